//! Judging an upstream's answer: is it the artifact, the rest of it, or something that must not be taken for it?

use std::time::{Duration, SystemTime};

use http::{HeaderMap, Response, StatusCode, header};
use http_body_util::BodyExt;
use hyper::body::{Body as _, Bytes, Incoming};
use serde::{Deserialize, Serialize};

use super::{Failure, LONGEST_RETRY_AFTER, Resume, Retry, dial::Connection};
use crate::{
    artifact::{SourceUrl, media},
    error::Error,
};

/// What an upstream says of the artifact; hostile values are already gone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// Of the whole artifact, in bytes, if known.
    pub length: Option<u64>,
    /// The media type.
    pub content_type: Option<String>,
    /// The encoding that it insists on although asked for none.
    pub content_encoding: Option<String>,
    /// The name to save it under.
    pub file_name: Option<String>,
    /// The validator as sent.
    pub etag: Option<String>,
    /// Never later than now.
    pub last_modified: Option<SystemTime>,
}

/// An acceptable answer.
#[derive(Debug)]
pub struct Answer {
    /// What it is.
    pub head: Head,
    /// The body continues at the offset that was asked for; otherwise it begins at 0.
    pub resumed: bool,
    /// The bytes.
    pub body: Body,
}

/// A body that is only complete if its framing says so.
pub struct Body {
    incoming: Incoming,
    source: SourceUrl,
    /// Dropping it cuts the transfer off.
    _connection: Connection,
}

impl std::fmt::Debug for Body {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Body").field("source", &self.source.key()).finish_non_exhaustive()
    }
}

impl Body {
    /// The next piece; `None` after the last.
    pub async fn chunk(&mut self) -> Result<Option<Bytes>, Failure> {
        loop {
            match self.incoming.frame().await {
                None => return Ok(None),
                Some(Ok(frame)) => {
                    // Trailers say nothing that is used.
                    if let Ok(bytes) = frame.into_data() {
                        return Ok(Some(bytes));
                    }
                }
                Some(Err(cause)) => {
                    let message = format!("Upstream's body was cut short: {}", super::innermost(&cause));
                    return Err(Failure::upstream(&self.source, None, message, Retry::After(None)));
                }
            }
        }
    }
}

impl Head {
    fn read(url: &SourceUrl, headers: &HeaderMap, length: Option<u64>) -> Head {
        let text = |name| headers.get(name).and_then(|value: &http::HeaderValue| value.to_str().ok());
        let etag = text(header::ETAG).filter(|etag| {
            let opaque = etag.strip_prefix("W/").unwrap_or(etag);
            etag.len() <= 1024 && opaque.len() >= 2 && opaque.starts_with('"') && opaque.ends_with('"')
        });
        let encoding = text(header::CONTENT_ENCODING).filter(|encoding| {
            let is_token = |byte: u8| byte.is_ascii_alphanumeric() || b"-_., ".contains(&byte);
            !encoding.is_empty()
                && encoding.len() <= 64
                && encoding.bytes().all(is_token)
                && *encoding != "identity"
        });
        let disposition = headers.get(header::CONTENT_DISPOSITION).map(|value| value.as_bytes());
        Head {
            length,
            content_type: headers
                .get(header::CONTENT_TYPE)
                .and_then(|value| media::media_type(value.as_bytes())),
            content_encoding: encoding.map(str::to_owned),
            file_name: media::file_name(disposition, url),
            etag: etag.map(str::to_owned),
            last_modified: text(header::LAST_MODIFIED)
                .and_then(|date| httpdate::parse_http_date(date).ok())
                .map(|date| date.min(SystemTime::now())),
        }
    }

    /// The validator, if it promises identical bytes (RFC 9110, section 8.8.3).
    pub fn strong_etag(&self) -> Option<&str> {
        self.etag.as_deref().filter(|etag| !etag.starts_with("W/"))
    }
}

/// Takes a 200, or the 206 that continues what `resume` describes, and refuses everything else.
pub(super) fn judge(
    url: &SourceUrl,
    response: Response<Incoming>,
    connection: Connection,
    resume: Option<Resume<'_>>,
) -> Result<Answer, Failure> {
    let status = response.status();
    let headers = response.headers();
    check_framing(url, status, headers)?;
    let (length, resumed) = match (status, resume) {
        (StatusCode::OK, _) => (response.body().size_hint().exact(), false),
        (StatusCode::PARTIAL_CONTENT, Some(resume)) => {
            let total = continues(headers, resume).ok_or_else(|| {
                let message = "Upstream answered a range request with another range or content".to_owned();
                Failure::upstream(url, Some(status), message, Retry::FromTheStart)
            })?;
            (Some(total), true)
        }
        (StatusCode::RANGE_NOT_SATISFIABLE, Some(_)) => {
            let message = "Upstream's content has become shorter".to_owned();
            return Err(Failure::upstream(url, Some(status), message, Retry::FromTheStart));
        }
        _ => return Err(refused(url, &response)),
    };
    let head = Head::read(url, headers, length);
    let body = Body { incoming: response.into_body(), source: url.clone(), _connection: connection };
    Ok(Answer { head, resumed, body })
}

/// Reads an answer to HEAD, or to GET for the first byte.
pub(super) fn judge_head(url: &SourceUrl, response: &Response<Incoming>) -> Result<Head, Failure> {
    let headers = response.headers();
    let length = match response.status() {
        StatusCode::OK => {
            headers.get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse().ok())
        }
        StatusCode::PARTIAL_CONTENT => content_range(headers).map(|(_, _, total)| total),
        // There is no first byte to ask for.
        StatusCode::RANGE_NOT_SATISFIABLE if is_empty_range(headers) => Some(0),
        _ => return Err(refused(url, response)),
    };
    Ok(Head::read(url, headers, length))
}

/// RFC 9112, section 6.3: a response with both a length and a coding may be an attempt at smuggling.
fn check_framing(url: &SourceUrl, status: StatusCode, headers: &HeaderMap) -> Result<(), Failure> {
    if headers.contains_key(header::CONTENT_LENGTH) && headers.contains_key(header::TRANSFER_ENCODING) {
        let message = "Upstream's answer has both Content-Length and Transfer-Encoding".to_owned();
        return Err(Failure::upstream(url, Some(status), message, Retry::Never));
    }
    Ok(())
}

/// The total length, if the 206 begins where it should and is of the same content as before.
fn continues(headers: &HeaderMap, resume: Resume<'_>) -> Option<u64> {
    let (first, last, total) = content_range(headers)?;
    let etag = headers.get(header::ETAG).map(|etag| etag.to_str().unwrap_or_default());
    let same_etag = match resume.head.strong_etag() {
        // RFC 9110, section 15.3.7: it must be repeated. Who leaves it out may have ignored If-Range.
        Some(strong) => etag == Some(strong),
        None => etag.is_none_or(|etag| Some(etag) == resume.head.etag.as_deref()),
    };
    let same_length = resume.length.is_none_or(|length| length == total);
    (first == resume.offset && last + 1 == total && same_length && same_etag).then_some(total)
}

/// `bytes first-last/total` (RFC 9110, section 14.4), a known total and a range inside it.
fn content_range(headers: &HeaderMap) -> Option<(u64, u64, u64)> {
    let (range, total) =
        headers.get(header::CONTENT_RANGE)?.to_str().ok()?.strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let (first, last, total) = (first.parse().ok()?, last.parse().ok()?, total.parse::<u64>().ok()?);
    (first <= last && last < total).then_some((first, last, total))
}

/// `bytes */0`
fn is_empty_range(headers: &HeaderMap) -> bool {
    headers.get(header::CONTENT_RANGE).is_some_and(|range| range == "bytes */0")
}

/// An answer that is not the artifact.
fn refused(url: &SourceUrl, response: &Response<Incoming>) -> Failure {
    let status = response.status();
    let retry_after = retry_after(response.headers());
    let may_pass = matches!(status.as_u16(), 408 | 429 | 500..=599);
    let retry = match retry_after {
        _ if !may_pass => Retry::Never,
        Some(long) if long > LONGEST_RETRY_AFTER => Retry::Never,
        short => Retry::After(short),
    };
    Failure {
        error: Error::Upstream {
            status: Some(status.as_u16()),
            source_url: url.key().into(),
            message: format!("Upstream server returned status {}", status.as_u16()),
            retry_after: retry_after.filter(|_| may_pass),
        },
        retry,
    }
}

/// RFC 9110, section 10.2.3: seconds or a date.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim();
    match text.parse() {
        Ok(seconds) => Some(Duration::from_secs(seconds)),
        Err(_) => httpdate::parse_http_date(text).ok()?.duration_since(SystemTime::now()).ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect()
    }

    fn head(length: Option<u64>, etag: &str) -> Head {
        Head {
            length,
            content_type: None,
            content_encoding: None,
            file_name: None,
            etag: Some(etag.to_owned()),
            last_modified: None,
        }
    }

    #[test]
    fn only_the_exact_rest_of_the_same_content_continues() {
        let head = head(Some(100), "\"a\"");
        let resume = Resume { offset: 40, head: &head, length: head.length };
        let with = |range, etag| continues(&headers(&[("content-range", range), ("etag", etag)]), resume);
        assert_eq!(with("bytes 40-99/100", "\"a\""), Some(100));
        let without = headers(&[("content-range", "bytes 40-99/100")]);
        assert_eq!(continues(&without, resume), None, "a strong ETag must be repeated");
        for (range, etag) in [
            ("bytes 40-99/100", "\"b\""),
            ("bytes 39-99/100", "\"a\""),
            ("bytes 40-98/100", "\"a\""),
            ("bytes 40-100/101", "\"a\""),
            ("bytes 40-99/*", "\"a\""),
            ("bytes 99-40/100", "\"a\""),
            ("bytes 40-18446744073709551615/18446744073709551615", "\"a\""),
            ("lines 40-99/100", "\"a\""),
        ] {
            assert_eq!(with(range, etag), None, "{range} {etag}");
        }
    }

    #[test]
    fn retry_after_takes_seconds_and_dates() {
        assert_eq!(retry_after(&headers(&[("retry-after", "120")])), Some(Duration::from_secs(120)));
        let later = httpdate::fmt_http_date(SystemTime::now() + Duration::from_secs(90));
        assert!(retry_after(&headers(&[("retry-after", &later)])).unwrap() > Duration::from_secs(60));
        assert_eq!(retry_after(&headers(&[("retry-after", "soon")])), None);
    }
}
