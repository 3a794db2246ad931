//! The scrub: every stored file is read again once a period, the longest unverified first, slowly enough that nobody
//! notices; what has rotted is set aside and fetched again.
//!
//! How far it has come is in the catalogue (`verified_at`), so it needs no other memory.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use crate::{
    artifact::Digest,
    cache::{Cache, Scrubbed},
    catalog::Blob,
    config::Jobs,
    error::Error,
};

/// Blobs asked for at a time.
const BATCH: usize = 256;
/// How long a blob may have been verified before that is noted: what a crash makes it read again.
const NOTE_EVERY: Duration = Duration::from_secs(5);
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
pub(super) async fn run_once(
    cache: &Arc<Cache>,
    config: &Jobs,
    stop: &CancellationToken,
    lost_in_a_row: &mut usize,
) -> Result<Run, Error> {
    let pace = Arc::new(Pace::new(config.scrub_max_bytes_per_second, stop.clone()));
    loop {
        let (reading, period) = (cache.clone(), config.scrub_period);
        let due = tokio::task::spawn_blocking(move || reading.due_blobs(period, BATCH)).await;
        let due = due.unwrap_or_else(|_| Ok(Vec::new()))?;
        if due.is_empty() {
            return Ok(Run::Done);
        }
        let mut whole = Whole { cache, blobs: Vec::new(), since: Instant::now() };
        for blob in due {
            match scrub(cache, blob, &pace).await? {
                Scrubbed::Stopped => {
                    whole.note().await?;
                    return Ok(Run::Done);
                }
                Scrubbed::Whole => {
                    whole.push(blob.digest).await?;
                    *lost_in_a_row = 0;
                }
                Scrubbed::Healed | Scrubbed::Lost if !blob.is_missing => *lost_in_a_row += 1,
                Scrubbed::Healed | Scrubbed::Lost | Scrubbed::Changed => {}
            }
            if *lost_in_a_row >= SUSPICIOUS {
                whole.note().await?;
                tracing::error!(
                    lost_in_a_row = *lost_in_a_row,
                    "so many stored files are lost that the scrub pauses; is the disk of storage.base_path all there?"
                );
                return Ok(Run::StoreIsIll);
            }
        }
        whole.note().await?;
    }
}

async fn scrub(cache: &Arc<Cache>, blob: Blob, pace: &Arc<Pace>) -> Result<Scrubbed, Error> {
    let waiting = pace.clone();
    pace.count(OPEN_COST_BYTES);
    tokio::select! {
        scrubbed = cache.scrub(blob, move |bytes| waiting.wait_after(bytes)) => scrubbed,
        // A download that heals may take long; it goes on by itself as long as the process does.
        () = pace.stop.cancelled() => Ok(Scrubbed::Stopped),
    }
}

/// What was found whole and is not noted yet.
struct Whole<'a> {
    cache: &'a Arc<Cache>,
    blobs: Vec<Digest>,
    since: Instant,
}

impl Whole<'_> {
    async fn push(&mut self, digest: Digest) -> Result<(), Error> {
        self.blobs.push(digest);
        if self.since.elapsed() >= NOTE_EVERY { self.note().await } else { Ok(()) }
    }

    async fn note(&mut self) -> Result<(), Error> {
        self.since = Instant::now();
        match std::mem::take(&mut self.blobs) {
            none if none.is_empty() => Ok(()),
            blobs => self.cache.note_whole(blobs).await,
        }
    }
}

/// Keeps a run under so many bytes a second, all its reads together.
struct Pace {
    bytes_per_second: u64,
    began: Instant,
    bytes: AtomicU64,
    stop: CancellationToken,
    runtime: Handle,
}

impl Pace {
    fn new(bytes_per_second: u64, stop: CancellationToken) -> Pace {
        let runtime = Handle::current();
        Pace { bytes_per_second, began: Instant::now(), bytes: AtomicU64::new(0), stop, runtime }
    }

    /// Counts bytes read, and says how long the run should have taken by now.
    fn count(&self, bytes: u64) -> Duration {
        let bytes = self.bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        Duration::from_secs_f64(bytes as f64 / self.bytes_per_second as f64)
    }

    /// Blocks until more may be read; `false` when there is to be no more.
    fn wait_after(&self, bytes: u64) -> bool {
        let until = tokio::time::Instant::from_std(self.began + self.count(bytes));
        self.runtime.block_on(async {
            tokio::select! {
                () = tokio::time::sleep_until(until) => true,
                () = self.stop.cancelled() => false,
            }
        })
    }
}
