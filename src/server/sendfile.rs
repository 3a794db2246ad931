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
use socket2::SockRef;
use tokio::net::{TcpListener, TcpStream};

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
/// From here on the last or only piece of an answer is given whole to the socket of a client that is alone.
const WHOLE_FROM: u64 = 256 * 1024;
/// How many bytes may wait in a socket that TCP can't send yet, where there is a limit ([`send`]). The kernel's own is 4 MiB, and
/// what waits there is sent off when acknowledgements arrive, on loopback at the cost of the client's core. Written
/// when it can be sent, 1 MiB arrives at each of 64 clients a quarter faster, 1 GiB at one a fifth; with half of this, less than a
/// packet may wait, and a single client gets less than half (`docs/performance.md`).
const NOT_SENT_BYTES: u32 = 128 * 1024;
/// No limit but the kernel's own.
const NOT_LIMITED: u32 = 0;
/// TCP's own congestion control (RFC 5681), which every kernel has and every process may choose.
const UNPACED: &[u8] = b"reno";

/// A connection's promises, by slot, and how its socket is set.
#[derive(Debug, Default)]
pub(super) struct Promises {
    slots: Mutex<Vec<Option<Promised>>>,
    /// It waits for more before it sends what does not fill a packet.
    is_corked: AtomicBool,
    /// What it is given is the end of an answer: any number of bytes may wait, and it stays corked.
    takes_whole: AtomicBool,
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

    /// Sets the socket for the next answer. One that goes into it whole is corked from its first byte, and the socket stays
    /// so; any other when something is left to send, so that what the socket takes at once costs no call.
    fn begin(&self, stream: &TcpStream, whole: bool) {
        if self.takes_whole.swap(whole, Ordering::Relaxed) != whole {
            let limit = if whole { NOT_LIMITED } else { NOT_SENT_BYTES };
            // It only saves time, as all of these.
            let _ = SockRef::from(stream).set_tcp_notsent_lowat(limit);
        }
        if whole {
            self.cork(stream);
        } else {
            self.uncork(stream);
        }
    }

    /// Sends off what waits of an answer that is all in the socket.
    fn end(&self, stream: &TcpStream) {
        if self.takes_whole.load(Ordering::Relaxed) {
            // Sends, and leaves the cork (tcp(7), `TCP_NODELAY`): the next answer may be as long.
            let _ = rustix::net::sockopt::set_tcp_nodelay(stream, true);
        } else {
            self.uncork(stream);
        }
    }

    /// Whole packets only, until [`Promises::uncork`]: else each acknowledgement sends off the few bytes by which a page
    /// is longer than a packet, a third more packets in all. The kernel lets nothing wait for more than 200 ms.
    fn cork(&self, stream: &TcpStream) {
        if !self.is_corked.swap(true, Ordering::Relaxed) {
            let _ = rustix::net::sockopt::set_tcp_cork(stream, true);
        }
    }

    /// Sends off what waits. Must come before or with the last bytes of anything that is not a promise.
    pub(super) fn uncork(&self, stream: &TcpStream) {
        if self.is_corked.load(Ordering::Relaxed) {
            self.is_corked.store(false, Ordering::Relaxed);
            let _ = rustix::net::sockopt::set_tcp_cork(stream, false);
        }
    }
}

/// Sets what every connection of a listener inherits.
///
/// # Errors
/// What the kernel says.
pub(super) fn prepare(listener: &TcpListener) -> io::Result<()> {
    let is_local = listener.local_addr()?.ip().is_loopback();
    let listener = SockRef::from(listener);
    // Answers are written whole; waiting to fill a packet would only delay their ends.
    listener.set_tcp_nodelay(true)?;
    listener.set_tcp_notsent_lowat(NOT_SENT_BYTES)?;
    // BBR spreads what it sends over time, by timers, so that no queue on the way overflows. Within one machine there is none:
    // large files to a proxy or a client beside the service are two to three times as fast without.
    if is_local && listener.tcp_congestion()?.starts_with(b"bbr") {
        listener.set_tcp_congestion(UNPACED)?;
    }
    Ok(())
}

/// Where in a vectored write the first promise is.
pub(super) fn position(bufs: &[IoSlice<'_>]) -> Option<usize> {
    let window = WINDOW.as_ptr_range();
    bufs.iter().position(|slice| window.contains(&slice.as_ptr()))
}

/// Sends `before` and then as much of the promise behind it as the socket takes, without waiting. `is_alone` says that
/// no other connection is open.
///
/// # Errors
/// `WouldBlock` when the socket takes nothing; `UnexpectedEof` when the file has become shorter.
pub(super) fn send(
    stream: &TcpStream,
    promises: &Promises,
    before: &[IoSlice<'_>],
    promise: &IoSlice<'_>,
    is_alone: impl FnOnce() -> bool,
) -> io::Result<usize> {
    let Promised { range: FileRange { file, mut offset, length }, more } =
        promises.find(promise).ok_or_else(|| io::Error::other("a promise that was never made"))?;
    let mut sent = 0;
    if !before.is_empty() {
        // The last or only piece of a client that is alone is given at once: waking this process for each part of it would
        // cost the client's core more than sending what waits. Of a longer file it gets parts, so that both cores send; and
        // among others everybody does, so that nobody's waits for the whole of another's.
        promises.begin(stream, !more && length >= WHOLE_FROM && is_alone());
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
                promises.end(stream);
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

#[cfg(test)]
mod tests {
    use std::io::Write;

    use rustix::net::sockopt::tcp_cork;
    use tokio::io::AsyncReadExt;

    use super::*;

    async fn pair() -> io::Result<(TcpStream, TcpStream)> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        prepare(&listener)?;
        let client = TcpStream::connect(listener.local_addr()?).await?;
        Ok((listener.accept().await?.0, client))
    }

    #[tokio::test]
    async fn connections_inherit_a_listeners_options() -> io::Result<()> {
        let (server, _client) = pair().await?;
        assert!(server.nodelay()?);
        assert_eq!(SockRef::from(&server).tcp_notsent_lowat()?, NOT_SENT_BYTES);
        Ok(())
    }

    #[tokio::test]
    async fn a_socket_is_set_for_what_is_sent() -> io::Result<()> {
        let (server, mut client) = pair().await?;
        let mut file = tempfile::tempfile()?;
        let contents: Vec<u8> = (0..3 * WHOLE_FROM).map(|at| (at / 7) as u8).collect();
        file.write_all(&contents)?;
        let file = Arc::new(file);
        let promises = Promises::default();
        let cases = [
            // length, whether more follows, whether it is alone; then corked, and the limit
            (1000, false, true, false, NOT_SENT_BYTES),
            (WHOLE_FROM, false, true, true, NOT_LIMITED),
            (WHOLE_FROM + 1, false, true, true, NOT_LIMITED),
            (1000, false, true, false, NOT_SENT_BYTES),
            (WHOLE_FROM + 1, false, false, false, NOT_SENT_BYTES),
            (WHOLE_FROM, false, true, true, NOT_LIMITED),
            (WHOLE_FROM, true, true, true, NOT_SENT_BYTES),
            (WHOLE_FROM, true, false, true, NOT_SENT_BYTES),
            (1000, false, false, false, NOT_SENT_BYTES),
        ];
        for (length, more, is_alone, corked, limit) in cases {
            let range = FileRange { file: file.clone(), offset: 0, length };
            *promises.slots() = vec![Some(Promised { range, more })];
            let mut left = length;
            while left > 0 {
                let head: &[IoSlice<'_>] = if left == length { &[IoSlice::new(b"head")] } else { &[] };
                let promise = IoSlice::new(&WINDOW[..left as usize]);
                server.writable().await?;
                let sent = send(&server, &promises, head, &promise, || is_alone)?;
                let sent = sent as u64 - if left == length { 4 } else { 0 };
                let mut received = vec![0; (4 * head.len() as u64 + sent) as usize];
                client.read_exact(&mut received).await?;
                let at = (length - left) as usize;
                assert_eq!(&received[4 * head.len()..], &contents[at..at + sent as usize]);
                if let Some(Promised { range, .. }) = &mut promises.slots()[0] {
                    range.offset += sent;
                    range.length -= sent;
                }
                left -= sent;
            }
            assert_eq!(tcp_cork(&server)?, corked, "{length} more {more} alone {is_alone}");
            let is = SockRef::from(&server).tcp_notsent_lowat()?;
            assert_eq!(is, limit, "{length} more {more} alone {is_alone}");
        }
        Ok(())
    }
}
