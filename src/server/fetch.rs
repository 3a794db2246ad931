//! `GET` and `HEAD /fetch`: from the request to the response, by way of `Cache`.

use std::{ops::Range, sync::Arc, time::Instant};

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, Version, header, request::Parts};
use hyper::body::Incoming;

use super::{
    App,
    answer::{self, Origin, X_CONTENT_SHA256},
    body::{ResponseBody, Segment},
    conditions::{self, Validators, Verdict},
    connection::Connection,
    error::Refusal,
    exchange::Exchange,
    framing::{self, Framing},
    params,
};
use crate::{
    artifact::{CacheStatus, RequestId, Streaming, Want},
    blobs::Mode,
    cache::{Content, Fetched, Growing, Stored},
    error::Error,
    kill_point,
};

/// RFC 9110 asks for at least 8,000 bytes; a `url` of 8 KiB may be percent-encoded threefold.
const MAX_TARGET_BYTES: usize = 32 * 1024;

/// Answers one request, whatever comes of it.
pub(super) async fn fetch(
    app: &Arc<App>,
    connection: &Arc<Connection>,
    request: Request<Incoming>,
    request_id: RequestId,
) -> Response<ResponseBody> {
    let asked = Instant::now();
    let (parts, _) = request.into_parts();
    let mut exchange = Exchange::begin(app, connection, &parts.headers, request_id, asked);
    let mut response = match answer(app, connection, &parts, &mut exchange, asked).await {
        Ok(response) => response,
        Err(refusal) => {
            let is_ours = refusal.status().is_server_error();
            exchange.failed(refusal.code(), log_text(&refusal), is_ours);
            refusal.into_response(params::has_member(
                &parts.headers,
                header::ACCEPT,
                "application/problem+json",
            ))
        }
    };
    response.body_mut().end_with(exchange);
    response
}

/// The log may say more than the client is told.
fn log_text(refusal: &Refusal) -> String {
    match refusal {
        Refusal::Failed(Error::Internal { message, details, .. }) => format!("{message}: {details}"),
        // In the words of the document's example.
        Refusal::Failed(Error::Upstream { message, .. }) => {
            message.replacen("Upstream server", "upstream", 1)
        }
        other => other.message(),
    }
}

async fn answer(
    app: &Arc<App>,
    connection: &Arc<Connection>,
    parts: &Parts,
    exchange: &mut Exchange,
    asked: Instant,
) -> Result<Response<ResponseBody>, Refusal> {
    if !matches!(parts.method, Method::GET | Method::HEAD) {
        return Err(Refusal::MethodNotAllowed);
    }
    if parts.uri.path_and_query().is_some_and(|target| target.as_str().len() > MAX_TARGET_BYTES) {
        return Err(Refusal::UriTooLong);
    }
    let (url, sha256) = app.targets.parse(&parts.uri)?;
    exchange.concerns(url.clone());
    kill_point::pass_or_panic("fetch.parsed");
    let headers = &parts.headers;
    let framing = framing::choose(app.config.fetch.stream_framing, parts.version, headers);
    let want = Want {
        url,
        sha256,
        streaming: match params::prefers_wait(headers) || conditions::need_digest(headers) {
            true => Streaming::Never,
            false => framing.streaming,
        },
        no_cache: params::has_member(headers, header::CACHE_CONTROL, "no-cache"),
        request_id: exchange.request_id(),
        only_if_cached: params::has_member(headers, header::CACHE_CONTROL, "only-if-cached"),
    };
    if parts.method == Method::HEAD {
        return head(app, connection, parts, exchange, &want).await;
    }
    let Fetched { status, collapsed, content } = app.cache.fetch(&want, asked).await?;
    exchange.answered(status, collapsed);
    let origin = Origin { status, collapsed, stored: true };
    match content {
        Content::Whole(stored) => whole(app, connection, parts, &want, origin, stored),
        Content::Growing(growing) => Ok(arriving(app, connection, parts, &want, origin, growing, framing)),
    }
}

/// Like GET when it is held; else the upstream is asked for its word, and nothing is stored.
async fn head(
    app: &Arc<App>,
    connection: &Arc<Connection>,
    parts: &Parts,
    exchange: &mut Exchange,
    want: &Want,
) -> Result<Response<ResponseBody>, Refusal> {
    if let Some(stored) = app.cache.peek(want)? {
        exchange.answered(CacheStatus::Hit, false);
        let origin = Origin { status: CacheStatus::Hit, collapsed: false, stored: true };
        return whole(app, connection, parts, want, origin, stored);
    }
    if want.only_if_cached {
        return Err(Error::NotCached { source_url: want.url.key().into() }.into());
    }
    let head = Box::pin(app.cache.probe(want)).await?;
    exchange.answered(CacheStatus::Miss, false);
    let origin = Origin { status: CacheStatus::Miss, collapsed: false, stored: false };
    let mut response = Response::new(ResponseBody::empty());
    *response.headers_mut() = answer::announced(&head, want, origin);
    if let Some(length) = head.length {
        response.headers_mut().insert(header::CONTENT_LENGTH, length.into());
    }
    Ok(response)
}

/// Of an artifact that is all there.
fn whole(
    app: &Arc<App>,
    connection: &Arc<Connection>,
    parts: &Parts,
    want: &Want,
    origin: Origin,
    stored: Arc<Stored>,
) -> Result<Response<ResponseBody>, Refusal> {
    let mut headers = answer::stored(&stored, want, origin);
    let size = stored.version.size;
    let etag = headers.get(header::ETAG).and_then(|etag| etag.to_str().ok());
    let last_modified = Some(answer::last_modified(&stored.version));
    let known = Validators { etag, last_modified, size: Some(size) };
    let verdict = conditions::judge(&parts.method, &parts.headers, known);
    let is_head = parts.method == Method::HEAD;
    let slice =
        |range| Segment::Body(Content::Whole(stored.clone()).into_body(&app.cache, range, mode(parts)));
    let body = |segments: Vec<Segment>| ResponseBody::artifact(&app.cache, connection, segments, false);
    let (status, length, body) = match verdict {
        Verdict::PreconditionFailed => return Err(Refusal::PreconditionFailed),
        Verdict::Unsatisfiable(size) => return Err(Refusal::RangeNotSatisfiable { size }),
        Verdict::NotModified => (StatusCode::NOT_MODIFIED, None, ResponseBody::empty()),
        Verdict::Whole if is_head => (StatusCode::OK, Some(size), ResponseBody::empty()),
        Verdict::Whole => (StatusCode::OK, Some(size), body(vec![slice(None)])),
        Verdict::Ranges(ranges) => match <[Range<u64>; 1]>::try_from(ranges) {
            Ok([range]) => {
                headers.insert(header::CONTENT_RANGE, answer::content_range(&range, size));
                let length = range.end - range.start;
                (StatusCode::PARTIAL_CONTENT, Some(length), body(vec![slice(Some(range))]))
            }
            Err(ranges) => {
                let content_type = headers.get(header::CONTENT_TYPE).cloned();
                let multipart = Multipart::new(content_type, size, ranges);
                headers.insert(header::CONTENT_TYPE, multipart.content_type());
                let length = multipart.length();
                (StatusCode::PARTIAL_CONTENT, Some(length), body(multipart.segments(slice)))
            }
        },
    };
    if let Some(length) = length {
        headers.insert(header::CONTENT_LENGTH, length.into());
    }
    let mut response = Response::new(body);
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    Ok(response)
}

/// Of an artifact that is still being downloaded.
fn arriving(
    app: &Arc<App>,
    connection: &Arc<Connection>,
    parts: &Parts,
    want: &Want,
    origin: Origin,
    growing: Growing,
    framing: Framing,
) -> Response<ResponseBody> {
    let mut headers = answer::announced(&growing.head, want, origin);
    let etag = want.sha256.map(answer::etag);
    let size = growing.head.length;
    let known = Validators { etag: etag.as_deref(), last_modified: growing.head.last_modified, size };
    let range = match conditions::judge(&parts.method, &parts.headers, known) {
        Verdict::NotModified => {
            let mut response = Response::new(ResponseBody::empty());
            *response.status_mut() = StatusCode::NOT_MODIFIED;
            *response.headers_mut() = headers;
            return response;
        }
        // A range that would be unsatisfiable, and several, are answered with the whole: that is always allowed.
        Verdict::Ranges(ranges) => <[Range<u64>; 1]>::try_from(ranges).ok().map(|[range]| range),
        _ => None,
    };
    let length = range.as_ref().map(|range| range.end - range.start).or(size);
    let mut status = StatusCode::OK;
    if let (Some(range), Some(size)) = (&range, size) {
        status = StatusCode::PARTIAL_CONTENT;
        headers.insert(header::CONTENT_RANGE, answer::content_range(range, size));
    }
    let mut trailer = false;
    match length.filter(|_| framing.announce_length) {
        Some(length) => drop(headers.insert(header::CONTENT_LENGTH, length.into())),
        None if want.sha256.is_none() && params::has_member(&parts.headers, header::TE, "trailers") => {
            trailer = true;
            headers.insert(header::TRAILER, HeaderValue::from(X_CONTENT_SHA256));
        }
        None => {}
    }
    let body = Content::Growing(growing).into_body(&app.cache, range, mode(parts));
    let mut response =
        Response::new(ResponseBody::artifact(&app.cache, connection, [Segment::Body(body)], trailer));
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    response
}

/// HTTP/2 frames its bytes; in HTTP/1 they can go from the file to the socket.
fn mode(parts: &Parts) -> Mode {
    if parts.version == Version::HTTP_2 { Mode::Copy } else { Mode::Refer }
}

/// Several ranges in one response (RFC 9110, section 14.6).
struct Multipart {
    boundary: String,
    parts: Vec<(Bytes, Range<u64>)>,
}

impl Multipart {
    fn new(content_type: Option<HeaderValue>, size: u64, ranges: Vec<Range<u64>>) -> Multipart {
        let boundary = format!("{:016x}{:016x}", fastrand::u64(..), fastrand::u64(..));
        let content_type = content_type.as_ref().and_then(|value| value.to_str().ok()).unwrap_or_default();
        let parts = ranges.into_iter().enumerate().map(|(at, range)| {
            let (first, last) = (range.start, range.end - 1);
            let break_before = if at == 0 { "" } else { "\r\n" };
            let head = format!(
                "{break_before}--{boundary}\r\nContent-Type: {content_type}\r\n\
                 Content-Range: bytes {first}-{last}/{size}\r\n\r\n"
            );
            (Bytes::from(head), range)
        });
        let parts = parts.collect();
        Multipart { boundary, parts }
    }

    fn content_type(&self) -> HeaderValue {
        HeaderValue::try_from(format!("multipart/byteranges; boundary={}", self.boundary))
            .unwrap_or_else(|_| HeaderValue::from_static("multipart/byteranges"))
    }

    fn end(&self) -> Bytes {
        Bytes::from(format!("\r\n--{}--\r\n", self.boundary))
    }

    fn length(&self) -> u64 {
        let parts = self.parts.iter().map(|(head, range)| head.len() as u64 + range.end - range.start);
        parts.sum::<u64>() + self.end().len() as u64
    }

    fn segments(self, slice: impl Fn(Option<Range<u64>>) -> Segment) -> Vec<Segment> {
        let end = Segment::Text(self.end());
        let parts =
            self.parts.into_iter().flat_map(|(head, range)| [Segment::Text(head), slice(Some(range))]);
        parts.chain([end]).collect()
    }
}
