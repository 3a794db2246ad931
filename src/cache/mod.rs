//! The product: hit or miss is decided here and nowhere else.
//!
//! ```text
//! fetch ─ look up ─ known and held ──────────────────────────► Hit: the file
//!             │  └─ known, but missing or damaged ─┐
//!             └─ unknown ──────────────────────────┴─ flight ─► Miss: the file, or the growing spool
//! ```
//! A *flight* is one download that everybody who wants the same URL joins (`inflight`). It is a task of the process,
//! never of the request that began it (`download`), and its bytes can be read while they arrive (`body`).

mod archive;
mod body;
mod download;
mod front;
mod inflight;
mod scrub;
mod sweep;
mod verified;

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use quick_cache::sync::Cache as Bounded;
use tokio::time::{timeout, timeout_at};

use crate::{
    artifact::{CacheStatus, Digest, Streaming, Version, Want, media},
    blobs::{Blobs, Held, SpoolFile},
    catalog::{Artifact, Blob, Catalog, CopyError, Pace, Totals},
    config::Config,
    error::Error,
    kill_point,
    telemetry::{Metrics, metrics::Sample},
    upstream::{Head, Upstream},
};
pub use archive::Archive;
use archive::Ownership;
pub use body::{Body, Broken};
use download::Landing;
use front::Front;
pub use front::Stored;
use inflight::{Flight, Inflight, Stage};
pub use scrub::Scrubbed;
use scrub::Suspects;
pub use sweep::{Swept, Turn};

/// Rejected digests that are remembered; old ones go first.
const REMEMBERED_MISMATCHES: usize = 10_000;

/// The cache engine. Share it in an `Arc`.
#[derive(Debug)]
pub struct Cache {
    catalog: Catalog,
    blobs: Arc<Blobs>,
    upstream: Upstream,
    metrics: Arc<Metrics>,
    front: Front,
    inflight: Inflight,
    /// The digest that a URL had when a client expected another one, and when that was.
    mismatches: Bounded<(Arc<str>, Digest), (Digest, Instant)>,
    ownership: Ownership,
    suspects: Suspects,
    limits: Limits,
}

/// What `download` and `body` need of the configuration.
#[derive(Debug, Clone)]
struct Limits {
    stream_after: Duration,
    tail_hold_bytes: u64,
    mismatch_memory: Duration,
    max_artifact_bytes: u64,
    timeout: Duration,
    stall: Duration,
    min_bytes_per_second: u64,
    max_retries: u32,
    min_free_bytes: u64,
    /// Orphans that crashes may have left: each at most as many as there are downloads at a time.
    tolerated_orphans: i64,
    verify_on_read: bool,
}

/// An answer.
#[derive(Debug)]
pub struct Fetched {
    /// Whether it was stored before this request.
    pub status: CacheStatus,
    /// This request joined another's download.
    pub collapsed: bool,
    /// What it is.
    pub content: Content,
}

/// What an answer is made of.
#[derive(Debug)]
pub enum Content {
    /// All there.
    Whole(Arc<Stored>),
    /// Still arriving: what the upstream says of it, and the download to follow.
    Growing(Growing),
}

/// A download under way whose upstream has answered.
#[derive(Debug)]
pub struct Growing {
    /// What the upstream says.
    pub head: Head,
    flight: Arc<Flight>,
    lineage: u64,
    expected: Option<Digest>,
}

/// What the lookup found.
enum Found {
    Held(Arc<Stored>),
    /// What a row says, whose file is gone or damaged, and how.
    Lost(Version, String),
    Unknown,
}

impl Cache {
    /// Puts the parts together.
    pub fn new(
        config: &Config,
        catalog: Catalog,
        blobs: Blobs,
        upstream: Upstream,
        metrics: Arc<Metrics>,
    ) -> Arc<Cache> {
        metrics.min_free_bytes.set(config.storage.min_free_bytes.try_into().unwrap_or(i64::MAX));
        let ownership = Ownership::new(&catalog, &blobs);
        Arc::new(Cache {
            ownership,
            catalog,
            blobs: Arc::new(blobs),
            upstream,
            metrics,
            front: Front::new(),
            inflight: Inflight::new(config.upstream.max_downloads),
            mismatches: Bounded::new(REMEMBERED_MISMATCHES),
            suspects: Suspects::default(),
            limits: Limits {
                stream_after: config.fetch.stream_after,
                tail_hold_bytes: config.fetch.tail_hold_bytes,
                mismatch_memory: config.fetch.mismatch_memory,
                max_artifact_bytes: config.storage.max_artifact_bytes,
                timeout: config.upstream.timeout,
                stall: config.upstream.stall,
                min_bytes_per_second: config.upstream.min_bytes_per_second,
                max_retries: config.upstream.max_retries,
                min_free_bytes: config.storage.min_free_bytes,
                tolerated_orphans: config.upstream.max_downloads as i64,
                verify_on_read: config.storage.verify_on_read,
            },
        })
    }

    /// What is stored for a URL, if it is held whole. Touches no upstream.
    ///
    /// # Errors
    /// `ChecksumMismatch` when the client expects another digest.
    pub fn peek(&self, want: &Want) -> Result<Option<Arc<Stored>>, Error> {
        match self.look_up(want.url.key())? {
            Found::Held(stored) => self.check(want, &stored.version).map(|()| Some(stored)),
            Found::Lost(..) | Found::Unknown => Ok(None),
        }
    }

    /// Answers a request, downloading the artifact if it isn't held.
    ///
    /// `asked` is when the request came: a download that is not finished `fetch.stream_after_seconds` later is
    /// answered while it runs, if the request allows that.
    pub async fn fetch(self: &Arc<Self>, want: &Want, asked: Instant) -> Result<Fetched, Error> {
        let mut is_counted = false;
        loop {
            let found = self.look_up(want.url.key())?;
            if let Found::Held(stored) = found {
                self.check(want, &stored.version)?;
                return Ok(Fetched {
                    status: CacheStatus::Hit,
                    collapsed: false,
                    content: Content::Whole(stored),
                });
            }
            if want.only_if_cached {
                return Err(Error::NotCached { source_url: want.url.key().into() });
            }
            self.recall_mismatch(want)?;
            let (lost, problem) = match found {
                Found::Lost(version, problem) => (Some(version), problem),
                _ => (None, String::new()),
            };
            // Said once, however often it is asked for until it is fetched again.
            let is_news = lost.as_ref().is_some_and(|version| !self.is_known_missing(version.digest));
            let joined = self.inflight.join(want, lost);
            if joined.leads {
                let landing = Landing::new(self, &joined.flight);
                kill_point::pass_or_panic("flight.joined");
                // Another flight may have landed between the look-up and the join.
                if let Some(stage) = self.landed_meanwhile(want.url.key()) {
                    let failure = match &stage {
                        Stage::Failed(error) => Some(error.clone()),
                        _ => None,
                    };
                    landing.land(stage);
                    match failure {
                        // Asking again could go on for ever: the first look-up may succeed each time, by another
                        // connection to the database.
                        Some(error) => return Err(error),
                        None => continue,
                    }
                }
                if is_news {
                    tracing::warn!(
                        source_url = %want.url.masked(),
                        problem,
                        request_id = want.request_id.as_str(),
                        "stored file lost, will be fetched again"
                    );
                }
                landing.take_off();
            } else if !std::mem::replace(&mut is_counted, true) {
                self.metrics.collapsed_requests.inc();
            }
            if let Some(content) = Box::pin(self.follow(want, &joined, asked)).await? {
                return Ok(Fetched { status: CacheStatus::Miss, collapsed: !joined.leads, content });
            }
        }
    }

    /// How a flight ends that was begun although the URL is held by now, or can't be looked up.
    fn landed_meanwhile(&self, key: &str) -> Option<Stage> {
        match self.look_up(key) {
            Ok(Found::Held(stored)) => Some(Stage::Stored { stored, lineage: 0 }),
            Ok(_) => None,
            Err(error) => Some(Stage::Failed(error)),
        }
    }

    /// Moves what is left of a lost blob out of the way, and notes that it is gone, unless it is whole again by now.
    async fn set_aside(&self, version: Version) -> Result<(), Error> {
        let blobs = self.blobs.clone();
        let is_lost = tokio::task::spawn_blocking(move || blobs.quarantine(version.digest, version.size))
            .await
            .map_err(|cause| {
                Error::io("Failed to set damaged content aside", &std::io::Error::other(cause))
            })??;
        if !is_lost {
            return Ok(());
        }
        match self.catalog.note_lost(version.digest).await {
            Ok(true) => drop(self.metrics.blobs_corrupt.inc()),
            Ok(false) => {}
            // The sums count it on; the record of what replaces it will put them right.
            Err(error) => tracing::warn!(error = %error, "a lost blob could not be noted"),
        }
        kill_point::pass("quarantine.noted");
        Ok(())
    }

    fn is_known_missing(&self, digest: Digest) -> bool {
        matches!(self.catalog.find_blob(digest), Ok(Some(Blob { is_missing: true, .. })))
    }

    /// Asks the upstream what an artifact is that isn't held. Stores nothing; takes a place like a download.
    pub async fn probe(&self, want: &Want) -> Result<Head, Error> {
        let _place = self.inflight.place().await?;
        match timeout(self.limits.timeout, self.upstream.head(&want.url)).await {
            Ok(answered) => answered.map_err(|failure| failure.error),
            Err(_) => Err(Error::Unavailable {
                source_url: want.url.key().into(),
                message: format!("no answer within {} s", self.limits.timeout.as_secs_f32()),
                retry_after: None,
            }),
        }
    }

    /// Counts one body served.
    pub fn count_access(&self, stored: &Stored) {
        self.catalog.count_access(stored.id);
    }

    /// The sums over everything known.
    pub fn totals(&self) -> Result<Totals, Error> {
        self.catalog.totals()
    }

    /// Bytes that the store's disk has free, zero if that can't be known. Blocks.
    pub fn free_bytes(&self) -> u64 {
        self.blobs.free_bytes().unwrap_or(0)
    }

    /// What is measured when somebody asks; zeros where it can't be. Blocks.
    pub fn sample(&self) -> Sample {
        let totals = self.catalog.totals().unwrap_or_default();
        Sample {
            items: totals.items,
            stored_bytes: totals.stored_bytes,
            free_bytes: self.free_bytes(),
            partial_bytes: self.blobs.partial_bytes(),
            missing_blobs: self.catalog.count_missing().unwrap_or(0),
            oldest_verified: self.catalog.oldest_verified().unwrap_or_default(),
        }
    }

    /// What keeps hits or misses from working: empty when all is well.
    pub fn check_health(&self) -> Health {
        let unreadable = self.catalog.totals().is_err() || self.blobs.check_readable().is_err();
        Health {
            hits: !unreadable,
            disk: !self.blobs.is_nearly_full() && self.blobs.is_writable(),
            database: !self.catalog.is_read_only(),
            archive: self.archive(),
        }
    }

    /// Whether the database is the one that records this store.
    fn archive(&self) -> Archive {
        let orphans = self.metrics.orphan_blobs.get();
        self.ownership.verdict(&self.catalog, &self.blobs, orphans, self.limits.tolerated_orphans)
    }

    /// There is something that a snapshot of the database would save.
    pub fn knows_anything(&self) -> bool {
        self.catalog.totals().is_ok_and(|totals| totals.items > 0)
    }

    /// When the newest snapshot of the database was taken. Also tells the metrics.
    pub fn last_snapshot(&self) -> Option<jiff::Timestamp> {
        let last = self.catalog.last_snapshot().unwrap_or_else(|cause| {
            tracing::warn!(error = %cause, "can't look for snapshots of the database");
            None
        });
        self.metrics.snapshot_timestamp.set(last.map_or(0, |last| last.as_second()));
        last
    }

    /// Takes a snapshot of the database. Of the earlier ones so many stay that there are `kept`, or all while the
    /// database is in doubt. Blocks.
    pub fn take_snapshot(&self, kept: usize, pace: Pace) -> Result<PathBuf, CopyError> {
        let kept = if self.archive() == Archive::Known { kept } else { usize::MAX };
        let taken = self.catalog.take_snapshot(self.limits.min_free_bytes, kept, pace);
        self.last_snapshot();
        taken
    }

    /// The digests of all stored files that begin with this byte. Blocks.
    pub fn list_blobs(&self, first: u8) -> Result<Vec<Digest>, Error> {
        self.blobs.list(first).map_err(|cause| Error::io("Failed to read cache storage", &cause))
    }

    /// How many of these the catalogue does not know. Blocks.
    pub fn count_unknown(&self, blobs: &[Digest]) -> Result<u64, Error> {
        blobs
            .iter()
            .try_fold(0, |unknown, digest| Ok(unknown + u64::from(!self.catalog.knows_blob(*digest)?)))
    }

    /// Removes downloads that broke off and nobody went on with in time. Blocks.
    pub fn give_up_expired_partials(&self) {
        self.blobs.give_up_expired_partials();
    }

    /// Tells how many there are in all.
    pub fn set_orphans(&self, orphans: u64) {
        self.metrics.orphan_blobs.set(orphans as i64);
        self.ownership.counted();
    }

    /// Writes what is only in memory, so that a plain copy of the database is whole.
    pub async fn checkpoint(&self) {
        self.catalog.checkpoint().await;
    }

    fn look_up(&self, key: &str) -> Result<Found, Error> {
        let generation = self.catalog.generation();
        if let Some(stored) = self.front.get(key, generation) {
            return Ok(Found::Held(stored));
        }
        let Some(artifact) = self.catalog.find(key)? else { return Ok(Found::Unknown) };
        self.hold(key, artifact, generation)
    }

    /// Opens a known artifact's file and remembers both.
    fn hold(&self, key: &str, artifact: Artifact, generation: u64) -> Result<Found, Error> {
        let Version { digest, size, .. } = artifact.version;
        let lost = |problem| Found::Lost(artifact.version.clone(), problem);
        Ok(match self.blobs.open_blob(digest, size)? {
            Held::Whole(file) => {
                let stored = Arc::new(Stored::new(artifact.clone(), Arc::new(file)));
                self.front.put(key, stored.clone(), generation);
                Found::Held(stored)
            }
            Held::Missing => lost("is missing".to_owned()),
            Held::Damaged(problem) => lost(problem),
        })
    }

    fn check(&self, want: &Want, version: &Version) -> Result<(), Error> {
        match want.sha256 {
            Some(expected) if expected != version.digest => {
                Err(self.mismatch(want, expected, version.digest))
            }
            _ => Ok(()),
        }
    }

    fn mismatch(&self, want: &Want, expected: Digest, actual: Digest) -> Error {
        self.metrics.checksum_mismatches.inc();
        Error::ChecksumMismatch { expected, actual, source_url: want.url.key().into() }
    }

    /// Fails at once when this client's digest was rejected a short while ago.
    fn recall_mismatch(&self, want: &Want) -> Result<(), Error> {
        let Some(expected) = want.sha256.filter(|_| !want.no_cache) else { return Ok(()) };
        match self.mismatches.get(&(Arc::from(want.url.key()), expected)) {
            Some((actual, when)) if when.elapsed() < self.limits.mismatch_memory => {
                Err(self.mismatch(want, expected, actual))
            }
            _ => Ok(()),
        }
    }

    fn remember_mismatch(&self, key: &str, expected: Digest, actual: Digest) {
        self.mismatches.insert((Arc::from(key), expected), (actual, Instant::now()));
    }

    /// Waits for a flight: for its end, or long enough to be answered while it runs. `None` means that the flight
    /// was decided without this client, who must ask again.
    async fn follow(
        &self,
        want: &Want,
        joined: &inflight::Joined,
        asked: Instant,
    ) -> Result<Option<Content>, Error> {
        let mut stage = joined.flight.subscribe();
        let deadline = tokio::time::Instant::from_std(asked + self.limits.stream_after);
        let ended = timeout_at(deadline, stage.wait_for(Stage::has_ended)).await.map(drop);
        let may_stream = joined.flight.early && want.streaming != Streaming::Never;
        let is_enough = |stage: &Stage| match stage {
            Stage::Receiving(receiving) if may_stream => match receiving.head.length {
                // An empty body has no tail to hold back: its head alone is a complete answer.
                Some(0) => false,
                Some(_) => true,
                None => want.streaming == Streaming::Always,
            },
            other => other.has_ended(),
        };
        if ended.is_err() {
            // A flight always ends, even when its task panics.
            let _ = stage.wait_for(is_enough).await;
        }
        let stage = stage.borrow().clone();
        match stage {
            Stage::Stored { stored, .. } => {
                self.check(want, &stored.version).map(|()| Some(Content::Whole(stored)))
            }
            Stage::Receiving(receiving) => {
                let mut head = receiving.head.clone();
                head.content_type.get_or_insert_with(|| detect(&receiving.spool, &receiving.head));
                let (flight, lineage) = (joined.flight.clone(), receiving.lineage);
                Ok(Some(Content::Growing(Growing { head, flight, lineage, expected: want.sha256 })))
            }
            Stage::Rejected { actual } => match want.sha256 {
                Some(expected) if expected != actual => Err(self.mismatch(want, expected, actual)),
                // It joined when that was already decided.
                _ => Ok(None),
            },
            Stage::Failed(error) => Err(error),
            Stage::Asking | Stage::Suspended => Ok(None),
        }
    }
}

/// The type of a content that its upstream says nothing of.
fn detect(spool: &SpoolFile, head: &Head) -> String {
    media::detect(&spool.prefix(), head.file_name.as_deref()).to_owned()
}

/// What works.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Health {
    /// The catalogue and the store can be read.
    pub hits: bool,
    /// There is room for new downloads, and they can be written.
    pub disk: bool,
    /// The database can be written.
    pub database: bool,
    /// The database is the one that records this store.
    pub archive: Archive,
}
