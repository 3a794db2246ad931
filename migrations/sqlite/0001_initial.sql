-- The catalogue: what each URL's content is, which contents it has had, and which blobs the store holds.
-- Timestamps are UTC, as SQLite's CURRENT_TIMESTAMP writes them ('YYYY-MM-DD HH:MM:SS').

CREATE TABLE artifacts (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    source_url TEXT NOT NULL UNIQUE,
    content_hash TEXT NOT NULL,
    -- Relative to storage.base_path; generated, so that it can never disagree with the hash.
    storage_path TEXT NOT NULL GENERATED ALWAYS AS
        (substr(content_hash, 1, 2) || '/' || substr(content_hash, 3, 2) || '/' || content_hash) VIRTUAL,
    file_size INTEGER NOT NULL,
    content_type TEXT,
    first_cached_at TIMESTAMP DEFAULT CURRENT_TIMESTAMP,
    last_accessed_at TIMESTAMP DEFAULT CURRENT_TIMESTAMP,
    access_count INTEGER DEFAULT 0
);
CREATE INDEX idx_content_hash ON artifacts(content_hash);
CREATE INDEX idx_last_accessed ON artifacts(last_accessed_at);

-- Every content a URL has had. The one in force is the one whose hash artifacts names.
CREATE TABLE versions (
    id INTEGER PRIMARY KEY,
    source_url TEXT NOT NULL,
    content_hash TEXT NOT NULL,
    file_size INTEGER NOT NULL,
    content_type TEXT,
    content_encoding TEXT,
    file_name TEXT,
    etag TEXT,
    last_modified TIMESTAMP,
    first_seen_at TIMESTAMP NOT NULL DEFAULT CURRENT_TIMESTAMP,
    last_seen_at TIMESTAMP NOT NULL DEFAULT CURRENT_TIMESTAMP,
    UNIQUE (source_url, content_hash)
);
CREATE INDEX idx_versions_content_hash ON versions(content_hash);

-- Every file the store was given. Rows are never removed: a deleted blob keeps its row, with the time. 'missing' is what
-- was found gone or damaged, until it is fetched again.
CREATE TABLE blobs (
    content_hash TEXT NOT NULL PRIMARY KEY,
    file_size INTEGER NOT NULL,
    state TEXT NOT NULL DEFAULT 'present' CHECK (state IN ('present', 'missing', 'deleted')),
    published_at TIMESTAMP NOT NULL DEFAULT CURRENT_TIMESTAMP,
    verified_at TIMESTAMP,
    deleted_at TIMESTAMP
) WITHOUT ROWID;

-- One row of sums, kept by triggers so that it is right whoever changes the tables, an operator's sqlite3 included.
CREATE TABLE totals (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    items INTEGER NOT NULL DEFAULT 0,
    size_bytes INTEGER NOT NULL DEFAULT 0,
    accesses INTEGER NOT NULL DEFAULT 0,
    blobs INTEGER NOT NULL DEFAULT 0,
    stored_bytes INTEGER NOT NULL DEFAULT 0
);
INSERT INTO totals (id) VALUES (1);

CREATE TRIGGER totals_artifact_added AFTER INSERT ON artifacts BEGIN
    UPDATE totals SET items = items + 1, size_bytes = size_bytes + new.file_size,
        accesses = accesses + new.access_count;
END;
CREATE TRIGGER totals_artifact_removed AFTER DELETE ON artifacts BEGIN
    UPDATE totals SET items = items - 1, size_bytes = size_bytes - old.file_size,
        accesses = accesses - old.access_count;
END;
CREATE TRIGGER totals_artifact_changed AFTER UPDATE OF file_size, access_count ON artifacts BEGIN
    UPDATE totals SET size_bytes = size_bytes + new.file_size - old.file_size,
        accesses = accesses + new.access_count - old.access_count;
END;
CREATE TRIGGER totals_blob_added AFTER INSERT ON blobs WHEN new.state = 'present' BEGIN
    UPDATE totals SET blobs = blobs + 1, stored_bytes = stored_bytes + new.file_size;
END;
CREATE TRIGGER totals_blob_removed AFTER DELETE ON blobs WHEN old.state = 'present' BEGIN
    UPDATE totals SET blobs = blobs - 1, stored_bytes = stored_bytes - old.file_size;
END;
CREATE TRIGGER totals_blob_changed AFTER UPDATE OF state, file_size ON blobs BEGIN
    UPDATE totals SET
        blobs = blobs + (new.state = 'present') - (old.state = 'present'),
        stored_bytes = stored_bytes + iif(new.state = 'present', new.file_size, 0)
            - iif(old.state = 'present', old.file_size, 0);
END;
