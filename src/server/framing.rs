//! How a body that may yet break off is framed, so that whoever receives it notices when it does.
//!
//! A connection that is reset in the middle of a body is an error to every client. A proxy in between hides the reset,
//! and then it depends:
//!
//! - A body in chunks without its last chunk is an error to every client, but some proxies (Caddy before 2.8) end the
//!   chunks properly when their upstream breaks off, and then it is one to none.
//! - A body shorter than its `Content-Length` passes through every proxy as such, and is an error to nearly every client,
//!   but not to Python's urllib and to requests with urllib3 1.x.
//!
//! So a proxy that names itself in `Via`, as RFC 9110 asks, is sent chunks; one that only shows by its forwarding headers
//! or by HTTP/1.0 is sent a length; and a client that is careless about lengths waits behind such a one.

use http::{HeaderMap, Version, header};

use crate::{artifact::Streaming, config::StreamFraming};

/// Products that take a short body for whole (their own time-out is none by default, so that they can wait).
const CARELESS: [&str; 2] = ["python-requests/", "Python-urllib/"];

/// How to stream to this client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Framing {
    /// When streaming is allowed at all.
    pub(super) streaming: Streaming,
    /// Say the length if it is known.
    pub(super) announce_length: bool,
}

/// Decides by `fetch.stream_framing` and by what is between the client and us.
pub(super) fn choose(configured: StreamFraming, version: Version, headers: &HeaderMap) -> Framing {
    // HTTP/1.0 knows no chunks.
    let any_length = if version == Version::HTTP_10 { Streaming::IfLengthKnown } else { Streaming::Always };
    let named = headers.contains_key(header::VIA) && version != Version::HTTP_10;
    let with_length = |streaming| Framing { streaming, announce_length: true };
    match configured {
        StreamFraming::ContentLength => with_length(any_length),
        StreamFraming::Chunked => {
            Framing { streaming: any_length, announce_length: version == Version::HTTP_10 }
        }
        StreamFraming::Auto if named => Framing { streaming: Streaming::Always, announce_length: false },
        StreamFraming::Auto if !may_be_proxied(version, headers) => with_length(any_length),
        StreamFraming::Auto if is_careless(headers) => with_length(Streaming::Never),
        StreamFraming::Auto => with_length(Streaming::IfLengthKnown),
    }
}

fn may_be_proxied(version: Version, headers: &HeaderMap) -> bool {
    // nginx speaks HTTP/1.0 to its upstreams unless told otherwise, and says nothing of itself.
    version == Version::HTTP_10
        || headers.contains_key(header::VIA)
        || headers.contains_key(header::FORWARDED)
        || headers.keys().any(|name| name.as_str().starts_with("x-forwarded-"))
}

fn is_careless(headers: &HeaderMap) -> bool {
    let agent = headers.get(header::USER_AGENT).and_then(|agent| agent.to_str().ok()).unwrap_or_default();
    CARELESS.iter().any(|product| agent.starts_with(product))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_framing_that_every_client_sees_break() {
        let chosen = |version, pairs: &[(&'static str, &str)]| {
            let headers =
                pairs.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect();
            let Framing { streaming, announce_length } = choose(StreamFraming::Auto, version, &headers);
            (streaming, announce_length)
        };
        let (curl, requests) = (("user-agent", "curl/8.5.0"), ("user-agent", "python-requests/2.28.1"));
        let (forwarded, via) = (("x-forwarded-for", "192.0.2.1"), ("via", "1.1 Caddy"));
        use Streaming::{Always, IfLengthKnown, Never};
        for (version, headers, expected) in [
            (Version::HTTP_11, vec![curl], (Always, true)),
            (Version::HTTP_11, vec![requests], (Always, true)),
            (Version::HTTP_11, vec![requests, forwarded, via], (Always, false)),
            (Version::HTTP_11, vec![curl, forwarded], (IfLengthKnown, true)),
            (Version::HTTP_11, vec![requests, forwarded], (Never, true)),
            (Version::HTTP_10, vec![curl], (IfLengthKnown, true)),
            (Version::HTTP_10, vec![requests], (Never, true)),
            (Version::HTTP_10, vec![requests, via], (Never, true)),
            (Version::HTTP_2, vec![curl], (Always, true)),
        ] {
            assert_eq!(chosen(version, &headers), expected, "{version:?} {headers:?}");
        }
    }
}
