//! Bytes that go from the page cache to the socket without passing through this process: sendfile(2) below hyper.
//!
//! hyper wants bytes; a cached piece of a file is handed to it as a [`Promise`] instead. A promise knows its length, and
//! shows itself to a vectored write as a slice of [`WINDOW`], memory that is never read: its *address* says which of the
//! connection's promises is meant. The socket, which is where hyper's vectored writes end, recognises the address and
//! sends that part of the file. Nothing lies if that ever changes: every other way of looking at a promise
//! (`Buf::chunk`) reads the real bytes from the file.
//!
//! Copying through a buffer cost a third of the throughput from 64 KiB on (`docs/performance.md`). Only pieces that are
//! in the page cache come here, so that no worker waits for a disk.

use std::{
    cell::OnceCell,
    fmt,
    io::{self, IoSlice},
    os::unix::fs::FileExt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use bytes::{Buf, Bytes};
use rustix::{
    event::{PollFd, PollFlags, Timespec},
    io::Errno,
    net::SendFlags,
};
use tokio::net::TcpStream;

use super::{body::Ending, connection::Connection};
use crate::blobs::FileRange;

/// Promises of one connection that may be waiting to be sent; hyper queues fewer.
const SLOTS: usize = 64;
/// The most that one call sends; also the longest slice of the window.
const MOST_BYTES: usize = 2 << 20;
const PAGE_BYTES: u64 = 4096;
/// Addresses, never contents. It takes no memory: its pages are never touched.
static WINDOW: [u8; MOST_BYTES + SLOTS] = [0; MOST_BYTES + SLOTS];
/// What a promise shows of the real bytes at a time, to whoever wants to see them.
const COPY_BYTES: u64 = 16 * 1024;

/// A connection's promises, by slot, and whether its socket waits for more before it sends what does not fill a packet.
#[derive(Debug, Default)]
pub(super) struct Promises {
    slots: Mutex<Vec<Option<Promised>>>,
    is_corked: AtomicBool,
}

#[derive(Debug)]
struct Promised {
    range: FileRange,
    /// More of the same file follows at once.
    more: bool,
}

/// Part of a file, on its way to a socket.
pub(super) struct Promise {
    connection: Arc<Connection>,
    slot: usize,
    remaining: usize,
    copy: OnceCell<Bytes>,
    /// The end of the response, if this is its last part.
    ending: Option<Box<Ending>>,
}

impl fmt::Debug for Promise {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Promise")
            .field("slot", &self.slot)
            .field("remaining", &self.remaining)
            .finish_non_exhaustive()
    }
}

impl Promises {
    fn slots(&self) -> MutexGuard<'_, Vec<Option<Promised>>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a slice stands for, if it is one of the window.
    fn find(&self, slice: &IoSlice<'_>) -> Option<Promised> {
        let slot =
            (slice.as_ptr() as usize).checked_sub(WINDOW.as_ptr() as usize).filter(|&slot| slot < SLOTS)?;
        let slots = self.slots();
        let Promised { range, more } = slots.get(slot)?.as_ref()?;
        let length = range.length.min(slice.len() as u64);
        Some(Promised { range: FileRange { length, ..range.clone() }, more: *more || length < range.length })
    }

    /// Whole packets only, until [`Promises::uncork`]: else each acknowledgement sends off the few bytes by which a page
    /// is longer than a packet, a third more packets in all. The kernel lets nothing wait for more than 200 ms.
    ///
    /// Called when something is left to send, so that an answer which the socket takes whole costs no call, and
    /// the first packets leave as early as they can.
    fn cork(&self, stream: &TcpStream) {
        if !self.is_corked.swap(true, Ordering::Relaxed) {
            // It only saves packets.
            let _ = rustix::net::sockopt::set_tcp_cork(stream, true);
        }
    }

    /// Sends off what waits. Must come before or with the last bytes of anything.
    pub(super) fn uncork(&self, stream: &TcpStream) {
        if self.is_corked.load(Ordering::Relaxed) {
            self.is_corked.store(false, Ordering::Relaxed);
            let _ = rustix::net::sockopt::set_tcp_cork(stream, false);
        }
    }
}

/// Where in a vectored write the first promise is.
pub(super) fn position(bufs: &[IoSlice<'_>]) -> Option<usize> {
    let window = WINDOW.as_ptr_range();
    bufs.iter().position(|slice| window.contains(&slice.as_ptr()))
}

/// Sends `before` and then as much of the promise behind it as the socket takes, without waiting.
///
/// # Errors
/// `WouldBlock` when the socket takes nothing; `UnexpectedEof` when the file has become shorter.
pub(super) fn send(
    stream: &TcpStream,
    promises: &Promises,
    before: &[IoSlice<'_>],
    promise: &IoSlice<'_>,
) -> io::Result<usize> {
    let Promised { range: FileRange { file, mut offset, length }, more } =
        promises.find(promise).ok_or_else(|| io::Error::other("a promise that was never made"))?;
    let mut sent = 0;
    if !before.is_empty() {
        // MORE, so that a head does not travel in a packet of its own: by many clients a tenth faster. But a piece that
        // does not begin with a page has one page more than a packet takes beside the head, and is then half as fast.
        // And what was copied of a range, up to its first whole page, goes ahead: it wakes the client meanwhile.
        let more =
            if before.len() == 1 && offset % PAGE_BYTES == 0 { SendFlags::MORE } else { SendFlags::empty() };
        let flags = more | SendFlags::NOSIGNAL;
        sent = rustix::net::sendmsg(stream, before, &mut Default::default(), flags)?;
        if sent < before.iter().map(|slice| slice.len()).sum() {
            return Ok(sent);
        }
    }
    match rustix::fs::sendfile(stream, &*file, Some(&mut offset), length as usize) {
        Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
        Ok(count) => {
            if more || (count as u64) < length {
                promises.cork(stream);
            } else {
                promises.uncork(stream);
            }
            Ok(sent + count)
        }
        Err(Errno::AGAIN | Errno::INTR) if sent > 0 => Ok(sent),
        Err(Errno::INTR) => Err(io::ErrorKind::WouldBlock.into()),
        Err(cause) => Err(cause.into()),
    }
}

/// Whether the socket takes nothing now. If so, the kernel tells epoll when it does again.
pub(super) fn is_full(stream: &TcpStream) -> bool {
    let mut sockets = [PollFd::new(stream, PollFlags::OUT)];
    matches!(rustix::event::poll(&mut sockets, Some(&Timespec::default())), Ok(0))
}

impl Promise {
    /// Registers a part of a file with the connection it is to be sent on. `more` says that the next part is there
    /// already. `ending` is held until it was sent.
    pub(super) fn new(
        connection: &Arc<Connection>,
        range: FileRange,
        more: bool,
        ending: Option<Box<Ending>>,
    ) -> Promise {
        let remaining = range.length as usize;
        let promised = Promised { range, more };
        let mut slots = connection.promises().slots();
        let slot = slots.iter().position(Option::is_none).unwrap_or(slots.len());
        // hyper queues at most 16 pieces; a slot past the window would only cost the shortcut.
        match slots.get_mut(slot) {
            Some(free) => *free = Some(promised),
            None => slots.push(Some(promised)),
        }
        drop(slots);
        Promise { connection: connection.clone(), slot, remaining, copy: OnceCell::new(), ending }
    }

    /// The next real bytes.
    fn read(&self) -> io::Result<Bytes> {
        let slots = self.connection.promises().slots();
        let Promised { range, .. } =
            slots.get(self.slot).and_then(Option::as_ref).ok_or(io::ErrorKind::NotFound)?;
        let mut bytes = vec![0; range.length.min(COPY_BYTES) as usize];
        range.file.read_exact_at(&mut bytes, range.offset)?;
        Ok(bytes.into())
    }
}

impl Drop for Promise {
    fn drop(&mut self) {
        if let Some(slot) = self.connection.promises().slots().get_mut(self.slot) {
            *slot = None;
        }
    }
}

impl Buf for Promise {
    fn remaining(&self) -> usize {
        self.remaining
    }

    fn chunk(&self) -> &[u8] {
        if self.remaining == 0 {
            return &[];
        }
        // There is no way to return an error from here, and nothing else may be sent in place of these bytes: the panic
        // ends this connection, and only this one.
        self.copy
            .get_or_init(|| self.read().unwrap_or_else(|cause| panic!("can't read a promised file: {cause}")))
    }

    fn chunks_vectored<'a>(&'a self, dst: &mut [IoSlice<'a>]) -> usize {
        match dst.first_mut() {
            Some(first) if self.remaining > 0 && self.slot < SLOTS => {
                *first = IoSlice::new(&WINDOW[self.slot..self.slot + self.remaining.min(MOST_BYTES)]);
                1
            }
            Some(first) if self.remaining > 0 => {
                *first = IoSlice::new(self.chunk());
                1
            }
            _ => 0,
        }
    }

    fn advance(&mut self, count: usize) {
        self.remaining -= count;
        if let Some(ending) = self.ending.as_mut().filter(|_| self.remaining == 0) {
            ending.complete();
        }
        if let Some(Some(Promised { range, .. })) = self.connection.promises().slots().get_mut(self.slot) {
            range.offset += count as u64;
            range.length -= count as u64;
        }
        match self.copy.take() {
            Some(mut copy) if count < copy.len() => {
                copy.advance(count);
                // It was just taken, so it is empty.
                let _ = self.copy.set(copy);
            }
            _ => {}
        }
    }
}
