//! Deleting blobs from the store: the one place that does, what it waits for, and what holds it off. (What a backup's own
//! directory has too much is removed by `tree`.)
//!
//! A publisher and the sweep may want one digest at the same time. They take turns under its shard's lock, which alone
//! would not be enough: a publisher has the file in its place before the catalogue has the row. So it *claims* the
//! digest from before the one until after the other, and the sweep leaves alone what is claimed. Without a claim,
//! whatever was published is recorded, so that what the catalogue says under the lock is the truth.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use super::{Blobs, SweepLock, list, place, sync_dir};
use crate::{artifact::Digest, error::Error, kill_point};

/// A publisher's claim on a digest. Dropping it gives it up.
#[derive(Debug)]
pub struct Claim {
    blobs: Arc<Blobs>,
    digest: Digest,
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut claims = self.blobs.claims();
        if let Some(at) = claims.iter().position(|claimed| *claimed == self.digest) {
            claims.swap_remove(at);
        }
    }
}

/// What [`Blobs::remove`] came to.
#[derive(Debug, PartialEq, Eq)]
pub enum Removal {
    /// Nothing lies at its place any more, and that survives a power cut. So many bytes were there.
    Gone(u64),
    /// It is wanted again: published, or about to be.
    Wanted,
    /// The file was written after the deletion, so it can't be what was deleted: the catalogue must be an old one.
    Newer,
}

impl Blobs {
    /// Claims a digest for a publisher.
    pub(super) fn claim(self: &Arc<Self>, digest: Digest) -> Claim {
        self.claims().push(digest);
        Claim { blobs: self.clone(), digest }
    }

    /// A turn for the sweep, `None` while a backup needs every blob of its snapshot.
    pub fn try_sweep_turn(&self) -> io::Result<Option<SweepLock>> {
        SweepLock::try_exclusive(&self.base)
    }

    /// Deletes a blob for good, if `is_deleted` says so while nobody can publish it. `deleted_at` is when it was
    /// deleted, as recorded. Blocks.
    ///
    /// # Errors
    /// Those of `is_deleted`; else what the disk says, and then the file may be there or not.
    pub fn remove(
        &self,
        digest: Digest,
        deleted_at: SystemTime,
        is_deleted: impl FnOnce() -> Result<bool, Error>,
    ) -> Result<Removal, Error> {
        let _shard = self.shard(digest);
        // In this order: a claim that is gone by now has its row.
        let is_claimed = self.claims().contains(&digest);
        if is_claimed || !is_deleted()? {
            return Ok(Removal::Wanted);
        }
        kill_point::pass("sweep.checked");
        unlink(&self.path(digest), deleted_at)
            .map_err(|cause| Error::io("Failed to delete from cache storage", &cause))
    }
}

fn unlink(path: &Path, deleted_at: SystemTime) -> io::Result<Removal> {
    let bytes = match fs::symlink_metadata(path) {
        Ok(found) if written_seconds(&found) > seconds(deleted_at) => return Ok(Removal::Newer),
        Ok(found) => {
            fs::remove_file(path)?;
            kill_point::pass("sweep.unlinked");
            found.len()
        }
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => 0,
        Err(cause) => return Err(cause),
    };
    // Also when nothing was there: it may have been unlinked by a process that died before it came to this.
    match path.parent().map(sync_dir) {
        Some(Err(cause)) if cause.kind() != io::ErrorKind::NotFound => return Err(cause),
        _ => {}
    }
    kill_point::pass("sweep.synced");
    Ok(Removal::Gone(bytes))
}

/// When its bytes were written; linking or renaming a file leaves that as it is.
fn written_seconds(file: &fs::Metadata) -> i64 {
    file.mtime()
}

/// As the catalogue writes times: whole seconds.
fn seconds(time: SystemTime) -> i64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs() as i64
}

/// The blobs below the store at `base` whose digest begins with this byte, with their sizes in bytes. For commands
/// beside a running service, which has the store locked.
pub fn list_with_sizes(base: &Path, first: u8) -> io::Result<Vec<(Digest, u64)>> {
    let size = |digest| match fs::symlink_metadata(place(base, digest)) {
        Ok(found) => Ok(Some((digest, found.len()))),
        // Moved away meanwhile.
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(cause) => Err(cause),
    };
    list(base, first)?.into_iter().filter_map(|digest| size(digest).transpose()).collect()
}
