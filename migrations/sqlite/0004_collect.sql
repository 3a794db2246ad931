-- What the sweep has done: when the file of a deleted blob went. A blob that is published again has neither time.
ALTER TABLE blobs ADD COLUMN swept_at TIMESTAMP;
DROP INDEX idx_blobs_deleted;
CREATE INDEX idx_blobs_unswept ON blobs(deleted_at) WHERE state = 'deleted' AND swept_at IS NULL;
