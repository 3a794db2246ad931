//! Database files that no service uses: a copy of the live one for a backup, or one about to take its place.
//!
//! A live database is copied by SQLite itself, in one read transaction: readers and writers go on. What is to become
//! the live one is first copied beside it and looked through, so that what can't be used replaces nothing.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use rusqlite::{Connection, ErrorCode};

use super::{OpenError, sqlite};
use crate::{artifact::Digest, kill_point};

/// Why a database can't be copied or put in place; the text names the file and the cure.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// SQLite refuses.
    #[error("can't copy the database {path}: {cause}{}", hint(cause))]
    Sqlite {
        /// The file at fault.
        path: PathBuf,
        /// What SQLite says.
        cause: rusqlite::Error,
    },
    /// A file can't be read or written.
    #[error("can't copy the database: {path}: {cause}")]
    Io {
        /// The file at fault.
        path: PathBuf,
        /// What the system says.
        cause: io::Error,
    },
    /// It can't be trusted.
    #[error("{path} is damaged ({problem}); use another backup or snapshot")]
    Damaged {
        /// The file at fault.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// It is something else, or of another version.
    #[error(transparent)]
    Foreign(OpenError),
    /// The disk would be too full afterwards.
    #[error("no room for a copy of the database {path}: it needs {needed} bytes over storage.min_free_bytes")]
    NoRoom {
        /// The database.
        path: PathBuf,
        /// Its size in bytes.
        needed: u64,
    },
}

fn hint(cause: &rusqlite::Error) -> &'static str {
    match cause.sqlite_error_code() {
        Some(ErrorCode::CannotOpen | ErrorCode::ReadOnly | ErrorCode::PermissionDenied) => {
            "; is it there, and is this the user of the service?"
        }
        _ => "",
    }
}

/// A blob as a database records it.
#[derive(Debug, Clone, Copy)]
pub struct RecordedBlob {
    /// Its name.
    pub digest: Digest,
    /// Its size in bytes.
    pub size: u64,
    /// Some artifact has it now. What only older versions had may be lost for good, and nobody asks for it.
    pub is_named: bool,
}

/// Called again and again while a database is copied: may sleep, so that others come first, and ends the copying by
/// returning true.
pub type Pace = Box<dyn FnMut() -> bool + Send>;

/// A database file that nobody else uses.
#[derive(Debug)]
pub struct Detached {
    path: PathBuf,
    db: Connection,
}

impl Detached {
    /// Copies a database that may be in use to a new file `to`, in the state of one moment, and syncs it; as fast as
    /// it can, or at somebody's pace.
    pub fn snapshot_of(database: &Path, to: &Path, pace: Option<Pace>) -> Result<Detached, CopyError> {
        clear(to)?;
        let refused = |cause| CopyError::Sqlite { path: database.to_owned(), cause };
        let mut source = sqlite::open_existing(database).map_err(refused)?;
        let copied = sqlite::vacuum_into(&mut source, to, pace).map_err(refused);
        if let Err(error) = copied {
            clear(to)?;
            return Err(error);
        }
        File::open(to).and_then(|file| file.sync_all()).map_err(io_at(to))?;
        Detached::open(to)
    }

    /// Copies a database file that is not in use, with what is still in its log, to a new file `to`, and looks through
    /// it.
    pub fn copy_of(source: &Path, to: &Path) -> Result<Detached, CopyError> {
        clear(to)?;
        copy_file(source, to)?;
        let log = beside(source, "-wal");
        if log.exists() {
            copy_file(&log, &beside(to, "-wal"))?;
        }
        let copy = Detached::open(to).and_then(|copy| copy.look_through().map(|()| copy));
        if copy.is_err() {
            clear(to)?;
        }
        copy.map_err(|error| error.about(source))
    }

    fn open(path: &Path) -> Result<Detached, CopyError> {
        let refused = |cause| CopyError::Sqlite { path: path.to_owned(), cause };
        let db = sqlite::open_existing(path).map_err(refused)?;
        Ok(Detached { path: path.to_owned(), db })
    }

    /// Fails if anything is wrong with its structure, or it is not one of ours. Reads all of it.
    pub fn look_through(&self) -> Result<(), CopyError> {
        let problem = sqlite::first_problem(&self.db).map_err(|cause| self.refused(cause))?;
        if let Some(problem) = problem {
            return Err(CopyError::Damaged { path: self.path.clone(), problem });
        }
        sqlite::check_schema(&self.db, &self.path).map_err(CopyError::Foreign)?;
        // From here on it is one file, whatever its log held.
        sqlite::leave_wal(&self.db).map_err(|cause| self.refused(cause))
    }

    /// Every blob that should be there, in the order of their names. Blobs that were deleted are left out.
    pub fn for_each_blob<E: From<CopyError>>(
        &self,
        mut each: impl FnMut(RecordedBlob) -> Result<(), E>,
    ) -> Result<(), E> {
        let refused = |cause| E::from(self.refused(cause));
        let mut failed = None;
        sqlite::for_each_blob(&self.db, |blob| match each(blob) {
            Ok(()) => true,
            Err(error) => {
                failed = Some(error);
                false
            }
        })
        .map_err(refused)?;
        failed.map_or(Ok(()), Err)
    }

    /// Whether it has this blob, deleted ones left out.
    pub fn names(&self, digest: Digest) -> Result<bool, CopyError> {
        sqlite::names_blob(&self.db, digest).map_err(|cause| self.refused(cause))
    }

    /// How many artifacts it has.
    pub fn count_artifacts(&self) -> Result<u64, CopyError> {
        sqlite::totals(&self.db).map(|totals| totals.items).map_err(|cause| self.refused(cause))
    }

    /// Adapts it to what the store really has: `lost` are blobs that are nowhere. What the store has (`has_file` says
    /// so) is not missing any more; nor, if it was deleted, deleted later, because it may have been published again since.
    pub fn adapt(
        &mut self,
        lost: &[Digest],
        has_file: impl Fn(Digest, u64) -> bool,
    ) -> Result<(), CopyError> {
        let path = self.path.clone();
        sqlite::adapt(&mut self.db, lost, has_file).map_err(|cause| CopyError::Sqlite { path, cause })
    }

    /// How it names itself to a store: see [`super::Identity`].
    pub fn identity(&self) -> Result<Option<super::Identity>, CopyError> {
        sqlite::identity(&self.db).map_err(|cause| self.refused(cause))
    }

    /// Makes it the live database, and returns where what was there is kept, if anything was. The caller has the lock.
    ///
    /// A log of the old database that stayed would be replayed over the new one, so it is moved with it. Without one, as
    /// after every clean stop, there is a whole database at every moment.
    pub fn install(self, database: &Path, now: &str) -> Result<Option<PathBuf>, CopyError> {
        let Detached { path, db } = self;
        db.close().map_err(|(_, cause)| CopyError::Sqlite { path: path.clone(), cause })?;
        File::open(&path).and_then(|file| file.sync_all()).map_err(io_at(&path))?;
        let (aside, log) = (unused_name(database, now), beside(database, "-wal"));
        let mut kept = None;
        for suffix in ["", "-wal"] {
            if keep(&beside(database, suffix), &beside(&aside, suffix))? {
                kept = Some(aside.clone());
            }
            kill_point::pass("restore.set_aside");
        }
        if log.exists() {
            sync_parent(database)?;
            // The database goes first: either is of use only with the other, and nothing uses a log alone.
            remove_if_there(database)?;
            remove_if_there(&log)?;
        }
        remove_if_there(&beside(database, "-shm"))?;
        fs::rename(&path, database).map_err(io_at(database))?;
        sync_parent(database)?;
        kill_point::pass("restore.installed");
        Ok(kept)
    }

    /// Gives it its name in a backup, over the one that is there, and opens it there.
    pub fn put_at(self, place: &Path) -> Result<Detached, CopyError> {
        let Detached { path, db } = self;
        db.close().map_err(|(_, cause)| CopyError::Sqlite { path: path.clone(), cause })?;
        File::open(&path).and_then(|file| file.sync_all()).map_err(io_at(&path))?;
        // A log beside it belongs to the one before, and would be replayed over this one.
        for suffix in ["-wal", "-shm", "-journal"] {
            remove_if_there(&beside(place, suffix))?;
        }
        fs::rename(&path, place).map_err(io_at(place))?;
        sync_parent(place)?;
        Detached::open(place)
    }

    fn refused(&self, cause: rusqlite::Error) -> CopyError {
        CopyError::Sqlite { path: self.path.clone(), cause }
    }
}

impl CopyError {
    /// The same about the file that the copy was made of, which is the one the operator knows.
    fn about(self, source: &Path) -> CopyError {
        let path = source.to_owned();
        match self {
            CopyError::Sqlite { cause, .. } => match cause.sqlite_error_code() {
                Some(ErrorCode::NotADatabase | ErrorCode::DatabaseCorrupt) => {
                    CopyError::Damaged { path, problem: cause.to_string() }
                }
                _ => CopyError::Sqlite { path, cause },
            },
            CopyError::Damaged { problem, .. } => CopyError::Damaged { path, problem },
            CopyError::Foreign(OpenError::Newer { found, known, .. }) => {
                CopyError::Foreign(OpenError::Newer { path, found, known })
            }
            CopyError::Foreign(OpenError::NotOurs { .. }) => CopyError::Foreign(OpenError::NotOurs { path }),
            other => other,
        }
    }
}

/// The name of a file that SQLite keeps beside a database.
fn beside(database: &Path, suffix: &str) -> PathBuf {
    let mut name = database.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// Gives a file a second name, and if the file system has no such thing, another name. Says whether there is one.
fn keep(from: &Path, to: &Path) -> Result<bool, CopyError> {
    match fs::hard_link(from, to).or_else(|_| fs::rename(from, to)) {
        Ok(()) => Ok(true),
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(cause) => Err(io_at(from)(cause)),
    }
}

/// Where the database that is replaced goes: its name, and when.
fn unused_name(database: &Path, now: &str) -> PathBuf {
    let first = beside(database, &format!(".replaced-{now}"));
    let mut names =
        std::iter::once(first.clone()).chain((2..).map(|number: u32| beside(&first, &format!(".{number}"))));
    names.find(|name| !name.exists()).unwrap_or(first)
}

/// Removes what an interrupted run has left.
fn clear(path: &Path) -> Result<(), CopyError> {
    ["", "-wal", "-shm", "-journal"].iter().try_for_each(|suffix| remove_if_there(&beside(path, suffix)))
}

fn remove_if_there(path: &Path) -> Result<(), CopyError> {
    match fs::remove_file(path) {
        Err(cause) if cause.kind() != io::ErrorKind::NotFound => Err(io_at(path)(cause)),
        _ => Ok(()),
    }
}

/// Content only: a read-only backup must not make a read-only database.
fn copy_file(from: &Path, to: &Path) -> Result<(), CopyError> {
    let mut source = File::open(from).map_err(io_at(from))?;
    let mut target = File::create_new(to).map_err(io_at(to))?;
    io::copy(&mut source, &mut target).map(drop).map_err(io_at(to))
}

/// Puts a name on disk.
pub(super) fn sync_parent(path: &Path) -> Result<(), CopyError> {
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    match File::open(parent).and_then(|dir| dir.sync_all()) {
        // Some network file systems have no such call.
        Err(cause) if cause.kind() == io::ErrorKind::InvalidInput => Ok(()),
        synced => synced.map_err(io_at(parent)),
    }
}

pub(super) fn io_at(path: &Path) -> impl Fn(io::Error) -> CopyError {
    let path = path.to_owned();
    move |cause| CopyError::Io { path: path.clone(), cause }
}
