//! What we hold: one file per content, named by its SHA-256, in two levels of directories.
//!
//! The store's contract:
//! - A blob MUST NOT be visible under its name until all of its bytes are on disk and verified.
//! - When [`Blobs::publish`] returns, the blob MUST survive a power cut.
//! - Publishing a digest twice MUST equal publishing it once, in either order, at the same time too.
//! - What is damaged is moved aside, never deleted. Only [`Blobs::remove`] deletes, and only what its caller still finds
//!   deleted while nobody can publish it, and nobody has published it without having recorded it yet.
//! - A path MUST be formed from a parsed [`Digest`] only, never from request text.

mod hashing;
mod partial;
mod read;
mod room;
mod spool;
mod sweep;
mod sweep_lock;
mod tree;
mod verify;

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{
        Arc, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

use tokio::sync::Semaphore;

use crate::{
    artifact::Digest,
    config::Storage,
    error::{Error, PathKind, cure_for_path},
    kill_point,
    sync::{Mutex, MutexGuard},
};
use partial::Partials;
pub use partial::{Origin, Partial};
pub use read::{BufferPool, Chunk, FileRange, Mode, Reader};
use room::Disk;
pub use spool::{Spool, SpoolFile, Written};
pub use sweep::{Claim, Removal, list_with_sizes};
pub use sweep_lock::SweepLock;
pub use tree::{Taken, Tree, Way};
pub use verify::{Checked, Loss, check};

/// Growing files, beside the blobs because a rename needs one file system.
const SPOOL_DIR: &str = ".spool";
/// Damaged files, kept for the operator.
const QUARANTINE_DIR: &str = ".quarantine";
const LOCK_FILE: &str = ".lock";
/// Which database records what is here.
const OWNER_FILE: &str = ".database";
/// Bytes of all downloads together that may wait for the disk.
const SPOOL_POOL_BYTES: usize = 16 << 20;

/// Why a store can't be opened; the text names the path and the cure.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// A directory or file can't be made or used.
    #[error("can't use storage.base_path: {path}: {cause}{}", cure_for_path(path, PathKind::Directory, Some(cause.kind())))]
    Io {
        /// The path that failed.
        path: PathBuf,
        /// What the system says.
        cause: io::Error,
    },
    /// Another process has it.
    #[error("storage.base_path {path} is in use by another artifact-cache; stop that one first")]
    Locked {
        /// `storage.base_path`.
        path: PathBuf,
    },
    /// Renaming into place would not be atomic.
    #[error("{path} is on another file system than storage.base_path; both must be on one")]
    OtherFileSystem {
        /// The spool directory.
        path: PathBuf,
    },
}

/// A blob that survives a power cut from now on.
#[derive(Debug)]
pub struct Published {
    /// Its file.
    pub file: Arc<SpoolFile>,
    /// Something was at its place already.
    pub replaced: bool,
    /// Keeps the sweep from it. To be held until the catalogue knows it, or won't.
    pub claim: Claim,
}

/// What is found where a blob should be.
#[derive(Debug)]
pub enum Held {
    /// A regular file of the right size, open for reading.
    Whole(File),
    /// Nothing.
    Missing,
    /// Something else: a file of another size, a directory, a link.
    Damaged(String),
}

/// The store. Share it in an `Arc`.
#[derive(Debug)]
pub struct Blobs {
    base: PathBuf,
    disk: Arc<Disk>,
    partials: Arc<Partials>,
    next_spool: AtomicU64,
    spool_pool: Arc<Semaphore>,
    buffers: BufferPool,
    /// By a digest's first byte: publishing, moving aside and deleting exclude each other.
    shards: Box<[Mutex<Shard>; 256]>,
    /// What is being published, once for each publisher: from before it has its name until the catalogue knows it. Its
    /// lock is for a moment only, unlike a shard's, so that whoever gives a claim up waits for no disk. It is taken
    /// with a shard's lock held or none, never the other way round.
    claims: Mutex<Vec<Digest>>,
    _lock: File,
}

/// One first-level directory.
#[derive(Debug, Default)]
struct Shard {
    /// This process knows it to be durable. A directory that merely exists may have been made by a process that was
    /// killed before it synced the parent.
    durable: bool,
    /// The same of its entries.
    durable_children: [u64; 4],
}

impl Blobs {
    /// Opens and locks the store, making its directories when they are not there, and clears leftover spool files but
    /// for those that can be resumed.
    pub fn open(config: &Storage) -> Result<Blobs, OpenError> {
        let base = config.base_path.clone();
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |cause| OpenError::Io { path, cause }
        };
        let (spool, quarantine, lock_path) =
            (base.join(SPOOL_DIR), base.join(QUARANTINE_DIR), base.join(LOCK_FILE));
        for dir in [&base, &spool, &quarantine] {
            fs::create_dir_all(dir).map_err(failed(dir))?;
        }
        kill_point::pass("open.directories_made");
        let lock = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&lock_path)
            .map_err(failed(&lock_path))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(OpenError::Locked { path: base }),
            Err(TryLockError::Error(cause)) => return Err(failed(&lock_path)(cause)),
        }
        let partials = Arc::new(Partials::open(&spool, config)?);
        let disk = Disk::new(&base, config.min_free_bytes, partials.clone());
        if let Err(cause) = SweepLock::prepare(&base) {
            // A full disk must not keep hits from being served.
            tracing::warn!(error = %cause, "no lock file for backups: they have to be run by the user of the service");
        }
        // Proves that it can be written before the first client has to find out.
        match disk.probe() {
            // Hits can be served all the same, and room may come.
            Err(OpenError::Io { cause, .. }) if is_full(&cause) => disk.note_failure(true),
            tried => tried?,
        }
        kill_point::pass("open.probed");
        Ok(Blobs {
            disk: Arc::new(disk),
            base,
            next_spool: AtomicU64::new(partials.next_number()),
            partials,
            spool_pool: Arc::new(Semaphore::new(SPOOL_POOL_BYTES / 1024)),
            buffers: BufferPool::default(),
            shards: Box::new(std::array::from_fn(|_| Mutex::default())),
            claims: Mutex::default(),
            _lock: lock,
        })
    }

    /// Opens a blob for reading if what lies at its place has the right kind and size.
    ///
    /// # Errors
    /// When the file system itself fails; a blob that isn't there is an answer.
    pub fn open_blob(&self, digest: Digest, size: u64) -> Result<Held, Error> {
        held(&self.path(digest), size).map_err(|cause| Error::io("Failed to read cache storage", &cause))
    }

    /// Moves what lies at a blob's place out of the way, unless it has become whole meanwhile. Says whether the blob is
    /// lost. Nothing is deleted.
    pub fn quarantine(&self, digest: Digest, size: u64) -> Result<bool, Error> {
        let mut shard = self.shard(digest);
        match self.open_blob(digest, size)? {
            Held::Whole(_) => return Ok(false),
            Held::Missing => {}
            Held::Damaged(_) => self
                .clear_place(&mut shard, digest)
                .map_err(|cause| Error::io("Failed to set damaged content aside", &cause))?,
        }
        Ok(true)
    }

    /// Moves what lies at a blob's place out of the way, whatever its size: its content was found to be wrong.
    pub fn quarantine_content(&self, digest: Digest) -> Result<(), Error> {
        let mut shard = self.shard(digest);
        self.clear_place(&mut shard, digest)
            .map_err(|cause| Error::io("Failed to set damaged content aside", &cause))
    }

    /// Moves into the quarantine what lies where a blob should be, and what is no directory where one of its
    /// directories should be.
    fn clear_place(&self, shard: &mut Shard, digest: Digest) -> io::Result<()> {
        let path = self.path(digest);
        // The base is the operator's, and opening the store has shown that it is a directory.
        let directories = [path.parent().and_then(Path::parent), path.parent()];
        for directory in directories.into_iter().flatten() {
            match fs::metadata(directory) {
                Ok(found) if found.is_dir() => continue,
                Err(cause) if cause.kind() != io::ErrorKind::NotFound => return Err(cause),
                Err(_) if !is_there(directory) => return Ok(()),
                // A link to nowhere is there, and is not found.
                Ok(_) | Err(_) => {}
            }
            tracing::warn!("something lies where a directory of the store should be, set aside");
            *shard = Shard::default();
            return self.move_aside(directory);
        }
        if is_there(&path) { self.move_aside(&path) } else { Ok(()) }
    }

    fn move_aside(&self, path: &Path) -> io::Result<()> {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let number = self.next_spool.fetch_add(1, Ordering::Relaxed);
        let seconds = jiff::Timestamp::now().as_second();
        kill_point::pass("quarantine.found");
        let quarantine = self.base.join(QUARANTINE_DIR);
        fs::rename(path, quarantine.join(format!("{name}.{seconds}.{number}")))?;
        kill_point::pass("quarantine.renamed");
        // Where it is now first: a power cut between the two may leave it in both places, but never in none.
        sync_dir(&quarantine)?;
        path.parent().map_or(Ok(()), sync_dir)
    }

    /// Begins a growing file for a download of `announced` bytes, if that is known.
    ///
    /// # Errors
    /// When there is no room for it under `storage.min_free_bytes`, counting what downloads under way still need, or
    /// the file can't be made.
    pub fn spool(&self, announced: Option<u64>, origin: Origin) -> Result<Spool, Error> {
        let number = self.next_spool.fetch_add(1, Ordering::Relaxed);
        let path = self.base.join(SPOOL_DIR).join(format!("{number:016x}"));
        let room = self.disk.reserve(announced, 0)?;
        Spool::create(path, room, self.partials.checkpoints(origin), self.spool_pool.clone())
    }

    /// What an earlier download of a URL has left, to be resumed or given up by the caller.
    pub fn take_partial(&self, source_url: &str) -> Option<Partial> {
        self.partials.take(source_url)
    }

    /// Goes on with what an earlier download of `announced` bytes has left, where its last checkpoint was. Blocks while
    /// all of it is read and hashed.
    ///
    /// # Errors
    /// When it isn't what it was any more, or there is no room for the rest. It is removed then.
    pub fn resume(&self, partial: Partial, announced: Option<u64>) -> io::Result<Spool> {
        Spool::resume(partial, announced, &self.disk, &self.partials, self.spool_pool.clone())
    }

    /// Removes what an earlier download has left.
    pub fn give_up(&self, partial: Partial) {
        partial.give_up();
    }

    /// Removes what downloads have left that nobody went on with for `storage.partial_keep_hours`.
    pub fn give_up_expired_partials(&self) {
        self.partials.give_up_expired();
    }

    /// Bytes that downloads have left which nobody goes on with at the moment.
    pub fn partial_bytes(&self) -> u64 {
        self.partials.bytes()
    }

    /// Makes a verified spool the blob of its digest: on disk first, then under its name, then the name on disk.
    ///
    /// Whatever lies at the place is replaced: it has the same name, so it has the same bytes or is damaged.
    pub async fn publish(self: &Arc<Self>, written: Written) -> Result<Published, Error> {
        let blobs = self.clone();
        tokio::task::spawn_blocking(move || {
            let published = blobs.publish_now(&written);
            blobs.disk.note_failure(published.is_err());
            let (replaced, claim) =
                published.map_err(|cause| Error::io("Failed to write to cache storage", &cause))?;
            Ok(Published { file: written.file().clone(), replaced, claim })
        })
        .await
        .map_err(|_| Error::io("Failed to write to cache storage", &io::Error::other("publisher panicked")))?
    }

    /// Says whether something was there already.
    pub(crate) fn publish_now(self: &Arc<Self>, written: &Written) -> io::Result<(bool, Claim)> {
        kill_point::pass("publish.verified");
        // A failed fsync has thrown the dirty pages away: the spool must never be synced again, only dropped, which
        // is what returning the error does.
        written.file().sync()?;
        kill_point::pass("publish.spool_synced");
        let digest = written.digest;
        let [first, second] = [digest.as_bytes()[0], digest.as_bytes()[1]];
        // Before the shard's lock: a sweep that has that lock and sees no claim is done before this gets any further.
        let claim = self.claim(digest);
        let mut shard = self.shard(digest);
        let outer = self.base.join(format!("{first:02x}"));
        let inner = outer.join(format!("{second:02x}"));
        let (word, bit) = (usize::from(second / 64), 1u64 << (second % 64));
        kill_point::pass_or_panic("publish.locked");
        let to = self.path(digest);
        let replaced = fs::symlink_metadata(&to).is_ok();
        if let Err(cause) = written.file().rename_to(&to) {
            // Its directory is new, or an operator removed it; or something else lies there.
            let kinds = [io::ErrorKind::NotFound, io::ErrorKind::NotADirectory, io::ErrorKind::IsADirectory];
            if !kinds.contains(&cause.kind()) {
                return Err(cause);
            }
            self.clear_place(&mut shard, digest)?;
            shard.durable_children[word] &= !bit;
            if fs::create_dir(&inner).is_err() {
                (shard.durable, shard.durable_children) = Default::default();
                fs::create_dir_all(&inner)?;
            }
            kill_point::pass("publish.directory_made");
            written.file().rename_to(&to)?;
        }
        kill_point::pass("publish.renamed");
        // From the inside out: the first sync commits what the others are about on most file systems, which makes
        // them cheap.
        sync_dir(&inner)?;
        kill_point::pass("publish.inner_synced");
        if shard.durable_children[word] & bit == 0 {
            sync_dir(&outer)?;
            kill_point::pass("publish.outer_synced");
            shard.durable_children[word] |= bit;
        }
        if !shard.durable {
            sync_dir(&self.base)?;
            kill_point::pass("publish.base_synced");
            shard.durable = true;
        }
        Ok((replaced, claim))
    }

    /// The digests of all blobs that begin with this byte, in no order. Whatever else lies there is left out.
    pub fn list(&self, first: u8) -> io::Result<Vec<Digest>> {
        list(&self.base, first)
    }

    /// No blob is here, and none was ever published here.
    pub fn is_empty(&self) -> io::Result<bool> {
        for entry in fs::read_dir(&self.base)? {
            let entry = entry?;
            let is_first_level = |name: &str| name.len() == 2 && u8::from_str_radix(name, 16).is_ok();
            if entry.file_name().to_str().is_some_and(is_first_level) && entry.file_type()?.is_dir() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// What was last noted with [`Blobs::note_owner`]: which database records what is here.
    pub fn owner(&self) -> io::Result<Option<String>> {
        match fs::read_to_string(self.base.join(OWNER_FILE)) {
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => Ok(None),
            // Damaged, it names nobody.
            Err(cause) if cause.kind() == io::ErrorKind::InvalidData => Ok(Some(String::new())),
            owner => owner.map(|text| Some(text.trim().to_owned())),
        }
    }

    /// Notes, in one step and durably, which database records what is here; `None` that any may.
    pub fn note_owner(&self, owner: Option<&str>) -> io::Result<()> {
        let path = self.base.join(OWNER_FILE);
        let Some(owner) = owner else {
            return match fs::remove_file(&path) {
                Err(cause) if cause.kind() == io::ErrorKind::NotFound => Ok(()),
                removed => removed.and_then(|()| sync_dir(&self.base)),
            };
        };
        let new = path.with_extension("new");
        fs::write(&new, format!("{owner}\n"))?;
        File::open(&new)?.sync_all()?;
        fs::rename(&new, &path)?;
        sync_dir(&self.base)
    }

    /// Bytes that an ordinary user can still write on the storage's file system.
    pub fn free_bytes(&self) -> io::Result<u64> {
        self.disk.free_bytes()
    }

    /// Fails when no download can be kept, before its upstream has to be asked.
    pub fn check_room(&self) -> Result<(), Error> {
        if matches!(self.disk.has_room(0), Ok(false)) { Err(Error::disk_full()) } else { Ok(()) }
    }

    /// No new download can be kept: less than `storage.min_free_bytes` is left.
    pub fn is_nearly_full(&self) -> bool {
        self.disk.is_nearly_full().unwrap_or(false)
    }

    /// New blobs can be written, as far as is known.
    pub fn is_writable(&self) -> bool {
        self.disk.is_writable()
    }

    /// Hits can't be served: the base directory can't be read.
    pub fn check_readable(&self) -> io::Result<()> {
        fs::read_dir(&self.base).map(drop)
    }

    /// The buffers that bodies are read into.
    pub fn buffers(&self) -> &BufferPool {
        &self.buffers
    }

    fn path(&self, digest: Digest) -> PathBuf {
        place(&self.base, digest)
    }

    fn claims(&self) -> MutexGuard<'_, Vec<Digest>> {
        self.claims.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn shard(&self, digest: Digest) -> MutexGuard<'_, Shard> {
        self.shards[usize::from(digest.as_bytes()[0])].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether renaming into place can be atomic, judged from outside: what there is of the store's own directories must lie
/// on the store's file system.
pub fn check_file_system(base: &Path) -> Result<(), OpenError> {
    for dir in [SPOOL_DIR, QUARANTINE_DIR].map(|name| base.join(name)) {
        match (fs::metadata(&dir), fs::metadata(base)) {
            (Ok(inner), Ok(outer)) if inner.dev() != outer.dev() => {
                return Err(OpenError::OtherFileSystem { path: dir });
            }
            (Err(cause), _) if cause.kind() != io::ErrorKind::NotFound => {
                return Err(OpenError::Io { path: dir, cause });
            }
            _ => {}
        }
    }
    Ok(())
}

/// Where a blob is, or would be, in a store at `base`.
fn place(base: &Path, digest: Digest) -> PathBuf {
    let hex = digest.to_string();
    let mut path = PathBuf::with_capacity(base.as_os_str().len() + 72);
    path.push(base);
    path.push(&hex[0..2]);
    path.push(&hex[2..4]);
    path.push(&hex);
    path
}

/// What is found at a blob's place.
fn held(path: &Path, size: u64) -> io::Result<Held> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let opened = OpenOptions::new().read(true).custom_flags(flags).open(path);
    match opened.and_then(|file| file.metadata().map(|found| (file, found))) {
        Ok((file, found)) => Ok(match (found.is_file(), found.len() == size) {
            (true, true) => Held::Whole(file),
            (true, false) => Held::Damaged(format!("has {} bytes instead of {size}", found.len())),
            (false, _) => Held::Damaged("is not a regular file".to_owned()),
        }),
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => Ok(Held::Missing),
        Err(cause) if cause.raw_os_error() == Some(libc::ELOOP) => {
            Ok(Held::Damaged("is a symbolic link".to_owned()))
        }
        Err(cause) if cause.kind() == io::ErrorKind::NotADirectory => {
            Ok(Held::Damaged("has a file where its directory should be".to_owned()))
        }
        // A socket.
        Err(cause) if cause.raw_os_error() == Some(libc::ENXIO) => {
            Ok(Held::Damaged("is not a regular file".to_owned()))
        }
        Err(cause) if is_rot(&cause) => Ok(Held::Damaged(format!("can't be opened: {cause}"))),
        Err(cause) => Err(cause),
    }
}

/// The disk or the file system itself has lost it. Anything else (too many open files, a missing right, no memory) says
/// nothing of the blob.
fn is_rot(cause: &io::Error) -> bool {
    matches!(cause.raw_os_error(), Some(libc::EIO | libc::EBADMSG | libc::EUCLEAN))
}

/// The digests of all blobs at `base` that begin with this byte, in no order. Whatever else lies there is left out.
pub fn list(base: &Path, first: u8) -> io::Result<Vec<Digest>> {
    let mut found = Vec::new();
    let outer = match fs::read_dir(base.join(format!("{first:02x}"))) {
        Err(cause) if matches!(cause.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Ok(found);
        }
        outer => outer?,
    };
    for inner in outer {
        let inner = inner?;
        if inner.file_type()?.is_dir() {
            for blob in fs::read_dir(inner.path())? {
                found.extend(blob?.file_name().to_str().and_then(|name| name.parse::<Digest>().ok()));
            }
            // Of a service, on a single processor: whoever waits for a hit comes first.
            thread::yield_now();
        }
    }
    Ok(found)
}

/// Anything at all lies there, be it a link to nowhere.
fn is_there(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok()
}

fn is_full(cause: &io::Error) -> bool {
    matches!(cause.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

fn sync_dir(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}
