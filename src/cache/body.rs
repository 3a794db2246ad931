//! The body of an answer: bytes of a stored file, or of a download while it arrives.
//!
//! *Verified streaming*: a growing body gives out what has arrived, but the last `fetch.tail_hold_bytes` of the
//! response only when length and digest are verified and the artifact is durable and recorded. If that does not come to
//! pass the body is [`Broken`] before its end, so no client can take a bad or partial file for a good one.

use std::{
    ops::Range,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use tokio::sync::watch;
use tokio_util::sync::ReusableBoxFuture;

use super::{
    Cache, Content, Growing,
    front::Stored,
    inflight::{Flight, Stage},
    verified::Verified,
};
use crate::{
    artifact::Digest,
    blobs::{Chunk, Mode, Reader, SpoolFile},
    error::Error,
};

/// Bytes of a growing file given out in one step.
const STEP_BYTES: u64 = 512 << 10;

/// A body that must not be finished properly: the connection has to be reset.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{0}")]
pub struct Broken(pub Error);

/// Bytes of an artifact.
pub struct Body {
    source: Source,
    /// Where the next byte lies in the artifact.
    offset: u64,
    /// `None` while a growing artifact's length is unknown.
    end: Option<u64>,
    /// The artifact, once it is known to be stored.
    stored: Option<Arc<Stored>>,
}

enum Source {
    Small(Bytes),
    Whole(Reader),
    /// In a box, because it is large and rare.
    Verified(Box<Verified>),
    Growing(ReusableBoxFuture<'static, (Follower, Next)>),
    /// A growing body that has ended or broken.
    Finished,
}

impl std::fmt::Debug for Body {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Body").field("offset", &self.offset).field("end", &self.end).finish_non_exhaustive()
    }
}

impl Content {
    /// The bytes in `range`, or all of them. A range must lie inside the artifact.
    pub fn into_body(self, cache: &Arc<Cache>, range: Option<Range<u64>>, mode: Mode) -> Body {
        let start = range.as_ref().map_or(0, |range| range.start);
        match self {
            Content::Whole(stored) => {
                let is_whole = range.is_none();
                let end = range.map_or(stored.version.size, |range| range.end);
                let source = match stored.small() {
                    _ if is_whole && cache.limits.verify_on_read => {
                        Source::Verified(Box::new(Verified::new(cache, &stored)))
                    }
                    Some(bytes) => Source::Small(bytes.slice(start as usize..end as usize)),
                    None => {
                        let buffers = cache.blobs.buffers().clone();
                        Source::Whole(Reader::new(stored.file.clone(), start, buffers, mode))
                    }
                };
                Body { source, offset: start, end: Some(end), stored: Some(stored) }
            }
            Content::Growing(Growing { head, flight, lineage, expected }) => {
                let end = range.map(|range| range.end).or(head.length);
                let follower = Follower {
                    stage: flight.subscribe(),
                    cache: cache.clone(),
                    flight,
                    lineage,
                    length: head.length,
                    end,
                    offset: start,
                    given: false,
                    expected,
                    mode,
                    following: None,
                    reader: None,
                };
                let source = Source::Growing(ReusableBoxFuture::new(follower.next()));
                Body { source, offset: start, end, stored: None }
            }
        }
    }
}

impl Body {
    /// The next piece; `None` after the last.
    pub fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Chunk, Broken>>> {
        let next = match &mut self.source {
            Source::Finished => Next::End(None),
            Source::Small(bytes) if bytes.is_empty() => Next::End(None),
            Source::Small(bytes) => Next::Chunk(Chunk::Bytes(std::mem::take(bytes)), None),
            Source::Whole(reader) => match self.end {
                Some(end) if reader.offset() < end => match ready!(reader.poll_read(cx, end)) {
                    Ok(chunk) => Next::Chunk(chunk, None),
                    Err(cause) => {
                        let error = Error::io("Failed to read cache storage", &cause);
                        Next::Broken(Broken(error))
                    }
                },
                _ => Next::End(None),
            },
            Source::Verified(verified) => ready!(verified.poll_next(cx)),
            Source::Growing(future) => {
                let (follower, next) = ready!(future.poll(cx));
                match next {
                    Next::Chunk(..) => future.set(follower.next()),
                    _ => self.source = Source::Finished,
                }
                next
            }
        };
        Poll::Ready(match next {
            Next::Chunk(chunk, stored) => {
                self.offset += chunk.len();
                // Noted with the bytes already: whoever knows the length never asks for the end.
                self.stored = stored.or(self.stored.take());
                Some(Ok(chunk))
            }
            Next::End(stored) => {
                self.stored = stored.or(self.stored.take());
                self.end = Some(self.offset);
                None
            }
            Next::Broken(broken) => Some(Err(broken)),
        })
    }

    /// Bytes still to come, if that is known.
    pub fn remaining(&self) -> Option<u64> {
        self.end.map(|end| end - self.offset)
    }

    /// What is served; of a growing artifact not before the body's end.
    pub fn stored(&self) -> Option<&Arc<Stored>> {
        self.stored.as_ref()
    }

    /// Every byte was given out.
    pub fn is_complete(&self) -> bool {
        self.remaining() == Some(0)
    }
}

pub(super) enum Next {
    /// The next bytes; of this artifact, once that is stored.
    Chunk(Chunk, Option<Arc<Stored>>),
    /// All was given out, of this artifact.
    End(Option<Arc<Stored>>),
    Broken(Broken),
}

/// One client's way through a flight.
struct Follower {
    cache: Arc<Cache>,
    flight: Arc<Flight>,
    stage: watch::Receiver<Stage>,
    /// The lineage whose bytes this client has got.
    lineage: u64,
    /// The artifact's length as it was announced to this client.
    length: Option<u64>,
    /// The end of this response, if known.
    end: Option<u64>,
    offset: u64,
    /// This client has got bytes.
    given: bool,
    expected: Option<Digest>,
    mode: Mode,
    /// The spool that is followed, and how far it is written.
    following: Option<(Arc<SpoolFile>, watch::Receiver<u64>)>,
    reader: Option<Reader>,
}

/// What a look at the stage allows.
enum Step {
    Wait,
    Read(u64),
    Take(Arc<Stored>),
    Break(Error),
}

impl Follower {
    async fn next(mut self) -> (Follower, Next) {
        loop {
            match self.look() {
                Step::Read(upto) => {
                    let next = self.read(upto, None).await;
                    return (self, next);
                }
                Step::Take(stored) => {
                    let end = self.end.unwrap_or(stored.version.size);
                    if self.offset >= end {
                        return (self, Next::End(Some(stored)));
                    }
                    let buffers = self.cache.blobs.buffers().clone();
                    self.reader = Some(Reader::new(stored.file.clone(), self.offset, buffers, self.mode));
                    let next = self.read(end, Some(stored)).await;
                    return (self, next);
                }
                Step::Break(error) => return (self, Next::Broken(Broken(error))),
                Step::Wait => match &mut self.following {
                    Some((_, watermark)) => tokio::select! {
                        _ = self.stage.changed() => {}
                        _ = watermark.changed() => {}
                    },
                    None => drop(self.stage.changed().await),
                },
            }
        }
    }

    /// Decides what may be given out. Bytes are marked as released while the stage is borrowed, so that a download
    /// that begins again knows of all of them.
    fn look(&mut self) -> Step {
        let stage = self.stage.borrow_and_update();
        match &*stage {
            Stage::Asking | Stage::Suspended => Step::Wait,
            Stage::Failed(error) => Step::Break(error.clone()),
            Stage::Rejected { actual } => Step::Break(mismatch(&self.flight, self.expected, *actual)),
            Stage::Stored { stored, lineage } => {
                let version = &stored.version;
                let same_length = self.length.is_none_or(|length| length == version.size);
                match self.expected {
                    _ if !same_length || (self.given && *lineage != self.lineage) => {
                        Step::Break(changed(&self.flight))
                    }
                    Some(expected) if expected != version.digest => {
                        self.cache.metrics.checksum_mismatches.inc();
                        Step::Break(mismatch(&self.flight, self.expected, version.digest))
                    }
                    _ => Step::Take(stored.clone()),
                }
            }
            Stage::Receiving(receiving) => {
                let same_length = self.length.is_none_or(|length| receiving.head.length == Some(length));
                if !same_length || (self.given && receiving.lineage != self.lineage) {
                    return Step::Break(changed(&self.flight));
                }
                let spool = &receiving.spool;
                self.lineage = receiving.lineage;
                let watermark = match &mut self.following {
                    Some((following, watermark)) if Arc::ptr_eq(following, spool) => watermark,
                    other => {
                        let buffers = self.cache.blobs.buffers().clone();
                        self.reader =
                            Some(Reader::new(spool.file().clone(), self.offset, buffers, self.mode));
                        &mut other.insert((spool.clone(), spool.watermark())).1
                    }
                };
                let written = *watermark.borrow_and_update();
                let held = self.cache.limits.tail_hold_bytes;
                let limit = written.min(self.end.unwrap_or(written).saturating_sub(held));
                if limit <= self.offset {
                    return Step::Wait;
                }
                let upto = limit.min(self.offset + STEP_BYTES);
                self.flight.release(upto);
                Step::Read(upto)
            }
        }
    }

    async fn read(&mut self, upto: u64, stored: Option<Arc<Stored>>) -> Next {
        let Some(reader) = &mut self.reader else { return Next::Broken(Broken(changed(&self.flight))) };
        match reader.read(upto).await {
            Ok(chunk) => {
                self.offset += chunk.len();
                self.given = true;
                Next::Chunk(chunk, stored)
            }
            Err(cause) => Next::Broken(Broken(Error::io("Failed to read cache storage", &cause))),
        }
    }
}

fn mismatch(flight: &Flight, expected: Option<Digest>, actual: Digest) -> Error {
    let source_url = flight.url.key().into();
    Error::ChecksumMismatch { expected: expected.unwrap_or(actual), actual, source_url }
}

fn changed(flight: &Flight) -> Error {
    Error::Upstream {
        status: None,
        source_url: flight.url.key().into(),
        message: "Upstream's content changed while it was downloaded".to_owned(),
        retry_after: None,
    }
}
