//! The words of the domain: what is asked for, what it is called, what is known of it. Pure values, no I/O.

pub mod digest;
pub mod globs;
pub mod media;
pub mod source_url;

use std::time::SystemTime;

pub use digest::{Digest, Hasher};
pub use source_url::{InvalidUrl, SourceUrl};

/// Whether an answer came from what was stored, or had to be fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CacheStatus {
    /// It was stored.
    Hit,
    /// It was, or is being, fetched from upstream.
    Miss,
}

impl CacheStatus {
    /// As `X-Cache-Status` spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            CacheStatus::Hit => "HIT",
            CacheStatus::Miss => "MISS",
        }
    }
}

/// One content that a URL has had, and what the catalogue keeps of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Version {
    /// The content's name in the store.
    pub digest: Digest,
    /// Its length in bytes, as stored (that is, with `content_encoding` applied).
    pub size: u64,
    /// Upstream's media type, checked by [`media::media_type`].
    pub content_type: Option<String>,
    /// The encoding that upstream insisted on, replayed with the bytes.
    pub content_encoding: Option<String>,
    /// The name to save it under, cleaned by [`media::file_name`].
    pub file_name: Option<String>,
    /// Upstream's validator, quotes and `W/` included.
    pub etag: Option<String>,
    /// Upstream's date of the content.
    pub last_modified: Option<SystemTime>,
    /// When the URL was last seen to have this content: never before it got it.
    pub fetched: SystemTime,
}

/// Whether an answer may begin while its artifact is still being downloaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Streaming {
    /// Wait for the whole.
    Never,
    /// Only if the length is known, because the client could not tell the end of the body otherwise.
    IfLengthKnown,
    /// Yes.
    Always,
}

/// A request's name in the log: visible ASCII. Cheap to clone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestId(http::HeaderValue);

impl RequestId {
    /// The longest that a client may choose.
    pub const MAX_BYTES: usize = 128;

    /// Takes a client's own, if it can be logged and returned as it is.
    pub fn accept(value: &http::HeaderValue) -> Option<RequestId> {
        let bytes = value.as_bytes();
        let is_fit =
            !bytes.is_empty() && bytes.len() <= Self::MAX_BYTES && bytes.iter().all(u8::is_ascii_graphic);
        is_fit.then(|| RequestId(value.clone()))
    }

    /// Makes a new one.
    pub fn random() -> RequestId {
        let id = format!("{:016x}", fastrand::u64(..));
        RequestId(http::HeaderValue::try_from(id).unwrap_or_else(|_| http::HeaderValue::from_static("-")))
    }

    /// As text.
    pub fn as_str(&self) -> &str {
        self.0.to_str().unwrap_or("-")
    }

    /// As a header's value.
    pub fn to_header(&self) -> http::HeaderValue {
        self.0.clone()
    }
}

/// What one client asks for.
#[derive(Debug, Clone)]
pub struct Want {
    /// Where the artifact comes from.
    pub url: SourceUrl,
    /// The digest that the client insists on.
    pub sha256: Option<Digest>,
    /// Whether the answer may begin before the whole is there.
    pub streaming: Streaming,
    /// Pass by the memory of rejected digests (`Cache-Control: no-cache`).
    pub no_cache: bool,
    /// Never download (`Cache-Control: only-if-cached`).
    pub only_if_cached: bool,
    /// What the log calls this request, and what comes of it.
    pub request_id: RequestId,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_is_spelt_as_in_the_header() {
        assert_eq!([CacheStatus::Hit, CacheStatus::Miss].map(CacheStatus::as_str), ["HIT", "MISS"]);
    }
}
