//! Talking to a running service, for the verbs that ask it something. A trusted server: the one the user named.
//!
//! What downloads from servers that somebody else named is `upstream`, with its guard.

use std::{error::Error, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use clap::Args;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, header, response};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::{
    body::{Bytes, Incoming},
    client::conn::http1,
};
use hyper_util::rt::TokioIo;
use rustls::{CertificateError, pki_types::ServerName};
use serde_json::Value;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::TlsConnector;
use tokio_util::task::AbortOnDropHandle;
use url::{Position, Url};

use crate::upstream::Roots;

/// For a connection, TLS included.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// For the answer to a question that costs the service nothing.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// The longest answer that is read into memory.
const MAX_TEXT_BYTES: usize = 4 << 20;

/// Which running service.
#[derive(Debug, Clone, Args)]
pub(super) struct ServerArgs {
    // An attribute, because rustdoc wants URLs marked up, which a terminal would show.
    #[arg(long, help = "The running service, such as https://artifactcache.lan")]
    #[arg(value_name = "URL", env = "ARTIFACT_CACHE_SERVER", hide_env_values = true, value_parser = server_url)]
    pub(super) server: Option<Url>,
    /// PEM file of a certificate authority to trust beside the system's, for a https:// server
    #[arg(long, value_name = "FILE", env = "ARTIFACT_CACHE_CA_FILE", hide_env_values = true)]
    pub(super) ca_file: Option<PathBuf>,
}

impl ServerArgs {
    /// A client of the named service, or of `default` if none was named.
    pub(super) fn client(&self, default: impl FnOnce() -> Result<Url, String>) -> Result<Client, String> {
        let base = self.server.clone().map_or_else(default, Ok)?;
        Client::new(base, self.ca_file.as_deref())
    }
}

fn server_url(text: &str) -> Result<Url, String> {
    let url = Url::parse(text).ok().filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host());
    match url {
        None => Err(format!("not an http:// or https:// URL; write http://{text} or https://{text}")),
        Some(url) if url.query().is_some() || url.fragment().is_some() => {
            Err("has a query or fragment; write scheme, host, port and at most a path".to_owned())
        }
        Some(url) => Ok(url),
    }
}

/// No answer was to be had; says why and what to try.
#[derive(Debug, thiserror::Error)]
#[error("{server} can't be reached: {cause}")]
pub(super) struct Unreachable {
    server: String,
    cause: String,
}

/// Asks one service. A connection for each request: these verbs make few.
pub(super) struct Client {
    base: Url,
    tls: Option<TlsConnector>,
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

impl Client {
    /// Loads certificate authorities only when TLS is spoken.
    pub(super) fn new(base: Url, ca_file: Option<&std::path::Path>) -> Result<Client, String> {
        let tls = match base.scheme() {
            "https" => {
                let roots = Roots::load(ca_file).map_err(|error| format!("--ca-file {error}"))?;
                let config = roots.into_client_config().map_err(|error| error.to_string())?;
                Some(TlsConnector::from(Arc::new(config)))
            }
            _ => None,
        };
        Ok(Client { base, tls })
    }

    /// The service's URL.
    pub(super) fn base(&self) -> &Url {
        &self.base
    }

    /// Sends a request without a body for `target`, a path with its query; the answer must begin within `patience`, and
    /// must never be silent for longer.
    pub(super) async fn ask(
        &self,
        method: Method,
        target: &str,
        headers: HeaderMap,
        patience: Duration,
    ) -> Result<Answer, Unreachable> {
        let (mut requests, driver, ours) = match timeout(CONNECT_TIMEOUT, self.connect()).await {
            Ok(connected) => connected.map_err(|cause| self.unreachable(cause))?,
            Err(_) => return Err(self.unreachable(format!("no connection within {CONNECT_TIMEOUT:?}"))),
        };
        let mut request = Request::new(Empty::<Bytes>::new());
        *request.method_mut() = method;
        let prefix = self.base.path().trim_end_matches('/');
        *request.uri_mut() = format!("{prefix}{target}")
            .parse()
            .map_err(|cause| self.unreachable(format!("{target} is no request target: {cause}")))?;
        *request.headers_mut() = headers;
        let host = &self.base[Position::BeforeHost..Position::AfterPort];
        if let Ok(host) = HeaderValue::from_str(host) {
            request.headers_mut().insert(header::HOST, host);
        }
        let agent = HeaderValue::from_static(concat!("artifact-cache/", env!("CARGO_PKG_VERSION")));
        request.headers_mut().insert(header::USER_AGENT, agent);
        let response = match timeout(patience, requests.send_request(request)).await {
            Ok(response) => response.map_err(|cause| self.unreachable(innermost(&cause)))?,
            Err(_) => return Err(self.unreachable(format!("no answer within {patience:?}"))),
        };
        let (head, body) = response.into_parts();
        if let (301 | 302 | 307 | 308, Some(to)) = (head.status.as_u16(), text(&head, &header::LOCATION)) {
            return Err(self.unreachable(format!("it redirects to {to}; name that server with --server")));
        }
        Ok(Answer { head, ours, body, patience, _driver: driver })
    }

    /// GET of a small answer: its status, its head and its whole text.
    pub(super) async fn read(&self, target: &str, headers: HeaderMap) -> Result<Text, Unreachable> {
        let answer = self.ask(Method::GET, target, headers, ANSWER_TIMEOUT).await?;
        let (head, ours) = (answer.head, answer.ours);
        let whole = timeout(ANSWER_TIMEOUT, Limited::new(answer.body, MAX_TEXT_BYTES).collect()).await;
        let bytes = match whole {
            Ok(bytes) => bytes.map_err(|cause| self.unreachable(innermost(&*cause)))?.to_bytes(),
            Err(_) => return Err(self.unreachable(format!("no answer within {ANSWER_TIMEOUT:?}"))),
        };
        Ok(Text { head, ours, text: String::from_utf8_lossy(&bytes).into_owned() })
    }

    /// GET of a JSON answer, whatever its status.
    pub(super) async fn json(&self, target: &str) -> Result<(response::Parts, Value), Unreachable> {
        let Text { head, text, .. } = self.read(target, HeaderMap::new()).await?;
        match serde_json::from_str(&text) {
            Ok(value @ Value::Object(_)) => Ok((head, value)),
            _ => Err(self.unreachable(format!("{} from {target}: it is no artifact-cache", head.status))),
        }
    }

    async fn connect(&self) -> Result<Connected, String> {
        // Blocking is right here: there is nothing else to do meanwhile.
        let found = self.base.socket_addrs(|| None).map_err(|cause| cause.to_string())?;
        let tcp = TcpStream::connect(&found[..]).await.map_err(|cause| cause.to_string())?;
        let ours = tcp.local_addr().map_err(|cause| cause.to_string())?;
        let stream: Box<dyn Stream> = match &self.tls {
            None => Box::new(tcp),
            Some(tls) => Box::new(tls.connect(self.name()?, tcp).await.map_err(|cause| explain_tls(&cause))?),
        };
        let (requests, driver) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|cause| innermost(&cause))?;
        let driver = tokio::spawn(async move {
            // Its errors reach whoever waits for the answer.
            let _ = driver.await;
        });
        Ok((requests, AbortOnDropHandle::new(driver), ours))
    }

    fn name(&self) -> Result<ServerName<'static>, String> {
        let host = self.base.host_str().unwrap_or_default().trim_matches(['[', ']']);
        ServerName::try_from(host.to_owned()).map_err(|_| format!("{host} is no name that TLS can check"))
    }

    fn unreachable(&self, cause: String) -> Unreachable {
        Unreachable { server: self.base.as_str().trim_end_matches('/').to_owned(), cause }
    }
}

type Connected = (http1::SendRequest<Empty<Bytes>>, AbortOnDropHandle<()>, SocketAddr);

/// An answer whose body is still to come.
pub(super) struct Answer {
    pub(super) head: response::Parts,
    ours: SocketAddr,
    body: Incoming,
    patience: Duration,
    _driver: AbortOnDropHandle<()>,
}

impl Answer {
    /// The next bytes of the body, `None` at its proper end; the error says how it broke off.
    pub(super) async fn piece(&mut self) -> Result<Option<Bytes>, String> {
        loop {
            let frame = timeout(self.patience, self.body.frame())
                .await
                .map_err(|_| format!("not a byte within {:?}", self.patience))?;
            match frame {
                None => return Ok(None),
                Some(Err(cause)) => return Err(innermost(&cause)),
                // Trailers have no bytes.
                Some(Ok(frame)) => {
                    if let Ok(bytes) = frame.into_data() {
                        return Ok(Some(bytes));
                    }
                }
            }
        }
    }

    /// The body of an error, if it is the service's own JSON.
    pub(super) async fn into_json(self) -> Option<Value> {
        let body =
            timeout(ANSWER_TIMEOUT, Limited::new(self.body, MAX_TEXT_BYTES).collect()).await.ok()?.ok()?;
        serde_json::from_slice(&body.to_bytes()).ok()
    }
}

/// A small answer.
pub(super) struct Text {
    pub(super) head: response::Parts,
    /// This end of the connection.
    pub(super) ours: SocketAddr,
    pub(super) text: String,
}

/// A header's value, if it is there and readable.
pub(super) fn text<'a>(head: &'a response::Parts, name: &HeaderName) -> Option<&'a str> {
    head.headers.get(name)?.to_str().ok()
}

/// Runs a verb's conversation to its end.
pub(super) fn block_on<T>(conversation: impl Future<Output = T>) -> std::io::Result<T> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(conversation))
}

/// The deepest cause, which is the one that says something.
fn innermost(error: &(dyn Error + 'static)) -> String {
    let mut deepest = error;
    while let Some(source) = deepest.source() {
        deepest = source;
    }
    deepest.to_string()
}

fn explain_tls(cause: &std::io::Error) -> String {
    let verdict = cause.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    match verdict {
        Some(rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer)) => {
            format!("{cause}; trust its authority with --ca-file FILE")
        }
        _ => cause.to_string(),
    }
}
