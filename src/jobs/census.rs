//! Counts orphans: blobs that the catalogue does not know. They are harmless, and become known when their content is
//! downloaded again; but many of them at once mean that `storage.database` is the wrong one, or an old one, so they are
//! said aloud. None is ever deleted.

use std::{sync::Arc, time::Instant};

use tokio_util::sync::CancellationToken;

use crate::{cache::Cache, error::Error};

/// Times as long as a step took are waited before the next: the census gets a tenth of one processor and disk at most.
const REST: u32 = 9;

/// Goes through the whole store once, a first-level directory at a time.
pub(super) async fn run_once(cache: &Arc<Cache>, stop: &CancellationToken) -> Result<(), Error> {
    let mut orphans = 0;
    for first in 0..=u8::MAX {
        let began = Instant::now();
        let counting = cache.clone();
        let found = tokio::task::spawn_blocking(move || counting.count_orphans(first)).await;
        orphans += found.unwrap_or(Ok(0))?;
        tokio::select! {
            () = tokio::time::sleep(began.elapsed() * REST) => {}
            () = stop.cancelled() => return Ok(()),
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
