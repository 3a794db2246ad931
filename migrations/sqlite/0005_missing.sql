-- What is known to be missing is counted at each scrape and tried again every day.
CREATE INDEX idx_blobs_missing ON blobs(verified_at) WHERE state = 'missing';
