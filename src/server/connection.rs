//! Accepting connections, and how long each may take for what.
//!
//! A connection is either waiting for its next request (*idle*), in the middle of a request's head, or being answered.
//! Each has its own limit. Instead of a timer per event, a connection notes when it changed, which costs an atomic store,
//! and one task looks at all of them a few times a second. The same notes say which has idled longest when a new client
//! finds every place taken.

use std::{
    collections::HashMap,
    io,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use http::Version;
use tokio::{
    io::{AsyncRead, AsyncWrite, Interest, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{Notify, OwnedSemaphorePermit, Semaphore},
};

use super::sendfile::{self, Promises};
use crate::config::Server;

/// RFC 9110, section 15.5.9.
const TOO_SLOW: &[u8] = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";

/// All connections.
#[derive(Debug)]
pub(super) struct Registry {
    connections: Mutex<HashMap<u64, Arc<Connection>>>,
    places: Arc<Semaphore>,
    started: Instant,
    next: AtomicU64,
    header_timeout: Duration,
    keepalive_timeout: Duration,
    write_idle_timeout: Duration,
}

/// What is known of a connection; times are milliseconds since the registry began, 0 meaning "not".
#[derive(Debug)]
pub(super) struct Connection {
    peer: SocketAddr,
    /// The same as text, for the log.
    peer_text: String,
    started: Instant,
    /// When it last began to wait for a request.
    idle_since: AtomicU64,
    /// When the first byte of the head came that is not complete yet.
    head_since: AtomicU64,
    /// Since when the client has taken nothing of what is waiting to be written.
    stuck_since: AtomicU64,
    /// Requests being answered.
    requests: AtomicU32,
    is_http2: AtomicBool,
    /// Close with a reset, so that the client can't take a broken body for a complete one.
    reset: AtomicBool,
    /// Close with a 408, because a head was begun and not completed in time.
    too_slow: AtomicBool,
    close: Notify,
    promises: Promises,
}

/// Marks one request as being answered until it is dropped.
#[derive(Debug)]
pub(super) struct Busy(Arc<Connection>);

impl Registry {
    pub(super) fn new(config: &Server) -> Arc<Registry> {
        // The other half of the descriptors is for artifacts, downloads and the database.
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(u64::MAX);
        let possible = usize::try_from(limit / 2).unwrap_or(usize::MAX).min(Semaphore::MAX_PERMITS);
        if possible < config.max_connections {
            tracing::warn!(
                possible,
                configured = config.max_connections,
                "fewer connections than server.max_connections: raise the limit on open files (ulimit -n)"
            );
        }
        Arc::new(Registry {
            connections: Mutex::default(),
            places: Arc::new(Semaphore::new(config.max_connections.min(possible))),
            started: Instant::now(),
            next: AtomicU64::new(0),
            header_timeout: config.header_timeout,
            keepalive_timeout: config.keepalive_timeout,
            write_idle_timeout: config.write_idle_timeout,
        })
    }

    /// The next connection, when there is a place for it: if need be that of the one that has idled longest.
    pub(super) async fn accept(
        self: &Arc<Self>,
        listener: &TcpListener,
    ) -> io::Result<(Socket, Arc<Connection>)> {
        let (stream, peer) = listener.accept().await?;
        let place = loop {
            if let Ok(place) = self.places.clone().try_acquire_owned() {
                break place;
            }
            self.close_idlest();
            // When all are being answered, wait until one ends or becomes idle.
            let freed = tokio::time::timeout(Duration::from_millis(100), self.places.clone().acquire_owned());
            if let Ok(Ok(place)) = freed.await {
                break place;
            }
        };
        let connection = Arc::new(Connection {
            peer,
            peer_text: peer.to_string(),
            started: self.started,
            idle_since: AtomicU64::new(0),
            head_since: AtomicU64::new(0),
            stuck_since: AtomicU64::new(0),
            requests: AtomicU32::new(0),
            is_http2: AtomicBool::new(false),
            reset: AtomicBool::new(false),
            too_slow: AtomicBool::new(false),
            close: Notify::new(),
            promises: Promises::default(),
        });
        // From the start a head is due.
        connection.mark(&connection.head_since);
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        self.connections().insert(id, connection.clone());
        let socket =
            Socket { stream, connection: connection.clone(), registry: self.clone(), id, _place: place };
        Ok((socket, connection))
    }

    /// Closes what has taken too long, for as long as it is polled.
    pub(super) async fn reap(self: Arc<Self>) {
        let shortest = self.header_timeout.min(self.keepalive_timeout).min(self.write_idle_timeout);
        let mut ticks =
            tokio::time::interval((shortest / 8).clamp(Duration::from_millis(20), Duration::from_secs(1)));
        loop {
            ticks.tick().await;
            let now = self.started.elapsed();
            for connection in self.connections().values() {
                let is_over = |since: &AtomicU64, limit: Duration| match since.load(Ordering::Relaxed) {
                    0 => false,
                    since => now.saturating_sub(Duration::from_millis(since)) >= limit,
                };
                if is_over(&connection.head_since, self.header_timeout) {
                    connection.too_slow.store(true, Ordering::Relaxed);
                    connection.close.notify_one();
                }
                if connection.is_idle() && is_over(&connection.idle_since, self.keepalive_timeout) {
                    connection.close.notify_one();
                }
                if is_over(&connection.stuck_since, self.write_idle_timeout) {
                    // It reads nothing, so it would not see a proper end either.
                    connection.reset();
                    connection.close.notify_one();
                }
            }
        }
    }

    /// Breaks off every connection.
    pub(super) fn close_all(&self) {
        for connection in self.connections().values() {
            connection.reset();
            connection.close.notify_one();
        }
    }

    /// Makes room for another connection.
    pub(super) fn close_idlest(&self) {
        let connections = self.connections();
        let waiting_since = |connection: &&Arc<Connection>| {
            if !connection.is_idle() {
                return None;
            }
            let of = |since: &AtomicU64| Some(since.load(Ordering::Relaxed)).filter(|&since| since != 0);
            of(&connection.idle_since).or(of(&connection.head_since))
        };
        let idlest = connections.values().filter(|connection| waiting_since(connection).is_some());
        if let Some(connection) = idlest.min_by_key(waiting_since) {
            connection.close.notify_one();
        }
    }

    /// One connection is open, no more.
    fn has_one(&self) -> bool {
        self.connections().len() == 1
    }

    fn connections(&self) -> MutexGuard<'_, HashMap<u64, Arc<Connection>>> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Connection {
    /// The other end.
    pub(super) fn peer(&self) -> SocketAddr {
        self.peer
    }

    /// The other end, as the log shows it.
    pub(super) fn peer_text(&self) -> &str {
        &self.peer_text
    }

    /// A request's head is complete.
    pub(super) fn begin_request(self: &Arc<Self>, version: Version) -> Busy {
        if version == Version::HTTP_2 {
            self.is_http2.store(true, Ordering::Relaxed);
        }
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.idle_since.store(0, Ordering::Relaxed);
        self.head_since.store(0, Ordering::Relaxed);
        Busy(self.clone())
    }

    /// Breaks the connection off with a reset as soon as it closes. Not for HTTP/2, where only the stream is reset.
    pub(super) fn reset(&self) {
        if !self.is_http2.load(Ordering::Relaxed) {
            self.reset.store(true, Ordering::Relaxed);
        }
    }

    /// Completes when the connection has to be dropped.
    pub(super) async fn closed(&self) {
        self.close.notified().await;
    }

    /// Parts of files that are waiting to be sent.
    pub(super) fn promises(&self) -> &Promises {
        &self.promises
    }

    /// Nothing is being answered or written.
    fn is_idle(&self) -> bool {
        self.requests.load(Ordering::Relaxed) == 0 && self.stuck_since.load(Ordering::Relaxed) == 0
    }

    /// A body gave bytes to send, or (`false`) was asked for more. Of HTTP/2 only this shows whether a client takes
    /// anything: the socket is not stuck when a stream's window is closed.
    pub(super) fn body_gave(&self, bytes: bool) {
        if !self.is_http2.load(Ordering::Relaxed) {
            return;
        }
        match bytes {
            true => self.mark(&self.stuck_since),
            false => self.stuck_since.store(0, Ordering::Relaxed),
        }
    }

    fn mark(&self, since: &AtomicU64) {
        since.store(self.started.elapsed().as_millis().max(1) as u64, Ordering::Relaxed);
    }

    fn has_read(&self) {
        if self.idle_since.load(Ordering::Relaxed) != 0 && !self.is_http2.load(Ordering::Relaxed) {
            self.idle_since.store(0, Ordering::Relaxed);
            self.mark(&self.head_since);
        }
    }

    fn has_written<T>(&self, written: &Poll<io::Result<T>>) {
        if self.is_http2.load(Ordering::Relaxed) {
            // Frames of all kinds come through here; see `body_gave`.
            return;
        }
        match (written.is_pending(), self.stuck_since.load(Ordering::Relaxed)) {
            (true, 0) => self.mark(&self.stuck_since),
            (false, since) if since != 0 => {
                self.stuck_since.store(0, Ordering::Relaxed);
                // The end of an answer was still being sent, so it is idle from now.
                if self.idle_since.load(Ordering::Relaxed) != 0 {
                    self.mark(&self.idle_since);
                }
            }
            _ => {}
        }
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        if self.0.requests.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.0.mark(&self.0.idle_since);
        }
    }
}

/// A connection's stream, which keeps the notes.
#[derive(Debug)]
pub(super) struct Socket {
    stream: TcpStream,
    connection: Arc<Connection>,
    registry: Arc<Registry>,
    id: u64,
    _place: OwnedSemaphorePermit,
}

impl Drop for Socket {
    fn drop(&mut self) {
        self.registry.connections().remove(&self.id);
        if self.connection.too_slow.load(Ordering::Relaxed) {
            // If it does not fit into the socket's buffer, the client is not reading anyway.
            let _ = self.stream.try_write(TOO_SLOW);
        }
        // A panic in a body must not look like its end either.
        if self.connection.reset.load(Ordering::Relaxed) || std::thread::panicking() {
            // Closing then sends RST instead of FIN. If that fails, the connection is gone anyway.
            let _ = self.stream.set_zero_linger();
        }
    }
}

impl Socket {
    /// Writes what stands before a promise, and then of it what the socket takes.
    fn poll_send(
        &self,
        cx: &mut Context<'_>,
        before: &[io::IoSlice<'_>],
        promise: &io::IoSlice<'_>,
    ) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.stream.poll_write_ready(cx))?;
            let promises = &self.connection.promises;
            let wanted = before.iter().map(|slice| slice.len()).sum::<usize>() + promise.len();
            let mut filled = None;
            let sent = self.stream.try_io(Interest::WRITABLE, || {
                let sent =
                    sendfile::send(&self.stream, promises, before, promise, || self.registry.has_one())?;
                // Else hyper would try again at once, to be told what a cheaper call can say.
                filled = (sent < wanted && sendfile::is_full(&self.stream)).then_some(sent);
                if filled.is_some() { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(sent) }
            });
            if let Some(sent) = filled {
                return Poll::Ready(Ok(sent));
            }
            match sent {
                Err(cause) if cause.kind() == io::ErrorKind::WouldBlock => {}
                Err(cause) => {
                    // The head has promised these bytes.
                    self.connection.reset();
                    return Poll::Ready(Err(cause));
                }
                sent => return Poll::Ready(sent),
            }
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        if buf.filled().len() > before {
            self.connection.has_read();
        }
        read
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        // hyper writes vectors, but if a layer ever takes them apart, a promise must still be recognised.
        let slice = io::IoSlice::new(buf);
        let written = match sendfile::position(&[slice]) {
            None => {
                self.connection.promises.uncork(&self.stream);
                Pin::new(&mut self.stream).poll_write(cx, buf)
            }
            Some(_) => self.poll_send(cx, &[], &slice),
        };
        self.connection.has_written(&written);
        written
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = match sendfile::position(bufs) {
            None => {
                self.connection.promises.uncork(&self.stream);
                Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
            }
            Some(at) => self.poll_send(cx, &bufs[..at], &bufs[at]),
        };
        self.connection.has_written(&written);
        written
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.connection.reset.load(Ordering::Relaxed) {
            // A FIN would make the broken body look like a short one.
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
