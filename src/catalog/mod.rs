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

mod detached;
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
};

use rusqlite::Connection;

use crate::{
    artifact::{Digest, Version},
    error::Error,
};
pub use detached::{CopyError, Detached, RecordedBlob};
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
    #[error("can't open the database {path}: {cause}")]
    Sqlite {
        /// `storage.database`.
        path: PathBuf,
        /// What SQLite says.
        cause: rusqlite::Error,
    },
    /// The directory or the lock file can't be made.
    #[error("can't open the database {path}: {cause}")]
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

    /// Whether a blob with this digest was ever recorded.
    pub fn knows_blob(&self, digest: Digest) -> Result<bool, Error> {
        self.told(sqlite::knows_blob(&self.reader(), digest))
    }

    /// The sums; the same time at any size of the catalogue.
    pub fn totals(&self) -> Result<Totals, Error> {
        self.told(sqlite::totals(&self.reader()))
    }

    /// Records a published content as its URL's current one, in one transaction, and returns its row when that is
    /// durable.
    pub async fn record(&self, record: Record) -> Result<Recorded, Error> {
        self.writer.record(record).await
    }

    /// Notes that a blob was found gone or damaged, so that the sums no longer count it. Never waits.
    pub fn mark_lost(&self, digest: Digest) {
        self.writer.mark_lost(digest);
    }

    /// Counts one body served of the artifact with this row. Written within a second; never waits.
    pub fn count_access(&self, id: i64) {
        self.writer.count_access(id);
    }

    /// Changes whenever another process has changed the database: what is remembered of it must then be forgotten.
    pub fn generation(&self) -> u64 {
        self.status.generation.load(Ordering::Acquire)
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

    /// When the newest snapshot was taken, if there is one.
    pub fn last_snapshot(&self) -> io::Result<Option<jiff::Timestamp>> {
        Ok(snapshots::list(&self.path)?.last().and_then(|newest| snapshots::taken_at(newest)))
    }

    /// Takes a snapshot, keeps `kept` in all, and leaves `min_free_bytes` of the disk free. Blocks.
    pub fn take_snapshot(&self, min_free_bytes: u64, kept: usize) -> Result<PathBuf, CopyError> {
        snapshots::take(&self.path, min_free_bytes, kept)
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
