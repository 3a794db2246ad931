//! Work that nobody asked for: done in the background now and then, slowly enough that nobody notices.
//!
//! A job is a function that does its work once; what calls it decides when.

mod census;
mod collect;

use std::{sync::Arc, time::Duration};

use tokio_util::sync::CancellationToken;

use crate::{cache::Cache, config::Jobs};
use collect::Collect;

const CENSUS_EVERY: Duration = Duration::from_secs(24 * 3600);

/// Runs every job at its time until `stop` is cancelled.
pub async fn run(cache: Arc<Cache>, config: Jobs, stop: CancellationToken) {
    tokio::join!(run_census(&cache, &stop), run_collect(&cache, &config, &stop));
}

async fn run_census(cache: &Arc<Cache>, stop: &CancellationToken) {
    loop {
        if let Err(error) = census::run_once(cache, stop).await {
            tracing::warn!(error = %error, "census failed, will be tried again");
        }
        if is_stopped_within(CENSUS_EVERY, stop).await {
            return;
        }
    }
}

async fn run_collect(cache: &Arc<Cache>, config: &Jobs, stop: &CancellationToken) {
    let mut collect = Collect::new(config.delete_grace);
    loop {
        if let Err(error) = collect.run_once(cache, stop).await {
            tracing::warn!(error = %error, "sweep failed, will be tried again");
        }
        if is_stopped_within(collect.period(), stop).await {
            return;
        }
    }
}

/// Waits until a job's next time, and says whether there is none.
async fn is_stopped_within(pause: Duration, stop: &CancellationToken) -> bool {
    tokio::select! {
        () = tokio::time::sleep(pause) => false,
        () = stop.cancelled() => true,
    }
}
