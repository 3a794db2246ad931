-- Which database this is, so that a store can tell a wrong, a new or an old one from the one that last recorded it: the
-- store keeps a copy of both values. `starts` counts the starts of the service on it.
CREATE TABLE identity (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    database_id TEXT NOT NULL,
    starts INTEGER NOT NULL DEFAULT 0
);
INSERT INTO identity (id, database_id) VALUES (1, lower(hex(randomblob(16))));
