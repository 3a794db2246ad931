//! The sweep's timing: a deleted blob leaves the disk when it has been deleted for `jobs.delete_grace_seconds`.
//!
//! That time is measured by this process and no clock: from when it first saw the deletion, which is later than when
//! it happened, and again from the beginning after a restart. So no jump of a clock, and no date in a database, makes
//! anything go sooner.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio_util::sync::CancellationToken;

use crate::{
    cache::{Cache, Turn},
    catalog::Deleted,
    error::Error,
};

/// Deletions that are watched at a time, about 8 MiB; more wait for their turn.
const WATCHED: usize = 100_000;
/// Blobs swept while a backup has to wait.
const TURN: usize = 256;

/// The job, with what it has seen.
pub(super) struct Collect {
    grace: Duration,
    /// The deletions not carried out yet, and when each was first seen.
    seen: HashMap<Deleted, Instant>,
}

impl Collect {
    pub(super) fn new(grace: Duration) -> Collect {
        Collect { grace, seen: HashMap::new() }
    }

    /// How long to wait between two runs: short against the grace time, which an idle run costs a query.
    pub(super) fn period(&self) -> Duration {
        (self.grace / 6).clamp(Duration::from_millis(500), Duration::from_secs(600))
    }

    /// Sweeps what has been deleted long enough.
    pub(super) async fn run_once(
        &mut self,
        cache: &Arc<Cache>,
        stop: &CancellationToken,
    ) -> Result<(), Error> {
        let reading = cache.clone();
        let listed = tokio::task::spawn_blocking(move || reading.unswept(WATCHED)).await;
        let due = self.due(listed.unwrap_or_else(|_| Ok(Vec::new()))?, Instant::now());
        for turn in due.chunks(TURN) {
            if stop.is_cancelled() {
                return Ok(());
            }
            let swept = match cache.sweep(turn.to_vec()).await? {
                Turn::Taken(swept) => swept,
                Turn::Backup => {
                    tracing::info!(
                        waiting = due.len(),
                        "a backup is running, deleted files stay until it is done"
                    );
                    return Ok(());
                }
                Turn::Doubt => {
                    tracing::info!(
                        waiting = due.len(),
                        "storage.database is not the one that records the store, deleted files stay; see /health"
                    );
                    return Ok(());
                }
            };
            if swept.blobs > 0 {
                tracing::info!(blobs = swept.blobs, bytes = swept.bytes, "deleted files swept");
            }
            if swept.newer > 0 {
                tracing::warn!(
                    blobs = swept.newer,
                    "files are newer than their deletion and stay; is storage.database an old one?"
                );
            }
            if let Some(error) = swept.failure {
                tracing::warn!(
                    blobs = swept.failed,
                    error,
                    "deleted files can't be removed, will be tried again"
                );
            }
        }
        Ok(())
    }

    /// Which of the deletions that are `listed` now have been seen for the grace time. Forgets what is not listed.
    fn due(&mut self, listed: Vec<Deleted>, now: Instant) -> Vec<Deleted> {
        let first_seen = |blob| self.seen.get(&blob).copied().unwrap_or(now);
        self.seen = listed.iter().map(|&blob| (blob, first_seen(blob))).collect();
        let is_due = |blob: &Deleted| now.saturating_duration_since(self.seen[blob]) >= self.grace;
        listed.into_iter().filter(is_due).collect()
    }
}
