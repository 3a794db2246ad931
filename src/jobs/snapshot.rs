//! A daily copy of the database, beside it: a lost or damaged one is replaced from it (`artifact-cache restore
//! --snapshot`).
//!
//! When the last one was taken is in its name, so a restart takes none before its time. While the database is in
//! doubt (new, another, an old one), none of the earlier snapshots goes: one of them may be what is needed.
//!
//! A large database is copied for seconds, so the copying rests: on a single processor every hit would otherwise wait
//! until the scheduler takes the processor from it.

use std::{
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use crate::{
    cache::Cache,
    catalog::{CopyError, Pace},
};

const EVERY: Duration = Duration::from_secs(24 * 3600);
/// How long is copied before the next rest.
const STINT: Duration = Duration::from_micros(100);
/// Times as long as a stint took are rested. No more, because the write-ahead log can't be emptied meanwhile.
const REST: u32 = 3;
/// A disk that makes a stint long is no reason to sleep through the order to stop.
const MAX_REST: Duration = Duration::from_millis(100);

/// Takes a snapshot if one is due, and keeps `kept` in all; 0 takes none.
pub(super) async fn run_once(
    cache: &Arc<Cache>,
    kept: usize,
    stop: &CancellationToken,
) -> Result<(), CopyError> {
    let last = cache.last_snapshot();
    if kept == 0 || !is_due(last, Timestamp::now()) || !cache.knows_anything() {
        return Ok(());
    }
    let (taking, pace) = (cache.clone(), pace(stop.clone()));
    match tokio::task::spawn_blocking(move || taking.take_snapshot(kept, pace)).await {
        Ok(Err(_)) if stop.is_cancelled() => {}
        Ok(taken) => tracing::info!(path = %taken?.display(), "snapshot of the database taken"),
        // It panicked, which is logged and counted.
        Err(_) => {}
    }
    Ok(())
}

/// Rests between stints, and ends the copying when there is an order to stop.
fn pace(stop: CancellationToken) -> Pace {
    let mut began = Instant::now();
    Box::new(move || {
        let worked = began.elapsed();
        if worked >= STINT {
            thread::sleep((worked * REST).min(MAX_REST));
            began = Instant::now();
        }
        stop.is_cancelled()
    })
}

/// `last` is no later than `now`, but for a moment.
fn is_due(last: Option<Timestamp>, now: Timestamp) -> bool {
    last.is_none_or(|last| now.as_second().saturating_sub(last.as_second()) >= EVERY.as_secs() as i64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_a_day() {
        let at = |seconds| Timestamp::from_second(seconds).unwrap();
        let now = at(1_000_000_000);
        assert!(is_due(None, now));
        for (last, due) in [(-86_400, true), (-86_399, false), (0, false), (1, false)] {
            assert_eq!(is_due(Some(at(1_000_000_000 + last)), now), due, "{last}");
        }
    }
}
