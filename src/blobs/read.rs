//! Reading files into bodies: on the calling thread when the kernel has the page, on another when it would have to
//! wait for the disk, into buffers that are used again.
//!
//! Measured against the alternatives (`docs/performance.md`): handing every read to another thread costs 30–60 µs a
//! chunk; a mapping stalls the whole worker on a cold page.

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
use rustix::io::{Errno, ReadWriteFlags};
use tokio::task::JoinHandle;

/// Sizes of buffers, largest first, each with the bytes that may be in use in total before a smaller one is taken. A
/// client that reads slowly keeps its buffer, so the last kind must be small: it has no limit but the number of
/// connections.
const CLASSES: [(usize, usize); 3] = [(512 << 10, 12 << 20), (64 << 10, 20 << 20), (16 << 10, usize::MAX)];
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

/// Reads a file from an offset on, in chunks.
#[derive(Debug)]
pub struct Reader {
    file: Arc<File>,
    offset: u64,
    pool: BufferPool,
    /// A read that had to wait for the disk.
    pending: Option<JoinHandle<io::Result<Bytes>>>,
}

impl Reader {
    /// Begins at `offset`.
    pub fn new(file: Arc<File>, offset: u64, pool: BufferPool) -> Reader {
        Reader { file, offset, pool, pending: None }
    }

    /// Where the next chunk begins.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The next chunk, of at least one byte and none at or past `end`, which must be past the offset.
    ///
    /// # Errors
    /// What the disk says; `UnexpectedEof` when the file is shorter than `end` promised.
    pub fn poll_read(&mut self, cx: &mut Context<'_>, end: u64) -> Poll<io::Result<Bytes>> {
        if self.pending.is_none() {
            let wanted = end.saturating_sub(self.offset);
            match read_cached(&self.file, self.offset, self.pool.take(wanted), wanted) {
                Ok(bytes) => return Poll::Ready(self.advance(Ok(bytes))),
                Err(buffer) => {
                    let (file, offset) = (self.file.clone(), self.offset);
                    self.pending = Some(tokio::task::spawn_blocking(move || {
                        read_waiting(&file, offset, buffer, wanted)
                    }));
                }
            }
        }
        let Some(pending) = &mut self.pending else { return Poll::Pending };
        let read = ready!(Pin::new(pending).poll(cx));
        self.pending = None;
        Poll::Ready(self.advance(read.unwrap_or_else(|cause| Err(io::Error::other(cause)))))
    }

    /// [`Reader::poll_read`] as a future.
    pub async fn read(&mut self, end: u64) -> io::Result<Bytes> {
        std::future::poll_fn(|cx| self.poll_read(cx, end)).await
    }

    fn advance(&mut self, read: io::Result<Bytes>) -> io::Result<Bytes> {
        match read {
            Ok(bytes) if bytes.is_empty() => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(bytes) => {
                self.offset += bytes.len() as u64;
                Ok(bytes)
            }
            Err(cause) => Err(cause),
        }
    }
}

/// What the page cache has at once; gives the buffer back when that is nothing, or the file system can't tell.
fn read_cached(file: &File, offset: u64, mut buffer: Filled, wanted: u64) -> Result<Bytes, Filled> {
    let space = &mut [IoSliceMut::new(buffer.space(wanted))];
    match rustix::io::preadv2(file, space, offset, ReadWriteFlags::NOWAIT) {
        // 0 is the end of the file, which the waiting read will tell just as well.
        Ok(0) | Err(Errno::AGAIN | Errno::OPNOTSUPP | Errno::NOSYS | Errno::INTR) => Err(buffer),
        Ok(length) => {
            buffer.length = length;
            Ok(Bytes::from_owner(buffer))
        }
        // Let the waiting read meet the error again and report it.
        Err(_) => Err(buffer),
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
