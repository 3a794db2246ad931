//! The body of a response, and what has to happen when it ends: the access is counted, the request's line is written,
//! and a broken body resets the connection.

use std::{
    collections::VecDeque,
    io::IoSlice,
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes};
use http::{HeaderMap, HeaderValue};
use http_body::{Frame, SizeHint};

use super::{
    answer::X_CONTENT_SHA256,
    connection::{Busy, Connection},
    exchange::Exchange,
    sendfile::Promise,
};
use crate::{
    blobs::Chunk,
    cache::{Body, Broken, Cache, Stored},
};

/// What hyper sends after a response's head.
#[derive(Debug)]
pub(super) struct ResponseBody {
    kind: Kind,
    ending: Box<Ending>,
    /// Bytes given out since others had a turn.
    turn_bytes: u64,
}

/// After so many bytes a body lets others have their turn: a fast client of a large file must not keep a worker.
const TURN_BYTES: u64 = 2 << 20;

#[derive(Debug)]
enum Kind {
    Full(Bytes),
    Artifact(Artifact),
}

/// Bytes of an artifact, with what stands between several ranges of it.
#[derive(Debug)]
struct Artifact {
    segments: VecDeque<Segment>,
    connection: Arc<Connection>,
    /// Say the digest after the last chunk.
    trailer: bool,
}

/// A piece of a response.
#[derive(Debug)]
pub(super) enum Segment {
    /// A separator between ranges.
    Text(Bytes),
    /// Bytes of the artifact.
    Body(Body),
}

/// What comes of a response when its last byte is on its way, or when it has come to nothing: dropping it is the end.
#[derive(Debug, Default)]
pub(super) struct Ending {
    exchange: Option<Exchange>,
    busy: Option<Busy>,
    served: Option<Served>,
}

/// What an artifact's response has come to.
#[derive(Debug)]
struct Served {
    cache: Arc<Cache>,
    /// Known at the latest with the last byte.
    stored: Option<Arc<Stored>>,
    /// Every byte was given out.
    complete: bool,
    broken: bool,
}

impl Drop for Ending {
    fn drop(&mut self) {
        match (&self.served, &mut self.exchange) {
            (Some(Served { complete: true, cache, stored: Some(stored), .. }), _) => {
                cache.count_access(stored)
            }
            (Some(Served { complete: false, broken: false, .. }), Some(exchange)) => exchange.abandoned(),
            _ => {}
        }
    }
}

impl Ending {
    /// The last byte is the socket's.
    pub(super) fn complete(&mut self) {
        if let Some(served) = &mut self.served {
            served.complete = true;
        }
    }
}

impl ResponseBody {
    /// A small body that is all there.
    pub(super) fn full(body: impl Into<Bytes>) -> ResponseBody {
        ResponseBody { kind: Kind::Full(body.into()), ending: Box::default(), turn_bytes: 0 }
    }

    pub(super) fn empty() -> ResponseBody {
        ResponseBody::full(Bytes::new())
    }

    pub(super) fn artifact(
        cache: &Arc<Cache>,
        connection: &Arc<Connection>,
        segments: impl Into<VecDeque<Segment>>,
        trailer: bool,
    ) -> ResponseBody {
        let segments = segments.into();
        let stored = segments.iter().find_map(|segment| match segment {
            Segment::Body(body) => body.stored().cloned(),
            Segment::Text(_) => None,
        });
        let served = Served { cache: cache.clone(), stored, complete: false, broken: false };
        let ending = Box::new(Ending { exchange: None, busy: None, served: Some(served) });
        ResponseBody {
            kind: Kind::Artifact(Artifact { segments, connection: connection.clone(), trailer }),
            ending,
            turn_bytes: 0,
        }
    }

    /// Ends `exchange` when this response ends.
    pub(super) fn end_with(&mut self, exchange: Exchange) {
        self.ending.exchange = Some(exchange);
    }

    /// Keeps the connection marked as busy until this response ends.
    pub(super) fn hold(&mut self, busy: Busy) {
        self.ending.busy = Some(busy);
    }
}

impl Artifact {
    /// The next piece of the response, and what is noted of it.
    fn poll_segment(
        &mut self,
        cx: &mut Context<'_>,
        served: &mut Served,
    ) -> Poll<Option<Result<Given, Broken>>> {
        loop {
            match self.segments.front_mut() {
                None => return Poll::Ready(None),
                Some(Segment::Text(text)) => {
                    let text = std::mem::take(text);
                    self.segments.pop_front();
                    return Poll::Ready(Some(Ok(Given::Text(text))));
                }
                Some(Segment::Body(body)) => {
                    let chunk = ready!(body.poll_chunk(cx));
                    if served.stored.is_none() {
                        served.stored = body.stored().cloned();
                    }
                    // hyper does not ask for the end of a body whose length it knows, so it is noticed here.
                    if body.is_complete() {
                        self.segments.pop_front();
                    }
                    if let Some(chunk) = chunk {
                        return Poll::Ready(Some(chunk.map(Given::Artifact)));
                    }
                }
            }
        }
    }

    /// Every byte was given out.
    fn is_complete(&self) -> bool {
        self.segments.iter().all(|segment| matches!(segment, Segment::Body(body) if body.is_complete()))
    }
}

/// What comes next of a response.
enum Given {
    Text(Bytes),
    Artifact(Chunk),
}

/// What hyper is given to send.
#[derive(Debug)]
pub(super) enum Piece {
    Bytes(Bytes),
    File(Promise),
}

impl ResponseBody {
    /// Makes a piece for hyper of what comes next. The last one takes the response's end along, if it is still to be
    /// sent when this body is gone.
    fn piece(&mut self, given: Given) -> Piece {
        let Kind::Artifact(artifact) = &self.kind else { return Piece::Bytes(Bytes::new()) };
        let chunk = match given {
            Given::Text(text) => return Piece::Bytes(text),
            Given::Artifact(chunk) => chunk,
        };
        self.turn_bytes += chunk.len();
        artifact.connection.body_gave(true);
        if let Some(exchange) = &mut self.ending.exchange {
            exchange.gave(chunk.len());
        }
        match chunk {
            Chunk::Bytes(bytes) => Piece::Bytes(bytes),
            Chunk::Cached(range) => {
                // A trailer still needs to know what was served.
                let is_last = artifact.is_complete() && !artifact.trailer;
                // A body that still arrives may pause after any piece.
                let is_whole = self.ending.served.as_ref().is_some_and(|served| served.stored.is_some());
                let more = is_whole && !artifact.is_complete();
                let ending = is_last.then(|| std::mem::take(&mut self.ending));
                Piece::File(Promise::new(&artifact.connection, range, more, ending))
            }
        }
    }

    fn broke(&mut self, broken: &Broken) {
        if let Some(served) = &mut self.ending.served {
            served.broken = true;
        }
        if let Some(exchange) = &mut self.ending.exchange {
            exchange.broke(broken);
        }
        if let Kind::Artifact(artifact) = &self.kind {
            artifact.connection.reset();
        }
    }

    /// The digest of what was served, if the client is to be told after the last chunk.
    fn take_trailer(&mut self) -> Option<HeaderMap> {
        let Kind::Artifact(artifact) = &mut self.kind else { return None };
        if !std::mem::take(&mut artifact.trailer) {
            return None;
        }
        let digest = self.ending.served.as_ref()?.stored.as_ref()?.version.digest;
        let value = HeaderValue::try_from(digest.to_string()).ok()?;
        Some(HeaderMap::from_iter([(X_CONTENT_SHA256, value)]))
    }
}

impl http_body::Body for ResponseBody {
    type Data = Piece;
    type Error = Broken;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Piece>, Broken>>> {
        let this = self.get_mut();
        if let Kind::Artifact(artifact) = &this.kind {
            artifact.connection.body_gave(false);
        }
        if this.turn_bytes >= TURN_BYTES {
            this.turn_bytes = 0;
            // Not by waking itself: the worker would only look at sockets again after 61 such turns, which is up to
            // 80 ms for whoever has just asked. This wakes after the worker has looked.
            if pin!(tokio::task::yield_now()).poll(cx).is_pending() {
                return Poll::Pending;
            }
        }
        let given = match (&mut this.kind, &mut this.ending.served) {
            (Kind::Full(bytes), _) => {
                let bytes = std::mem::take(bytes);
                return Poll::Ready((!bytes.is_empty()).then(|| Ok(Frame::data(Piece::Bytes(bytes)))));
            }
            (Kind::Artifact(artifact), Some(served)) => ready!(artifact.poll_segment(cx, served)),
            // The last piece has taken the end along.
            (Kind::Artifact(_), None) => None,
        };
        Poll::Ready(match given {
            Some(Ok(given)) => Some(Ok(Frame::data(this.piece(given)))),
            None => this.take_trailer().map(|trailer| Ok(Frame::trailers(trailer))),
            Some(Err(broken)) => {
                this.broke(&broken);
                Some(Err(broken))
            }
        })
    }

    fn size_hint(&self) -> SizeHint {
        match &self.kind {
            Kind::Full(bytes) => SizeHint::with_exact(bytes.len() as u64),
            // Content-Length says it where it is to be said.
            Kind::Artifact(_) => SizeHint::default(),
        }
    }
}

impl Drop for ResponseBody {
    fn drop(&mut self) {
        if let Kind::Artifact(artifact) = &self.kind {
            artifact.connection.body_gave(false);
            if artifact.is_complete() {
                self.ending.complete();
            }
        }
    }
}

impl Buf for Piece {
    fn remaining(&self) -> usize {
        match self {
            Piece::Bytes(bytes) => bytes.remaining(),
            Piece::File(promise) => promise.remaining(),
        }
    }

    fn chunk(&self) -> &[u8] {
        match self {
            Piece::Bytes(bytes) => bytes.chunk(),
            Piece::File(promise) => promise.chunk(),
        }
    }

    fn chunks_vectored<'a>(&'a self, dst: &mut [IoSlice<'a>]) -> usize {
        match self {
            Piece::Bytes(bytes) => bytes.chunks_vectored(dst),
            Piece::File(promise) => promise.chunks_vectored(dst),
        }
    }

    fn advance(&mut self, count: usize) {
        match self {
            Piece::Bytes(bytes) => bytes.advance(count),
            Piece::File(promise) => promise.advance(count),
        }
    }
}
