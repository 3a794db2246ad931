//! `storage.verify_on_read`: a stored artifact is hashed while it is served whole, and what must not be taken for it
//! breaks off before its end.

use std::{
    collections::VecDeque,
    io,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::Bytes;

use super::{
    Cache,
    body::{Broken, Next},
    front::Stored,
};
use crate::{
    artifact::Hasher,
    blobs::{Chunk, Mode, Reader},
    error::Error,
};

/// The end that is held back is kept in memory, so it can't be as long as that of a download. A client that misses
/// one byte knows as well that something is wrong.
const MOST_HELD_BYTES: u64 = 1 << 20;

/// The bytes of a stored artifact, the last of them only when all have the right digest.
pub(super) struct Verified {
    cache: Arc<Cache>,
    stored: Arc<Stored>,
    reader: Reader,
    /// Of what was read so far; `None` once it was judged.
    hasher: Option<Hasher>,
    /// Read and not given out.
    held: VecDeque<Bytes>,
    /// What ends after this is held back.
    tail_from: u64,
}

impl Verified {
    pub(super) fn new(cache: &Arc<Cache>, stored: &Arc<Stored>) -> Verified {
        let held = cache.limits.tail_hold_bytes.min(MOST_HELD_BYTES);
        // From memory or disk alike as bytes, because they have to be looked at.
        let reader = Reader::new(stored.file.clone(), 0, cache.blobs.buffers().clone(), Mode::Copy);
        Verified {
            cache: cache.clone(),
            stored: stored.clone(),
            reader,
            hasher: Some(Hasher::new()),
            held: VecDeque::new(),
            tail_from: stored.version.size.saturating_sub(held),
        }
    }

    pub(super) fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Next> {
        let size = self.stored.version.size;
        while self.reader.offset() < size {
            let bytes = match ready!(self.reader.poll_read(cx, size)) {
                Ok(Chunk::Bytes(bytes)) => bytes,
                Ok(Chunk::Cached(_)) => return Poll::Ready(self.rotten("a part of the file was not read")),
                Err(cause) => return Poll::Ready(self.unreadable(&cause)),
            };
            if let Some(hasher) = &mut self.hasher {
                hasher.update(&bytes);
            }
            self.held.push_back(bytes);
            if self.reader.offset() <= self.tail_from {
                break;
            }
        }
        if self.reader.offset() == size
            && let Some(hasher) = self.hasher.take()
            && hasher.finish() != self.stored.version.digest
        {
            return Poll::Ready(self.rotten("the stored file has rotted"));
        }
        Poll::Ready(match self.held.pop_front() {
            Some(bytes) => Next::Chunk(Chunk::Bytes(bytes), None),
            None => Next::End(None),
        })
    }

    fn unreadable(&mut self, cause: &io::Error) -> Next {
        self.cache.suspect(&self.stored);
        Next::Broken(Broken(Error::io("Failed to read cache storage", cause)))
    }

    fn rotten(&mut self, details: &str) -> Next {
        self.held.clear();
        self.cache.suspect(&self.stored);
        let message = "Failed to read cache storage";
        Next::Broken(Broken(Error::Internal { message, details: details.to_owned(), retry_after: None }))
    }
}
