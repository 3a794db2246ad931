//! Work that nobody asked for: done in the background now and then, slowly enough that nobody notices.
//!
//! A job is a function that does its work once; what calls it decides when.

mod census;
mod collect;
mod scrub;
mod snapshot;

use std::{sync::Arc, time::Duration};

use tokio_util::sync::CancellationToken;

use crate::{cache::Cache, config::Jobs};
use collect::Collect;

const CENSUS_EVERY: Duration = Duration::from_secs(24 * 3600);
/// How soon the scrub sees that something is due, which costs an idle one a look into an index.
const SCRUB_EVERY: Duration = Duration::from_secs(1);
/// How long the scrub leaves a store alone that seems ill as a whole.
const SCRUB_PAUSE: Duration = Duration::from_secs(3600);
/// How long it waits when it failed, on a busy database for instance.
const SCRUB_RETRY: Duration = Duration::from_secs(60);

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
        collect(&cache, config.delete_grace, &stop),
        scrub(&cache, &config, &stop),
    );
}

/// What was deleted leaves the disk.
async fn collect(cache: &Arc<Cache>, grace: Duration, stop: &CancellationToken) {
    let mut collect = Collect::new(grace);
    loop {
        if let Err(error) = collect.run_once(cache, stop).await {
            tracing::warn!(error = %error, "sweep failed, will be tried again");
        }
        if stops_within(collect.period(), stop).await {
            return;
        }
    }
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
        if let Err(error) = snapshot::run_once(cache, kept, stop).await {
            tracing::warn!(error = %error, "no snapshot of the database, will be tried again");
        }
        if stops_within(SNAPSHOT_CHECK_EVERY, stop).await {
            return;
        }
    }
}

async fn scrub(cache: &Arc<Cache>, config: &Jobs, stop: &CancellationToken) {
    let mut lost_in_a_row = 0;
    loop {
        let pause = match scrub::run_once(cache, config, stop, &mut lost_in_a_row).await {
            Ok(scrub::Run::Done) => SCRUB_EVERY,
            Ok(scrub::Run::StoreIsIll) => SCRUB_PAUSE,
            Err(error) => {
                tracing::warn!(error = %error, "scrub failed, will be tried again in a minute");
                SCRUB_RETRY
            }
        };
        if stops_within(pause, stop).await {
            return;
        }
    }
}

/// Waits; true if the order to stop came meanwhile.
async fn stops_within(time: Duration, stop: &CancellationToken) -> bool {
    tokio::time::timeout(time, stop.cancelled()).await.is_ok()
}
