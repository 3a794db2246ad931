//! All SQL, and how a connection is set up.

use std::{
    fs::{self, File, TryLockError},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use rusqlite::{
    Connection, ErrorCode, OpenFlags, OptionalExtension, Row, Transaction, config::DbConfig, ffi, params,
};

use super::{Artifact, OpenError, Record, Recorded, Totals, hash_text};
use crate::{
    artifact::{Digest, Version},
    error::Error,
    kill_point,
};

/// How long a statement waits for another process's lock before it fails.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// Numbered scripts; the database's `user_version` says how many it has seen.
const MIGRATIONS: [&str; 2] = [
    include_str!("../../migrations/sqlite/0001_initial.sql"),
    include_str!("../../migrations/sqlite/0002_jobs.sql"),
];

/// Takes the lock that keeps a second process away from this database.
///
/// On a file of its own: closing any descriptor of the database itself would drop the locks that SQLite holds on it.
pub(super) fn lock(database: &Path) -> Result<File, OpenError> {
    let path = PathBuf::from(format!("{}.lock", database.display()));
    let io = |cause| OpenError::Io { path: path.clone(), cause };
    if let Some(parent) = database.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        fs::create_dir_all(parent).map_err(|cause| OpenError::Io { path: parent.to_owned(), cause })?;
    }
    let file = File::options().create(true).truncate(false).write(true).open(&path).map_err(io)?;
    if let Some(kind) = network_file_system(&file) {
        return Err(OpenError::Network { path: database.to_owned(), kind });
    }
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(OpenError::Locked { path: database.to_owned() }),
        Err(TryLockError::Error(cause)) => Err(io(cause)),
    }
}

/// See statfs(2) for the numbers.
fn network_file_system(file: &File) -> Option<&'static str> {
    match rustix::fs::fstatfs(file).ok()?.f_type as u32 {
        0x6969 => Some("NFS"),
        0x517b | 0xff53_4d42 | 0xfe53_4d42 => Some("SMB"),
        _ => None,
    }
}

/// Opens the one connection that writes, and brings the schema up to date.
pub(super) fn open(path: &Path) -> Result<Connection, OpenError> {
    let sqlite = |cause| OpenError::Sqlite { path: path.to_owned(), cause };
    let mut db = Connection::open_with_flags(
        path,
        OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE | OpenFlags::SQLITE_OPEN_NO_MUTEX,
    )
    .map_err(sqlite)?;
    set_up(&db).map_err(sqlite)?;
    let found: i64 = db.query_row("PRAGMA user_version", [], |row| row.get(0)).map_err(sqlite)?;
    let known = MIGRATIONS.len() as i64;
    if found > known {
        return Err(OpenError::Newer { path: path.to_owned(), found, known });
    }
    db.pragma_update(None, "journal_mode", "WAL").map_err(sqlite)?;
    for (number, script) in (1i64..).zip(MIGRATIONS).skip(found.max(0) as usize) {
        let step = db.transaction().map_err(sqlite)?;
        step.execute_batch(script).map_err(sqlite)?;
        kill_point::pass("migrate.executed");
        step.pragma_update(None, "user_version", number).map_err(sqlite)?;
        step.commit().map_err(sqlite)?;
        kill_point::pass("migrate.committed");
    }
    Ok(db)
}

/// Opens a connection that only reads.
pub(super) fn open_reader(path: &Path) -> Result<Connection, OpenError> {
    let sqlite = |cause| OpenError::Sqlite { path: path.to_owned(), cause };
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let db = Connection::open_with_flags(path, flags).map_err(sqlite)?;
    set_up(&db).map_err(sqlite)?;
    Ok(db)
}

fn set_up(db: &Connection) -> rusqlite::Result<()> {
    db.busy_timeout(BUSY_TIMEOUT)?;
    // FULL, because with NORMAL a power cut takes back transactions that were already acknowledged.
    db.pragma_update(None, "synchronous", "FULL")?;
    // No temporary files: the only writable place may be the data directory.
    db.pragma_update(None, "temp_store", "MEMORY")?;
    db.pragma_update(None, "foreign_keys", true)?;
    // The writer checkpoints by itself when writes have ended; this bounds the WAL under steady load.
    db.pragma_update(None, "wal_autocheckpoint", 4000)?;
    Ok(())
}

const FIND: &str = "
    SELECT a.id, a.content_hash, a.file_size, a.content_type, v.content_encoding, v.file_name, v.etag,
           unixepoch(v.last_modified), unixepoch(coalesce(v.last_seen_at, a.first_cached_at))
    FROM artifacts AS a
    LEFT JOIN versions AS v ON v.source_url = a.source_url AND v.content_hash = a.content_hash
    WHERE a.source_url = ?1";

pub(super) fn find(db: &Connection, source_url: &str) -> rusqlite::Result<Option<Artifact>> {
    db.prepare_cached(FIND)?.query_row([source_url], artifact).optional()
}

fn artifact(row: &Row<'_>) -> rusqlite::Result<Artifact> {
    let hash: String = row.get(1)?;
    let digest = hash.parse().map_err(|_| {
        let cause = format!("content_hash {hash:?} is not a SHA-256").into();
        rusqlite::Error::FromSqlConversionFailure(1, rusqlite::types::Type::Text, cause)
    })?;
    Ok(Artifact {
        id: row.get(0)?,
        version: Version {
            digest,
            size: row.get::<_, i64>(2)?.max(0) as u64,
            content_type: row.get(3)?,
            content_encoding: row.get(4)?,
            file_name: row.get(5)?,
            etag: row.get(6)?,
            last_modified: row.get::<_, Option<i64>>(7)?.map(from_unix),
            fetched: row.get::<_, Option<i64>>(8)?.map_or(SystemTime::UNIX_EPOCH, from_unix),
        },
    })
}

pub(super) fn totals(db: &Connection) -> rusqlite::Result<Totals> {
    db.prepare_cached("SELECT items, size_bytes, accesses, blobs, stored_bytes FROM totals")?.query_row(
        [],
        |row| {
            let sum = |column| row.get::<_, i64>(column).map(|value| value.max(0) as u64);
            Ok(Totals {
                items: sum(0)?,
                size_bytes: sum(1)?,
                accesses: sum(2)?,
                blobs: sum(3)?,
                stored_bytes: sum(4)?,
            })
        },
    )
}

/// Writes blob, version and artifact; the triggers keep the totals.
pub(super) fn record(tx: &Transaction<'_>, record: &Record) -> rusqlite::Result<Recorded> {
    let Record { source_url, version } = record;
    let hash = hash_text(version.digest);
    let size = version.size as i64;
    let is_new_blob = !knows_blob(tx, version.digest)?;
    tx.prepare_cached(
        "INSERT INTO blobs (content_hash, file_size, verified_at) VALUES (?1, ?2, CURRENT_TIMESTAMP)
         ON CONFLICT (content_hash) DO UPDATE SET file_size = excluded.file_size, state = 'present',
             published_at = CURRENT_TIMESTAMP, verified_at = CURRENT_TIMESTAMP, deleted_at = NULL",
    )?
    .execute(params![hash, size])?;
    tx.prepare_cached(
        "INSERT INTO versions (source_url, content_hash, file_size, content_type, content_encoding, file_name, etag,
             last_modified)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, datetime(?8, 'unixepoch'))
         ON CONFLICT (source_url, content_hash) DO UPDATE SET content_type = excluded.content_type,
             content_encoding = excluded.content_encoding, file_name = excluded.file_name, etag = excluded.etag,
             last_modified = excluded.last_modified, last_seen_at = CURRENT_TIMESTAMP",
    )?
    .execute(params![
        source_url,
        hash,
        size,
        version.content_type,
        version.content_encoding,
        version.file_name,
        version.etag,
        version.last_modified.map(to_unix),
    ])?;
    tx.prepare_cached(
        "INSERT INTO artifacts (source_url, content_hash, file_size, content_type) VALUES (?1, ?2, ?3, ?4)
         ON CONFLICT (source_url) DO UPDATE SET content_hash = excluded.content_hash,
             file_size = excluded.file_size, content_type = excluded.content_type",
    )?
    .execute(params![source_url, hash, size, version.content_type])?;
    // Read back, because an artifact that was known keeps its row and its first_cached_at.
    let artifact = tx.prepare_cached(FIND)?.query_row([source_url], artifact)?;
    Ok(Recorded { artifact, is_new_blob })
}

pub(super) fn knows_blob(db: &Connection, digest: Digest) -> rusqlite::Result<bool> {
    db.prepare_cached("SELECT 1 FROM blobs WHERE content_hash = ?1")?.exists([hash_text(digest)])
}

/// Adds what was counted in memory since the last time.
pub(super) fn add_accesses(
    tx: &Transaction<'_>,
    accesses: impl Iterator<Item = (i64, u64)>,
) -> rusqlite::Result<()> {
    let mut statement = tx.prepare_cached(
        "UPDATE artifacts SET access_count = access_count + ?2, last_accessed_at = CURRENT_TIMESTAMP WHERE id = ?1",
    )?;
    for (id, count) in accesses {
        statement.execute(params![id, count as i64])?;
    }
    Ok(())
}

/// Changes when another connection has changed the database, and only then.
pub(super) fn data_version(db: &Connection) -> rusqlite::Result<i64> {
    db.prepare_cached("PRAGMA data_version")?.query_row([], |row| row.get(0))
}

/// Moves the WAL's content into the database and empties it. Says whether that is done: a reader may hold it back, and
/// is not waited for.
pub(super) fn checkpoint(db: &Connection) -> rusqlite::Result<bool> {
    db.busy_timeout(Duration::ZERO)?;
    let done = db.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| row.get::<_, i64>(0));
    db.busy_timeout(BUSY_TIMEOUT)?;
    done.map(|busy| busy == 0)
}

/// Notes that a blob is not where it should be.
pub(super) fn mark_lost(db: &Connection, digest: Digest) -> rusqlite::Result<()> {
    db.prepare_cached("UPDATE blobs SET state = 'missing' WHERE content_hash = ?1 AND state = 'present'")?
        .execute([hash_text(digest)])
        .map(drop)
}

/// Means that no write can succeed until an operator has done something.
pub(super) fn is_unwritable(cause: &rusqlite::Error) -> bool {
    use ErrorCode::{CannotOpen, DatabaseCorrupt, DiskFull, NotADatabase, ReadOnly, SystemIoFailure};
    cause.sqlite_error_code().is_some_and(|code| {
        matches!(code, ReadOnly | DiskFull | SystemIoFailure | CannotOpen | DatabaseCorrupt | NotADatabase)
    })
}

/// The system would not say that what was written is on the disk.
pub(super) fn is_failed_sync(cause: &rusqlite::Error) -> bool {
    let rusqlite::Error::SqliteFailure(failure, _) = cause else { return false };
    matches!(failure.extended_code, ffi::SQLITE_IOERR_FSYNC | ffi::SQLITE_IOERR_DIR_FSYNC)
}

/// Makes a connection refuse every change, its own checkpoint when it is closed among them.
pub(super) fn seal(db: &Connection) -> rusqlite::Result<()> {
    db.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
    db.pragma_update(None, "query_only", true)
}

/// What a client is told of a failed statement.
pub(super) fn error(message: &'static str, cause: &rusqlite::Error) -> Error {
    let (details, retry_after) = match cause.sqlite_error_code() {
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => {
            ("database busy", Some(Duration::from_secs(5)))
        }
        Some(ErrorCode::DiskFull) => ("disk full", None),
        Some(ErrorCode::ReadOnly) => ("database read-only", None),
        Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => ("database corrupt", None),
        Some(ErrorCode::SystemIoFailure | ErrorCode::CannotOpen) => ("database I/O error", None),
        _ => ("database error", None),
    };
    Error::Internal { message, details: details.to_owned(), retry_after }
}

/// What a client is told when nothing may be written.
pub(super) fn read_only() -> Error {
    let (message, details) = ("Failed to write to the catalogue", "database read-only".to_owned());
    Error::Internal { message, details, retry_after: None }
}

fn from_unix(seconds: i64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds.max(0) as u64)
}

fn to_unix(time: SystemTime) -> i64 {
    time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs() as i64)
}
