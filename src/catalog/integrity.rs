//! What is known of the blobs' own health: when each was last read and found whole, which are missing, and which
//! should be looked at next.
//!
//! `verified_at` is the cursor of the scrub, so that it goes on where it was after a restart. NULL means that somebody
//! asked for the blob to be looked at now.

use std::{path::Path, time::Duration};

use rusqlite::{Connection, ErrorCode, OptionalExtension, Row, TransactionBehavior, params};

use super::{OpenError, hash_text, sqlite};
use crate::{artifact::Digest, error::Error};

/// A blob as it is recorded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Blob {
    /// Its name.
    pub digest: Digest,
    /// Its length in bytes.
    pub size: u64,
    /// It was found missing or damaged, and not found whole since.
    pub is_missing: bool,
}

/// What came of looking at a blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Finding {
    /// It is what its name says.
    Whole,
    /// The same, although it was known to be missing.
    Found,
    /// It is not there, or was damaged and set aside.
    Lost,
    /// The same, and it was known to be missing.
    LostStill,
}

/// How long after a blob was found missing it is looked for again.
const MISSING_AGAIN: &str = "-1 day";

/// Each part of the union walks an index, so that the question costs nothing when nothing is due. A date from the
/// future is a clock's mistake, and must not keep a blob from being read for years.
const DUE: &str = "
    SELECT * FROM (SELECT content_hash, file_size, 0 FROM blobs
        WHERE state = 'present' AND verified_at IS NULL LIMIT ?3)
    UNION ALL SELECT * FROM (SELECT content_hash, file_size, 1 FROM blobs
        WHERE state = 'missing' AND verified_at IS NULL LIMIT ?3)
    UNION ALL SELECT * FROM (SELECT content_hash, file_size, 1 FROM blobs
        WHERE state = 'missing' AND verified_at <= datetime('now', ?2) ORDER BY verified_at LIMIT ?3)
    UNION ALL SELECT * FROM (SELECT content_hash, file_size, 0 FROM blobs
        WHERE state = 'present' AND verified_at <= datetime('now', ?1) ORDER BY verified_at LIMIT ?3)
    UNION ALL SELECT * FROM (SELECT content_hash, file_size, 0 FROM blobs
        WHERE state = 'present' AND ?1 IS NOT NULL AND verified_at > datetime('now', '+1 day') LIMIT ?3)
    LIMIT ?3";

/// The blobs to look at next: what was asked for, what is missing for another day, then what was verified longest ago,
/// if that is longer than `period`. With no period only what was asked for.
pub(super) fn due(db: &Connection, period: Option<Duration>, limit: usize) -> rusqlite::Result<Vec<Blob>> {
    let ago = period.map(|period| format!("-{} seconds", period.as_secs()));
    let missing_ago = period.map(|_| MISSING_AGAIN);
    db.prepare_cached(DUE)?
        .query_map(params![ago, missing_ago, limit as i64], blob)?
        .filter_map(Result::transpose)
        .collect()
}

/// `None` for a row that an operator has written by hand and that names no content.
fn blob(row: &Row<'_>) -> rusqlite::Result<Option<Blob>> {
    let (hash, size): (String, i64) = (row.get(0)?, row.get(1)?);
    let is_missing = row.get(2)?;
    Ok(hash.parse().ok().map(|digest| Blob { digest, size: size.max(0) as u64, is_missing }))
}

/// A blob's row, unless it was deleted or never recorded.
pub(super) fn find(db: &Connection, digest: Digest) -> rusqlite::Result<Option<Blob>> {
    db.prepare_cached(
        "SELECT content_hash, file_size, state = 'missing' FROM blobs WHERE content_hash = ?1 AND state <> 'deleted'",
    )?
    .query_row([hash_text(digest)], blob)
    .optional()
    .map(Option::flatten)
}

/// The URLs that have this content now, the last asked for first. A URL that has got another one since would only
/// give that.
pub(super) fn urls(db: &Connection, digest: Digest) -> rusqlite::Result<Vec<String>> {
    db.prepare_cached(
        "SELECT source_url FROM artifacts WHERE content_hash = ?1 ORDER BY last_accessed_at DESC",
    )?
    .query_map([hash_text(digest)], |row| row.get(0))?
    .collect()
}

/// When the blob that was verified longest ago was: Unix time in seconds.
pub(super) fn oldest_verified(db: &Connection) -> rusqlite::Result<Option<i64>> {
    db.prepare_cached(
        "SELECT unixepoch(coalesce(verified_at, published_at)) FROM blobs WHERE state = 'present'
         ORDER BY verified_at LIMIT 1",
    )?
    .query_row([], |row| row.get(0))
    .optional()
    .map(Option::flatten)
}

/// Blobs known to be missing that some URL should have.
pub(super) fn count_missing(db: &Connection) -> rusqlite::Result<u64> {
    db.prepare_cached(
        "SELECT count(*) FROM blobs AS b WHERE state = 'missing'
             AND EXISTS (SELECT 1 FROM artifacts AS a WHERE a.content_hash = b.content_hash)",
    )?
    .query_row([], |row| row.get::<_, i64>(0))
    .map(|count| count.max(0) as u64)
}

/// Notes what came of looking at these blobs, now. What has got another state meanwhile is left alone;
/// returns how many that leaves.
pub(super) fn note(db: &mut Connection, blobs: &[Digest], finding: Finding) -> rusqlite::Result<usize> {
    let sql = match finding {
        Finding::Whole => {
            "UPDATE blobs SET verified_at = CURRENT_TIMESTAMP WHERE content_hash = ?1 AND state = 'present'"
        }
        Finding::Found => {
            "UPDATE blobs SET state = 'present', verified_at = CURRENT_TIMESTAMP
             WHERE content_hash = ?1 AND state = 'missing'"
        }
        Finding::Lost => {
            "UPDATE blobs SET state = 'missing', verified_at = CURRENT_TIMESTAMP
             WHERE content_hash = ?1 AND state = 'present'"
        }
        Finding::LostStill => {
            "UPDATE blobs SET verified_at = CURRENT_TIMESTAMP WHERE content_hash = ?1 AND state = 'missing'"
        }
    };
    for_each(db, blobs, sql)
}

/// Executes a statement for each of these blobs, all in one transaction, and counts the rows that it changes.
fn for_each(db: &mut Connection, blobs: &[Digest], sql: &str) -> rusqlite::Result<usize> {
    let tx = db.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let mut statement = tx.prepare_cached(sql)?;
    let mut changed = 0;
    for digest in blobs {
        changed += statement.execute([hash_text(*digest)])?;
    }
    drop(statement);
    tx.commit().map(|()| changed)
}

/// The catalogue as `verify` reads it, beside a service that may be running. It takes no lock of its own.
#[derive(Debug)]
pub struct Inspection(Connection);

impl Inspection {
    /// Opens the database at `path`, which must be there and have the schema that this program knows.
    pub fn open(path: &Path) -> Result<Inspection, OpenError> {
        sqlite::open_beside(path).map(Inspection)
    }

    /// What SQLite finds wrong with the file itself; nothing when it is sound.
    pub fn damage(&self) -> Result<Vec<String>, Error> {
        let check = || {
            let mut statement = self.0.prepare("PRAGMA integrity_check")?;
            statement.query_map([], |row| row.get(0))?.collect::<rusqlite::Result<Vec<String>>>()
        };
        match check() {
            Ok(lines) if lines == ["ok"] => Ok(Vec::new()),
            Ok(lines) => Ok(lines),
            Err(cause) if is_damage(&cause) => Ok(vec![cause.to_string()]),
            Err(cause) => Err(read_failed(&cause)),
        }
    }

    /// Every blob that should be there, the longest unverified first. What only `artifacts` names is among them.
    pub fn blobs(&self) -> Result<Vec<Blob>, Error> {
        let read = || {
            let mut statement = self.0.prepare(
                "SELECT content_hash, file_size, state = 'missing', verified_at FROM blobs WHERE state <> 'deleted'
                 UNION
                 SELECT content_hash, file_size, 0, NULL FROM artifacts AS a
                     WHERE NOT EXISTS (SELECT 1 FROM blobs AS b WHERE b.content_hash = a.content_hash)
                 ORDER BY 4",
            )?;
            statement.query_map([], blob)?.filter_map(Result::transpose).collect::<rusqlite::Result<Vec<_>>>()
        };
        read().map_err(|cause| read_failed(&cause))
    }

    /// A blob's row as it is now, unless it was deleted meanwhile.
    pub fn find(&self, digest: Digest) -> Result<Option<Blob>, Error> {
        find(&self.0, digest).map_err(|cause| read_failed(&cause))
    }

    /// The URLs that have this content now.
    pub fn urls(&self, digest: Digest) -> Result<Vec<String>, Error> {
        urls(&self.0, digest).map_err(|cause| read_failed(&cause))
    }

    /// Whether a file with this digest may be in the store.
    pub fn knows_blob(&self, digest: Digest) -> Result<bool, Error> {
        sqlite::knows_blob(&self.0, digest).map_err(|cause| read_failed(&cause))
    }

    /// Notes that these blobs were read and found whole. What has been found missing since stays so.
    pub fn note_whole(&mut self, blobs: &[Digest]) -> Result<(), Error> {
        note(&mut self.0, blobs, Finding::Whole).map(drop).map_err(|cause| write_failed(&cause))
    }

    /// Notes that a blob that was known to be missing was just found whole.
    pub fn note_found(&mut self, blob: Digest) -> Result<(), Error> {
        note(&mut self.0, &[blob], Finding::Found).map(drop).map_err(|cause| write_failed(&cause))
    }

    /// Asks the running service to look at these blobs itself, and to mend what it finds.
    pub fn ask_for(&mut self, blobs: &[Digest]) -> Result<(), Error> {
        for_each(&mut self.0, blobs, "UPDATE blobs SET verified_at = NULL WHERE content_hash = ?1")
            .map(drop)
            .map_err(|cause| write_failed(&cause))
    }
}

fn is_damage(cause: &rusqlite::Error) -> bool {
    matches!(cause.sqlite_error_code(), Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase))
}

pub(super) fn read_failed(cause: &rusqlite::Error) -> Error {
    sqlite::error("Failed to read the catalogue", cause)
}

pub(super) fn write_failed(cause: &rusqlite::Error) -> Error {
    sqlite::error("Failed to write to the catalogue", cause)
}
