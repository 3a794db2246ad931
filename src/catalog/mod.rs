//! What we know: which content each URL has, which contents it has had, which blobs the store holds, and the sums.
//!
//! The catalogue is the truth about what was acknowledged. Its contract:
//! - [`Catalog::record`] MUST be durable before it returns: what a client was told is stored survives a power cut.
//! - A row MUST NOT be written for bytes that are not yet published and durable; callers publish first.
//! - The totals MUST equal what counting would give, whoever changed the tables.
//! - An operator's change with `sqlite3` MUST be seen within a second ([`Catalog::generation`]).
//!
//! Reads run on the calling thread (about 4 µs; handing them to another thread costs ten times that). All writes go
//! through one thread that puts everything waiting into one transaction.

mod deletion;
mod detached;
mod examine;
mod integrity;
pub mod snapshots;
mod sqlite;
mod writer;

use std::{
    io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use rusqlite::Connection;

use crate::{
    artifact::{Digest, Version},
    error::{Error, PathKind, cure_for_path},
};
pub use deletion::{Deleted, Editor, Removed};
pub use detached::{CopyError, Detached, Pace, RecordedBlob};
pub use examine::{Examined, examine};
use integrity::Finding;
pub use integrity::{Blob, Inspection};
pub use sqlite::network_file_system;
use writer::Writer;

/// One content of one URL, published and durable, to be recorded.
#[derive(Debug, Clone)]
pub struct Record {
    /// The URL's canonical form.
    pub source_url: Arc<str>,
    /// What it has there.
    pub version: Version,
}

/// A URL's current content, as recorded.
#[derive(Debug, Clone)]
pub struct Artifact {
    /// Its row.
    pub id: i64,
    /// Its content.
    pub version: Version,
}

/// What recording came to.
#[derive(Debug, Clone)]
pub struct Recorded {
    /// The URL's row.
    pub artifact: Artifact,
    /// The blob was not known before.
    pub is_new_blob: bool,
}

/// The sums over everything, as `/api/stats` tells them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    /// Artifacts (URLs) known.
    pub items: u64,
    /// Bytes of all artifacts, each counted.
    pub size_bytes: u64,
    /// Bodies served, of all artifacts.
    pub accesses: u64,
    /// Distinct contents held.
    pub blobs: u64,
    /// Bytes of the distinct contents.
    pub stored_bytes: u64,
}

/// Why a catalogue can't be opened; the text names the file and the cure.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// SQLite refuses.
    #[error("can't open the database {path}: {cause}{}", cure_for_path(path, PathKind::File, None))]
    Sqlite {
        /// `storage.database`.
        path: PathBuf,
        /// What SQLite says.
        cause: rusqlite::Error,
    },
    /// The directory or the lock file can't be made.
    #[error("can't open the database {path}: {cause}{}", cure_for_path(path, PathKind::File, Some(cause.kind())))]
    Io {
        /// `storage.database`, or the lock beside it.
        path: PathBuf,
        /// What the system says.
        cause: io::Error,
    },
    /// It is no database, or its structure is broken.
    #[error(
        "the database {path} is damaged: {cause}; nothing was changed. Put a good one in its place: {}",
        cure(snapshot.as_deref())
    )]
    Damaged {
        /// `storage.database`.
        path: PathBuf,
        /// What SQLite says.
        cause: rusqlite::Error,
        /// The newest snapshot beside it.
        snapshot: Option<PathBuf>,
    },
    /// It is somebody else's.
    #[error(
        "{path} is another program's database, not one of artifact-cache; it was left alone: check storage.database"
    )]
    NotOurs {
        /// The file.
        path: PathBuf,
    },
    /// It was written by a newer version of this program.
    #[error(
        "the database {path} has schema {found}, this program knows {known}: it was written by a newer version; \
         run that one, or put an older one in its place with `artifact-cache restore --snapshot FILE` or \
         `artifact-cache restore DIR`"
    )]
    Newer {
        /// `storage.database`.
        path: PathBuf,
        /// Its `user_version`.
        found: i64,
        /// The newest this program knows.
        known: i64,
    },
    /// A command needs one that is there.
    #[error("there is no database {path}: is storage.database the right one?")]
    Absent {
        /// `storage.database`.
        path: PathBuf,
    },
    /// A command can't work on what an earlier version left.
    #[error(
        "the database {path} has schema {found}, this program wants {known}: start the service once, which brings it \
         up to date"
    )]
    Older {
        /// `storage.database`.
        path: PathBuf,
        /// Its `user_version`.
        found: i64,
        /// The newest this program knows.
        known: i64,
    },
    /// Another process has it.
    #[error("the database {path} is in use by another artifact-cache; stop that one first")]
    Locked {
        /// `storage.database`.
        path: PathBuf,
    },
    /// SQLite's locks can't be trusted there.
    #[error(
        "the database {path} is on a network file system ({kind}), where SQLite's locks are not safe and the archive \
         could be lost; put storage.database on a local disk"
    )]
    Network {
        /// `storage.database`.
        path: PathBuf,
        /// NFS, SMB …
        kind: &'static str,
    },
}

fn cure(snapshot: Option<&Path>) -> String {
    match snapshot {
        Some(newest) => format!(
            "`artifact-cache restore --snapshot` takes the newest snapshot, {}; the damaged one is kept",
            newest.display()
        ),
        None => "`artifact-cache restore DIR` takes a backup; there is no snapshot beside it".to_owned(),
    }
}

/// Which database this is, and how often the service was started on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Made up when the database was.
    pub database_id: String,
    /// Starts of the service on it.
    pub starts: u64,
}

/// As a store notes it.
impl std::fmt::Display for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.database_id, self.starts)
    }
}

/// Keeps the service, or whoever has it, alone with the database.
#[derive(Debug)]
pub struct Lock {
    _file: std::fs::File,
}

impl Lock {
    /// Locks the database at `path`, which need not be there; fails when the service runs.
    pub fn take(path: &Path) -> Result<Lock, OpenError> {
        sqlite::lock(path).map(|file| Lock { _file: file })
    }
}

/// The catalogue. Share it in an `Arc`; every method may be called from any thread.
pub struct Catalog {
    readers: Vec<Mutex<Connection>>,
    next_reader: AtomicUsize,
    writer: Writer,
    status: Arc<Status>,
    path: PathBuf,
    identity: Identity,
    is_new: bool,
    _lock: Lock,
}

/// What the writer thread tells everyone.
#[derive(Default)]
pub(crate) struct Status {
    generation: AtomicU64,
    read_only: AtomicBool,
    /// Stands until the process ends: what is written into a broken file may break more of it.
    corrupt: AtomicBool,
    /// The disk has failed on a write or a sync, so what the page cache shows of the log may not be on it.
    doubtful: AtomicBool,
}

impl Status {
    /// Keeps in mind that the database is broken, if that is what the error says.
    fn note(&self, cause: &rusqlite::Error) {
        if sqlite::is_corrupt(cause) && !self.corrupt.swap(true, Ordering::Relaxed) {
            tracing::error!(
                error = %cause,
                "the database is damaged: nothing is written to it any more; stop the service and put a good one in \
                 its place: artifact-cache restore --snapshot"
            );
        }
    }
}

impl Catalog {
    /// Opens, locks and migrates the database at `path`, making it and its directory when they are not there.
    ///
    /// `readers` is how many threads may look things up at once without waiting.
    pub fn open(path: &Path, readers: usize) -> Result<Catalog, OpenError> {
        let lock = Lock::take(path)?;
        let (writing, is_new) = sqlite::open(path)?;
        let sqlite = |cause| OpenError::Sqlite { path: path.to_owned(), cause };
        let identity = sqlite::identity(&writing)
            .map_err(sqlite)?
            .ok_or_else(|| OpenError::NotOurs { path: path.to_owned() })?;
        let readers = (0..readers.max(1))
            .map(|_| sqlite::open_reader(path).map(Mutex::new))
            .collect::<Result<Vec<_>, _>>()?;
        let status = Arc::new(Status::default());
        let writer = Writer::start(writing, status.clone())
            .map_err(|cause| OpenError::Io { path: path.to_owned(), cause })?;
        let (path, next_reader) = (path.to_owned(), AtomicUsize::new(0));
        Ok(Catalog { readers, next_reader, writer, status, path, identity, is_new, _lock: lock })
    }

    /// The current content of a URL, `None` when it is not known.
    pub fn find(&self, source_url: &str) -> Result<Option<Artifact>, Error> {
        self.told(sqlite::find(&self.reader(), source_url))
    }

    /// Whether a file with this digest may be in the store: it was recorded, and not swept since.
    pub fn knows_blob(&self, digest: Digest) -> Result<bool, Error> {
        self.told(sqlite::knows_blob(&self.reader(), digest))
    }

    /// The sums; the same time at any size of the catalogue.
    pub fn totals(&self) -> Result<Totals, Error> {
        self.told(sqlite::totals(&self.reader()))
    }

    /// Records a published content as its URL's current one, in one transaction, and returns its row when that is
    /// durable.
    ///
    /// `claim` is dropped when it is durable or has failed, even if nobody waits any more: until then the content's
    /// file must be kept from the sweep, which can't know yet that it is wanted.
    pub async fn record(&self, record: Record, claim: impl Send + 'static) -> Result<Recorded, Error> {
        self.writer.record(record, Box::new(claim)).await
    }

    /// Blobs recorded as deleted whose files may still be there, the longest deleted first, `limit` at most.
    pub fn unswept(&self, limit: usize) -> Result<Vec<Deleted>, Error> {
        self.told(deletion::unswept(&self.reader(), limit))
    }

    /// Whether nothing wants this blob now: it is still deleted, by that same deletion.
    ///
    /// Never while the database's disk fails or it is damaged: a record that has failed so may yet be found when it is
    /// opened again. A full disk is no such reason, since SQLite has taken the record back, and the sweep makes room.
    pub fn is_deleted(&self, blob: &Deleted) -> Result<bool, Error> {
        let Status { doubtful, corrupt, .. } = &*self.status;
        if doubtful.load(Ordering::Acquire) || corrupt.load(Ordering::Acquire) {
            return Ok(false);
        }
        self.told(deletion::is_deleted(&self.reader(), blob))
    }

    /// Notes that the files of deleted blobs are gone for good. One that was published again meanwhile is left alone.
    pub async fn mark_swept(&self, blobs: Vec<Deleted>) -> Result<(), Error> {
        self.writer.mark_swept(blobs).await
    }

    /// Notes that a blob was found gone or damaged, so that the sums no longer count it and it is looked for again. Says
    /// whether that is news, which it is for one caller of several.
    pub async fn note_lost(&self, digest: Digest) -> Result<bool, Error> {
        if self.writer.note(vec![digest], Finding::Lost).await? > 0 {
            return Ok(true);
        }
        self.writer.note(vec![digest], Finding::LostStill).await.map(|_| false)
    }

    /// Notes that a blob that was known to be missing was read just now and is what its name says.
    pub async fn note_found(&self, digest: Digest) -> Result<(), Error> {
        self.writer.note(vec![digest], Finding::Found).await.map(drop)
    }

    /// Notes that these blobs were read just now and are what their names say.
    pub async fn note_whole(&self, blobs: Vec<Digest>) -> Result<(), Error> {
        self.writer.note(blobs, Finding::Whole).await.map(drop)
    }

    /// The blobs to be read next, `limit` at most: what was asked for, what is missing for another day, then what was
    /// verified longer than `period` ago, the longest first. With no period only what was asked for.
    pub fn due_blobs(&self, period: Option<Duration>, limit: usize) -> Result<Vec<Blob>, Error> {
        self.told(integrity::due(&self.reader(), period, limit))
    }

    /// A blob's row, unless it was deleted or never recorded.
    pub fn find_blob(&self, digest: Digest) -> Result<Option<Blob>, Error> {
        self.told(integrity::find(&self.reader(), digest))
    }

    /// The URLs whose current content this is.
    pub fn urls_of(&self, digest: Digest) -> Result<Vec<String>, Error> {
        self.told(integrity::urls(&self.reader(), digest))
    }

    /// When the blob that was verified longest ago was, in seconds of Unix time; `None` when there is no blob.
    pub fn oldest_verified(&self) -> Result<Option<i64>, Error> {
        self.told(integrity::oldest_verified(&self.reader()))
    }

    /// How many blobs are known to be missing that some URL should have.
    pub fn count_missing(&self) -> Result<u64, Error> {
        self.told(integrity::count_missing(&self.reader()))
    }

    /// Counts one body served of the artifact with this row. Written within a second; never waits.
    pub fn count_access(&self, id: i64) {
        self.writer.count_access(id);
    }

    /// Changes whenever another process has changed the database: what is remembered of it must then be forgotten.
    pub fn generation(&self) -> u64 {
        self.status.generation.load(Ordering::Acquire)
    }

    /// Makes everybody forget what they remember, as if another process had changed the database.
    pub fn forget_remembered(&self) {
        self.status.generation.fetch_add(1, Ordering::Release);
    }

    /// The last write failed because the database can't be written at all (read-only, full, failing, damaged).
    pub fn is_read_only(&self) -> bool {
        self.status.read_only.load(Ordering::Relaxed) || self.status.corrupt.load(Ordering::Relaxed)
    }

    /// Which database this is, as it was when it was opened.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Counts this start, durably, and returns what the database is from now on. Blocks.
    pub fn note_start(&self) -> Result<Identity, CopyError> {
        let refused = |cause| CopyError::Sqlite { path: self.path.clone(), cause };
        sqlite::note_start(&self.path).map_err(refused)
    }

    /// This process has made the database: there was none.
    pub fn is_new(&self) -> bool {
        self.is_new
    }

    /// When the newest snapshot was taken that is not of the future, if there is one.
    pub fn last_snapshot(&self) -> io::Result<Option<jiff::Timestamp>> {
        snapshots::last(&self.path, jiff::Timestamp::now())
    }

    /// Takes a snapshot, keeps `kept` in all, and leaves `min_free_bytes` of the disk free. Blocks.
    pub fn take_snapshot(&self, min_free_bytes: u64, kept: usize, pace: Pace) -> Result<PathBuf, CopyError> {
        snapshots::take(&self.path, min_free_bytes, kept, pace)
    }

    /// Writes the access counts and empties the WAL into the database, so that a plain copy of it is whole.
    pub async fn checkpoint(&self) {
        self.writer.checkpoint().await;
    }

    fn told<T>(&self, read: rusqlite::Result<T>) -> Result<T, Error> {
        read.map_err(|cause| {
            self.status.note(&cause);
            sqlite::error("Failed to read the catalogue", &cause)
        })
    }

    /// Whichever reader is free, trying the others before waiting for one.
    fn reader(&self) -> MutexGuard<'_, Connection> {
        let first = self.next_reader.fetch_add(1, Ordering::Relaxed);
        let at = |offset: usize| &self.readers[(first.wrapping_add(offset)) % self.readers.len()];
        (0..self.readers.len())
            .find_map(|offset| at(offset).try_lock().ok())
            .unwrap_or_else(|| at(0).lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl std::fmt::Debug for Catalog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Catalog").field("readers", &self.readers.len()).finish_non_exhaustive()
    }
}

/// The hash as the catalogue writes it: 64 lower-case hex digits.
fn hash_text(digest: Digest) -> String {
    digest.to_string()
}
