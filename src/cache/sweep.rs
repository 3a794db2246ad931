//! The sweep: what was deleted leaves the disk, unless somebody wants it again.

use std::sync::Arc;

use super::Cache;
use crate::{blobs::Removal, catalog::Deleted, error::Error};

/// What a turn of the sweep came to.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Deletions carried out.
    pub blobs: u64,
    /// Bytes that they had.
    pub bytes: u64,
    /// Left alone, because the file is newer than its deletion.
    pub newer: u64,
    /// Left alone, because the disk refused; with the last reason.
    pub failed: u64,
    /// The last reason.
    pub failure: Option<String>,
}

impl Cache {
    /// Blobs recorded as deleted whose files may still be there, the longest deleted first, `limit` at most. Blocks.
    pub fn unswept(&self, limit: usize) -> Result<Vec<Deleted>, Error> {
        self.catalog.unswept(limit)
    }

    /// Deletes the files of these blobs, but for those that are wanted again. `None` while a backup needs them all.
    pub async fn sweep(self: &Arc<Self>, due: Vec<Deleted>) -> Result<Option<Swept>, Error> {
        let cache = self.clone();
        let turn = tokio::task::spawn_blocking(move || cache.sweep_now(&due)).await;
        let turn = turn.map_err(|cause| failed(&std::io::Error::other(cause)))??;
        let Some((swept, gone)) = turn else { return Ok(None) };
        self.metrics.swept_blobs.inc_by(swept.blobs);
        self.metrics.swept_bytes.inc_by(swept.bytes);
        // Should this not come to be noted, the next turn finds nothing there and notes it then.
        self.catalog.mark_swept(gone).await?;
        Ok(Some(swept))
    }

    fn sweep_now(&self, due: &[Deleted]) -> Result<Option<(Swept, Vec<Deleted>)>, Error> {
        let Some(_turn) = self.blobs.try_sweep_turn().map_err(|cause| failed(&cause))? else {
            return Ok(None);
        };
        let (mut swept, mut gone) = (Swept::default(), Vec::new());
        for blob in due {
            match self.blobs.remove(blob.digest, blob.at(), || self.catalog.is_deleted(blob)) {
                Ok(Removal::Gone(bytes)) => {
                    swept.blobs += 1;
                    swept.bytes += bytes;
                    gone.push(*blob);
                }
                Ok(Removal::Wanted) => {}
                Ok(Removal::Newer) => swept.newer += 1,
                // One directory that lies in the way must not keep the others there.
                Err(error) => {
                    swept.failed += 1;
                    swept.failure = Some(error.to_string());
                }
            }
        }
        Ok(Some((swept, gone)))
    }
}

fn failed(cause: &std::io::Error) -> Error {
    Error::io("Failed to delete from cache storage", cause)
}
