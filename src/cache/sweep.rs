//! The sweep: what was deleted leaves the disk, unless somebody wants it again.

use std::sync::Arc;

use super::{Archive, Cache};
use crate::{blobs::Removal, catalog::Deleted, error::Error};

/// Whether a turn of the sweep took place.
#[derive(Debug, PartialEq, Eq)]
pub enum Turn {
    /// It did.
    Taken(Swept),
    /// A backup needs every file.
    Backup,
    /// The database is not the one that records this store, so what it calls deleted says nothing of these files.
    Doubt,
}

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

    /// Deletes the files of these blobs, but for those that are wanted again.
    pub async fn sweep(self: &Arc<Self>, due: Vec<Deleted>) -> Result<Turn, Error> {
        let cache = self.clone();
        let turn = tokio::task::spawn_blocking(move || cache.sweep_now(&due)).await;
        let turn = turn.map_err(|cause| failed(&std::io::Error::other(cause)))??;
        let (swept, gone) = match turn {
            Ok(swept) => swept,
            Err(held_off) => return Ok(held_off),
        };
        self.metrics.swept_blobs.inc_by(swept.blobs);
        self.metrics.swept_bytes.inc_by(swept.bytes);
        // Should this not come to be noted, the next turn finds nothing there and notes it then.
        self.catalog.mark_swept(gone).await?;
        Ok(Turn::Taken(swept))
    }

    /// The inner error is why there is no turn now.
    fn sweep_now(&self, due: &[Deleted]) -> Result<Result<(Swept, Vec<Deleted>), Turn>, Error> {
        // Many orphans are no reason: that the database is the right one is known, and a full disk may need the room.
        if matches!(self.archive(), Archive::New | Archive::Other | Archive::Older) {
            return Ok(Err(Turn::Doubt));
        }
        let Some(_lock) = self.blobs.try_sweep_turn().map_err(|cause| failed(&cause))? else {
            return Ok(Err(Turn::Backup));
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
        Ok(Ok((swept, gone)))
    }
}

fn failed(cause: &std::io::Error) -> Error {
    Error::io("Failed to delete from cache storage", cause)
}

#[cfg(test)]
mod tests {
    use std::{
        sync::mpsc::channel,
        time::{Duration, SystemTime},
    };

    use super::*;
    use crate::{
        artifact::Digest,
        blobs::{Blobs, Origin},
        config::Config,
    };

    /// The catalogue's thread gives claims up, and every record waits for it.
    #[tokio::test]
    async fn who_gives_a_claim_up_waits_for_no_publisher_and_no_sweep() {
        let dir = tempfile::tempdir().unwrap();
        let mut storage = Config::default().storage;
        (storage.base_path, storage.min_free_bytes) = (dir.path().join("cache"), 0);
        let blobs = Arc::new(Blobs::open(&storage).unwrap());
        let origin = Origin { source_url: String::new(), head: serde_json::Value::Null };
        let mut spool = blobs.spool(None, origin).unwrap();
        spool.write("content".into()).await.unwrap();
        let written = spool.finish().await.unwrap();
        let mut neighbour = written.digest.to_string();
        neighbour.replace_range(2.., &"0".repeat(62));
        let claim = blobs.publish(written).await.unwrap().claim;
        let is_given_up = || {
            let (told, heard) = channel();
            std::thread::spawn(move || {
                drop(claim);
                told.send(()).unwrap();
            });
            heard.recv_timeout(Duration::from_secs(10)).expect("it is given up in the middle of a removal");
            Ok(false)
        };
        let neighbour: Digest = neighbour.parse().unwrap();
        let removal = blobs.remove(neighbour, SystemTime::now(), is_given_up).unwrap();
        assert_eq!(removal, Removal::Wanted);
    }
}
