//! Reading files into bodies: on the calling thread when the kernel has the page, on another when it would have to
//! wait for the disk, into buffers that are used again.
//!
//! What is cached is not even read where the reader can send part of a file by itself ([`Chunk::Cached`]).
//!
//! Measured against the alternatives: handing every read to another thread costs 30–60 µs a chunk; a mapping stalls the
//! whole worker on a cold page.

use std::{
    fs::File,
    future::Future,
    io::{self, IoSliceMut},
    os::unix::fs::FileExt,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use rustix::io::ReadWriteFlags;
use tokio::task::JoinHandle;

/// Sizes of buffers, largest first, each with the bytes that may be in use in total before a smaller one is taken. A
/// client that reads slowly keeps its buffer, so the last kind must be small: it has no limit but the number of
/// connections.
const CLASSES: [(usize, usize); 3] = [(256 << 10, 12 << 20), (64 << 10, 20 << 20), (16 << 10, usize::MAX)];
/// Shorter pieces are cheaper to copy.
const REFER_FROM: u64 = 8 << 10;
const PAGE_BYTES: u64 = 4096;
/// The longest part of a file that is given out at once.
const REFER_BYTES: u64 = 2 << 20;
/// How far apart the bytes are by which it is told whether the page cache has them. Looking every 256 KiB
/// took up to 8 % more of the processor for a large file, and shows little more: the kernel reads ahead in one piece.
const PROBE_EVERY: u64 = 1 << 20;
/// How far a file is taken to be cold after a piece of it was.
const COLD_BYTES: u64 = 4 << 20;
/// Bytes of unused buffers kept for the next read.
const KEEP_BYTES: usize = 12 << 20;

/// Buffers for bodies. Cloning gives another handle to the same pool.
#[derive(Debug, Clone, Default)]
pub struct BufferPool(Arc<Mutex<Pool>>);

#[derive(Debug, Default)]
struct Pool {
    in_use: usize,
    kept: usize,
    free: [Vec<Box<[u8]>>; CLASSES.len()],
}

/// A filled buffer; it goes back to the pool when the last slice of it is dropped.
struct Filled {
    buffer: Option<Box<[u8]>>,
    length: usize,
    class: usize,
    pool: BufferPool,
}

impl BufferPool {
    /// The largest buffer that the load allows and `wanted` bytes make use of.
    fn take(&self, wanted: u64) -> Filled {
        let mut pool = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = |class: usize| {
            let (size, limit) = CLASSES[class];
            pool.in_use + size <= limit
                && wanted > CLASSES.get(class + 1).map_or(0, |&(smaller, _)| smaller as u64)
        };
        let class = (0..CLASSES.len() - 1).find(|&class| fits(class)).unwrap_or(CLASSES.len() - 1);
        let size = CLASSES[class].0;
        pool.in_use += size;
        let kept = pool.free[class].pop();
        pool.kept -= kept.as_ref().map_or(0, |_| size);
        drop(pool);
        let buffer = kept.unwrap_or_else(|| vec![0; size].into_boxed_slice());
        Filled { buffer: Some(buffer), length: 0, class, pool: self.clone() }
    }
}

impl Filled {
    fn space(&mut self, upto: u64) -> &mut [u8] {
        let buffer = self.buffer.as_deref_mut().unwrap_or_default();
        let length = (buffer.len() as u64).min(upto) as usize;
        &mut buffer[..length]
    }
}

impl AsRef<[u8]> for Filled {
    fn as_ref(&self) -> &[u8] {
        self.buffer.as_deref().map_or(&[], |buffer| &buffer[..self.length])
    }
}

impl Drop for Filled {
    fn drop(&mut self) {
        let mut pool = self.pool.0.lock().unwrap_or_else(PoisonError::into_inner);
        let size = CLASSES[self.class].0;
        pool.in_use -= size;
        if pool.kept + size <= KEEP_BYTES
            && let Some(buffer) = self.buffer.take()
        {
            pool.kept += size;
            pool.free[self.class].push(buffer);
        }
    }
}

/// A piece of a file.
#[derive(Debug)]
pub enum Chunk {
    /// Its bytes.
    Bytes(Bytes),
    /// Where they are; the page cache has them.
    Cached(FileRange),
}

/// Part of an open file, at least one byte.
#[derive(Debug, Clone)]
pub struct FileRange {
    /// The file.
    pub file: Arc<File>,
    /// Where the part begins.
    pub offset: u64,
    /// How many bytes it has.
    pub length: u64,
}

/// What a [`Reader`] may give out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Bytes only.
    Copy,
    /// Also [`Chunk::Cached`], for who can send a part of a file without reading it.
    Refer,
}

impl Chunk {
    /// How many bytes it has, at least one.
    #[expect(clippy::len_without_is_empty, reason = "it is never empty")]
    pub fn len(&self) -> u64 {
        match self {
            Chunk::Bytes(bytes) => bytes.len() as u64,
            Chunk::Cached(range) => range.length,
        }
    }
}

/// Where a reader found what it gave out last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Before {
    /// It has given out nothing.
    Nothing,
    PageCache,
    Disk,
}

/// Reads a file from an offset on, in chunks.
#[derive(Debug)]
pub struct Reader {
    file: Arc<File>,
    offset: u64,
    pool: BufferPool,
    mode: Mode,
    /// Where what comes before the offset was found.
    before: Before,
    /// The page cache lacked a piece before this offset, so that it will lack more: until there nothing is tried on the
    /// calling thread, because even asking makes the kernel read ahead, and that can wait for the disk's queue.
    cold_until: u64,
    /// A read that had to wait for the disk.
    pending: Option<JoinHandle<io::Result<Bytes>>>,
}

impl Reader {
    /// Begins at `offset`.
    pub fn new(file: Arc<File>, offset: u64, pool: BufferPool, mode: Mode) -> Reader {
        Reader { file, offset, pool, mode, before: Before::Nothing, cold_until: 0, pending: None }
    }

    /// Where the next chunk begins.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The next chunk, of at least one byte and none at or past `end`, which must be past the offset.
    ///
    /// # Errors
    /// What the disk says; `UnexpectedEof` when the file is shorter than `end` promised.
    pub fn poll_read(&mut self, cx: &mut Context<'_>, end: u64) -> Poll<io::Result<Chunk>> {
        if self.pending.is_none() {
            let wanted = end.saturating_sub(self.offset);
            if self.offset >= self.cold_until {
                if let Some(chunk) = self.read_cached(wanted) {
                    return Poll::Ready(Ok(chunk));
                }
                self.cold_until = self.offset + COLD_BYTES;
            }
            let buffer = self.pool.take(wanted);
            self.before = Before::Disk;
            let (file, offset) = (self.file.clone(), self.offset);
            self.pending =
                Some(tokio::task::spawn_blocking(move || read_waiting(&file, offset, buffer, wanted)));
        }
        let Some(pending) = &mut self.pending else { return Poll::Pending };
        let read = ready!(Pin::new(pending).poll(cx));
        self.pending = None;
        Poll::Ready(self.advance(read.unwrap_or_else(|cause| Err(io::Error::other(cause)))))
    }

    /// [`Reader::poll_read`] as a future.
    pub async fn read(&mut self, end: u64) -> io::Result<Chunk> {
        std::future::poll_fn(|cx| self.poll_read(cx, end)).await
    }

    /// The next chunk, if the page cache has it.
    fn read_cached(&mut self, mut wanted: u64) -> Option<Chunk> {
        let into_page = self.offset % PAGE_BYTES;
        let before = std::mem::replace(&mut self.before, Before::PageCache);
        if self.mode == Mode::Refer && wanted >= REFER_FROM {
            if before == Before::Nothing && into_page != 0 {
                // The rest of a page, so that what follows begins with one: 64 KiB then take no more pages than a packet
                // can, beside the head and this.
                wanted = PAGE_BYTES - into_page;
            } else {
                let is_going_on = before == Before::PageCache;
                let length = cached(&self.file, self.offset, wanted.min(REFER_BYTES), is_going_on);
                if length > 0 {
                    let range = FileRange { file: self.file.clone(), offset: self.offset, length };
                    self.offset += length;
                    return Some(Chunk::Cached(range));
                }
            }
        }
        let bytes = read_cached(&self.file, self.offset, self.pool.take(wanted), wanted)?;
        self.offset += bytes.len() as u64;
        Some(Chunk::Bytes(bytes))
    }

    fn advance(&mut self, read: io::Result<Bytes>) -> io::Result<Chunk> {
        match read {
            Ok(bytes) if bytes.is_empty() => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(bytes) => {
                self.offset += bytes.len() as u64;
                Ok(Chunk::Bytes(bytes))
            }
            Err(cause) => Err(cause),
        }
    }
}

/// How many bytes from `offset` on the page cache has, up to `most`, as far as a byte in every so many can tell: the
/// kernel reads in larger steps. If it is wrong, somebody waits once. `is_going_on` says that it has the byte before.
fn cached(file: &File, offset: u64, most: u64, is_going_on: bool) -> u64 {
    let has = |at: u64| {
        let mut byte = [0];
        let space = &mut [IoSliceMut::new(&mut byte)];
        matches!(rustix::io::preadv2(file, space, at, ReadWriteFlags::NOWAIT), Ok(1))
    };
    let mut length = if is_going_on { most.min(PROBE_EVERY) } else { 0 };
    while length < most && has(offset + length) {
        length = most.min(length + PROBE_EVERY);
    }
    // Of the last step only the beginning is known so far.
    if length > 0 && !has(offset + length - 1) { (length - 1) / PROBE_EVERY * PROBE_EVERY } else { length }
}

/// What the page cache has at once; `None` when that is nothing, or the file system can't tell.
fn read_cached(file: &File, offset: u64, mut buffer: Filled, wanted: u64) -> Option<Bytes> {
    let space = &mut [IoSliceMut::new(buffer.space(wanted))];
    match rustix::io::preadv2(file, space, offset, ReadWriteFlags::NOWAIT) {
        // 0 is the end of the file. That, and any error, the waiting read meets again and reports.
        Ok(0) | Err(_) => None,
        Ok(length) => {
            buffer.length = length;
            Some(Bytes::from_owner(buffer))
        }
    }
}

fn read_waiting(file: &File, offset: u64, mut buffer: Filled, wanted: u64) -> io::Result<Bytes> {
    loop {
        match file.read_at(buffer.space(wanted), offset) {
            Ok(length) => {
                buffer.length = length;
                return Ok(Bytes::from_owner(buffer));
            }
            Err(cause) if cause.kind() == io::ErrorKind::Interrupted => {}
            Err(cause) => return Err(cause),
        }
    }
}
