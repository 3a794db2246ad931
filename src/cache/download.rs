//! One flight from take-off to landing: ask, spool, verify, publish, record; and try again when an attempt breaks.
//!
//! The rule behind every branch: two contents are never mixed. An attempt continues the spool of an earlier one only
//! when a strong validator, or in the end the digest that a client gave, proves that it is the same content. An attempt
//! that begins again gets a new spool, and clients who already have bytes of the old one go on only if the new one
//! begins with exactly those.
//!
//! A flight that fails, or is killed, leaves its spool to the next one of its URL, up to the last checkpoint; that one
//! goes on with it as with an earlier attempt of its own.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::time::{sleep, timeout};

use super::{
    Cache, detect,
    front::Stored,
    inflight::{Flight, Receiving, Stage},
};
use crate::{
    artifact::Version,
    blobs::{Origin, Published, Spool, SpoolFile},
    catalog::Record,
    error::Error,
    kill_point,
    upstream::{Body, Failure, Head, Resume, Retry},
};

/// An attempt that brought less than this counts as one more failure in a row.
const PROGRESS_BYTES: u64 = 1 << 20;
/// The first pause between attempts; each further one is twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(400);
/// All pauses between attempts without progress together.
const LONGEST_PAUSES: Duration = Duration::from_secs(3);

/// What has been received so far.
struct Part {
    head: Head,
    spool: Spool,
    /// The spool before this one, and how much of it clients have got: to be compared before they get more.
    unproven: Option<Unproven>,
    /// What a 206 said the whole length is, if the first answer did not.
    total: Option<u64>,
    /// It was continued without a validator, so only a client's digest can prove that it is one content.
    unvalidated: bool,
    /// An earlier flight has left it, and the upstream has not said yet that it can be continued.
    inherited: bool,
}

impl Part {
    fn new(head: Head, spool: Spool) -> Part {
        Part { head, spool, unproven: None, total: None, unvalidated: false, inherited: false }
    }

    /// The whole length, if any answer has said it.
    fn length(&self) -> Option<u64> {
        self.head.length.or(self.total)
    }
}

struct Unproven {
    old: Arc<SpoolFile>,
    released: u64,
}

/// Ends a flight, whatever happens to whoever began it and to its task.
pub(super) struct Landing {
    cache: Arc<Cache>,
    flight: Arc<Flight>,
    stage: Option<Stage>,
}

impl Landing {
    pub(super) fn new(cache: &Arc<Cache>, flight: &Arc<Flight>) -> Landing {
        cache.metrics.inflight_downloads.inc();
        Landing { cache: cache.clone(), flight: flight.clone(), stage: None }
    }

    /// Begins the download, as a task of the process: clients may come and go.
    pub(super) fn take_off(self) {
        tokio::spawn(async move {
            let (cache, flight) = (self.cache.clone(), self.flight.clone());
            // What is left of the download goes before anybody is told of its end.
            let stage = Box::pin(Download::new(&cache, &flight).run()).await.unwrap_or_else(Stage::Failed);
            self.land(stage);
        });
    }

    pub(super) fn land(mut self, stage: Stage) {
        self.stage = Some(stage);
    }
}

impl Drop for Landing {
    fn drop(&mut self) {
        self.cache.metrics.inflight_downloads.dec();
        let stage = self.stage.take().unwrap_or_else(|| {
            Stage::Failed(Error::Internal {
                message: "The download was given up",
                details: "the service is stopping, or its task failed".to_owned(),
                retry_after: Some(Duration::from_secs(5)),
            })
        });
        self.cache.inflight.end(&self.flight, stage);
    }
}

struct Download<'a> {
    cache: &'a Cache,
    flight: &'a Flight,
    part: Option<Part>,
    /// See [`Receiving::lineage`].
    lineage: u64,
    /// The next attempt must not continue the spool.
    from_the_start: bool,
    /// When the last byte came that no earlier attempt had brought.
    progress: Instant,
    /// How many bytes that makes.
    high_water: u64,
    /// How many it made when failures were last forgiven for it.
    counted: u64,
}

impl<'a> Download<'a> {
    fn new(cache: &'a Cache, flight: &'a Flight) -> Download<'a> {
        Download {
            cache,
            flight,
            part: None,
            lineage: 0,
            from_the_start: false,
            progress: Instant::now(),
            high_water: 0,
            counted: 0,
        }
    }

    async fn run(mut self) -> Result<Stage, Error> {
        let _place = self.cache.inflight.place().await?;
        if let Some(version) = self.flight.lost.clone() {
            self.cache.set_aside(version).await?;
        }
        self.check_room().await?;
        self.inherit().await;
        let ended = self.attempts().await;
        if let Some(part) = self.part {
            part.spool.leave().await;
        }
        ended
    }

    /// Fails when nothing can be stored, before the upstream has to be asked. May remove files to make room.
    async fn check_room(&self) -> Result<(), Error> {
        let blobs = self.cache.blobs.clone();
        let checked = tokio::task::spawn_blocking(move || blobs.check_room()).await;
        checked
            .map_err(|cause| Error::io("Failed to write to cache storage", &std::io::Error::other(cause)))?
    }

    /// Tries until the artifact has landed or no further attempt may help.
    async fn attempts(&mut self) -> Result<Stage, Error> {
        self.progress = Instant::now();
        let (mut failures, mut paused) = (0, Duration::ZERO);
        loop {
            let failure = match self.attempt().await {
                Ok(stage) => return Ok(stage),
                Err(failure) => failure,
            };
            if failure.retry == Retry::FromTheStart {
                self.from_the_start = true;
                match &mut self.part {
                    // It is as if there had been nothing to inherit.
                    Some(part) if part.inherited => {
                        self.disinherit();
                        continue;
                    }
                    Some(part) => part.spool.condemn(),
                    None => {}
                }
            }
            if self.high_water >= self.counted + PROGRESS_BYTES {
                (failures, paused) = (0, Duration::ZERO);
                self.counted = self.high_water;
            }
            failures += 1;
            let named = match failure.retry {
                Retry::Never => return Err(failure.error),
                Retry::After(named) => named,
                Retry::FromTheStart => None,
            };
            let limits = &self.cache.limits;
            if failures > limits.max_retries || self.progress.elapsed() >= limits.timeout {
                return Err(failure.error);
            }
            let (source_url, received) = (self.flight.url.masked(), self.high_water);
            let request_id = self.flight.request_id.as_str();
            tracing::warn!(%source_url, error = %failure.error, received, request_id, "attempt failed, trying again");
            self.cache.metrics.upstream_retries.inc();
            let pause = named.unwrap_or_else(|| pause(failures).min(LONGEST_PAUSES.saturating_sub(paused)));
            paused += pause;
            sleep(pause).await;
        }
    }

    /// Takes over what an earlier flight has left, if it can be continued.
    async fn inherit(&mut self) {
        let (blobs, url) = (self.cache.blobs.clone(), self.flight.url.clone());
        // One whose time is up is removed.
        let taken = tokio::task::spawn_blocking(move || blobs.take_partial(url.key())).await;
        let Ok(Some(partial)) = taken else { return };
        let head = serde_json::from_value::<Head>(partial.origin().head.clone()).ok();
        let head = head.filter(|head| is_provable(head, self.flight));
        let (blobs, length) = (self.cache.blobs.clone(), head.as_ref().map(|head| head.length));
        let resumed = tokio::task::spawn_blocking(move || match length {
            Some(length) => blobs.resume(partial, length).map(Some),
            None => {
                blobs.give_up(partial);
                Ok(None)
            }
        });
        let (source_url, request_id) = (self.flight.url.masked(), self.flight.request_id.as_str());
        match (resumed.await, head) {
            (Ok(Ok(Some(spool))), Some(head)) => {
                let offset = spool.len();
                tracing::info!(%source_url, offset, request_id, "going on with a download that broke off");
                (self.high_water, self.counted) = (offset, offset);
                self.part = Some(Part { inherited: true, ..Part::new(head, spool) });
            }
            (Ok(Err(cause)), _) => {
                tracing::warn!(%source_url, error = %cause, request_id, "a download that broke off can't be continued");
            }
            _ => {}
        }
    }

    /// Gives up what an earlier flight has left, and what was known by it.
    fn disinherit(&mut self) {
        if let Some(mut part) = self.part.take() {
            part.spool.condemn();
        }
        (self.high_water, self.counted) = (0, 0);
        self.progress = Instant::now();
    }

    async fn attempt(&mut self) -> Result<Stage, Failure> {
        let url = &self.flight.url;
        let part = self.part.as_ref().filter(|part| {
            !self.from_the_start && !part.spool.is_empty() && is_provable(&part.head, self.flight)
        });
        let resume =
            part.map(|part| Resume { offset: part.spool.len(), head: &part.head, length: part.length() });
        let left = self.cache.limits.timeout.saturating_sub(self.progress.elapsed());
        let answer = timeout(left, self.cache.upstream.get(url, resume)).await.map_err(|_| {
            self.silent(format!("nothing new for {} s", self.cache.limits.timeout.as_secs_f32()))
        })??;
        match &mut self.part {
            Some(part) if answer.resumed => {
                self.cache.metrics.upstream_resumes.inc();
                part.unvalidated |= part.head.strong_etag().is_none();
                part.total = answer.head.length;
                if std::mem::take(&mut part.inherited) {
                    part.head.length = part.total;
                    enter_receiving(self.flight, part, self.lineage);
                }
            }
            _ => self.begin(answer.head).await.map_err(Failure::from)?,
        }
        kill_point::pass_or_panic("download.begun");
        self.receive(answer.body).await?;
        self.land().await
    }

    /// Makes the spool for an answer that begins at its first byte.
    async fn begin(&mut self, head: Head) -> Result<(), Error> {
        let limit = self.cache.limits.max_artifact_bytes;
        if head.length.is_some_and(|length| length > limit) {
            return Err(self.too_large());
        }
        self.from_the_start = false;
        if self.part.as_ref().is_some_and(|part| part.inherited) {
            self.disinherit();
        }
        let unproven = match self.part.take() {
            None => None,
            Some(mut old) => {
                old.spool.condemn();
                let released = self.flight.suspend();
                let same_length = old.head.length == head.length;
                let earlier = old
                    .unproven
                    .or_else(|| (released > 0).then(|| Unproven { old: old.spool.file().clone(), released }));
                if earlier.is_none() || !same_length {
                    self.lineage += 1;
                    self.flight.forget_released();
                }
                earlier.filter(|_| same_length)
            }
        };
        let blobs = self.cache.blobs.clone();
        let length = head.length;
        let origin = Origin {
            source_url: self.flight.url.key().to_owned(),
            head: serde_json::to_value(&head).unwrap_or_default(),
        };
        // Making a file and asking for free space can wait for the disk.
        let spool =
            tokio::task::spawn_blocking(move || blobs.spool(length, origin)).await.map_err(|cause| {
                Error::io("Failed to write to cache storage", &std::io::Error::other(cause))
            })??;
        let part = self.part.insert(Part { unproven, ..Part::new(head, spool) });
        if part.unproven.is_none() {
            enter_receiving(self.flight, part, self.lineage);
        }
        Ok(())
    }

    async fn receive(&mut self, mut body: Body) -> Result<(), Failure> {
        let limits = self.cache.limits.clone();
        // Only time spent waiting for the upstream counts against it, not that for our own disk.
        let (mut waited, mut received) = (Duration::ZERO, 0u64);
        loop {
            let patience = limits.stall.min(limits.timeout.saturating_sub(self.progress.elapsed()));
            let asked = Instant::now();
            let chunk = timeout(patience, body.chunk())
                .await
                .map_err(|_| self.silent(format!("it sent nothing for {} s", patience.as_secs_f32())))??;
            let Some(bytes) = chunk else { break };
            waited += asked.elapsed();
            received += bytes.len() as u64;
            if waited >= limits.stall {
                if (received as f64) < limits.min_bytes_per_second as f64 * waited.as_secs_f64() {
                    let rate = limits.min_bytes_per_second;
                    return Err(self.silent(format!("it sent less than {rate} bytes a second")));
                }
                (waited, received) = (Duration::ZERO, 0);
            }
            self.take(bytes).await?;
        }
        match &self.part {
            Some(part) if part.length().is_some_and(|length| length != part.spool.len()) => {
                let message = "Upstream's body was cut short".to_owned();
                let error =
                    Error::Upstream { status: None, source_url: self.url(), message, retry_after: None };
                Err(Failure { error, retry: Retry::After(None) })
            }
            _ => Ok(()),
        }
    }

    /// Gives bytes to the spool, and compares it with the one before when it has come far enough.
    async fn take(&mut self, bytes: bytes::Bytes) -> Result<(), Failure> {
        self.cache.metrics.bytes_downloaded.inc_by(bytes.len() as u64);
        let Some(part) = &mut self.part else { return Ok(()) };
        if part.spool.len() + bytes.len() as u64 > self.cache.limits.max_artifact_bytes {
            part.spool.condemn();
            return Err(self.too_large().into());
        }
        part.spool.write(bytes).await?;
        if part.spool.len() > self.high_water {
            self.high_water = part.spool.len();
            self.progress = Instant::now();
        }
        if let Some(Unproven { old, released }) =
            part.unproven.take_if(|unproven| part.spool.len() >= unproven.released)
        {
            let new = part.spool.file().clone();
            part.spool.written(released).await?;
            let same = tokio::task::spawn_blocking(move || new.same_prefix(&old, released)).await;
            if !matches!(same, Ok(Ok(true))) {
                self.lineage += 1;
                self.flight.forget_released();
            }
            enter_receiving(self.flight, part, self.lineage);
        }
        Ok(())
    }

    /// Verifies, publishes and records a complete part.
    async fn land(&mut self) -> Result<Stage, Failure> {
        let Some(part) = self.part.take() else { return Err(Failure::from(Error::disk_full())) };
        let Part { mut head, spool, unproven, unvalidated, .. } = part;
        let written = spool.finish().await?;
        if unproven.is_some() {
            // The content is shorter than what clients already have of the one before.
            self.lineage += 1;
        }
        if unvalidated && !self.flight.is_expected(written.digest) {
            // Whoever has got bytes of this mixture must not get any of what comes next.
            self.flight.suspend();
            self.flight.forget_released();
            self.lineage += 1;
            let message = "Upstream's content changed while it was downloaded".to_owned();
            let error = Error::Upstream { status: None, source_url: self.url(), message, retry_after: None };
            return Err(Failure { error, retry: Retry::FromTheStart });
        }
        if let Err(expected) = self.flight.seal(written.digest) {
            for expected in expected {
                self.cache.remember_mismatch(self.flight.url.key(), expected, written.digest);
            }
            return Ok(Stage::Rejected { actual: written.digest });
        }
        let content_type = head.content_type.take().unwrap_or_else(|| detect(written.file(), &head));
        let version = Version {
            digest: written.digest,
            size: written.size,
            content_type: Some(content_type),
            content_encoding: head.content_encoding,
            file_name: head.file_name,
            etag: head.etag,
            last_modified: head.last_modified,
            fetched: std::time::SystemTime::now(),
        };
        let generation = self.cache.catalog.generation();
        let Published { file, replaced, claim } = self.cache.blobs.publish(written).await?;
        let recorded = self.cache.catalog.record(Record { source_url: self.url(), version }, claim).await?;
        kill_point::pass("publish.recorded");
        if replaced && recorded.is_new_blob && self.cache.metrics.orphan_blobs.get() > 0 {
            // It was there all along, only unknown.
            self.cache.metrics.orphan_blobs.dec();
        }
        let artifact = recorded.artifact;
        let stored = Arc::new(Stored::new(artifact, file.file().clone()));
        self.cache.front.put(self.flight.url.key(), stored.clone(), generation);
        self.cache.metrics.downloads.inc();
        self.cache.metrics.download_size.observe(stored.version.size as f64);
        Ok(Stage::Stored { stored, lineage: self.lineage })
    }

    fn url(&self) -> Arc<str> {
        self.flight.url.key().into()
    }

    fn too_large(&self) -> Error {
        Error::TooLarge { source_url: self.url(), limit: self.cache.limits.max_artifact_bytes }
    }

    fn silent(&self, message: String) -> Failure {
        let error = Error::Unavailable { source_url: self.url(), message, retry_after: None };
        Failure { error, retry: Retry::After(None) }
    }
}

/// Whether it can be proven that what comes next continues what is there: by a strong validator, or in the end by the
/// digest that a client gave.
fn is_provable(head: &Head, flight: &Flight) -> bool {
    head.strong_etag().is_some() || flight.is_judged()
}

fn enter_receiving(flight: &Flight, part: &Part, lineage: u64) {
    let (head, spool) = (part.head.clone(), part.spool.file().clone());
    flight.enter(Stage::Receiving(Arc::new(Receiving { head, spool, lineage })));
}

/// Exponential with jitter, so that many clients of one broken upstream don't return in step.
fn pause(failures: u32) -> Duration {
    let longest = FIRST_PAUSE * 2u32.saturating_pow(failures.saturating_sub(1)).min(16);
    longest.mul_f64(0.75 + 0.25 * fastrand::f64())
}

/// Our own failures are final: trying again needs the same disk.
impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        Failure { error, retry: Retry::Never }
    }
}
