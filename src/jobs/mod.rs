//! Work that nobody asked for: done in the background now and then, slowly enough that nobody notices.
//!
//! A job is a function that does its work once; what calls it decides when.

mod census;

use std::{sync::Arc, time::Duration};

use tokio_util::sync::CancellationToken;

use crate::cache::Cache;

const CENSUS_EVERY: Duration = Duration::from_secs(24 * 3600);
/// They are kept for hours; a few minutes more are nothing.
const EXPIRY_EVERY: Duration = Duration::from_secs(600);

/// Runs every job at its time until `stop` is cancelled.
pub async fn run(cache: Arc<Cache>, stop: CancellationToken) {
    tokio::join!(census(cache.clone(), stop.clone()), expire_partials(cache, stop));
}

/// Partial downloads go when their time is up.
async fn expire_partials(cache: Arc<Cache>, stop: CancellationToken) {
    while stop.run_until_cancelled(tokio::time::sleep(EXPIRY_EVERY)).await.is_some() {
        let cache = cache.clone();
        let _ = tokio::task::spawn_blocking(move || cache.give_up_expired_partials()).await;
    }
}

async fn census(cache: Arc<Cache>, stop: CancellationToken) {
    loop {
        if let Err(error) = census::run_once(&cache, &stop).await {
            tracing::warn!(error = %error, "census failed, will be tried again");
        }
        tokio::select! {
            () = tokio::time::sleep(CENSUS_EVERY) => {}
            () = stop.cancelled() => return,
        }
    }
}
