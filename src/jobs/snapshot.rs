//! A daily copy of the database, beside it: a lost or damaged one is replaced from it (`artifact-cache restore
//! --snapshot`).
//!
//! When the last one was taken is in its name, so a restart takes none before its time. While the database is in
//! doubt (new, another, an old one), none of the earlier snapshots goes: one of them may be what is needed.

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;

use crate::{cache::Cache, catalog::CopyError};

const EVERY: Duration = Duration::from_secs(24 * 3600);

/// Takes a snapshot if one is due, and keeps `kept` in all; 0 takes none.
pub(super) async fn run_once(cache: &Arc<Cache>, kept: usize) -> Result<(), CopyError> {
    let last = cache.last_snapshot();
    if kept == 0 || !is_due(last, Timestamp::now()) || !cache.knows_anything() {
        return Ok(());
    }
    let taking = cache.clone();
    let taken = tokio::task::spawn_blocking(move || taking.take_snapshot(kept)).await;
    if let Ok(taken) = taken {
        tracing::info!(path = %taken?.display(), "snapshot of the database taken");
    }
    Ok(())
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
