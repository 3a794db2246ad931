//! A growing file: written by one thread as a download arrives, read by everyone who waits for it.
//!
//! The writer never waits for a reader and no byte is held for one: readers follow the watermark and read the file.
//! Bytes on their way to the disk come out of one pool for all downloads, so memory is bounded whatever the number
//! and size of the downloads.

use std::{
    fs::{self, File},
    io::{self, IoSlice, Seek, SeekFrom, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch},
    task::JoinHandle,
};

use super::{
    hashing::Hashing,
    partial::{self, Checkpoints, Partial, Partials},
    room::{Disk, Room},
};
use crate::{
    artifact::{Digest, digest::Hasher},
    error::Error,
    kill_point,
};

/// Bytes of one download that may wait for the disk.
const WINDOW_BYTES: usize = 1 << 20;

/// The writing end of a growing file. Dropping it before [`Spool::finish`] leaves the file to a later download if it
/// has got far enough for a checkpoint, and removes it otherwise.
#[derive(Debug)]
pub struct Spool {
    /// Dropped first: a condemned file has lost its name when the thread learns that no more comes.
    file: Unpublished,
    orders: mpsc::UnboundedSender<Order>,
    thread: JoinHandle<io::Result<Ended>>,
    window: Arc<Semaphore>,
    pool: Arc<Semaphore>,
    sent: u64,
}

/// A growing file as its readers see it.
#[derive(Debug)]
pub struct SpoolFile {
    file: Arc<File>,
    /// `None` once it has its final name, or none at all.
    name: Mutex<Option<Name>>,
    /// Bytes that may be read.
    watermark: watch::Sender<u64>,
}

/// Where a growing file lies.
#[derive(Debug)]
struct Name {
    path: PathBuf,
    /// There is a checkpoint beside it.
    is_resumable: bool,
}

/// A spool that has got its last byte.
#[derive(Debug)]
pub struct Written {
    /// Of all its bytes.
    pub digest: Digest,
    /// Its length in bytes.
    pub size: u64,
    pub(super) file: Unpublished,
}

/// Removes the name of a condemned file when it is dropped before the file was published; readers keep what they have
/// open. Any other is left to its thread, which knows whether there is a checkpoint.
#[derive(Debug)]
pub(super) struct Unpublished {
    file: Arc<SpoolFile>,
    /// Of no use to a later download.
    is_condemned: bool,
}

impl Drop for Unpublished {
    fn drop(&mut self) {
        if self.is_condemned {
            self.file.remove();
        }
    }
}

impl Written {
    /// The file.
    pub fn file(&self) -> &Arc<SpoolFile> {
        &self.file.file
    }
}

/// What the thread is told.
enum Order {
    Append(Arc<Chunk>),
    /// That was the last byte.
    Finish,
}

/// How the thread ended: with digest and length of the whole, or early.
type Ended = Option<(Digest, u64)>;

/// A piece on its way to the disk, and its share of the memory.
#[derive(Debug)]
pub(super) struct Chunk {
    pub(super) bytes: Bytes,
    _window: OwnedSemaphorePermit,
    _pool: OwnedSemaphorePermit,
}

#[cfg(test)]
impl Chunk {
    pub(super) fn of(bytes: Bytes) -> Chunk {
        let permit =
            || Arc::new(Semaphore::new(1)).try_acquire_owned().expect("a new semaphore has its permit");
        Chunk { bytes, _window: permit(), _pool: permit() }
    }
}

impl Spool {
    /// Makes a new file.
    pub(super) fn create(
        path: PathBuf,
        room: Room,
        checkpoints: Checkpoints,
        pool: Arc<Semaphore>,
    ) -> Result<Spool, Error> {
        let file = File::options().create_new(true).read(true).write(true).open(&path).map_err(|cause| {
            room.disk().note_failure(true);
            Error::io("Failed to write to cache storage", &cause)
        })?;
        let name = Name { path, is_resumable: false };
        Ok(Spool::start(file, name, Hasher::new(), 0, room, checkpoints, pool))
    }

    /// Goes on with a file that a download left, from its last checkpoint. Blocks while the file is hashed up to there.
    ///
    /// # Errors
    /// When the file is not what its checkpoint says. It is removed then.
    pub(super) fn resume(
        partial: Partial,
        announced: Option<u64>,
        disk: &Arc<Disk>,
        partials: &Arc<Partials>,
        pool: Arc<Semaphore>,
    ) -> io::Result<Spool> {
        let offset = partial.checkpoint.offset;
        let ready = disk.reserve(announced, offset).map_err(io::Error::other).and_then(|room| {
            let (file, hasher) = check(&partial)?;
            Ok((room, file, hasher))
        });
        match ready {
            Ok((room, file, hasher)) => {
                let name = Name { path: partial.path, is_resumable: true };
                let checkpoints = Checkpoints::of(partials, partial.checkpoint);
                Ok(Spool::start(file, name, hasher, offset, room, checkpoints, pool))
            }
            Err(cause) => {
                partial.give_up();
                Err(cause)
            }
        }
    }

    fn start(
        file: File,
        name: Name,
        hasher: Hasher,
        offset: u64,
        room: Room,
        checkpoints: Checkpoints,
        pool: Arc<Semaphore>,
    ) -> Spool {
        let (watermark, _) = watch::channel(offset);
        let file = Arc::new(SpoolFile { file: Arc::new(file), name: Mutex::new(Some(name)), watermark });
        let (orders, incoming) = mpsc::unbounded_channel();
        let writer =
            Writing { file: file.clone(), hashing: Hashing::new(hasher), written: offset, room, checkpoints };
        let thread = tokio::task::spawn_blocking(move || writer.run(incoming));
        let window = Arc::new(Semaphore::new(WINDOW_BYTES / 1024));
        Spool { file: Unpublished { file, is_condemned: false }, orders, thread, window, pool, sent: offset }
    }

    /// Appends `bytes`, waiting while too much is already on its way to the disk.
    ///
    /// # Errors
    /// What the disk says of this or an earlier piece; the spool is then lost.
    pub async fn write(&mut self, bytes: Bytes) -> Result<(), Error> {
        let length = bytes.len();
        let kib = length.div_ceil(1024).min(WINDOW_BYTES / 1024) as u32;
        // Neither semaphore is ever closed.
        let window = self.window.clone().acquire_many_owned(kib).await;
        let pool = self.pool.clone().acquire_many_owned(kib).await;
        let (Ok(_window), Ok(_pool)) = (window, pool) else { return Err(writer_gone()) };
        if self.orders.send(Order::Append(Arc::new(Chunk { bytes, _window, _pool }))).is_err() {
            return Err(match (&mut self.thread).await {
                Ok(Err(cause)) => Error::io("Failed to write to cache storage", &cause),
                _ => writer_gone(),
            });
        }
        self.sent += length as u64;
        Ok(())
    }

    /// Waits until the first `length` bytes, which were given to [`Spool::write`], can be read.
    ///
    /// # Errors
    /// What the disk says; the spool is then lost.
    pub async fn written(&mut self, length: u64) -> Result<(), Error> {
        let mut watermark = self.file.file.watermark();
        tokio::select! {
            // The sender lives as long as the file, so this only ends well.
            _ = watermark.wait_for(|written| *written >= length) => Ok(()),
            ended = &mut self.thread => Err(match ended {
                Ok(Err(cause)) => Error::io("Failed to write to cache storage", &cause),
                _ => writer_gone(),
            }),
        }
    }

    /// Bytes given to [`Spool::write`] so far.
    pub fn len(&self) -> u64 {
        self.sent
    }

    /// Nothing has been written yet.
    pub fn is_empty(&self) -> bool {
        self.sent == 0
    }

    /// The file, for those who read along.
    pub fn file(&self) -> &Arc<SpoolFile> {
        &self.file.file
    }

    /// Says that no later download must go on with this file.
    pub fn condemn(&mut self) {
        self.file.is_condemned = true;
    }

    /// Gives up, as dropping does, and waits until nothing happens to the file any more.
    pub async fn leave(self) {
        let Spool { file: unpublished, orders, thread, .. } = self;
        let file = unpublished.file.clone();
        drop(unpublished);
        drop(orders);
        // It has ended when it met an error, and `write` has asked it why.
        if !thread.is_finished() && thread.await.is_err() {
            file.remove();
        }
    }

    /// Waits until every byte is written and hashed.
    pub async fn finish(mut self) -> Result<Written, Error> {
        // Not taken when the thread has met an error, which it tells now.
        let _ = self.orders.send(Order::Finish);
        let ended = self.thread.await;
        // Who has the whole and can't store it has nothing that a later download could use.
        self.file.is_condemned = true;
        match ended {
            Ok(Ok(Some((digest, size)))) => Ok(Written { digest, size, file: self.file }),
            Ok(Err(cause)) => Err(Error::io("Failed to write to cache storage", &cause)),
            Ok(Ok(None)) | Err(_) => Err(writer_gone()),
        }
    }
}

fn writer_gone() -> Error {
    Error::io("Failed to write to cache storage", &io::Error::other("writer stopped"))
}

impl SpoolFile {
    /// The open file; its bytes below the watermark never change.
    pub fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// Tells how many bytes may be read, now and whenever that changes.
    pub fn watermark(&self) -> watch::Receiver<u64> {
        self.watermark.subscribe()
    }

    /// The first bytes, for detecting a type.
    pub fn prefix(&self) -> Vec<u8> {
        let mut bytes = vec![0; 512];
        let length = self.file.read_at(&mut bytes, 0).unwrap_or(0);
        bytes.truncate(length);
        bytes
    }

    /// Whether both files begin with the same `length` bytes. Blocks; both must be written that far.
    pub fn same_prefix(&self, other: &SpoolFile, length: u64) -> io::Result<bool> {
        let mut ours = vec![0; 256 * 1024];
        let mut theirs = vec![0; 256 * 1024];
        let mut offset = 0;
        while offset < length {
            let step = (length - offset).min(ours.len() as u64) as usize;
            self.file.read_exact_at(&mut ours[..step], offset)?;
            other.file.read_exact_at(&mut theirs[..step], offset)?;
            if ours[..step] != theirs[..step] {
                return Ok(false);
            }
            offset += step as u64;
        }
        Ok(true)
    }

    pub(super) fn sync(&self) -> io::Result<()> {
        self.file.sync_all()
    }

    /// Gives the file its final name; from then on it stays.
    pub(super) fn rename_to(&self, to: &Path) -> io::Result<()> {
        let mut name = self.name();
        if let Some(Name { path, is_resumable }) = name.as_ref() {
            fs::rename(path, to)?;
            if *is_resumable {
                partial::remove_checkpoint(path);
            }
            *name = None;
        }
        Ok(())
    }

    /// Where it lies, while it has a name of its own.
    pub(super) fn path(&self) -> Option<PathBuf> {
        self.name().as_ref().map(|name| name.path.clone())
    }

    /// Runs `place`, which puts a checkpoint beside the file, unless the file has lost its name: then it says false.
    pub(super) fn make_resumable(&self, place: impl FnOnce() -> io::Result<()>) -> io::Result<bool> {
        let mut name = self.name();
        let Some(name) = name.as_mut() else { return Ok(false) };
        place()?;
        name.is_resumable = true;
        Ok(true)
    }

    /// Hands the name over to the caller.
    pub(super) fn take_name(&self) -> Option<PathBuf> {
        self.name().take().map(|name| name.path)
    }

    /// Removes it, with its checkpoint if it has one.
    pub(super) fn remove(&self) {
        if let Some(Name { path, is_resumable }) = self.name().take() {
            partial::remove(&path, is_resumable);
        }
    }

    fn name(&self) -> MutexGuard<'_, Option<Name>> {
        self.name.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Cuts a file that a download left at its checkpoint, and hashes it up to there.
fn check(partial: &Partial) -> io::Result<(File, Hasher)> {
    let mut file = partial::open_regular(File::options().read(true).write(true), &partial.path)?;
    let offset = partial.checkpoint.offset;
    file.set_len(offset)?;
    kill_point::pass("resume.cut");
    let (mut hasher, mut buffer, mut at) = (Hasher::new(), vec![0; 256 * 1024], 0);
    while at < offset {
        let step = (offset - at).min(buffer.len() as u64) as usize;
        file.read_exact_at(&mut buffer[..step], at)?;
        hasher.update(&buffer[..step]);
        at += step as u64;
    }
    // Where the writer goes on.
    file.seek(SeekFrom::Start(offset))?;
    kill_point::pass("resume.hashed");
    match partial.checkpoint.agrees(hasher.clone()) {
        true => Ok((file, hasher)),
        false => Err(io::Error::other("its bytes are not those that its checkpoint was made of")),
    }
}

/// The thread's side.
struct Writing {
    file: Arc<SpoolFile>,
    hashing: Hashing,
    written: u64,
    room: Room,
    checkpoints: Checkpoints,
}

impl Writing {
    fn run(mut self, incoming: mpsc::UnboundedReceiver<Order>) -> io::Result<Ended> {
        let (file, disk) = (self.file.clone(), self.room.disk().clone());
        let ended = self.follow(incoming).and_then(|is_whole| self.end(is_whole));
        if ended.is_err() {
            disk.note_failure(true);
            // What is in it can't be known any more, not even what an earlier checkpoint speaks of.
            file.remove();
        }
        ended
    }

    /// Appends what comes; says whether that is the whole.
    fn follow(&mut self, mut incoming: mpsc::UnboundedReceiver<Order>) -> io::Result<bool> {
        let (mut chunks, mut is_whole) = (Vec::new(), false);
        while let Some(first) = incoming.blocking_recv() {
            let mut next = Some(first);
            // One write for all that has queued up, and one wake-up of the readers.
            while let Some(order) = next {
                match order {
                    Order::Append(chunk) => chunks.push(chunk),
                    Order::Finish => is_whole = true,
                }
                next = incoming.try_recv().ok();
            }
            self.append(&mut chunks)?;
            self.file.watermark.send_replace(self.written);
            if is_whole {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Appends all that has queued up in one write: larger writes make larger folios in the page cache, which are
    /// cheaper to serve from (`docs/performance.md`).
    fn append(&mut self, chunks: &mut Vec<Arc<Chunk>>) -> io::Result<()> {
        let length: usize = chunks.iter().map(|chunk| chunk.bytes.len()).sum();
        self.room.make(&self.file.file, self.written + length as u64)?;
        write_all(&self.file.file, chunks)?;
        // Each gives its share of the memory back as soon as it is hashed.
        for chunk in chunks.drain(..) {
            self.hashing.update(&chunk, self.written);
            self.written += chunk.bytes.len() as u64;
        }
        // The last byte is about to be made durable with all others.
        if self.room.announced() != Some(self.written) {
            self.checkpoints.advance(&self.file, self.written, || self.hashing.hasher())?;
        }
        Ok(())
    }

    fn end(mut self, is_whole: bool) -> io::Result<Ended> {
        self.room.trim(&self.file.file, self.written)?;
        if is_whole {
            self.checkpoints.settle()?;
            return Ok(Some((self.hashing.finish()?.finish(), self.written)));
        }
        self.checkpoints.leave(&self.file, self.written, self.hashing.finish()?)?;
        Ok(None)
    }
}

/// Writes chunks at the file's position, in as few calls as the kernel allows.
fn write_all(mut file: &File, chunks: &[Arc<Chunk>]) -> io::Result<()> {
    let mut slices: Vec<_> =
        chunks.iter().map(|chunk| IoSlice::new(&chunk.bytes)).filter(|slice| !slice.is_empty()).collect();
    let mut left = slices.as_mut_slice();
    while !left.is_empty() {
        match file.write_vectored(left) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => IoSlice::advance_slices(&mut left, count),
            Err(cause) if cause.kind() == io::ErrorKind::Interrupted => {}
            Err(cause) => return Err(cause),
        }
    }
    Ok(())
}
