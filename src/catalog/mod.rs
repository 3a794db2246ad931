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
    /// It was written by a newer version of this program.
    #[error(
        "the database {path} has schema {found}, this program knows {known}: it was written by a newer version; \
         run that one, or restore an older backup"
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

/// The catalogue. Share it in an `Arc`; every method may be called from any thread.
pub struct Catalog {
    readers: Vec<Mutex<Connection>>,
    next_reader: AtomicUsize,
    writer: Writer,
    status: Arc<Status>,
    _lock: std::fs::File,
}

/// What the writer thread tells everyone.
#[derive(Default)]
pub(crate) struct Status {
    generation: AtomicU64,
    read_only: AtomicBool,
    /// See [`Catalog::check_writable`].
    sealed: AtomicBool,
}

impl Catalog {
    /// Opens, locks and migrates the database at `path`, making it and its directory when they are not there.
    ///
    /// `readers` is how many threads may look things up at once without waiting.
    pub fn open(path: &Path, readers: usize) -> Result<Catalog, OpenError> {
        let lock = sqlite::lock(path)?;
        let writing = sqlite::open(path)?;
        let readers = (0..readers.max(1))
            .map(|_| sqlite::open_reader(path).map(Mutex::new))
            .collect::<Result<Vec<_>, _>>()?;
        let status = Arc::new(Status::default());
        let writer = Writer::start(writing, status.clone())
            .map_err(|cause| OpenError::Io { path: path.to_owned(), cause })?;
        Ok(Catalog { readers, next_reader: AtomicUsize::new(0), writer, status, _lock: lock })
    }

    /// The current content of a URL, `None` when it is not known.
    pub fn find(&self, source_url: &str) -> Result<Option<Artifact>, Error> {
        sqlite::find(&self.reader(), source_url)
            .map_err(|cause| sqlite::error("Failed to read the catalogue", &cause))
    }

    /// Whether a blob with this digest was ever recorded.
    pub fn knows_blob(&self, digest: Digest) -> Result<bool, Error> {
        sqlite::knows_blob(&self.reader(), digest)
            .map_err(|cause| sqlite::error("Failed to read the catalogue", &cause))
    }

    /// The sums; the same time at any size of the catalogue.
    pub fn totals(&self) -> Result<Totals, Error> {
        sqlite::totals(&self.reader()).map_err(|cause| sqlite::error("Failed to read the catalogue", &cause))
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

    /// The last write failed because the database can't be written at all (read-only, full, failing).
    pub fn is_read_only(&self) -> bool {
        self.status.read_only.load(Ordering::Relaxed)
    }

    /// Fails when nothing will be recorded any more until the service is started again.
    ///
    /// That is so once the database could not be synced: the system has then dropped pages that it took for written,
    /// and whatever is recorded on top of them may be lost. What is known can still be read.
    pub fn check_writable(&self) -> Result<(), Error> {
        if self.status.sealed.load(Ordering::Relaxed) { Err(sqlite::read_only()) } else { Ok(()) }
    }

    /// Writes the access counts and empties the WAL into the database, so that a plain copy of it is whole.
    pub async fn checkpoint(&self) {
        self.writer.checkpoint().await;
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
