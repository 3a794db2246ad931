//! From a URL to an open HTTP/1.1 connection: the judged address, or the configured proxy, and TLS.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use http::{Method, Request, Response, StatusCode, Uri, header};
use http_body_util::Empty;
use hyper::{
    body::{Bytes, Incoming},
    client::conn::http1,
};
use hyper_util::rt::TokioIo;
use rustls::{CertificateError, pki_types::ServerName};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    task::JoinSet,
    time::timeout,
};
use tokio_rustls::TlsConnector;
use tokio_util::task::AbortOnDropHandle;
use url::{Host, Url};

use super::{
    Failure, Retry, SetupError,
    guard::{self, Guard, ResolveError},
    roots::Roots,
};
use crate::{artifact::SourceUrl, config};

/// RFC 8305, section 5: how long one address may be silent before the next is tried beside it.
const CONNECTION_ATTEMPT_DELAY: Duration = Duration::from_millis(250);
/// Of a response, status line and trailers included.
const MAX_HEADER_BYTES: usize = 64 * 1024;
const MAX_HEADERS: usize = 200;
/// Bytes read ahead for one download; also the size of the pieces that go to the spool.
const READ_BUFFER_BYTES: usize = 128 * 1024;

trait Stream: AsyncRead + AsyncWrite + Send + Unpin + 'static {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin + 'static> Stream for T {}

/// Makes connections.
pub(super) struct Dialer {
    tls: TlsConnector,
    connect_timeout: Duration,
    proxy: Option<Url>,
}

impl std::fmt::Debug for Dialer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Dialer").field("connect_timeout", &self.connect_timeout).finish_non_exhaustive()
    }
}

/// One open connection; dropping it closes it, whatever is still to come.
pub(super) struct Connection {
    requests: http1::SendRequest<Empty<Bytes>>,
    /// A forwarding proxy wants the whole URL in the request line.
    absolute_form: bool,
    _driver: AbortOnDropHandle<()>,
}

impl Dialer {
    pub(super) fn new(config: &config::Upstream) -> Result<Dialer, SetupError> {
        let roots = Roots::load(config.ca_file.as_deref())?;
        for error in roots.problems() {
            tracing::warn!(error = %error, "some of the system's certificate authorities can't be read");
        }
        if roots.count() == 0 {
            tracing::warn!(
                "no certificate authorities found: every https upstream will fail; install ca-certificates"
            );
        }
        Ok(Dialer {
            tls: TlsConnector::from(Arc::new(roots.into_client_config()?)),
            connect_timeout: config.connect_timeout,
            proxy: config.proxy.clone(),
        })
    }

    /// Connects to the server of `url`, which `guard` has already let pass as far as its text goes.
    pub(super) async fn dial(
        &self,
        guard: &Guard,
        source: &SourceUrl,
        url: &Url,
    ) -> Result<Connection, Failure> {
        let (Some(host), Some(port)) = (url.host(), url.port_or_known_default()) else {
            return Err(Failure::upstream(source, None, "Upstream URL has no host".into(), Retry::Never));
        };
        let tls = url.scheme() == "https";
        let Some(proxy) = &self.proxy else {
            let resolved = timeout(self.connect_timeout, guard.resolve(host.clone(), port))
                .await
                .unwrap_or_else(|_| Err(ResolveError::Dns("no answer in time".to_owned())));
            let addresses = resolved.map_err(|refused| match refused {
                ResolveError::Forbidden(forbidden) => Failure::forbidden(source, forbidden.reason),
                ResolveError::Dns(cause) => {
                    Failure::unavailable(source, format!("can't resolve {host}: {cause}"))
                }
            })?;
            let tcp = self.connect(source, addresses).await?;
            return if tls {
                let stream = self.handshake(source, &host, tcp).await?;
                Connection::open(source, stream, false).await
            } else {
                Connection::open(source, tcp, false).await
            };
        };
        let tcp = self.connect_proxy(source, proxy).await?;
        if !tls {
            return Connection::open(source, tcp, true).await;
        }
        let tunnel = self.tunnel(source, tcp, &host, port).await?;
        let stream = self.handshake(source, &host, tunnel).await?;
        Connection::open(source, stream, false).await
    }

    /// Tries the addresses in order, each next one beside the others when they are slow, and keeps the first that
    /// answers.
    async fn connect(&self, source: &SourceUrl, addresses: Vec<SocketAddr>) -> Result<TcpStream, Failure> {
        let race = async {
            let mut left = addresses.into_iter();
            let mut running = JoinSet::new();
            let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
            let mut start_next = true;
            loop {
                if start_next && let Some(address) = left.next() {
                    running.spawn(TcpStream::connect(address));
                }
                start_next = tokio::select! {
                    Some(done) = running.join_next() => match done {
                        Ok(Ok(stream)) => return Ok(stream),
                        Ok(Err(cause)) => { last = cause; true }
                        Err(_) => true,
                    },
                    () = tokio::time::sleep(CONNECTION_ATTEMPT_DELAY), if left.len() > 0 => true,
                    else => return Err(last),
                };
            }
        };
        let stream = match timeout(self.connect_timeout, race).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(cause)) => {
                return Err(Failure::unavailable(source, cause.to_string()));
            }
            Err(_) => {
                let seconds = self.connect_timeout.as_secs_f32();
                let message = format!("no connection within {seconds} s");
                return Err(Failure::unavailable(source, message));
            }
        };
        // Our requests are one small write; waiting to fill a packet only delays them.
        let _ = stream.set_nodelay(true);
        Ok(stream)
    }

    /// The proxy was named by the operator, so it may be anywhere.
    async fn connect_proxy(&self, source: &SourceUrl, proxy: &Url) -> Result<TcpStream, Failure> {
        let port = proxy.port_or_known_default().unwrap_or(3128);
        let addresses = match proxy.host() {
            Some(Host::Ipv4(ip)) => vec![SocketAddr::from((ip, port))],
            Some(Host::Ipv6(ip)) => vec![SocketAddr::from((ip, port))],
            name => {
                let name = name.map(|name| name.to_string()).unwrap_or_default();
                let found = timeout(self.connect_timeout, guard::look_up(&name, port)).await;
                found.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())).map_err(|cause| {
                    Failure::unavailable(source, format!("can't resolve upstream.proxy: {cause}"))
                })?
            }
        };
        self.connect(source, addresses).await
    }

    /// RFC 9110, section 9.3.6.
    async fn tunnel(
        &self,
        source: &SourceUrl,
        tcp: TcpStream,
        host: &Host<&str>,
        port: u16,
    ) -> Result<impl Stream, Failure> {
        let mut connection = Connection::open(source, tcp, true).await?;
        let target = format!("{host}:{port}");
        let request = Request::builder()
            .method(Method::CONNECT)
            .uri(&target)
            .header(header::HOST, &target)
            .body(Empty::<Bytes>::new())
            .map_err(|cause| {
                Failure::upstream(source, None, format!("Bad upstream URL: {cause}"), Retry::Never)
            })?;
        let answer = timeout(self.connect_timeout, connection.send(request))
            .await
            .map_err(|_| Failure::unavailable(source, "upstream.proxy did not answer".to_owned()))?
            .map_err(|cause| Failure::of_hyper(source, &cause))?;
        if answer.status() != StatusCode::OK {
            let message =
                format!("upstream.proxy refused the connection with status {}", answer.status().as_u16());
            return Err(Failure::upstream(source, None, message, Retry::Never));
        }
        let upgraded = hyper::upgrade::on(answer).await.map_err(|cause| Failure::of_hyper(source, &cause))?;
        Ok(TokioIo::new(upgraded))
    }

    async fn handshake(
        &self,
        source: &SourceUrl,
        host: &Host<&str>,
        stream: impl Stream,
    ) -> Result<impl Stream, Failure> {
        let failed = |cause: String, retry| {
            Failure::upstream(source, None, format!("TLS with the upstream failed: {cause}"), retry)
        };
        let name = match host {
            Host::Domain(name) => ServerName::try_from((*name).to_owned())
                .map_err(|_| failed(format!("{name} can't be the name in a certificate"), Retry::Never))?,
            Host::Ipv4(ip) => ServerName::from(std::net::IpAddr::from(*ip)),
            Host::Ipv6(ip) => ServerName::from(std::net::IpAddr::from(*ip)),
        };
        match timeout(self.connect_timeout, self.tls.connect(name, stream)).await {
            Ok(Ok(stream)) => Ok(stream),
            Ok(Err(cause)) => {
                // What rustls says of a certificate stays true; a broken connection may not happen again.
                let verdict = cause.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
                let retry = if verdict.is_some() { Retry::Never } else { Retry::After(None) };
                let hint = match verdict {
                    Some(rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer)) => {
                        "; an authority of your own can be named in upstream.ca_file"
                    }
                    _ => "",
                };
                Err(failed(format!("{cause}{hint}"), retry))
            }
            Err(_) => Err(Failure::unavailable(source, "no answer to the TLS handshake in time".into())),
        }
    }
}

impl Connection {
    async fn open(
        source: &SourceUrl,
        stream: impl Stream,
        absolute_form: bool,
    ) -> Result<Connection, Failure> {
        let (requests, driver) = http1::Builder::new()
            .max_headers(MAX_HEADERS)
            .max_buf_size(READ_BUFFER_BYTES)
            .max_header_size(MAX_HEADER_BYTES)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(|cause| Failure::of_hyper(source, &cause))?;
        let driver = tokio::spawn(async move {
            // Its errors reach whoever waits for the response or its body.
            let _ = driver.with_upgrades().await;
        });
        Ok(Connection { requests, absolute_form, _driver: AbortOnDropHandle::new(driver) })
    }

    pub(super) async fn send(&mut self, request: Request<Empty<Bytes>>) -> hyper::Result<Response<Incoming>> {
        self.requests.send_request(request).await
    }

    /// What stands in the request line: path and query, or all of the URL for a proxy (RFC 9112, section 3.2).
    pub(super) fn request_target(&self, url: &Url) -> Uri {
        let text = if self.absolute_form { url.as_str() } else { &url[url::Position::BeforePath..] };
        // A parsed URL is always a valid request target; if a library disagrees the request fails as malformed.
        text.parse().unwrap_or_default()
    }
}
