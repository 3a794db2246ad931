//! Every failure's status and JSON: one exhaustive match.

use std::time::Duration;

use http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use serde_json::{Map, Value};

use super::body::ResponseBody;
use crate::error::Error;

/// When to come back, if nothing better is known.
const RETRY_AFTER_UNAVAILABLE: Duration = Duration::from_secs(10);
const RETRY_AFTER_BUSY: Duration = Duration::from_secs(5);

/// Why a request gets no artifact: a failure of the cache, or one of HTTP.
#[derive(Debug)]
pub(super) enum Refusal {
    Failed(Error),
    NotFound,
    MethodNotAllowed,
    PreconditionFailed,
    RangeNotSatisfiable { size: u64 },
    UriTooLong,
    BadFraming,
    Panicked,
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Refusal {
        Refusal::Failed(error)
    }
}

impl Refusal {
    /// The word in JSON, logs and the label `code`.
    pub(super) fn code(&self) -> &'static str {
        match self {
            Refusal::Failed(error) => error.code(),
            Refusal::NotFound => "not_found",
            Refusal::MethodNotAllowed => "method_not_allowed",
            Refusal::PreconditionFailed => "precondition_failed",
            Refusal::RangeNotSatisfiable { .. } => "range_not_satisfiable",
            Refusal::UriTooLong | Refusal::BadFraming => "invalid_parameter",
            Refusal::Panicked => "internal_error",
        }
    }

    /// What happened, for the client and the log.
    pub(super) fn message(&self) -> String {
        match self {
            Refusal::Failed(error) => error.to_string(),
            Refusal::NotFound => {
                "No such resource; artifacts are at /fetch?url=…, and there are /health, /api/stats and /metrics".into()
            }
            Refusal::MethodNotAllowed => "Only GET and HEAD are allowed here".into(),
            Refusal::PreconditionFailed => "The artifact does not meet the request's precondition".into(),
            Refusal::RangeNotSatisfiable { size } => {
                format!("None of the requested ranges lies within the artifact's {size} bytes")
            }
            Refusal::UriTooLong => "The request line is longer than 32 KiB".into(),
            Refusal::BadFraming => "A GET or HEAD request may not have a Transfer-Encoding".into(),
            Refusal::Panicked => "The request failed unexpectedly".into(),
        }
    }

    pub(super) fn status(&self) -> StatusCode {
        match self {
            Refusal::Failed(error) => status(error),
            Refusal::NotFound => StatusCode::NOT_FOUND,
            Refusal::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
            Refusal::PreconditionFailed => StatusCode::PRECONDITION_FAILED,
            Refusal::RangeNotSatisfiable { .. } => StatusCode::RANGE_NOT_SATISFIABLE,
            Refusal::UriTooLong => StatusCode::URI_TOO_LONG,
            Refusal::BadFraming => StatusCode::BAD_REQUEST,
            Refusal::Panicked => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    /// JSON, or problem details (RFC 9457) with the same members for who asks for them.
    pub(super) fn into_response(self, as_problem: bool) -> Response<ResponseBody> {
        let status = self.status();
        if matches!(self, Refusal::UriTooLong | Refusal::BadFraming) {
            // Bare and final, like the refusals of the HTTP layer itself.
            let mut response = Response::new(ResponseBody::empty());
            *response.status_mut() = status;
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
            return response;
        }
        let mut members = Map::new();
        if as_problem {
            members.insert("type".into(), "about:blank".into());
            members.insert("title".into(), status.canonical_reason().unwrap_or_default().into());
            members.insert("status".into(), status.as_u16().into());
            members.insert("detail".into(), self.message().into());
        }
        members.insert("error".into(), self.code().into());
        self.describe(&mut members);
        let mut body = Value::Object(members).to_string();
        body.push('\n');
        let mut response = Response::new(ResponseBody::full(body));
        *response.status_mut() = status;
        let content_type = if as_problem { "application/problem+json" } else { "application/json" };
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        self.add_headers(headers);
        response
    }

    /// The members between `error` and the end, in the document's order.
    fn describe(&self, members: &mut Map<String, Value>) {
        let mut put = |name: &str, value: Value| drop(members.insert(name.to_owned(), value));
        let details = match self {
            Refusal::Failed(error) => match error {
                Error::MissingParameter { parameter } => {
                    put("parameter", (*parameter).into());
                    None
                }
                Error::InvalidParameter { parameter, .. } => {
                    put("parameter", parameter.as_str().into());
                    None
                }
                Error::ChecksumMismatch { expected, actual, source_url } => {
                    put("expected", expected.to_string().into());
                    put("actual", actual.to_string().into());
                    put("source_url", (**source_url).into());
                    None
                }
                Error::Upstream { status, source_url, .. } => {
                    if let Some(status) = status {
                        put("status_code", (*status).into());
                    }
                    put("source_url", (**source_url).into());
                    None
                }
                Error::ForbiddenUpstream { source_url, .. }
                | Error::TooLarge { source_url, .. }
                | Error::Unavailable { source_url, .. }
                | Error::NotCached { source_url } => {
                    put("source_url", (**source_url).into());
                    None
                }
                Error::Internal { details, .. } => Some(details.as_str()),
                Error::Busy => None,
            },
            Refusal::Panicked => Some("unexpected error, see the log"),
            _ => None,
        };
        put("message", self.message().into());
        if let Some(details) = details {
            put("details", details.into());
        }
    }

    fn add_headers(&self, headers: &mut HeaderMap) {
        let retry_after = match self {
            Refusal::MethodNotAllowed => {
                headers.insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
                None
            }
            Refusal::RangeNotSatisfiable { size } => {
                if let Ok(value) = HeaderValue::try_from(format!("bytes */{size}")) {
                    headers.insert(header::CONTENT_RANGE, value);
                }
                None
            }
            Refusal::Failed(Error::Unavailable { retry_after, .. }) => {
                Some(retry_after.unwrap_or(RETRY_AFTER_UNAVAILABLE))
            }
            Refusal::Failed(Error::Busy) => Some(RETRY_AFTER_BUSY),
            Refusal::Failed(Error::Upstream { retry_after, .. } | Error::Internal { retry_after, .. }) => {
                *retry_after
            }
            _ => None,
        };
        if let Some(pause) = retry_after {
            headers.insert(header::RETRY_AFTER, pause.as_secs().max(1).into());
        }
    }
}

fn status(error: &Error) -> StatusCode {
    match error {
        Error::MissingParameter { .. } | Error::InvalidParameter { .. } => StatusCode::BAD_REQUEST,
        Error::ForbiddenUpstream { .. } => StatusCode::FORBIDDEN,
        Error::ChecksumMismatch { .. } => StatusCode::CONFLICT,
        Error::Internal { .. } => StatusCode::INTERNAL_SERVER_ERROR,
        Error::Upstream { .. } | Error::TooLarge { .. } => StatusCode::BAD_GATEWAY,
        Error::Unavailable { .. } | Error::Busy => StatusCode::SERVICE_UNAVAILABLE,
        Error::NotCached { .. } => StatusCode::GATEWAY_TIMEOUT,
    }
}
