//! Work that nobody asked for: done in the background now and then, slowly enough that nobody notices.
//!
//! A job is a function that does its work once; what calls it decides when.

mod census;
mod snapshot;

use std::{sync::Arc, time::Duration};

use tokio_util::sync::CancellationToken;

use crate::{cache::Cache, config::Jobs};

const CENSUS_EVERY: Duration = Duration::from_secs(24 * 3600);
/// How often is looked whether a snapshot is due.
const SNAPSHOT_CHECK_EVERY: Duration = Duration::from_secs(600);
/// Partial downloads are kept for hours; a few minutes more are nothing.
const EXPIRY_EVERY: Duration = Duration::from_secs(600);

/// Runs every job at its time until `stop` is cancelled.
pub async fn run(cache: Arc<Cache>, config: Jobs, stop: CancellationToken) {
    tokio::join!(
        take_census(&cache, &stop),
        take_snapshots(&cache, config.snapshots_kept, &stop),
        expire_partials(&cache, &stop),
    );
}

/// Partial downloads go when their time is up.
async fn expire_partials(cache: &Arc<Cache>, stop: &CancellationToken) {
    while !stops_within(EXPIRY_EVERY, stop).await {
        let cache = cache.clone();
        let _ = tokio::task::spawn_blocking(move || cache.give_up_expired_partials()).await;
    }
}

async fn take_census(cache: &Arc<Cache>, stop: &CancellationToken) {
    loop {
        if let Err(error) = census::run_once(cache, stop).await {
            tracing::warn!(error = %error, "census failed, will be tried again");
        }
        if stops_within(CENSUS_EVERY, stop).await {
            return;
        }
    }
}

async fn take_snapshots(cache: &Arc<Cache>, kept: usize, stop: &CancellationToken) {
    loop {
        if let Err(error) = snapshot::run_once(cache, kept).await {
            tracing::warn!(error = %error, "no snapshot of the database, will be tried again");
        }
        if stops_within(SNAPSHOT_CHECK_EVERY, stop).await {
            return;
        }
    }
}

/// Waits; true if the order to stop came meanwhile.
async fn stops_within(time: Duration, stop: &CancellationToken) -> bool {
    tokio::time::timeout(time, stop.cancelled()).await.is_ok()
}
