//! Counts orphans: blobs that the catalogue does not know. They are harmless, and become known when their content is
//! downloaded again; but many of them at once mean that `storage.database` is the wrong one, or an old one, so they are
//! said aloud. None is ever deleted but by an operator's explicit command.

use std::{sync::Arc, time::Instant};

use tokio_util::sync::CancellationToken;

use crate::{cache::Cache, error::Error};

/// Times as long as a step took are waited before the next: the census gets a tenth of one processor and disk at most.
const REST: u32 = 9;
/// Blobs asked for in a step: some hundred microseconds, so that on a single processor no request waits for it.
const STEP: usize = 8;

/// Goes through the whole store once.
pub(super) async fn run_once(cache: &Arc<Cache>, stop: &CancellationToken) -> Result<(), Error> {
    let mut orphans = 0;
    for first in 0..=u8::MAX {
        let Some(blobs) = step(cache, stop, move |cache| cache.list_blobs(first)).await? else {
            return Ok(());
        };
        for some in blobs.chunks(STEP) {
            let some = some.to_vec();
            let Some(unknown) = step(cache, stop, move |cache| cache.count_unknown(&some)).await? else {
                return Ok(());
            };
            orphans += unknown;
        }
    }
    cache.set_orphans(orphans);
    if orphans > 0 {
        tracing::warn!(
            orphans,
            "stored files that the database does not know; if they are many, is storage.database the right one?"
        );
    }
    Ok(())
}

/// Does something that can wait for the disk, and rests. `None` when there is to be no more.
async fn step<T: Send + Default + 'static>(
    cache: &Arc<Cache>,
    stop: &CancellationToken,
    work: impl FnOnce(&Cache) -> Result<T, Error> + Send + 'static,
) -> Result<Option<T>, Error> {
    let (began, working) = (Instant::now(), cache.clone());
    let done =
        tokio::task::spawn_blocking(move || work(&working)).await.unwrap_or_else(|_| Ok(T::default()))?;
    let rested = stop.run_until_cancelled(tokio::time::sleep(began.elapsed() * REST)).await;
    Ok(rested.map(|()| done))
}
