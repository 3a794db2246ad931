//! Deleting: what an operator's command does to the rows, and what the sweep reads and notes.
//!
//! The order mirrors publishing. The row goes first, and in the same transaction its blob is marked as deleted, if no
//! other row names it; the file goes later, and only if the blob is still marked then. Recording a content again takes
//! the mark back.

use std::{
    path::Path,
    time::{Duration, SystemTime},
};

use rusqlite::{Connection, OptionalExtension, Transaction, TransactionBehavior, params};

use super::{OpenError, Totals, hash_text, sqlite};
use crate::{artifact::Digest, error::Error, kill_point};

/// A blob that is recorded as deleted and whose file may still be there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Deleted {
    /// Which.
    pub digest: Digest,
    /// When that was, in seconds of Unix time. By some clock, so it decides nothing but whether it is still the same
    /// deletion, and never that something may go.
    at: i64,
}

impl Deleted {
    /// When it was deleted, by the clock of then.
    pub fn at(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(self.at.max(0) as u64)
    }
}

/// A row that was removed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Removed {
    /// The SHA-256 of the content that it named, as it was written there.
    pub sha256: String,
    /// Bytes of that content.
    pub size: u64,
    /// The content was marked as deleted; otherwise other rows still name it.
    pub is_blob_deleted: bool,
}

/// The catalogue as an operator's command changes it, beside a service that may be running.
///
/// It takes no lock: SQLite orders what it does and what the service does.
#[derive(Debug)]
pub struct Editor(Connection);

impl Editor {
    /// Opens the database at `path`, which must be there and have the schema that this program knows.
    pub fn open(path: &Path) -> Result<Editor, OpenError> {
        sqlite::open_beside(path).map(Editor)
    }

    /// Removes a URL's row, and marks its content as deleted unless another row names it. Durable when this returns;
    /// `None` if there is no such row.
    pub fn delete(&mut self, source_url: &str) -> Result<Option<Removed>, Error> {
        let removed = self.write(|tx| {
            let removed = delete(tx, source_url)?;
            kill_point::pass("delete.row_removed");
            Ok(removed)
        })?;
        kill_point::pass("delete.committed");
        Ok(removed)
    }

    /// Which of these blobs, given with their sizes in bytes, no row knows.
    pub fn unknown(&self, blobs: Vec<(Digest, u64)>) -> Result<Vec<(Digest, u64)>, Error> {
        let known = |digest| {
            sqlite::knows_blob(&self.0, digest)
                .map_err(|cause| sqlite::error("Failed to read the catalogue", &cause))
        };
        blobs
            .into_iter()
            .filter_map(|blob| known(blob.0).map(|known| (!known).then_some(blob)).transpose())
            .collect()
    }

    /// Records blobs that no row knows as deleted, so that the sweep takes them like any other. One that has become
    /// known meanwhile is left alone. Returns how many were recorded.
    pub fn delete_unknown(&mut self, blobs: &[(Digest, u64)]) -> Result<usize, Error> {
        self.write(|tx| {
            let mut insert = tx.prepare_cached(
                "INSERT INTO blobs (content_hash, file_size, state, deleted_at)
                 VALUES (?1, ?2, 'deleted', CURRENT_TIMESTAMP)
                 ON CONFLICT (content_hash) DO UPDATE SET file_size = excluded.file_size,
                     deleted_at = CURRENT_TIMESTAMP, swept_at = NULL WHERE swept_at IS NOT NULL",
            )?;
            blobs.iter().try_fold(0, |count, (digest, size)| {
                Ok(count + insert.execute(params![hash_text(*digest), *size as i64])?)
            })
        })
    }

    /// The sums over everything.
    pub fn totals(&self) -> Result<Totals, Error> {
        sqlite::totals(&self.0).map_err(|cause| sqlite::error("Failed to read the catalogue", &cause))
    }

    fn write<T>(&mut self, work: impl FnOnce(&Transaction<'_>) -> rusqlite::Result<T>) -> Result<T, Error> {
        (|| {
            let tx = self.0.transaction_with_behavior(TransactionBehavior::Immediate)?;
            let done = work(&tx)?;
            tx.commit()?;
            Ok(done)
        })()
        .map_err(|cause: rusqlite::Error| sqlite::error("Failed to write to the catalogue", &cause))
    }
}

fn delete(tx: &Transaction<'_>, source_url: &str) -> rusqlite::Result<Option<Removed>> {
    let removed = tx
        .query_row(
            "DELETE FROM artifacts WHERE source_url = ?1 RETURNING content_hash, file_size",
            [source_url],
            |row| Ok((row.get::<_, String>(0)?, row.get::<_, i64>(1)?)),
        )
        .optional()?;
    let Some((sha256, size)) = removed else { return Ok(None) };
    let marked = tx.execute(
        "UPDATE blobs SET state = 'deleted', deleted_at = CURRENT_TIMESTAMP, swept_at = NULL
         WHERE content_hash = ?1 AND state <> 'deleted'
             AND NOT EXISTS (SELECT 1 FROM artifacts WHERE content_hash = ?1)",
        [&sha256],
    )?;
    Ok(Some(Removed { sha256, size: size.max(0) as u64, is_blob_deleted: marked > 0 }))
}

/// What the sweep has not taken yet, the longest deleted first.
pub(super) fn unswept(db: &Connection, limit: usize) -> rusqlite::Result<Vec<Deleted>> {
    db.prepare_cached(
        "SELECT content_hash, unixepoch(deleted_at) FROM blobs
         WHERE state = 'deleted' AND swept_at IS NULL ORDER BY deleted_at LIMIT ?1",
    )?
    .query_map([limit as i64], |row| Ok((row.get::<_, String>(0)?, row.get::<_, Option<i64>>(1)?)))?
    // What an operator has written by hand and is neither a hash nor a time is not for the sweep to judge.
    .filter_map(|row| match row {
        Ok((hash, at)) => Some(Ok(Deleted { digest: hash.parse().ok()?, at: at? })),
        Err(cause) => Some(Err(cause)),
    })
    .collect()
}

/// Whether a blob is deleted by that same deletion, and no artifact names it.
pub(super) fn is_deleted(db: &Connection, blob: &Deleted) -> rusqlite::Result<bool> {
    db.prepare_cached(
        "SELECT 1 FROM blobs WHERE content_hash = ?1 AND state = 'deleted' AND unixepoch(deleted_at) = ?2
             AND NOT EXISTS (SELECT 1 FROM artifacts WHERE content_hash = ?1)",
    )?
    .exists(params![hash_text(blob.digest), blob.at])
}

/// Notes that the files of these deletions are gone for good.
pub(super) fn mark_swept(db: &mut Connection, blobs: &[Deleted]) -> rusqlite::Result<()> {
    let tx = db.transaction_with_behavior(TransactionBehavior::Immediate)?;
    {
        let mut update = tx.prepare_cached(
            "UPDATE blobs SET swept_at = CURRENT_TIMESTAMP
             WHERE content_hash = ?1 AND state = 'deleted' AND unixepoch(deleted_at) = ?2",
        )?;
        for blob in blobs {
            update.execute(params![hash_text(blob.digest), blob.at])?;
        }
    }
    tx.commit()
}

#[cfg(test)]
mod tests {
    use std::{
        path::PathBuf,
        sync::{
            atomic::Ordering,
            mpsc::{Sender, channel},
        },
    };

    use super::*;
    use crate::{
        artifact::Version,
        catalog::{Catalog, Record, Status},
    };

    /// Tells when it is dropped whether the row can be read by then.
    struct Claim(PathBuf, Sender<bool>);

    impl Drop for Claim {
        fn drop(&mut self) {
            let db = sqlite::open_reader(&self.0).unwrap();
            self.1.send(sqlite::find(&db, "http://h/x").unwrap().is_some()).unwrap();
        }
    }

    /// What a failed write has left may be found when the database is opened again; a full disk leaves nothing.
    #[test]
    fn a_failing_disk_holds_the_sweep_off_and_a_full_one_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metadata.db");
        let catalog = Catalog::open(&path, 1).unwrap();
        let digest = "ab".repeat(32).parse().unwrap();
        Editor::open(&path).unwrap().delete_unknown(&[(digest, 1)]).unwrap();
        let deleted = catalog.unswept(10).unwrap();
        assert_eq!(deleted.len(), 1);
        assert!(catalog.is_deleted(&deleted[0]).unwrap());
        let Status { read_only, doubtful, corrupt, .. } = &*catalog.status;
        read_only.store(true, Ordering::Relaxed);
        assert!(catalog.is_deleted(&deleted[0]).unwrap(), "the sweep may be what makes room");
        for reason in [doubtful, corrupt] {
            reason.store(true, Ordering::Relaxed);
            assert!(!catalog.is_deleted(&deleted[0]).unwrap());
            reason.store(false, Ordering::Relaxed);
        }
    }

    /// Between a file and its row only the claim keeps the sweep away.
    #[tokio::test]
    async fn a_claim_is_held_until_the_row_is_there_even_if_nobody_waits() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metadata.db");
        let catalog = Catalog::open(&path, 1).unwrap();
        let version = Version {
            digest: "ab".repeat(32).parse().unwrap(),
            size: 1,
            content_type: None,
            content_encoding: None,
            file_name: None,
            etag: None,
            last_modified: None,
            fetched: SystemTime::now(),
        };
        let (told, heard) = channel();
        let recording =
            catalog.record(Record { source_url: "http://h/x".into(), version }, Claim(path, told));
        // Asked once, so that it is on its way, and then given up.
        let given_up = tokio::time::timeout(Duration::ZERO, recording).await;
        drop(given_up);
        assert!(heard.recv_timeout(Duration::from_secs(30)).unwrap(), "the row was there first");
    }
}
