-- What the background jobs need: which blob is the longest unverified, which were deleted, and where a job stands.

-- The scrub takes the blob that was verified longest ago; those never verified come first, as SQLite sorts NULL.
CREATE INDEX idx_blobs_unverified ON blobs(verified_at) WHERE state = 'present';
CREATE INDEX idx_blobs_deleted ON blobs(deleted_at) WHERE state = 'deleted';

-- One row a job, by its name: how far it has come, in its own words, and when it last came to its end.
CREATE TABLE jobs (
    name TEXT NOT NULL PRIMARY KEY,
    cursor TEXT,
    finished_at TIMESTAMP
) WITHOUT ROWID;
