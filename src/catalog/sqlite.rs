//! All SQL, and how a connection is set up.

use std::{
    fs::{self, File, TryLockError},
    path::{Path, PathBuf},
    thread,
    time::{Duration, SystemTime},
};

use rusqlite::{
    Connection, ErrorCode, OpenFlags, OptionalExtension, Row, Transaction, TransactionBehavior,
    config::DbConfig, params,
};

use super::{
    Artifact, Identity, OpenError, Pace, Record, Recorded, RecordedBlob, Totals, hash_text, snapshots,
};
use crate::{
    artifact::{Digest, Version},
    error::Error,
    kill_point,
};

/// How long a statement waits for another process's lock before it fails.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// Access counts written in a few hundred microseconds.
const ACCESSES_AT_A_TIME: usize = 8;
/// SQLite's virtual machine does so many in some ten microseconds.
const OPERATIONS_AT_A_TIME: i32 = 100;
/// Numbered scripts; the database's `user_version` says how many it has seen.
const MIGRATIONS: [&str; 5] = [
    include_str!("../../migrations/sqlite/0001_initial.sql"),
    include_str!("../../migrations/sqlite/0002_jobs.sql"),
    include_str!("../../migrations/sqlite/0003_identity.sql"),
    include_str!("../../migrations/sqlite/0004_collect.sql"),
    include_str!("../../migrations/sqlite/0005_missing.sql"),
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

/// The network file system that a file or directory lies on, if it does. See statfs(2) for the numbers.
pub fn network_file_system(file: &File) -> Option<&'static str> {
    match rustix::fs::fstatfs(file).ok()?.f_type as u32 {
        0x6969 => Some("NFS"),
        0x517b | 0xff53_4d42 | 0xfe53_4d42 => Some("SMB"),
        _ => None,
    }
}

/// Opens the one connection that writes, and brings the schema up to date. Says whether it made the database.
pub(super) fn open(path: &Path) -> Result<(Connection, bool), OpenError> {
    let sqlite = |cause| refused(path, cause);
    let mut db = Connection::open_with_flags(
        path,
        OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE | OpenFlags::SQLITE_OPEN_NO_MUTEX,
    )
    .map_err(sqlite)?;
    set_up(&db).map_err(sqlite)?;
    let found = schema_version(&db, path)?;
    if found == 0 && !is_empty(&db).map_err(sqlite)? {
        return Err(OpenError::NotOurs { path: path.to_owned() });
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
    Ok((db, found == 0))
}

/// Nobody has made anything in it yet.
pub(super) fn is_empty(db: &Connection) -> rusqlite::Result<bool> {
    db.prepare("SELECT 1 FROM sqlite_schema")?.exists([]).map(|has_tables| !has_tables)
}

/// Why SQLite won't open it, with the newest snapshot where one can help.
pub(super) fn refused(path: &Path, cause: rusqlite::Error) -> OpenError {
    let path = path.to_owned();
    match cause.sqlite_error_code() {
        Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => {
            let snapshot = snapshots::list(&path).ok().and_then(|mut all| all.pop());
            OpenError::Damaged { path, cause, snapshot }
        }
        _ => OpenError::Sqlite { path, cause },
    }
}

/// How many of the migrations a database has seen, if they are all known here.
pub(super) fn schema_version(db: &Connection, path: &Path) -> Result<i64, OpenError> {
    let found: i64 =
        db.query_row("PRAGMA user_version", [], |row| row.get(0)).map_err(|cause| refused(path, cause))?;
    let known = known_schema();
    match found > known {
        true => Err(OpenError::Newer { path: path.to_owned(), found, known }),
        false => Ok(found),
    }
}

/// Whether a database is one of ours, of a version that can be used.
pub(super) fn check_schema(db: &Connection, path: &Path) -> Result<(), OpenError> {
    let has_blobs = || {
        let mut statement =
            db.prepare("SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = 'blobs'")?;
        statement.exists([])
    };
    let is_ours = schema_version(db, path)? > 0 && has_blobs().map_err(|cause| refused(path, cause))?;
    if is_ours { Ok(()) } else { Err(OpenError::NotOurs { path: path.to_owned() }) }
}

/// Opens a database that is there, without changing it. Its log is read, and emptied if nobody else has it open.
pub(super) fn open_existing(path: &Path) -> rusqlite::Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let db = Connection::open_with_flags(path, flags)?;
    set_up(&db)?;
    Ok(db)
}

/// Opens a connection for a command that changes what is there, beside a service that may be running.
pub(super) fn open_beside(path: &Path) -> Result<Connection, OpenError> {
    if !path.exists() {
        return Err(OpenError::Absent { path: path.to_owned() });
    }
    let db = open_existing(path).map_err(|cause| refused(path, cause))?;
    check_schema(&db, path)?;
    let (found, known) = (schema_version(&db, path)?, known_schema());
    match found < known {
        true => Err(OpenError::Older { path: path.to_owned(), found, known }),
        false => Ok(db),
    }
}

/// The newest schema that this program knows.
pub(super) fn known_schema() -> i64 {
    MIGRATIONS.len() as i64
}

/// Writes the whole database to a new file, in the state of one moment. With a `pace`, it asks that every few hundred
/// rows.
pub(super) fn vacuum_into(db: &mut Connection, to: &Path, pace: Option<Pace>) -> rusqlite::Result<()> {
    let to = to.to_str().ok_or_else(|| rusqlite::Error::InvalidPath(to.to_owned()))?;
    db.progress_handler(OPERATIONS_AT_A_TIME, pace)?;
    db.execute("VACUUM INTO ?1", [to]).map(drop)
}

/// Looks through a whole database; `None` if all is well.
pub(super) fn first_problem(db: &Connection) -> rusqlite::Result<Option<String>> {
    let said: String = db.query_row("PRAGMA integrity_check(1)", [], |row| row.get(0))?;
    Ok((said != "ok").then_some(said))
}

/// Makes a database one plain file again.
pub(super) fn leave_wal(db: &Connection) -> rusqlite::Result<()> {
    db.pragma_update(None, "journal_mode", "DELETE")
}

/// `None` for a schema from before databases had one.
pub(super) fn identity(db: &Connection) -> rusqlite::Result<Option<Identity>> {
    let known = "SELECT 1 FROM sqlite_schema WHERE name = 'identity'";
    if !db.prepare(known)?.exists([])? {
        return Ok(None);
    }
    db.query_row("SELECT database_id, starts FROM identity", [], |row| {
        Ok(Identity { database_id: row.get(0)?, starts: row.get::<_, i64>(1)?.max(0) as u64 })
    })
    .optional()
}

/// Counts one more start, on a connection of its own: the one that writes belongs to its thread by then.
pub(super) fn note_start(path: &Path) -> rusqlite::Result<Identity> {
    let db = open_existing(path)?;
    db.execute("UPDATE identity SET starts = starts + 1", [])?;
    identity(&db)?.ok_or(rusqlite::Error::QueryReturnedNoRows)
}

/// Writes something that changes nothing, through to the disk. There and back, because SQLite leaves a page alone that
/// would be the same.
pub(super) fn probe(db: &mut Connection) -> rusqlite::Result<()> {
    let tx = db.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
    tx.execute("UPDATE identity SET starts = starts + 1", [])?;
    tx.execute("UPDATE identity SET starts = starts - 1", [])?;
    tx.commit()
}

/// Calls `each` for every blob that is not deleted, by name, until it says no.
pub(super) fn for_each_blob(
    db: &Connection,
    mut each: impl FnMut(RecordedBlob) -> bool,
) -> rusqlite::Result<()> {
    let mut statement = db.prepare(
        "SELECT content_hash, file_size, EXISTS (SELECT 1 FROM artifacts AS a WHERE a.content_hash = b.content_hash)
         FROM blobs AS b WHERE state <> 'deleted' ORDER BY content_hash",
    )?;
    let mut rows = statement.query([])?;
    while let Some(row) = rows.next()? {
        let size = row.get::<_, i64>(1)?.max(0) as u64;
        if !each(RecordedBlob { digest: digest(row, 0)?, size, is_named: row.get(2)? }) {
            break;
        }
    }
    Ok(())
}

pub(super) fn names_blob(db: &Connection, digest: Digest) -> rusqlite::Result<bool> {
    db.prepare_cached("SELECT 1 FROM blobs WHERE content_hash = ?1 AND state <> 'deleted'")?
        .exists([hash_text(digest)])
}

/// See [`super::Detached::adapt`]. What was deleted and has a file all the same becomes unknown: counted, and adopted
/// when it is published again. What was missing and has one is there again, and the first that the scrub looks at.
pub(super) fn adapt(
    db: &mut Connection,
    lost: &[Digest],
    has_file: impl Fn(Digest, u64) -> bool,
) -> rusqlite::Result<()> {
    let tx = db.transaction()?;
    lost.iter().try_for_each(|digest| mark_lost(&tx, *digest))?;
    let cures = [
        ("deleted", "DELETE FROM blobs WHERE content_hash = ?1"),
        ("missing", "UPDATE blobs SET state = 'present', verified_at = NULL WHERE content_hash = ?1"),
    ];
    for (state, cure) in cures {
        let blobs: Vec<(Digest, u64)> = tx
            .prepare("SELECT content_hash, file_size FROM blobs WHERE state = ?1")?
            .query_map([state], |row| Ok((digest(row, 0)?, row.get::<_, i64>(1)?.max(0) as u64)))?
            .collect::<Result<_, _>>()?;
        for (digest, _) in blobs.into_iter().filter(|(digest, size)| has_file(*digest, *size)) {
            tx.execute(cure, [hash_text(digest)])?;
        }
    }
    tx.commit()
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
    // A plan that may depend on the values asked for, as with a partial index, is made anew for each of them: that took
    // longer than the query. No query here would gain from it.
    db.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true)?;
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

fn digest(row: &Row<'_>, column: usize) -> rusqlite::Result<Digest> {
    let hash: String = row.get(column)?;
    hash.parse().map_err(|_| {
        let cause = format!("content_hash {hash:?} is not a SHA-256").into();
        rusqlite::Error::FromSqlConversionFailure(column, rusqlite::types::Type::Text, cause)
    })
}

fn artifact(row: &Row<'_>) -> rusqlite::Result<Artifact> {
    let digest = digest(row, 1)?;
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
             published_at = CURRENT_TIMESTAMP, verified_at = CURRENT_TIMESTAMP, deleted_at = NULL,
             swept_at = NULL",
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

/// One that was swept is known no more: should its file be there, a crash has left it half published.
pub(super) fn knows_blob(db: &Connection, digest: Digest) -> rusqlite::Result<bool> {
    db.prepare_cached("SELECT 1 FROM blobs WHERE content_hash = ?1 AND swept_at IS NULL")?
        .exists([hash_text(digest)])
}

/// Adds what was counted in memory since the last time.
pub(super) fn add_accesses(db: &mut Connection, accesses: &[(i64, u64)]) -> rusqlite::Result<()> {
    let tx = db.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let mut statement = tx.prepare_cached(
        "UPDATE artifacts SET access_count = access_count + ?2, last_accessed_at = CURRENT_TIMESTAMP WHERE id = ?1",
    )?;
    for some in accesses.chunks(ACCESSES_AT_A_TIME) {
        for (id, count) in some {
            statement.execute(params![id, *count as i64])?;
        }
        // On a single processor, whoever waits for a hit comes first.
        thread::yield_now();
    }
    drop(statement);
    tx.commit()
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

/// The file's own structure is broken, or it is no database any more.
pub(super) fn is_corrupt(cause: &rusqlite::Error) -> bool {
    matches!(cause.sqlite_error_code(), Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase))
}

/// The disk has failed: what was written may be lost, although the page cache still shows it.
pub(super) fn is_io_failure(cause: &rusqlite::Error) -> bool {
    cause.sqlite_error_code() == Some(ErrorCode::SystemIoFailure)
}

/// What SQLite itself would say.
pub(super) fn failure(code: i32) -> rusqlite::Error {
    rusqlite::Error::SqliteFailure(rusqlite::ffi::Error::new(code), None)
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

fn from_unix(seconds: i64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds.max(0) as u64)
}

fn to_unix(time: SystemTime) -> i64 {
    time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs() as i64)
}
