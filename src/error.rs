//! The ways a request can fail, each with what a client needs to know to act on it.
//!
//! Nothing here knows HTTP: `server::error` gives every variant its status and JSON. An error is cheap to clone,
//! because everyone who waits for one download gets the same one.

use std::{fs, io, os::unix::fs::MetadataExt, path::Path, sync::Arc, time::Duration};

use rustix::fs::Access;

use crate::artifact::Digest;

/// Why a request was not answered with an artifact.
///
/// `source_url` is always the canonical form (`SourceUrl::key`): without fragment, signature parameters or secrets
/// of a signed URL.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// A required parameter is not there.
    #[error("Missing required '{parameter}' parameter")]
    MissingParameter {
        /// Its name.
        parameter: &'static str,
    },
    /// A parameter is there and can't be used.
    #[error("{message}")]
    InvalidParameter {
        /// Its name as the client wrote it.
        parameter: String,
        /// What is wrong with it, and the cure.
        message: String,
    },
    /// The URL, or a redirect it led to, points where this service may not go.
    #[error("Refused to contact the upstream: {reason}")]
    ForbiddenUpstream {
        /// What was asked for.
        source_url: Arc<str>,
        /// Which rule forbids it.
        reason: String,
    },
    /// The content is not what the client expects.
    #[error("Artifact checksum does not match expected value")]
    ChecksumMismatch {
        /// What the client said.
        expected: Digest,
        /// What the content has.
        actual: Digest,
        /// What was asked for.
        source_url: Arc<str>,
    },
    /// The upstream answered, and not with the artifact.
    #[error("{message}")]
    Upstream {
        /// Its status, if its answer had one worth telling.
        status: Option<u16>,
        /// What was asked for.
        source_url: Arc<str>,
        /// What it did.
        message: String,
        /// When it said to come back.
        retry_after: Option<Duration>,
    },
    /// The artifact is larger than this service keeps.
    #[error("Artifact is larger than the limit of {limit} bytes (storage.max_artifact_bytes)")]
    TooLarge {
        /// What was asked for.
        source_url: Arc<str>,
        /// `storage.max_artifact_bytes`.
        limit: u64,
    },
    /// The upstream did not answer, or not in time.
    #[error("Upstream server timeout or unreachable: {message}")]
    Unavailable {
        /// What was asked for.
        source_url: Arc<str>,
        /// What exactly happened.
        message: String,
        /// When to try again.
        retry_after: Option<Duration>,
    },
    /// Every place for a download is taken, and so is the queue.
    #[error("Too many downloads are under way or waiting; try again later")]
    Busy,
    /// The client wanted only what is stored, and it isn't.
    #[error("Artifact is not in the cache, and the request said only-if-cached")]
    NotCached {
        /// What was asked for.
        source_url: Arc<str>,
    },
    /// This service's own disk, database or code failed.
    #[error("{message}")]
    Internal {
        /// What it was doing.
        message: &'static str,
        /// Why that failed; never a path.
        details: String,
        /// When to try again, for what passes by itself.
        retry_after: Option<Duration>,
    },
}

impl Error {
    /// The word for this failure in JSON, logs and the label `code`.
    pub fn code(&self) -> &'static str {
        match self {
            Error::MissingParameter { .. } => "missing_parameter",
            Error::InvalidParameter { .. } => "invalid_parameter",
            Error::ForbiddenUpstream { .. } => "forbidden_upstream",
            Error::ChecksumMismatch { .. } => "checksum_mismatch",
            Error::Upstream { .. } => "upstream_error",
            Error::TooLarge { .. } => "artifact_too_large",
            Error::Unavailable { .. } => "upstream_unavailable",
            Error::Busy => "server_busy",
            Error::NotCached { .. } => "not_cached",
            Error::Internal { .. } => "internal_error",
        }
    }

    /// An I/O failure while doing `message`, its reason in words that show no path.
    pub fn io(message: &'static str, cause: &io::Error) -> Error {
        Error::Internal { message, details: io_details(cause), retry_after: None }
    }

    /// The file system has no room for what was asked.
    pub fn disk_full() -> Error {
        Error::Internal {
            message: "Failed to write to cache storage",
            details: "disk full".to_owned(),
            retry_after: None,
        }
    }
}

/// What went wrong, in words an operator knows, without the path that the cause may carry.
fn io_details(cause: &io::Error) -> String {
    match cause.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "disk full".to_owned(),
        io::ErrorKind::ReadOnlyFilesystem => "read-only file system".to_owned(),
        io::ErrorKind::PermissionDenied => "permission denied".to_owned(),
        _ => match cause.raw_os_error() {
            Some(code) => format!("I/O error: {}", io::Error::from_raw_os_error(code)),
            None => "I/O error".to_owned(),
        },
    }
}

const MOUNT_WRITABLE: &str = "; mount it writable";

/// What a path is to be.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum PathKind {
    /// A directory, made with its parents.
    Directory,
    /// A file, with others beside it.
    File,
}

/// What makes a path usable that this process can't read and write, to be put behind the error: a command, or nothing.
///
/// `path` is a file or directory that is to be used, or to be made; `failure`, where it is known, is what came of that.
pub fn cure_for_path(path: &Path, wanted: PathKind, failure: Option<io::ErrorKind>) -> String {
    // After an error the kernel refuses writes without showing it to access(2).
    if failure == Some(io::ErrorKind::ReadOnlyFilesystem) {
        return MOUNT_WRITABLE.to_owned();
    }
    let exists = |path: &&Path| !path.as_os_str().is_empty() && path.symlink_metadata().is_ok();
    let Some(found) = path.ancestors().find(exists) else { return String::new() };
    let access = if found.is_dir() {
        Access::READ_OK | Access::WRITE_OK | Access::EXEC_OK
    } else {
        Access::READ_OK | Access::WRITE_OK
    };
    match rustix::fs::access(found, access) {
        Err(rustix::io::Errno::ACCESS) => {}
        Err(rustix::io::Errno::ROFS) => return MOUNT_WRITABLE.to_owned(),
        _ => return String::new(),
    }
    let (uid, gid) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
    let owner_is_us = |path: &Path| path.metadata().is_ok_and(|found| found.uid() == uid);
    // A fresh file system has `lost+found`, the `data` of a fresh clone a `.gitkeep`.
    let is_nothing = |name: &str| [".gitkeep", "lost+found"].contains(&name);
    let is_empty = |dir: &Path| {
        fs::read_dir(dir).is_ok_and(|entries| {
            entries.flatten().all(|entry| is_nothing(&entry.file_name().to_string_lossy()))
        })
    };
    // Only what is surely meant for this service: the path itself, an empty directory, such as a fresh volume, or one
    // that is ours already. A chown of any other might be one of the system's.
    let command = match found.parent() {
        Some(parent) if !found.is_dir() && owner_is_us(parent) => {
            format!("chown -R {uid}:{gid} {}", parent.display())
        }
        _ if !found.is_dir() => format!("chown {uid}:{gid} {}", found.display()),
        _ if found == path || is_empty(found) => format!("chown -R {uid}:{gid} {}", found.display()),
        _ if wanted == PathKind::File => {
            return format!(
                "; the service runs as {uid}:{gid} and must be able to write to {}",
                found.display()
            );
        }
        _ => format!("mkdir -p {0} && chown -R {uid}:{gid} {0}", path.display()),
    };
    format!(
        "; the service runs as {uid}:{gid} and must own it: {command} (of a container's volume: on the host, the \
         directory that is mounted there)"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn details_name_the_cause_and_never_a_path() {
        let full = Error::io("x", &io::Error::from_raw_os_error(28));
        assert!(matches!(full, Error::Internal { details, .. } if details == "disk full"));
        let secret = Error::io("x", &io::Error::other("open /var/lib/secret failed"));
        assert!(matches!(secret, Error::Internal { details, .. } if details == "I/O error"));
    }
}
