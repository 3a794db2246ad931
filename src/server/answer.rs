//! The headers of an artifact's response (RFC 9110, 9111, 9211, 9530, 6266), whole, partial or still arriving.

use std::{ops::Range, time::SystemTime};

use base64::{Engine, prelude::BASE64_STANDARD};
use http::{HeaderMap, HeaderName, HeaderValue, header};

use crate::{
    artifact::{CacheStatus, Digest, Version, Want, media},
    cache::Stored,
    upstream::Head,
};

pub(super) const X_CONTENT_SHA256: HeaderName = HeaderName::from_static("x-content-sha256");
const X_CACHE_STATUS: HeaderName = HeaderName::from_static("x-cache-status");
const CACHE_STATUS: HeaderName = HeaderName::from_static("cache-status");
const REPR_DIGEST: HeaderName = HeaderName::from_static("repr-digest");

/// An artifact under one digest never changes; what a URL has may.
const FOR_EVER: HeaderValue = HeaderValue::from_static("public, max-age=31536000, immutable");
const REVALIDATE: HeaderValue = HeaderValue::from_static("no-cache");
/// A browser must neither guess a type nor run anything it is served from here.
const SANDBOX: HeaderValue = HeaderValue::from_static("sandbox; default-src 'none'");

/// How an answer came about.
#[derive(Debug, Clone, Copy)]
pub(super) struct Origin {
    pub(super) status: CacheStatus,
    pub(super) collapsed: bool,
    /// The bytes are, or will be, in the store.
    pub(super) stored: bool,
}

/// The headers of a stored artifact, without `Content-Length`.
pub(super) fn stored(stored: &Stored, want: &Want, origin: Origin) -> HeaderMap {
    let mut headers = stored.memo.get_or_init(|| describe(&stored.version)).clone();
    add_origin(&mut headers, want, origin);
    headers
}

/// The headers of an artifact that is still arriving, or of which only the upstream's word is known. Its digest is
/// known only if the client gave it: a body that ends properly has it.
pub(super) fn announced(head: &Head, want: &Want, origin: Origin) -> HeaderMap {
    let mut headers = HeaderMap::with_capacity(16);
    let content_type = head.content_type.as_deref();
    add_type(&mut headers, content_type, head.content_encoding.as_deref(), head.file_name.as_deref());
    if let Some(date) = head.last_modified {
        headers.insert(header::LAST_MODIFIED, http_date(date));
    }
    if let Some(digest) = want.sha256.filter(|_| origin.stored) {
        add_digest(&mut headers, digest);
    }
    add_origin(&mut headers, want, origin);
    headers
}

/// What every answer about this version has in common.
pub(super) fn describe(version: &Version) -> HeaderMap {
    let mut headers = HeaderMap::with_capacity(20);
    let content_type = version.content_type.as_deref();
    add_type(&mut headers, content_type, version.content_encoding.as_deref(), version.file_name.as_deref());
    headers.insert(header::LAST_MODIFIED, http_date(last_modified(version)));
    add_digest(&mut headers, version.digest);
    headers
}

fn add_type(
    headers: &mut HeaderMap,
    content_type: Option<&str>,
    encoding: Option<&str>,
    file_name: Option<&str>,
) {
    let content_type = content_type.and_then(|value| HeaderValue::from_str(value).ok());
    let default = HeaderValue::from_static("application/octet-stream");
    headers.insert(header::CONTENT_TYPE, content_type.unwrap_or(default));
    if let Some(encoding) = encoding.and_then(|value| HeaderValue::from_str(value).ok()) {
        headers.insert(header::CONTENT_ENCODING, encoding);
    }
    headers.insert(header::CONTENT_DISPOSITION, media::content_disposition(file_name));
    headers.insert(header::ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(header::CONTENT_SECURITY_POLICY, SANDBOX);
}

fn add_digest(headers: &mut HeaderMap, digest: Digest) {
    headers.insert(X_CONTENT_SHA256, visible(digest.to_string()));
    headers.insert(header::ETAG, visible(etag(digest)));
    headers.insert(REPR_DIGEST, visible(format!("sha-256=:{}:", BASE64_STANDARD.encode(digest.as_bytes()))));
}

fn add_origin(headers: &mut HeaderMap, want: &Want, origin: Origin) {
    headers.insert(X_CACHE_STATUS, HeaderValue::from_static(origin.status.as_str()));
    let cache_status = match (origin.status, origin.stored, origin.collapsed) {
        (CacheStatus::Hit, _, _) => "artifact-cache; hit",
        (CacheStatus::Miss, false, _) => "artifact-cache; fwd=uri-miss",
        (CacheStatus::Miss, true, false) => "artifact-cache; fwd=uri-miss; stored",
        (CacheStatus::Miss, true, true) => "artifact-cache; fwd=uri-miss; stored; collapsed",
    };
    headers.insert(CACHE_STATUS, HeaderValue::from_static(cache_status));
    headers.insert(header::CACHE_CONTROL, if want.sha256.is_some() { FOR_EVER } else { REVALIDATE });
}

/// The strong validator: the content itself.
pub(super) fn etag(digest: Digest) -> String {
    format!("\"{digest}\"")
}

/// The upstream's date, else when it was fetched; never later than now.
pub(super) fn last_modified(version: &Version) -> SystemTime {
    version.last_modified.unwrap_or(version.fetched).min(SystemTime::now())
}

pub(super) fn content_range(range: &Range<u64>, size: u64) -> HeaderValue {
    visible(format!("bytes {}-{}/{size}", range.start, range.end - 1))
}

fn http_date(date: SystemTime) -> HeaderValue {
    visible(httpdate::fmt_http_date(date))
}

/// For text made here of visible ASCII.
fn visible(text: String) -> HeaderValue {
    HeaderValue::try_from(text).unwrap_or_else(|_| HeaderValue::from_static(""))
}
