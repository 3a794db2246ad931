//! From a request to a verified artifact, over as many attempts as it takes.

use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue, Method, header, response};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};

use super::{
    outcome::{Failure, Fetched},
    progress::Progress,
    sink::Sink,
};
use crate::{
    artifact::Digest,
    cli::client::{Answer, Client, text},
};

static X_CONTENT_SHA256: HeaderName = HeaderName::from_static("x-content-sha256");
static X_CACHE_STATUS: HeaderName = HeaderName::from_static("x-cache-status");

/// Between attempts: the first pause, doubled each time, and the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

const FOREIGN_BEGINNING: &str = "what was here already does not belong to it";

/// One artifact to be had.
pub(super) struct Transfer<'a> {
    pub(super) client: &'a Client,
    pub(super) source: &'a str,
    pub(super) expected: Option<Digest>,
    /// In a row, without a new byte.
    pub(super) retries: u32,
    /// How long the service may be silent.
    pub(super) patience: Duration,
    pub(super) progress: &'a Progress,
}

impl Transfer<'_> {
    /// Fetches what the sink does not have yet.
    pub(super) async fn run(&self, sink: &mut Sink) -> Result<Fetched, Failure> {
        let resumed_bytes = sink.size_bytes();
        let mut etag = self.expected.map(etag_of);
        let (mut failures, mut broke_once) = (0, false);
        loop {
            let had = sink.size_bytes();
            let failure = match self.attempt(sink, &mut etag).await {
                Ok(answer) => {
                    let cache_status = text(&answer, &X_CACHE_STATUS).map(str::to_owned);
                    let (digest, size_bytes) = (sink.digest(), sink.size_bytes());
                    let file = sink.keep()?;
                    return Ok(Fetched { file, digest, size_bytes, cache_status, resumed_bytes });
                }
                Err(failure) => failure,
            };
            failures = if sink.size_bytes() > had { 1 } else { failures + 1 };
            broke_once |= matches!(failure, Failure::Broken { .. });
            // A service that restarts in the middle is worth waiting for; one that was never there is not.
            let may_help = matches!(failure, Failure::Broken { .. })
                || broke_once && matches!(failure, Failure::Unreachable(_));
            if !may_help || failures > self.retries {
                sink.abandon();
                return Err(failure);
            }
            self.progress.say(&format!("{failure}; trying again"));
            tokio::time::sleep((FIRST_PAUSE * 2u32.pow(failures.min(8) - 1)).min(LONGEST_PAUSE)).await;
        }
    }

    /// One request, to the end of its body and its verification.
    async fn attempt(&self, sink: &mut Sink, etag: &mut Option<String>) -> Result<response::Parts, Failure> {
        let mut answer = self.ask(sink.size_bytes(), etag.as_deref()).await?;
        match answer.head.status.as_u16() {
            200 | 206 if !answer.head.headers.contains_key(&X_CACHE_STATUS) => {
                return Err(refusal(answer).await);
            }
            206 if range_start(&answer.head) == Some(sink.size_bytes()) => {}
            200 => begin_again(sink, "the artifact has changed")?,
            // More is here than there is: these bytes belong to something else.
            206 | 416 => {
                begin_again(sink, "the service can't continue it")?;
                return Err(broken(sink, FOREIGN_BEGINNING));
            }
            _ => return Err(refusal(answer).await),
        }
        let had = sink.size_bytes();
        *etag = text(&answer.head, &header::ETAG).map(str::to_owned).or(self.expected.map(etag_of));
        self.progress.begin(had, length(&answer.head).map(|length| had + length));
        loop {
            match answer.piece().await {
                Ok(Some(bytes)) => {
                    sink.write(&bytes)?;
                    self.progress.advance(bytes.len());
                }
                Ok(None) => break,
                Err(cause) => return Err(broken(sink, cause)),
            }
        }
        self.verify(sink, &answer.head, had > 0).await?;
        Ok(answer.head)
    }

    async fn ask(&self, have: u64, etag: Option<&str>) -> Result<Answer, Failure> {
        let mut headers = HeaderMap::new();
        if have > 0 {
            headers.insert(header::RANGE, value(format!("bytes={have}-"))?);
            if let Some(etag) = etag {
                headers.insert(header::IF_RANGE, value(etag.to_owned())?);
            }
        }
        Ok(self.client.ask(Method::GET, &self.target(), headers, self.patience).await?)
    }

    fn target(&self) -> String {
        let url = utf8_percent_encode(self.source, NON_ALPHANUMERIC);
        self.expected
            .map_or_else(|| format!("/fetch?url={url}"), |sha256| format!("/fetch?url={url}&sha256={sha256}"))
    }

    /// Holds what was written against what the service says, and against what the user said.
    async fn verify(&self, sink: &mut Sink, head: &response::Parts, resumed: bool) -> Result<(), Failure> {
        let actual = sink.digest();
        let told = match digest_in(head) {
            None => self.recorded().await,
            told => told,
        };
        match self.expected.or(told) {
            Some(expected) if expected == actual => Ok(()),
            // Whole as its framing says, in one piece, and gone from the service since.
            None if !resumed => Ok(()),
            // The beginning, of another run or another version, is the likelier culprit: once more without it.
            _ if resumed && sink.restart()? => Err(broken(sink, FOREIGN_BEGINNING)),
            Some(expected) => {
                let note = if sink.restart()? { "" } else { "; what was written is wrong" };
                Err(Failure::Mismatch { expected, actual, note })
            }
            None => Err(broken(sink, "the service no longer knows what it should be")),
        }
    }

    /// The digest of an artifact that was streamed before it was known: by the end of its body it is on record.
    async fn recorded(&self) -> Option<Digest> {
        let answer =
            self.client.ask(Method::HEAD, &self.target(), HeaderMap::new(), self.patience).await.ok()?;
        digest_in(&answer.head)
    }
}

/// Begins again from nothing; a stream can't.
fn begin_again(sink: &mut Sink, why: &str) -> Result<(), Failure> {
    match sink.restart()? {
        true => Ok(()),
        false => Err(Failure::Local(format!("{why}, and what was written to a stream can't be taken back"))),
    }
}

fn broken(sink: &Sink, cause: impl Into<String>) -> Failure {
    Failure::Broken { after_bytes: sink.size_bytes(), cause: cause.into() }
}

fn etag_of(digest: Digest) -> String {
    format!("\"{digest}\"")
}

fn value(text: String) -> Result<HeaderValue, Failure> {
    HeaderValue::try_from(text).map_err(|error| Failure::Local(error.to_string()))
}

fn digest_in(head: &response::Parts) -> Option<Digest> {
    text(head, &X_CONTENT_SHA256)?.parse().ok()
}

fn length(head: &response::Parts) -> Option<u64> {
    text(head, &header::CONTENT_LENGTH)?.parse().ok()
}

/// `bytes 100-199/1000` → 100.
fn range_start(head: &response::Parts) -> Option<u64> {
    text(head, &header::CONTENT_RANGE)?.strip_prefix("bytes ")?.split('-').next()?.parse().ok()
}

/// What an answer that is no artifact says.
async fn refusal(answer: Answer) -> Failure {
    let status = answer.head.status;
    let Some(body) = answer.into_json().await.filter(|body| body["error"].is_string()) else {
        return Failure::Stranger(format!(
            "the server answers {status} and is no artifact-cache; check --server"
        ));
    };
    let member = |name: &str| body[name].as_str().map(str::to_owned);
    let mut message = member("message").unwrap_or_else(|| status.to_string());
    if let (Some(expected), Some(actual)) = (member("expected"), member("actual")) {
        message += &format!(": expected {expected}, got {actual}");
    }
    if let Some(details) = member("details") {
        message += &format!(": {details}");
    }
    Failure::Refused { word: member("error").unwrap_or_default(), message }
}
