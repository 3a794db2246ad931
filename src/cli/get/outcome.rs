//! How `get` ends, for people, for scripts and as an exit code.

use std::path::PathBuf;

use serde_json::{Value, json};

use crate::{artifact::Digest, cli::client::Unreachable};

/// What came of it.
#[derive(Debug)]
pub(super) struct Fetched {
    /// `None` when it went to a stream.
    pub(super) file: Option<PathBuf>,
    pub(super) digest: Digest,
    pub(super) size_bytes: u64,
    /// `HIT` or `MISS` as the service said last; `None` when it was not asked.
    pub(super) cache_status: Option<String>,
    /// Bytes that were there before this run.
    pub(super) resumed_bytes: u64,
}

/// Why there is no artifact.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    /// Something on this machine.
    #[error("{0}")]
    Local(String),
    /// The command line.
    #[error("{0}")]
    Usage(String),
    /// The bytes are not what they should be.
    #[error("the checksum does not match: expected {expected}, got {actual}{note}")]
    Mismatch {
        expected: Digest,
        actual: Digest,
        /// What that means for what was written.
        note: &'static str,
    },
    /// The service said no, in its own words.
    #[error("{message}")]
    Refused { word: String, message: String },
    /// No answer.
    #[error(transparent)]
    Unreachable(#[from] Unreachable),
    /// Something answered that is no artifact-cache.
    #[error("{0}")]
    Stranger(String),
    /// The body broke off; another attempt may help.
    #[error("the transfer broke off after {after_bytes} bytes: {cause}")]
    Broken { after_bytes: u64, cause: String },
}

impl Failure {
    /// What the verb's help says.
    pub(super) fn exit_code(&self) -> u8 {
        match self {
            Failure::Local(_) => 1,
            Failure::Usage(_) => 2,
            Failure::Mismatch { .. } => 3,
            Failure::Refused { word, .. } => match word.as_str() {
                "missing_parameter" | "invalid_parameter" => 2,
                "checksum_mismatch" => 3,
                "upstream_error" | "upstream_unavailable" | "artifact_too_large" | "forbidden_upstream" => 4,
                _ => 5,
            },
            Failure::Unreachable(_) | Failure::Stranger(_) | Failure::Broken { .. } => 5,
        }
    }

    /// One word for it: the service's where it is its error.
    pub(super) fn word(&self) -> &str {
        match self {
            Failure::Local(_) => "local_error",
            Failure::Usage(_) => "usage",
            Failure::Mismatch { .. } => "checksum_mismatch",
            Failure::Refused { word, .. } => word,
            Failure::Unreachable(_) => "unreachable",
            Failure::Stranger(_) => "no_artifact_cache",
            Failure::Broken { .. } => "broken_transfer",
        }
    }
}

/// The one JSON object of `--json`.
pub(super) fn report(url: &str, outcome: &Result<Fetched, Failure>) -> Value {
    match outcome {
        Ok(fetched) => json!({
            "url": url,
            "file": fetched.file,
            "size_bytes": fetched.size_bytes,
            "sha256": fetched.digest,
            "cache_status": fetched.cache_status,
            "resumed_bytes": fetched.resumed_bytes,
        }),
        Err(failure) => json!({
            "url": url,
            "error": failure.word(),
            "message": failure.to_string(),
            "exit_code": failure.exit_code(),
        }),
    }
}
