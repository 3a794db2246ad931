//! The outside: one polite attempt at downloading from a URL that a user gave.
//!
//! - Every hop of a redirect passes the guard, and the connection goes to the address that was judged (`dial`).
//! - Nothing of the client's request goes along: no cookies, no credentials, no forwarding headers.
//! - A body counts as complete only if its framing says so.
//! - HTTP/1.1 on a connection of its own for each request: nothing is shared between downloads, so nothing of one can
//!   disturb another, and a stale pooled connection is never the reason for a retry.

mod answer;
mod dial;
mod guard;
mod roots;

use std::{sync::Arc, time::Duration};

use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::Empty;
use hyper::body::{Bytes, Incoming};
use tokio::sync::Notify;
use url::Url;

use crate::{artifact::SourceUrl, config, error::Error};
pub use answer::{Answer, Body, Head};
use dial::{Connection, Dialer};
pub use guard::{Forbidden, Guard, ResolveError};
pub use roots::{CaFileError, Roots};

/// More of them than this before the answer is a flood, not a courtesy.
const MAX_INFORMATIONAL: u32 = 16;
/// A longer `Retry-After` is the client's to wait for, not ours.
const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(5);

/// Why the upstream part can't be set up.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// `upstream.ca_file` is no use.
    #[error("upstream.ca_file {0}")]
    CaFile(#[from] CaFileError),
    /// The TLS library refuses.
    #[error("can't set up TLS: {0}")]
    Tls(#[from] rustls::Error),
}

/// How one attempt failed.
#[derive(Debug)]
pub struct Failure {
    /// What to tell the client if no further attempt is made.
    pub error: Error,
    /// Whether another attempt may help.
    pub retry: Retry,
}

/// What to do after a failed attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retry {
    /// Nothing: the answer would be the same.
    Never,
    /// Try again, after this long if the upstream named a time.
    After(Option<Duration>),
    /// Try again from the first byte: what was received so far can't be continued.
    FromTheStart,
}

/// Where to continue a broken download.
#[derive(Debug, Clone, Copy)]
pub struct Resume<'a> {
    /// Bytes already there, more than 0.
    pub offset: u64,
    /// What the first answer said of its content.
    pub head: &'a Head,
    /// The whole length, if any answer has said it.
    pub length: Option<u64>,
}

/// Asks upstreams. Share it in an `Arc`.
#[derive(Debug)]
pub struct Upstream {
    guard: Guard,
    dialer: Dialer,
    user_agent: HeaderValue,
    max_redirects: u32,
    stall: Duration,
}

impl Upstream {
    /// Loads the trusted roots: the system's, and those of `upstream.ca_file`.
    pub fn new(config: &config::Upstream) -> Result<Upstream, SetupError> {
        Ok(Upstream {
            guard: Guard::new(config),
            dialer: Dialer::new(config)?,
            user_agent: config.user_agent.clone(),
            max_redirects: config.max_redirects,
            stall: config.stall,
        })
    }

    /// Asks for the artifact, or for the rest of it, following redirects from the URL itself.
    ///
    /// The answer is a 200, or a 206 that continues exactly what `resume` describes.
    pub async fn get(&self, url: &SourceUrl, resume: Option<Resume<'_>>) -> Result<Answer, Failure> {
        let mut headers = HeaderMap::new();
        if let Some(Resume { offset, head, .. }) = resume {
            headers.insert(header::RANGE, header_value(format!("bytes={offset}-")));
            if let Some(etag) = head.strong_etag() {
                headers.insert(header::IF_RANGE, header_value(etag.to_owned()));
            }
        }
        let (response, connection) = self.follow(url, Method::GET, headers).await?;
        answer::judge(url, response, connection, resume)
    }

    /// Asks what the artifact is without downloading it.
    pub async fn head(&self, url: &SourceUrl) -> Result<Head, Failure> {
        let (response, _connection) = self.follow(url, Method::HEAD, HeaderMap::new()).await?;
        if !matches!(response.status().as_u16(), 403 | 405 | 501) {
            return answer::judge_head(url, &response);
        }
        // Some servers only know GET; one byte of it tells as much, and dropping the connection cuts off the rest.
        let headers = HeaderMap::from_iter([(header::RANGE, HeaderValue::from_static("bytes=0-0"))]);
        let (response, _connection) = self.follow(url, Method::GET, headers).await?;
        answer::judge_head(url, &response)
    }

    /// Sends a request and follows redirects to the first answer that is none.
    async fn follow(
        &self,
        source: &SourceUrl,
        method: Method,
        headers: HeaderMap,
    ) -> Result<(Response<Incoming>, Connection), Failure> {
        let mut url = source.upstream().clone();
        for _ in 0..=self.max_redirects {
            self.guard.judge_host(&url).map_err(|forbidden| Failure::forbidden(source, forbidden.reason))?;
            let (response, connection) = self.ask(source, &url, &method, &headers).await?;
            if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
                return Ok((response, connection));
            }
            url = redirect_target(source, &url, &response)?;
        }
        let message = format!("Upstream redirected more than {} times", self.max_redirects);
        Err(Failure::upstream(source, None, message, Retry::Never))
    }

    async fn ask(
        &self,
        source: &SourceUrl,
        url: &Url,
        method: &Method,
        headers: &HeaderMap,
    ) -> Result<(Response<Incoming>, Connection), Failure> {
        let mut connection = self.dialer.dial(&self.guard, source, url).await?;
        let mut request = Request::builder()
            .method(method)
            .uri(connection.request_target(url))
            .body(Empty::<Bytes>::new())
            .map_err(|cause| {
                Failure::upstream(source, None, format!("Bad upstream URL: {cause}"), Retry::Never)
            })?;
        let host = url.port().map_or_else(
            || url.host_str().unwrap_or_default().to_owned(),
            |port| format!("{}:{port}", url.host_str().unwrap_or_default()),
        );
        let fields = request.headers_mut();
        fields.insert(header::HOST, header_value(host));
        fields.insert(header::USER_AGENT, self.user_agent.clone());
        fields.insert(header::ACCEPT, HeaderValue::from_static("*/*"));
        fields.insert(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        fields.insert(header::CONNECTION, HeaderValue::from_static("close"));
        fields.extend(headers.iter().map(|(name, value)| (name.clone(), value.clone())));
        let flood = Arc::new(Notify::new());
        let (alarm, seen) = (flood.clone(), std::sync::atomic::AtomicU32::new(0));
        hyper::ext::on_informational(&mut request, move |_| {
            if seen.fetch_add(1, std::sync::atomic::Ordering::Relaxed) >= MAX_INFORMATIONAL {
                alarm.notify_one();
            }
        });
        let response = tokio::select! {
            response = connection.send(request) => {
                response.map_err(|cause| Failure::of_hyper(source, &cause))?
            }
            () = flood.notified() => {
                let message = "Upstream sent interim responses (1xx) without end".to_owned();
                return Err(Failure::upstream(source, None, message, Retry::Never));
            }
            () = tokio::time::sleep(self.stall) => {
                let message = format!("no answer within {} s", self.stall.as_secs_f32());
                return Err(Failure::unavailable(source, message));
            }
        };
        Ok((response, connection))
    }
}

/// The URL that a redirect names, if it may be followed.
fn redirect_target(source: &SourceUrl, from: &Url, response: &Response<Incoming>) -> Result<Url, Failure> {
    let refuse = |message: &str| {
        Failure::upstream(source, Some(response.status()), format!("Upstream {message}"), Retry::Never)
    };
    let location =
        response.headers().get(header::LOCATION).ok_or_else(|| refuse("redirected without saying where"))?;
    // Many servers send raw UTF-8, which joining percent-encodes.
    let location = std::str::from_utf8(location.as_bytes())
        .map_err(|_| refuse("redirected to something that is no URL"))?;
    let mut to = from.join(location).map_err(|_| refuse("redirected to something that is no URL"))?;
    to.set_fragment(None);
    match (from.scheme(), to.scheme()) {
        ("https", "http") => Err(refuse("redirected from https to http")),
        (_, "http" | "https") => Ok(to),
        _ => Err(refuse("redirected to something that is not http or https")),
    }
}

/// For text that is known to be visible ASCII: numbers, a parsed host, an ETag that came out of a header.
fn header_value(text: String) -> HeaderValue {
    HeaderValue::try_from(text).unwrap_or_else(|_| HeaderValue::from_static(""))
}

impl Failure {
    fn forbidden(source: &SourceUrl, reason: String) -> Failure {
        Failure {
            error: Error::ForbiddenUpstream { source_url: source.key().into(), reason },
            retry: Retry::Never,
        }
    }

    fn unavailable(source: &SourceUrl, message: String) -> Failure {
        let error = Error::Unavailable { source_url: source.key().into(), message, retry_after: None };
        Failure { error, retry: Retry::After(None) }
    }

    fn upstream(source: &SourceUrl, status: Option<StatusCode>, message: String, retry: Retry) -> Failure {
        let status = status.map(|status| status.as_u16());
        let error = Error::Upstream { status, source_url: source.key().into(), message, retry_after: None };
        Failure { error, retry }
    }

    /// The connection was made, and then HTTP or the connection failed.
    fn of_hyper(source: &SourceUrl, cause: &hyper::Error) -> Failure {
        if cause.is_parse() || cause.is_parse_too_large() || cause.is_user() {
            let message = format!("Upstream's answer is not valid HTTP: {}", innermost(cause));
            return Failure::upstream(source, None, message, Retry::Never);
        }
        let message = format!("Upstream broke off the connection: {}", innermost(cause));
        Failure::upstream(source, None, message, Retry::After(None))
    }
}

/// The deepest cause, which is the one that says something.
fn innermost(error: &dyn std::error::Error) -> String {
    let mut deepest = error;
    while let Some(source) = deepest.source() {
        deepest = source;
    }
    deepest.to_string()
}
