//! Flights: one download a URL, however many clients ask, each judged by its own checksum.

use std::{
    collections::HashMap,
    sync::{
        Arc, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use tokio::sync::{Semaphore, SemaphorePermit};

use super::front::Stored;
use crate::{
    artifact::{Digest, RequestId, SourceUrl, Version, Want},
    blobs::SpoolFile,
    error::Error,
    kill_point,
    sync::{AtomicU64, Mutex, MutexGuard, watch},
    upstream::Head,
};

/// Downloads that may wait for a place.
const MAX_WAITING: usize = 1000;

/// How far a flight has come.
#[derive(Debug, Clone)]
pub(super) enum Stage {
    /// The upstream has not answered yet.
    Asking,
    /// Bytes arrive.
    Receiving(Arc<Receiving>),
    /// The upstream began again from its first byte; nothing is released until it is known whether the content is
    /// still the same.
    Suspended,
    /// Verified, durable and recorded.
    Stored {
        /// What it became.
        stored: Arc<Stored>,
        /// See [`Receiving::lineage`].
        lineage: u64,
    },
    /// Complete, and not what anybody who waits expects; nothing was stored.
    Rejected {
        /// The digest it has.
        actual: Digest,
    },
    /// It failed for everybody.
    Failed(Error),
}

/// A download whose upstream has answered.
#[derive(Debug)]
pub(super) struct Receiving {
    pub(super) head: Head,
    pub(super) spool: Arc<SpoolFile>,
    /// Two stages of one lineage agree on every byte that was ever released. A client who has got bytes of another
    /// lineage must be cut off: two contents are never mixed.
    pub(super) lineage: u64,
}

impl Stage {
    pub(super) fn has_ended(&self) -> bool {
        matches!(self, Stage::Stored { .. } | Stage::Rejected { .. } | Stage::Failed(_))
    }
}

/// One download and those who wait for it.
#[derive(Debug)]
pub(super) struct Flight {
    pub(super) url: SourceUrl,
    /// What was stored for the URL and is gone or damaged, to be set aside first.
    pub(super) lost: Option<Version>,
    /// Of the request that began it.
    pub(super) request_id: RequestId,
    /// Clients may be answered before it has ended.
    pub(super) early: bool,
    stage: watch::Sender<Stage>,
    /// The end of the highest byte that any client was given, or may have been.
    released: AtomicU64,
    wants: Mutex<Wants>,
}

#[derive(Debug, Default)]
struct Wants {
    expected: Vec<Option<Digest>>,
    /// It is decided what becomes of the content; whoever joins now was not asked.
    sealed: bool,
}

/// A client's place in a flight.
#[derive(Debug)]
pub(super) struct Joined {
    pub(super) flight: Arc<Flight>,
    /// Nobody else has begun it: this client must start the download.
    pub(super) leads: bool,
}

impl Flight {
    pub(super) fn subscribe(&self) -> watch::Receiver<Stage> {
        self.stage.subscribe()
    }

    pub(super) fn enter(&self, stage: Stage) {
        self.stage.send_replace(stage);
    }

    /// Stops releasing bytes and returns the end of the highest one that was released. Releases happen while the
    /// stage is borrowed, so none can slip in after this has returned.
    pub(super) fn suspend(&self) -> u64 {
        self.stage.send_replace(Stage::Suspended);
        self.released.load(Ordering::Acquire)
    }

    /// Notes that bytes up to `end` are about to be given out. Call it while the stage is borrowed.
    pub(super) fn release(&self, end: u64) {
        self.released.fetch_max(end, Ordering::AcqRel);
    }

    /// No client will get more of what was released so far. Call it while the flight is suspended.
    pub(super) fn forget_released(&self) {
        self.released.store(0, Ordering::Release);
    }

    /// Some client gave the digest it expects.
    pub(super) fn is_judged(&self) -> bool {
        self.wants().expected.iter().any(Option::is_some)
    }

    /// Some client expects exactly this digest.
    pub(super) fn is_expected(&self, actual: Digest) -> bool {
        self.wants().expected.contains(&Some(actual))
    }

    /// Decides, once, whether a content with this digest is to be stored: somebody must be content with it. Returns
    /// the digests that were expected instead if not.
    pub(super) fn seal(&self, actual: Digest) -> Result<(), Vec<Digest>> {
        let mut wants = self.wants();
        wants.sealed = true;
        if wants.expected.iter().any(|expected| expected.is_none_or(|expected| expected == actual)) {
            return Ok(());
        }
        Err(wants.expected.iter().flatten().copied().collect())
    }

    fn wants(&self) -> MutexGuard<'_, Wants> {
        self.wants.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All flights, and the places for downloads.
#[derive(Debug)]
pub(super) struct Inflight {
    flights: Mutex<HashMap<Arc<str>, Arc<Flight>>>,
    places: Semaphore,
    waiting: AtomicUsize,
}

impl Inflight {
    pub(super) fn new(max_downloads: usize) -> Inflight {
        Inflight {
            flights: Mutex::default(),
            places: Semaphore::new(max_downloads.min(Semaphore::MAX_PERMITS)),
            waiting: AtomicUsize::new(0),
        }
    }

    /// Joins the flight for a URL, or begins one.
    pub(super) fn join(&self, want: &Want, lost: Option<Version>) -> Joined {
        let (url, expected) = (&want.url, want.sha256);
        let mut flights = self.flights();
        if let Some(flight) = flights.get(url.key()) {
            let mut wants = flight.wants();
            // One entry a distinct expectation, however many clients.
            if !wants.sealed && !wants.expected.contains(&expected) {
                wants.expected.push(expected);
            }
            return Joined { flight: flight.clone(), leads: false };
        }
        let flight = Arc::new(Flight {
            url: url.clone(),
            request_id: want.request_id.clone(),
            // What replaces a damaged file must be proven before anybody sees a byte of it.
            early: lost.is_none(),
            lost,
            stage: watch::channel(Stage::Asking).0,
            released: AtomicU64::new(0),
            wants: Mutex::new(Wants { expected: vec![expected], sealed: false }),
        });
        kill_point::pass_or_panic("flight.locked");
        flights.insert(Arc::from(url.key()), flight.clone());
        Joined { flight, leads: true }
    }

    /// Ends a flight: whoever comes now begins another, whoever waits is told.
    pub(super) fn end(&self, flight: &Flight, stage: Stage) {
        self.flights().remove(flight.url.key());
        flight.enter(stage);
    }

    /// Waits for a place among the downloads.
    ///
    /// # Errors
    /// `Busy` when too many wait already.
    pub(super) async fn place(&self) -> Result<SemaphorePermit<'_>, Error> {
        if let Ok(place) = self.places.try_acquire() {
            return Ok(place);
        }
        if self.waiting.fetch_add(1, Ordering::Relaxed) >= MAX_WAITING {
            self.waiting.fetch_sub(1, Ordering::Relaxed);
            return Err(Error::Busy);
        }
        let place = self.places.acquire().await;
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        // The semaphore is never closed.
        place.map_err(|_| Error::Busy)
    }

    fn flights(&self) -> MutexGuard<'_, HashMap<Arc<str>, Arc<Flight>>> {
        self.flights.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
