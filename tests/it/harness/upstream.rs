//! The upstream: a raw server, a thread a connection, whose every path is a script.
//!
//! A script is a closure that gets the [`Exchange`] and writes what it likes; it can count attempts, wait at a
//! [`super::Gate`], cut, reset and lie. [`Reply`] covers the well-behaved case and its small sins.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::client::Head;
use super::{Content, PATIENCE};

type Script = Arc<dyn Fn(&mut Exchange) -> io::Result<()> + Send + Sync>;

trait Wire: Read + Write + Send {}
impl<T: Read + Write + Send> Wire for T {}

#[derive(Default)]
struct Shared {
    scripts: Mutex<HashMap<String, Script>>,
    heads: Mutex<Vec<Head>>,
    stopped: AtomicBool,
}

/// A running upstream; it stops when dropped.
pub struct Upstream {
    address: SocketAddr,
    scheme: &'static str,
    shared: Arc<Shared>,
}

impl Upstream {
    /// Plain HTTP on a free port of 127.0.0.1.
    pub fn start() -> Upstream {
        Upstream::bind("127.0.0.1:0", None)
    }

    /// HTTPS with this configuration.
    pub fn start_tls(tls: Arc<rustls::ServerConfig>) -> Upstream {
        Upstream::bind("127.0.0.1:0", Some(tls))
    }

    /// At a chosen address, with TLS or without.
    pub fn bind(address: &str, tls: Option<Arc<rustls::ServerConfig>>) -> Upstream {
        Upstream::on_listener(TcpListener::bind(address).expect("the upstream's address is free"), tls)
    }

    /// On a listener of the test's own making.
    pub fn on_listener(listener: TcpListener, tls: Option<Arc<rustls::ServerConfig>>) -> Upstream {
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared::default());
        let scheme = if tls.is_some() { "https" } else { "http" };
        let state = shared.clone();
        std::thread::spawn(move || accept(&listener, &state, tls.as_ref()));
        Upstream { address, scheme, shared }
    }

    /// Its address.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The URL of a path here.
    pub fn url(&self, path: &str) -> String {
        format!("{}://{}{path}", self.scheme, self.address)
    }

    /// Sets the script of a path (without query); returns the path's URL.
    pub fn on<F>(&self, path: &str, script: F) -> String
    where
        F: Fn(&mut Exchange) -> io::Result<()> + Send + Sync + 'static,
    {
        self.shared.scripts.lock().unwrap().insert(path.to_string(), Arc::new(script));
        self.url(path)
    }

    /// Serves one reply at a path; returns the path's URL.
    pub fn serve(&self, path: &str, reply: Reply) -> String {
        self.on(path, move |x| x.reply(&reply))
    }

    /// Serves one reply at a path as a flaky line would: every connection is closed after `piece` bytes of the body.
    /// Returns the path's URL, and the count of body bytes sent so far.
    pub fn serve_in_pieces(&self, path: &str, reply: Reply, piece: u64) -> (String, Arc<AtomicU64>) {
        let sent = Arc::new(AtomicU64::new(0));
        let count = sent.clone();
        let url = self.on(path, move |x| {
            let (start, content) = (x.begin(&reply)?, &reply.content);
            content.each(start, start + piece, |bytes| {
                count.fetch_add(bytes.len() as u64, Ordering::SeqCst);
                x.raw(bytes)
            })
        });
        (url, sent)
    }

    /// Redirects a path; returns the path's URL.
    pub fn redirect(&self, path: &str, status: u16, location: &str) -> String {
        let location = location.to_string();
        self.on(path, move |x| {
            x.send(&format!("HTTP/1.1 {status} Moved\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n"))
        })
    }

    /// All request heads so far for a path (without query).
    pub fn requests(&self, path: &str) -> Vec<Head> {
        let heads = self.shared.heads.lock().unwrap();
        heads.iter().filter(|head| path_of(head) == path).cloned().collect()
    }

    /// How many requests came for a path.
    pub fn count(&self, path: &str) -> usize {
        self.requests(path).len()
    }

    /// How many requests came at all.
    pub fn total(&self) -> usize {
        self.shared.heads.lock().unwrap().len()
    }

    /// Stops listening: from now on connections are refused.
    pub fn stop(&self) {
        if !self.shared.stopped.swap(true, Ordering::SeqCst) {
            // Wakes the acceptor; the listener is closed once it has seen the flag.
            drop(TcpStream::connect(self.address));
            while TcpStream::connect(self.address).is_ok() {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        self.stop();
    }
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>, tls: Option<&Arc<rustls::ServerConfig>>) {
    for stream in listener.incoming() {
        if shared.stopped.load(Ordering::SeqCst) {
            return;
        }
        let Ok(stream) = stream else { continue };
        let (shared, tls) = (shared.clone(), tls.cloned());
        std::thread::spawn(move || {
            // An error here is the peer's leaving; the test sees it from the other side.
            let _ = converse(stream, &shared, tls);
        });
    }
}

/// Serves one request, then closes.
fn converse(stream: TcpStream, shared: &Shared, tls: Option<Arc<rustls::ServerConfig>>) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE * 2))?;
    stream.set_write_timeout(Some(PATIENCE * 2))?;
    let socket = stream.try_clone()?;
    let mut wire: Box<dyn Wire> = match tls {
        None => Box::new(stream),
        Some(config) => {
            let session = rustls::ServerConnection::new(config).map_err(io::Error::other)?;
            Box::new(rustls::StreamOwned::new(session, stream))
        }
    };
    let head = read_head(&mut wire)?;
    let path = path_of(&head);
    let attempt = {
        let mut heads = shared.heads.lock().unwrap();
        heads.push(head.clone());
        heads.iter().filter(|head| path_of(head) == path).count()
    };
    let script = shared.scripts.lock().unwrap().get(&path).cloned();
    let mut exchange = Exchange { head, attempt, wire, socket };
    match script {
        Some(script) => script(&mut exchange)?,
        None => exchange.reply(&Reply::new(404, Content::of(b"no such path")))?,
    }
    exchange.wire.flush()?;
    exchange.socket.shutdown(std::net::Shutdown::Write)
}

fn read_head(wire: &mut impl Read) -> io::Result<Head> {
    let mut text = Vec::new();
    let mut byte = [0];
    while !text.ends_with(b"\r\n\r\n") {
        if wire.read(&mut byte)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        text.push(byte[0]);
    }
    Ok(Head::parse(&String::from_utf8_lossy(&text)))
}

fn path_of(head: &Head) -> String {
    let target = head.line.split(' ').nth(1).unwrap_or("");
    target.split('?').next().unwrap_or("").to_string()
}

/// One request and the wire to answer it on.
pub struct Exchange {
    /// The request.
    pub head: Head,
    /// How many requests for this path there were, this one included.
    pub attempt: usize,
    wire: Box<dyn Wire>,
    socket: TcpStream,
}

impl Exchange {
    /// The request's method.
    pub fn method(&self) -> &str {
        self.head.line.split(' ').next().unwrap_or("")
    }

    /// The first byte of an open `Range: bytes=N-`.
    pub fn range_start(&self) -> Option<u64> {
        let range = self.head.get("Range")?.strip_prefix("bytes=")?;
        range.split('-').next()?.parse().ok()
    }

    /// Sends text as it is.
    pub fn send(&mut self, text: &str) -> io::Result<()> {
        self.raw(text.as_bytes())
    }

    /// Sends bytes as they are.
    pub fn raw(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.wire.write_all(bytes)?;
        self.wire.flush()
    }

    /// Sends the content's bytes of `start..end`.
    pub fn body(&mut self, content: &Content, start: u64, end: u64) -> io::Result<()> {
        content.each(start, end, |piece| self.wire.write_all(piece))?;
        self.wire.flush()
    }

    /// Sends one chunk.
    pub fn chunk(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.send(&format!("{:x}\r\n", bytes.len()))?;
        self.raw(bytes)?;
        self.send("\r\n")
    }

    /// Ends the connection with RST instead of FIN.
    pub fn reset(&mut self) -> io::Result<()> {
        rustix::net::sockopt::set_socket_linger(&self.socket, Some(Duration::ZERO))?;
        Err(io::ErrorKind::ConnectionReset.into())
    }

    /// Sends nothing more, and waits until the peer gives up (or twice [`PATIENCE`]).
    pub fn hang(&mut self) -> io::Result<()> {
        while self.wire.read(&mut [0; 1024])? > 0 {}
        Ok(())
    }

    /// Answers as `reply` says.
    pub fn reply(&mut self, reply: &Reply) -> io::Result<()> {
        let start = self.begin(reply)?;
        if self.method() == "HEAD" || matches!(reply.status, 204 | 304) {
            Ok(())
        } else {
            self.body(&reply.content, start, reply.content.len())
        }
    }

    /// Sends the head of an answer as `reply` says; returns where its body begins in the content.
    fn begin(&mut self, reply: &Reply) -> io::Result<u64> {
        let whole = reply.content.len();
        let range = self.range_start().filter(|start| reply.ranges && reply.status == 200 && *start < whole);
        let validator = reply.fields.iter().find(|(name, _)| name == "ETag").map(|(_, tag)| tag.as_str());
        let range = range.filter(|_| self.head.get("If-Range").is_none_or(|tag| Some(tag) == validator));
        let start = range.unwrap_or(0);
        let status = if range.is_some() { 206 } else { reply.status };
        self.send(&reply.head(status, start))?;
        Ok(start)
    }
}

/// A well-behaved answer: right length, ranges by RFC 9110, any further fields.
#[derive(Clone)]
pub struct Reply {
    status: u16,
    fields: Vec<(String, String)>,
    content: Content,
    ranges: bool,
}

impl Reply {
    /// 200 with this content.
    pub fn ok(content: &Content) -> Reply {
        Reply::new(200, content.clone())
    }

    /// Any status.
    pub fn new(status: u16, content: Content) -> Reply {
        Reply { status, fields: Vec::new(), content, ranges: true }
    }

    /// Adds a field.
    pub fn field(mut self, name: &str, value: &str) -> Reply {
        self.fields.push((name.to_string(), value.to_string()));
        self
    }

    /// Answers 200 to a Range.
    pub fn without_ranges(mut self) -> Reply {
        self.ranges = false;
        self
    }

    /// The head of a 200, or of a 206 from `start` on.
    pub fn head(&self, status: u16, start: u64) -> String {
        let whole = self.content.len();
        let mut head = format!("HTTP/1.1 {status} Scripted\r\nContent-Length: {}\r\n", whole - start);
        if status == 206 {
            head.push_str(&format!("Content-Range: bytes {start}-{}/{whole}\r\n", whole - 1));
        }
        self.fields.iter().for_each(|(name, value)| head.push_str(&format!("{name}: {value}\r\n")));
        head + "Connection: close\r\n\r\n"
    }
}
