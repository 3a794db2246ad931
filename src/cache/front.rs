//! What was served lately, with its file open: a hit on it costs no query and no open.
//!
//! It never hides what an operator did: a file removed, replaced or cut short shows in its own fstat at each hit, and a
//! changed database moves the catalogue's generation, and with it goes all that was read before.

use std::{
    fs::File,
    os::unix::fs::{FileExt, MetadataExt},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use quick_cache::sync::Cache;

use crate::{artifact::Version, catalog::Artifact};

/// Open files kept; also bounded by a share of the process's limit.
const MAX_OPEN: usize = 8192;
/// Artifacts up to this size are kept in memory, which is half the work of reading them; 32 MiB at the most.
const SMALL_BYTES: u64 = 4096;

/// An artifact whose file is open.
#[derive(Debug)]
pub struct Stored {
    /// Its row.
    pub id: i64,
    /// Its content.
    pub version: Version,
    /// Its bytes, and nothing but them.
    pub file: Arc<File>,
    small: OnceLock<Bytes>,
    /// The most links to the file that were seen.
    links: AtomicU64,
    /// Whatever the answers about it have in common, kept so that a hit needn't make it again. Empty at first; this
    /// layer doesn't look into it.
    pub memo: OnceLock<http::HeaderMap>,
}

impl Stored {
    pub(super) fn new(artifact: Artifact, file: Arc<File>) -> Stored {
        Stored {
            id: artifact.id,
            version: artifact.version,
            file,
            small: OnceLock::new(),
            links: AtomicU64::new(0),
            memo: OnceLock::new(),
        }
    }

    /// All bytes of a small artifact, read once and kept.
    pub(super) fn small(&self) -> Option<&Bytes> {
        if self.version.size > SMALL_BYTES {
            return None;
        }
        if let Some(bytes) = self.small.get() {
            return Some(bytes);
        }
        let mut bytes = vec![0; self.version.size as usize];
        // Whoever reads the file as usual will meet the error again.
        self.file.read_exact_at(&mut bytes, 0).ok()?;
        Some(self.small.get_or_init(|| bytes.into()))
    }

    /// The open file is still the one in the store, and of the right length. A link less than there was is looked into
    /// by opening it again; a backup may hold another one.
    fn is_current(&self) -> bool {
        let Ok(found) = self.file.metadata() else { return false };
        let links = self.links.fetch_max(found.nlink(), Ordering::Relaxed);
        found.nlink() > 0 && found.nlink() >= links && found.len() == self.version.size
    }
}

#[derive(Debug)]
pub(super) struct Front(Cache<Arc<str>, Entry>);

#[derive(Debug, Clone)]
struct Entry {
    /// The catalogue's when this was read from it.
    generation: u64,
    stored: Arc<Stored>,
}

impl Front {
    pub(super) fn new() -> Front {
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(u64::MAX);
        Front(Cache::new((limit / 4).clamp(16, MAX_OPEN as u64) as usize))
    }

    /// What was put under this key, if that still holds at `generation`.
    pub(super) fn get(&self, key: &str, generation: u64) -> Option<Arc<Stored>> {
        let entry = self.0.get(key)?;
        if entry.generation == generation && entry.stored.is_current() {
            return Some(entry.stored);
        }
        self.0.remove(key);
        None
    }

    /// Keeps what was read from the catalogue at `generation`.
    pub(super) fn put(&self, key: &str, stored: Arc<Stored>, generation: u64) {
        self.0.insert(Arc::from(key), Entry { generation, stored });
    }
}
