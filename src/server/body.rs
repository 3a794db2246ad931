//! The body of a response, and what has to happen when it ends: the access is counted, the request's line is written,
//! and a broken body resets the connection.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue};
use http_body::{Frame, SizeHint};

use super::{
    answer::X_CONTENT_SHA256,
    connection::{Busy, Connection},
    exchange::Exchange,
};
use crate::cache::{Body, Broken, Cache};

/// What hyper sends after a response's head.
#[derive(Debug)]
pub(super) struct ResponseBody {
    kind: Kind,
    exchange: Option<Box<Exchange>>,
    busy: Option<Busy>,
}

#[derive(Debug)]
enum Kind {
    Full(Bytes),
    Artifact(Artifact),
}

/// Bytes of an artifact, with what stands between several ranges of it.
#[derive(Debug)]
struct Artifact {
    segments: VecDeque<Segment>,
    cache: Arc<Cache>,
    connection: Arc<Connection>,
    /// Say the digest after the last chunk.
    trailer: bool,
    broken: bool,
}

/// A piece of a response.
#[derive(Debug)]
pub(super) enum Segment {
    /// A separator between ranges.
    Text(Bytes),
    /// Bytes of the artifact.
    Body(Body),
}

impl ResponseBody {
    /// A small body that is all there.
    pub(super) fn full(body: impl Into<Bytes>) -> ResponseBody {
        ResponseBody { kind: Kind::Full(body.into()), exchange: None, busy: None }
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
        let artifact = Artifact {
            segments: segments.into(),
            cache: cache.clone(),
            connection: connection.clone(),
            trailer,
            broken: false,
        };
        ResponseBody { kind: Kind::Artifact(artifact), exchange: None, busy: None }
    }

    /// Ends `exchange` when this body ends.
    pub(super) fn end_with(&mut self, exchange: Exchange) {
        self.exchange = Some(Box::new(exchange));
    }

    /// Keeps the connection marked as busy until this body ends.
    pub(super) fn hold(&mut self, busy: Busy) {
        self.busy = Some(busy);
    }
}

impl Artifact {
    fn poll_segment(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<(Bytes, bool), Broken>>> {
        loop {
            match self.segments.front_mut() {
                None => return Poll::Ready(None),
                Some(Segment::Text(text)) => {
                    let text = std::mem::take(text);
                    self.segments.pop_front();
                    return Poll::Ready(Some(Ok((text, false))));
                }
                Some(Segment::Body(body)) => match ready!(body.poll_chunk(cx)) {
                    Some(chunk) => return Poll::Ready(Some(chunk.map(|bytes| (bytes, true)))),
                    // The last body stays, because it knows what was served.
                    None if self.segments.len() == 1 => return Poll::Ready(None),
                    None => drop(self.segments.pop_front()),
                },
            }
        }
    }

    /// The body that was given out last, if nothing is missing.
    fn completed(&self) -> Option<&Body> {
        match (self.segments.len(), self.segments.back()) {
            (1, Some(Segment::Body(body))) if body.is_complete() => Some(body),
            _ => None,
        }
    }

    fn take_trailer(&mut self) -> Option<HeaderMap> {
        let wanted = std::mem::take(&mut self.trailer);
        let digest = self.completed().filter(|_| wanted)?.stored()?.version.digest;
        let value = HeaderValue::try_from(digest.to_string()).ok()?;
        Some(HeaderMap::from_iter([(X_CONTENT_SHA256, value)]))
    }
}

impl http_body::Body for ResponseBody {
    type Data = Bytes;
    type Error = Broken;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        let this = self.get_mut();
        let artifact = match &mut this.kind {
            Kind::Full(bytes) if bytes.is_empty() => return Poll::Ready(None),
            Kind::Full(bytes) => return Poll::Ready(Some(Ok(Frame::data(std::mem::take(bytes))))),
            Kind::Artifact(artifact) => artifact,
        };
        Poll::Ready(match ready!(artifact.poll_segment(cx)) {
            Some(Ok((bytes, is_artifact))) => {
                if let Some(exchange) = this.exchange.as_mut().filter(|_| is_artifact) {
                    exchange.gave(bytes.len());
                }
                Some(Ok(Frame::data(bytes)))
            }
            None => artifact.take_trailer().map(|trailer| Ok(Frame::trailers(trailer))),
            Some(Err(broken)) => {
                artifact.broken = true;
                artifact.connection.reset();
                if let Some(exchange) = &mut this.exchange {
                    exchange.broke(&broken);
                }
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
        let Kind::Artifact(artifact) = &self.kind else { return };
        match (artifact.completed(), &mut self.exchange) {
            (Some(body), _) => {
                if let Some(stored) = body.stored() {
                    artifact.cache.count_access(stored);
                }
            }
            (None, Some(exchange)) if !artifact.broken => exchange.abandoned(),
            _ => {}
        }
    }
}
