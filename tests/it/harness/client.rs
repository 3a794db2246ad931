//! An HTTP/1.1 client over a bare socket: it can tell a short body from a reset, dribble, pipeline and lie.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use super::PATIENCE;

/// How a response body ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// As its framing said it would.
    Complete,
    /// The connection was reset (ECONNRESET).
    Reset,
    /// The connection was closed before the framing's end.
    Short,
}

/// Status line and header fields.
#[derive(Debug, Clone, Default)]
pub struct Head {
    /// The first line.
    pub line: String,
    /// Field names as sent, and values.
    pub fields: Vec<(String, String)>,
}

impl Head {
    /// Parses a head without its closing empty line.
    pub fn parse(text: &str) -> Head {
        let mut lines = text.split("\r\n");
        let line = lines.next().unwrap_or_default().to_string();
        let field = |line: &str| line.split_once(':').map(|(n, v)| (n.to_string(), v.trim().to_string()));
        Head { line, fields: lines.filter_map(field).collect() }
    }

    /// The first value of a field.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.all(name).into_iter().next()
    }

    /// All values of a field.
    pub fn all(&self, name: &str) -> Vec<&str> {
        let same = |(n, _): &&(String, String)| n.eq_ignore_ascii_case(name);
        self.fields.iter().filter(same).map(|(_, value)| value.as_str()).collect()
    }

    /// The status code of a response's head.
    pub fn status(&self) -> u16 {
        self.line.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or(0)
    }
}

/// One whole answer.
#[derive(Debug, Clone)]
pub struct Response {
    /// Status code.
    pub status: u16,
    /// Status line and fields.
    pub head: Head,
    /// What came of the body.
    pub body: Vec<u8>,
    /// How the body ended.
    pub end: End,
    /// Trailer fields of a chunked body.
    pub trailers: Head,
}

impl Response {
    /// A header field's first value, or "" when it is absent.
    pub fn header(&self, name: &str) -> &str {
        self.head.get(name).unwrap_or("")
    }

    /// `HIT`, `MISS` or "".
    pub fn cache_status(&self) -> &str {
        self.header("X-Cache-Status")
    }

    /// The body as JSON; panics when it is none.
    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        let text = String::from_utf8_lossy(&self.body);
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e} in {} {text:?}", self.head.line))
    }

    /// The `error` member of an error's JSON.
    #[track_caller]
    pub fn error(&self) -> String {
        self.json()["error"].as_str().unwrap_or_default().to_string()
    }

    /// The body's beginning, if it can be read.
    fn shown(&self) -> String {
        match std::str::from_utf8(&self.body) {
            Ok(text) => text.chars().take(400).collect(),
            Err(_) => format!("({} bytes)", self.body.len()),
        }
    }

    /// Asserts a whole 200 with exactly this body.
    #[track_caller]
    pub fn assert_ok(&self, body: &[u8]) -> &Response {
        assert_eq!((self.status, &self.end), (200, &End::Complete), "{:?} {}", self.head, self.shown());
        assert_eq!(self.body.len(), body.len(), "length of the body");
        assert!(self.body == body, "the body's bytes differ from the artifact's");
        self
    }

    /// Asserts an error answer: status, code, and the headers that every error has.
    #[track_caller]
    pub fn assert_error(&self, status: u16, code: &str) -> serde_json::Value {
        let shown = self.shown();
        assert_eq!(self.status, status, "{shown}");
        let json = self.json();
        assert_eq!(json["error"], code, "{shown}");
        assert!(!json["message"].as_str().unwrap_or_default().is_empty(), "an error has a message: {shown}");
        assert_eq!(self.header("Cache-Control"), "no-store", "errors are not kept by caches");
        assert_eq!(self.header("Content-Type"), "application/json");
        json
    }
}

/// One connection.
pub struct Client {
    stream: TcpStream,
    /// Read, but not yet asked for.
    buffer: Vec<u8>,
    /// Where reads land; kept, because fresh pages for each read cost more than the read.
    landing: Box<[u8]>,
}

impl Client {
    /// Connects; every read and write fails after [`PATIENCE`].
    #[track_caller]
    pub fn connect(address: SocketAddr) -> Client {
        Client::try_connect(address).expect("the service accepts connections")
    }

    /// The same with a service that may be gone.
    pub fn try_connect(address: SocketAddr) -> io::Result<Client> {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Ok(Client { stream, buffer: Vec::new(), landing: vec![0; 256 * 1024].into() })
    }

    /// The client's own address, as the service sees it.
    pub fn local_addr(&self) -> SocketAddr {
        self.stream.local_addr().unwrap()
    }

    /// Sends raw bytes; false when the peer is gone.
    pub fn send(&mut self, bytes: impl AsRef<[u8]>) -> bool {
        self.stream.write_all(bytes.as_ref()).is_ok()
    }

    /// Sends a request without a body. `Host` is added.
    pub fn request(&mut self, method: &str, target: &str, fields: &[(&str, &str)]) {
        let mut head = format!("{method} {target} HTTP/1.1\r\nHost: cache.test\r\n");
        fields.iter().for_each(|(name, value)| head.push_str(&format!("{name}: {value}\r\n")));
        self.send(head + "\r\n");
    }

    /// Reads whatever comes next into the buffer; `Ok(0)` is the end.
    fn fill(&mut self) -> io::Result<usize> {
        let n = self.stream.read(&mut self.landing)?;
        self.buffer.extend_from_slice(&self.landing[..n]);
        Ok(n)
    }

    /// The next response's head; an error when the connection ends first.
    pub fn try_head(&mut self) -> io::Result<Head> {
        loop {
            if let Some(end) = self.buffer.windows(4).position(|w| w == b"\r\n\r\n") {
                let text = String::from_utf8_lossy(&self.buffer[..end]).into_owned();
                self.buffer.drain(..end + 4);
                return Ok(Head::parse(&text));
            }
            if self.fill()? == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
        }
    }

    /// The next response's head.
    #[track_caller]
    pub fn head(&mut self) -> Head {
        self.try_head().unwrap_or_else(|e| panic!("no response head: {e}"))
    }

    /// Exactly `n` raw bytes, or fewer when the connection ends.
    pub fn take(&mut self, n: usize) -> Vec<u8> {
        while self.buffer.len() < n && matches!(self.fill(), Ok(1..)) {}
        let n = n.min(self.buffer.len());
        self.buffer.drain(..n).collect()
    }

    /// What arrives, unasked, within `time`.
    pub fn whatever_comes(&mut self, time: Duration) -> Vec<u8> {
        self.stream.set_read_timeout(Some(time)).unwrap();
        while matches!(self.fill(), Ok(1..)) {}
        self.stream.set_read_timeout(Some(PATIENCE)).unwrap();
        std::mem::take(&mut self.buffer)
    }

    /// Waits for the end of the connection and says how it ended.
    #[track_caller]
    pub fn end(&mut self) -> End {
        loop {
            match self.fill() {
                Ok(0) => return End::Short,
                Ok(_) => {}
                Err(e) => return broken(&e),
            }
        }
    }

    /// Reads `n` bytes and hands them on in pieces, keeping none.
    pub fn drain(&mut self, mut n: u64, mut sink: impl FnMut(&[u8])) -> End {
        let known = (self.buffer.len() as u64).min(n) as usize;
        sink(&self.buffer[..known]);
        self.buffer.drain(..known);
        n -= known as u64;
        while n > 0 {
            let room = (self.landing.len() as u64).min(n) as usize;
            match self.stream.read(&mut self.landing[..room]) {
                Ok(0) => return End::Short,
                Ok(got) => {
                    sink(&self.landing[..got]);
                    n -= got as u64;
                }
                Err(e) => return broken(&e),
            }
        }
        End::Complete
    }

    /// The body that belongs to `head`, which answered `method`.
    #[track_caller]
    pub fn body(&mut self, method: &str, head: &Head) -> Response {
        let mut body = Vec::new();
        let mut trailers = Head::default();
        let bodiless = method == "HEAD" || matches!(head.status(), 100..=199 | 204 | 304);
        let end = if bodiless {
            End::Complete
        } else if head.get("Transfer-Encoding").is_some() {
            self.chunks(&mut body, &mut trailers)
        } else if let Some(length) = head.get("Content-Length") {
            self.drain(length.parse().expect("a number"), |piece| body.extend_from_slice(piece))
        } else {
            match self.drain(u64::MAX, |piece| body.extend_from_slice(piece)) {
                End::Short => End::Complete,
                other => other,
            }
        };
        Response { status: head.status(), head: head.clone(), body, end, trailers }
    }

    /// Reads chunks up to and with the last one.
    #[track_caller]
    fn chunks(&mut self, body: &mut Vec<u8>, trailers: &mut Head) -> End {
        loop {
            let line = match self.line() {
                Ok(line) => line,
                Err(e) => return broken(&e),
            };
            let size = u64::from_str_radix(line.split(';').next().unwrap_or(""), 16).expect("a chunk size");
            if size == 0 {
                return self.trailers(trailers);
            }
            let end = self.drain(size, |piece| body.extend_from_slice(piece));
            if end != End::Complete {
                return end;
            }
            if self.take(2) != b"\r\n" {
                return End::Short;
            }
        }
    }

    fn trailers(&mut self, trailers: &mut Head) -> End {
        loop {
            match self.line() {
                Ok(line) if line.is_empty() => return End::Complete,
                Ok(line) => trailers.fields.extend(Head::parse(&format!("\r\n{line}")).fields),
                Err(e) => return broken(&e),
            }
        }
    }

    fn line(&mut self) -> io::Result<String> {
        loop {
            if let Some(end) = self.buffer.windows(2).position(|w| w == b"\r\n") {
                let line = String::from_utf8_lossy(&self.buffer[..end]).into_owned();
                self.buffer.drain(..end + 2);
                return Ok(line);
            }
            if self.fill()? == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
        }
    }

    /// Head and body of the next response.
    #[track_caller]
    pub fn response(&mut self, method: &str) -> Response {
        let head = self.head();
        self.body(method, &head)
    }
}

/// Names the way a connection broke; a time-out is a hang, and no test expects one.
#[track_caller]
fn broken(error: &io::Error) -> End {
    match error.kind() {
        ErrorKind::ConnectionReset | ErrorKind::ConnectionAborted | ErrorKind::BrokenPipe => End::Reset,
        ErrorKind::UnexpectedEof => End::Short,
        _ => panic!("the connection hangs: {error}"),
    }
}
