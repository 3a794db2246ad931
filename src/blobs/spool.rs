//! A growing file: written and hashed by one thread as a download arrives, read by everyone who waits for it.
//!
//! The writer never waits for a reader and no byte is held for one: readers follow the watermark and read the file.
//! Bytes on their way to the disk come out of one pool for all downloads, so memory is bounded whatever the number
//! and size of the downloads.

use std::{
    fs::{self, File},
    io,
    os::{fd::AsRawFd, unix::fs::FileExt},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use rustix::fs::FallocateFlags;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch},
    task::JoinHandle,
};

use crate::{
    artifact::{Digest, digest::Hasher},
    error::Error,
};

/// Bytes of one download that may wait for the disk.
const WINDOW_BYTES: usize = 1 << 20;
/// How far the file's blocks are allocated ahead of the writer, at most: a claimed length must not cost more.
const ALLOCATE_AHEAD: u64 = 64 << 20;
/// Below this, allocating ahead costs more than it saves.
const ALLOCATE_FROM: u64 = 1 << 20;
/// Write-out to the disk is begun every so many bytes, so that the final fsync has little left to wait for.
const WRITE_OUT_EVERY: u64 = 8 << 20;

/// The writing end of a growing file. Dropping it before [`Spool::finish`] gives the file up.
#[derive(Debug)]
pub struct Spool {
    file: Unpublished,
    chunks: mpsc::UnboundedSender<Chunk>,
    thread: JoinHandle<io::Result<(Digest, u64)>>,
    window: Arc<Semaphore>,
    pool: Arc<Semaphore>,
    sent: u64,
}

/// A growing file as its readers see it.
#[derive(Debug)]
pub struct SpoolFile {
    file: Arc<File>,
    /// Where it lies now; `None` once it has its final name.
    path: Mutex<Option<PathBuf>>,
    /// Bytes that may be read.
    watermark: watch::Sender<u64>,
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

/// Removes the file's name when it is dropped before the file was published; readers keep what they have open.
#[derive(Debug)]
pub(super) struct Unpublished(pub(super) Arc<SpoolFile>);

impl Drop for Unpublished {
    fn drop(&mut self) {
        let path = self.0.path.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(Err(cause)) = path.map(fs::remove_file) {
            tracing::warn!(error = %cause, "leftover spool file, removed at the next start");
        }
    }
}

impl Written {
    /// The file.
    pub fn file(&self) -> &Arc<SpoolFile> {
        &self.file.0
    }
}

/// A piece on its way to the disk, and its share of the memory.
struct Chunk {
    bytes: Bytes,
    _window: OwnedSemaphorePermit,
    _pool: OwnedSemaphorePermit,
}

impl Spool {
    pub(super) fn create(path: PathBuf, room: Room, pool: Arc<Semaphore>) -> Result<Spool, Error> {
        let file = File::options()
            .create_new(true)
            .read(true)
            .write(true)
            .open(&path)
            .map_err(|cause| Error::io("Failed to write to cache storage", &cause))?;
        let (watermark, _) = watch::channel(0);
        let file = Arc::new(SpoolFile { file: Arc::new(file), path: Mutex::new(Some(path)), watermark });
        let (chunks, incoming) = mpsc::unbounded_channel();
        let writer = Writing { file: file.clone(), hasher: Hasher::new(), written: 0, written_out: 0, room };
        let thread = tokio::task::spawn_blocking(move || writer.run(incoming));
        Ok(Spool {
            file: Unpublished(file),
            chunks,
            thread,
            window: Arc::new(Semaphore::new(WINDOW_BYTES / 1024)),
            pool,
            sent: 0,
        })
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
        if self.chunks.send(Chunk { bytes, _window, _pool }).is_err() {
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
        let mut watermark = self.file.0.watermark();
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
        &self.file.0
    }

    /// Waits until every byte is written and hashed.
    pub async fn finish(self) -> Result<Written, Error> {
        drop(self.chunks);
        match self.thread.await {
            Ok(Ok((digest, size))) => Ok(Written { digest, size, file: self.file }),
            Ok(Err(cause)) => Err(Error::io("Failed to write to cache storage", &cause)),
            Err(_) => Err(writer_gone()),
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
        let mut path = self.path.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(from) = path.as_ref() {
            fs::rename(from, to)?;
            *path = None;
        }
        Ok(())
    }
}

/// The thread's side.
struct Writing {
    file: Arc<SpoolFile>,
    hasher: Hasher,
    written: u64,
    written_out: u64,
    room: Room,
}

impl Writing {
    fn run(mut self, mut incoming: mpsc::UnboundedReceiver<Chunk>) -> io::Result<(Digest, u64)> {
        while let Some(first) = incoming.blocking_recv() {
            self.append(&first)?;
            // One wake-up of the readers for all that has queued up, not one for each piece.
            while let Ok(next) = incoming.try_recv() {
                self.append(&next)?;
            }
            self.file.watermark.send_replace(self.written);
        }
        self.room.trim(&self.file.file, self.written)?;
        Ok((self.hasher.finish(), self.written))
    }

    fn append(&mut self, chunk: &Chunk) -> io::Result<()> {
        let bytes = &chunk.bytes;
        self.room.make(&self.file.file, self.written + bytes.len() as u64)?;
        self.file.file.write_all_at(bytes, self.written)?;
        self.hasher.update(bytes);
        self.written += bytes.len() as u64;
        if self.written - self.written_out >= WRITE_OUT_EVERY {
            write_out(&self.file.file, self.written_out, self.written - self.written_out)?;
            self.written_out = self.written;
        }
        Ok(())
    }
}

/// Begins writing a range of dirty pages to the disk, without waiting. An error here is a lost page, and counts like a
/// failed fsync.
fn write_out(file: &File, offset: u64, length: u64) -> io::Result<()> {
    // SAFETY: a plain system call on a descriptor that `file` keeps open; it touches no memory of ours.
    let result = unsafe {
        libc::sync_file_range(
            file.as_raw_fd(),
            offset as libc::off64_t,
            length as libc::off64_t,
            libc::SYNC_FILE_RANGE_WRITE,
        )
    };
    match result {
        0 => Ok(()),
        _ => match io::Error::last_os_error() {
            // The final fsync does all of it then.
            cause if cause.raw_os_error() == Some(libc::ENOSYS) => Ok(()),
            cause if cause.raw_os_error() == Some(libc::ESPIPE) => Ok(()),
            cause => Err(cause),
        },
    }
}

/// One download's claim on the disk: what it announced and has not allocated yet is kept from other downloads.
#[derive(Debug)]
pub(super) struct Room {
    reserved: Arc<AtomicU64>,
    /// This download's part of `reserved`.
    outstanding: u64,
    announced: Option<u64>,
    allocated: u64,
    can_allocate: bool,
    min_free_bytes: u64,
    base: PathBuf,
}

impl Room {
    /// Claims room for `announced` bytes, refusing when that would leave less than `min_free_bytes`.
    pub(super) fn reserve(
        reserved: Arc<AtomicU64>,
        min_free_bytes: u64,
        base: &Path,
        announced: Option<u64>,
    ) -> Result<Room, Error> {
        let free = free_bytes(base).map_err(|cause| Error::io("Failed to write to cache storage", &cause))?;
        let outstanding = announced.unwrap_or(0);
        let others = reserved.fetch_add(outstanding, Ordering::Relaxed);
        let room = Room {
            reserved,
            outstanding,
            announced,
            allocated: 0,
            can_allocate: true,
            min_free_bytes,
            base: base.to_owned(),
        };
        // From here on dropping `room` gives the claim back.
        match free.checked_sub(others).and_then(|left| left.checked_sub(outstanding)) {
            Some(left) if left >= min_free_bytes => Ok(room),
            _ => Err(Error::disk_full()),
        }
    }

    /// Makes sure that the file may grow to `end`, allocating blocks in growing steps ahead of the writer.
    fn make(&mut self, file: &File, end: u64) -> io::Result<()> {
        if end <= self.allocated {
            return Ok(());
        }
        let ahead = self.allocated.clamp(ALLOCATE_FROM, ALLOCATE_AHEAD);
        let target = match self.announced {
            Some(length) => (self.allocated + ahead).min(length).max(end),
            None => (self.allocated + ahead).max(end),
        };
        let step = target - self.allocated;
        if self.announced.is_none_or(|length| end > length)
            && free_bytes(&self.base)? < self.min_free_bytes + step
        {
            return Err(io::Error::from(io::ErrorKind::StorageFull));
        }
        if self.can_allocate
            && self.announced.is_none_or(|length| length > ALLOCATE_FROM)
            && target > ALLOCATE_FROM
        {
            match rustix::fs::fallocate(file, FallocateFlags::KEEP_SIZE, self.allocated, step) {
                Ok(()) => {}
                Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => self.can_allocate = false,
                Err(cause) => return Err(cause.into()),
            }
        }
        self.allocated = target;
        let settled = step.min(self.outstanding);
        self.outstanding -= settled;
        self.reserved.fetch_sub(settled, Ordering::Relaxed);
        Ok(())
    }

    /// Gives back blocks allocated past the end.
    fn trim(&mut self, file: &File, length: u64) -> io::Result<()> {
        if self.allocated > length { file.set_len(length) } else { Ok(()) }
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.reserved.fetch_sub(self.outstanding, Ordering::Relaxed);
    }
}

/// Bytes free to an ordinary user on the file system of `path`.
pub(super) fn free_bytes(path: &Path) -> io::Result<u64> {
    let stat = rustix::fs::statvfs(path)?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}
