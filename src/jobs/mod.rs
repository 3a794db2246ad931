//! Work that nobody asked for: done in the background now and then, slowly enough that nobody notices.
//!
//! A job is a function that does its work once; what calls it decides when.

mod census;
mod scrub;

use std::{sync::Arc, time::Duration};

use tokio_util::sync::CancellationToken;

use crate::{cache::Cache, config::Jobs};

const CENSUS_EVERY: Duration = Duration::from_secs(24 * 3600);
/// How soon the scrub sees that something is due, which costs an idle one a look into an index.
const SCRUB_EVERY: Duration = Duration::from_secs(1);
/// How long the scrub leaves alone what fails as a whole.
const SCRUB_PAUSE: Duration = Duration::from_secs(3600);

/// Runs every job at its time until `stop` is cancelled.
pub async fn run(cache: Arc<Cache>, config: Jobs, stop: CancellationToken) {
    tokio::join!(run_census(&cache, &stop), run_scrub(&cache, &config, &stop));
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

async fn run_scrub(cache: &Arc<Cache>, config: &Jobs, stop: &CancellationToken) {
    loop {
        let pause = match scrub::run_once(cache, config, stop).await {
            Ok(scrub::Run::Done) => SCRUB_EVERY,
            Ok(scrub::Run::StoreIsIll) => SCRUB_PAUSE,
            Err(error) => {
                tracing::warn!(error = %error, "scrub failed, will be tried again in an hour");
                SCRUB_PAUSE
            }
        };
        if is_stopped_within(pause, stop).await {
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
