//! The scrub: every stored file is read again once a period, the longest unverified first, slowly enough that nobody
//! notices; what has rotted is set aside and fetched again.
//!
//! How far it has come is in the catalogue (`verified_at`), so it needs no other memory.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use crate::{
    cache::{Cache, Scrubbed},
    catalog::Blob,
    config::Jobs,
    error::Error,
};

/// Blobs asked for at a time.
const BATCH: usize = 256;
/// After so long a batch begins no further blob. It is how long a blob may have been verified before that is noted, which
/// is what a crash makes it read again; and how long somebody waits who asks for a blob to be looked at now.
const BATCH_TIME: Duration = Duration::from_secs(5);
/// Time that a run has not used for reading is made up for, but only so much.
const CREDIT: Duration = Duration::from_secs(1);
/// What opening a file costs a disk, as if it had read so many bytes.
const OPEN_COST_BYTES: u64 = 64 << 10;
/// So many lost files one after another are no rot, but a disk that is not all there.
const SUSPICIOUS: usize = 32;

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Run {
    /// Nothing more is due now.
    Done,
    /// The store as a whole seems ill; it should be left alone for a while.
    StoreIsIll,
}

/// Reads every blob that is due. `lost_in_a_row` goes from run to run: as long as nothing is whole again, each run that
/// follows a pause ends with the next loss.
///
/// # Errors
/// When the catalogue fails; or when all is done but for blobs that could not be looked at, with the last reason.
pub(super) async fn run_once(
    cache: &Arc<Cache>,
    config: &Jobs,
    stop: &CancellationToken,
    lost_in_a_row: &mut usize,
) -> Result<Run, Error> {
    let pace = Arc::new(Pace::new(config.scrub_max_bytes_per_second, stop.clone()));
    let mut skipped = HashSet::new();
    let mut failure = None;
    loop {
        let (reading, period) = (cache.clone(), config.scrub_period);
        let due = tokio::task::spawn_blocking(move || reading.due_blobs(period, BATCH)).await;
        let mut due = due.unwrap_or_else(|_| Ok(Vec::new()))?;
        due.retain(|blob| !skipped.contains(&blob.digest));
        if due.is_empty() {
            return failure.map_or(Ok(Run::Done), Err);
        }
        let (mut whole, began, mut end) = (Vec::new(), Instant::now(), None);
        for blob in due {
            match scrub(cache, blob, &pace).await {
                Ok(Scrubbed::Stopped) => end = Some(Run::Done),
                Ok(Scrubbed::Whole) => {
                    whole.push(blob.digest);
                    *lost_in_a_row = 0;
                }
                Ok(Scrubbed::Healed | Scrubbed::Lost) if !blob.is_missing => *lost_in_a_row += 1,
                Ok(Scrubbed::Healed | Scrubbed::Lost | Scrubbed::Changed) => {}
                Err(error) => {
                    tracing::warn!(sha256 = %blob.digest, error = %error, "a stored file could not be looked at");
                    *lost_in_a_row += 1;
                    skipped.insert(blob.digest);
                    failure = Some(error);
                }
            }
            if *lost_in_a_row >= SUSPICIOUS {
                tracing::error!(
                    lost_in_a_row = *lost_in_a_row,
                    "so many stored files are lost or unreadable that the scrub pauses; is the disk of storage.base_path all there?"
                );
                end = Some(Run::StoreIsIll);
            }
            if end.is_some() || began.elapsed() >= BATCH_TIME {
                break;
            }
        }
        if !whole.is_empty() {
            cache.note_whole(whole).await?;
        }
        if let Some(end) = end {
            return Ok(end);
        }
    }
}

async fn scrub(cache: &Arc<Cache>, blob: Blob, pace: &Arc<Pace>) -> Result<Scrubbed, Error> {
    let waiting = pace.clone();
    pace.count(OPEN_COST_BYTES);
    tokio::select! {
        // What was told to stop must not be waited for.
        biased;
        // A download that heals may take long; it goes on by itself as long as the process does.
        () = pace.stop.cancelled() => Ok(Scrubbed::Stopped),
        scrubbed = cache.scrub(blob, move |bytes| waiting.wait_after(bytes)) => scrubbed,
    }
}

/// Keeps a run under so many bytes a second, all its reads together.
struct Pace {
    bytes_per_second: u64,
    /// When what was read so far is paid for.
    paid: Mutex<Instant>,
    stop: CancellationToken,
    runtime: Handle,
}

impl Pace {
    fn new(bytes_per_second: u64, stop: CancellationToken) -> Pace {
        let (paid, runtime) = (Mutex::new(Instant::now()), Handle::current());
        Pace { bytes_per_second, paid, stop, runtime }
    }

    /// Counts bytes read, and says when the next may be.
    fn count(&self, bytes: u64) -> Instant {
        let mut paid = self.paid.lock().unwrap_or_else(PoisonError::into_inner);
        *paid = pay(*paid, Instant::now(), bytes, self.bytes_per_second);
        *paid
    }

    /// Blocks until more may be read; `false` when there is to be no more.
    fn wait_after(&self, bytes: u64) -> bool {
        let until = tokio::time::Instant::from_std(self.count(bytes));
        self.runtime.block_on(async {
            tokio::select! {
                biased;
                () = self.stop.cancelled() => false,
                () = tokio::time::sleep_until(until) => true,
            }
        })
    }
}

/// When bytes read `now` are paid for, if all before them were at `paid`. Who has waited long for something else, such
/// as a download that heals, must not then read at full speed for as long.
fn pay(paid: Instant, now: Instant, bytes: u64, bytes_per_second: u64) -> Instant {
    let cost = Duration::from_secs_f64(bytes as f64 / bytes_per_second as f64);
    (paid + CREDIT).max(now) - CREDIT + cost
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_spent_on_something_else_buys_a_second_of_reading_at_most() {
        let second = Duration::from_secs(1);
        let began = Instant::now();
        // At its pace: each second the bytes of a second.
        let mut paid = began;
        for seconds in 0..10 {
            paid = pay(paid, began + second * seconds, 100, 100);
            assert_eq!(paid, began + second * (seconds + 1));
        }
        let long_after = began + second * 600;
        assert_eq!(pay(paid, long_after, 300, 100), long_after + second * 2);
    }
}
