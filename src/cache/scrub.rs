//! Rot: a stored file that is no longer what it was is found, set aside, and fetched again.
//!
//! The recorded digest is the expected one, so another content never takes its place here: when no URL gives the same
//! bytes any more, the artifact stays known as missing, and that is said.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use super::{Cache, Content, Fetched, Stored};
use crate::{
    artifact::{Digest, RequestId, SourceUrl, Streaming, Want, globs::QueryGlobs},
    blobs::{Checked, Loss},
    catalog::Blob,
    error::Error,
};

/// So many URLs of a lost blob are asked: each may take as long as a download.
const MAX_SOURCES: usize = 8;

/// What came of reading a blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scrubbed {
    /// It is what its name says. To be noted with [`Cache::note_whole`].
    Whole,
    /// It was lost, and is whole again: fetched from its source, or put back by somebody.
    Healed,
    /// It is lost, and no source gives it now.
    Lost,
    /// It was deleted or replaced while it was read.
    Changed,
    /// The reading was told to stop.
    Stopped,
}

/// Blobs that are being looked at because a reader found them rotten.
#[derive(Debug, Default)]
pub(super) struct Suspects(Mutex<HashSet<Digest>>);

impl Suspects {
    fn lock(&self) -> std::sync::MutexGuard<'_, HashSet<Digest>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Cache {
    /// The blobs to be read next, `limit` at most; see [`crate::catalog::Catalog::due_blobs`].
    pub fn due_blobs(&self, period: Option<std::time::Duration>, limit: usize) -> Result<Vec<Blob>, Error> {
        self.catalog.due_blobs(period, limit)
    }

    /// Notes that these blobs were read and found whole.
    pub async fn note_whole(&self, blobs: Vec<Digest>) -> Result<(), Error> {
        self.catalog.note_whole(blobs).await
    }

    /// Reads a blob, and if it is lost sets it aside and fetches it again.
    ///
    /// `go_on` is told after each read how many bytes that brought; it may block, and `false` ends the reading.
    pub async fn scrub(
        self: &Arc<Self>,
        blob: Blob,
        mut go_on: impl FnMut(u64) -> bool + Send + 'static,
    ) -> Result<Scrubbed, Error> {
        let cache = self.clone();
        let mut counted = move |bytes| {
            cache.metrics.scrubbed_bytes.inc_by(bytes);
            go_on(bytes)
        };
        let cache = self.clone();
        let judged = tokio::task::spawn_blocking(move || cache.judge(blob, &mut counted)).await;
        let loss = match judged.map_err(|cause| failed(&std::io::Error::other(cause)))?? {
            Judged::Is(scrubbed) => {
                if blob.is_missing && scrubbed == Scrubbed::Whole {
                    self.catalog.note_found(blob.digest).await?;
                    tracing::info!(sha256 = %blob.digest, "a missing file is there again");
                    return Ok(Scrubbed::Healed);
                }
                return Ok(scrubbed);
            }
            Judged::Lost(loss) => loss,
        };
        // Whoever looks it up from now on opens what is at its place.
        self.catalog.forget_remembered();
        let is_news = self.catalog.note_lost(blob.digest).await?;
        let urls = self.catalog.urls_of(blob.digest)?;
        if loss.is_absent && urls.is_empty() {
            // Most likely an operator has removed the row and then the file. It must not look like a failing disk.
            tracing::info!(sha256 = %blob.digest, "a stored file that no URL has any more is gone");
            return Ok(Scrubbed::Changed);
        }
        if is_news {
            self.metrics.blobs_corrupt.inc();
            tracing::error!(
                sha256 = %blob.digest,
                problem = loss.problem,
                source_urls = %masked(&urls),
                "stored file lost, will be fetched again"
            );
        }
        self.heal(blob.digest, &urls).await
    }

    /// Reads a blob, and if it is lost sets it aside. Blocks.
    fn judge(&self, blob: Blob, go_on: &mut dyn FnMut(u64) -> bool) -> Result<Judged, Error> {
        let Blob { digest, size, .. } = blob;
        let loss = match self.check_twice(digest, size, go_on)? {
            Checked::Whole => {
                self.metrics.scrubbed_blobs.inc();
                return Ok(Judged::Is(Scrubbed::Whole));
            }
            Checked::Stopped => return Ok(Judged::Is(Scrubbed::Stopped)),
            Checked::Lost(loss) => loss,
        };
        self.metrics.scrubbed_blobs.inc();
        let is_wanted =
            || Ok(self.catalog.find_blob(digest)?.is_some() || !self.catalog.urls_of(digest)?.is_empty());
        Ok(match self.blobs.set_aside(digest, size, &loss, is_wanted)? {
            true => Judged::Lost(loss),
            false => Judged::Is(Scrubbed::Changed),
        })
    }

    /// Reads a blob, and a second time before it counts as lost: a cable, or memory, may have had it wrong once. Blocks.
    fn check_twice(
        &self,
        digest: Digest,
        size: u64,
        go_on: &mut dyn FnMut(u64) -> bool,
    ) -> Result<Checked, Error> {
        match self.blobs.check(digest, size, go_on)? {
            Checked::Lost(loss) if !loss.is_absent => {}
            checked => return Ok(checked),
        }
        self.blobs.forget_cached(digest, size);
        self.blobs.check(digest, size, go_on)
    }

    /// Fetches a lost blob from its sources in turn, the first few of them.
    async fn heal(self: &Arc<Self>, digest: Digest, urls: &[String]) -> Result<Scrubbed, Error> {
        let mut failure = "no URL has this content".to_owned();
        for url in urls.iter().take(MAX_SOURCES) {
            // What is recorded was taken once; its parameters that were ignored are not recorded.
            let Ok(url) = SourceUrl::parse(url, &QueryGlobs::default()) else { continue };
            let want = Want {
                url,
                sha256: Some(digest),
                streaming: Streaming::Never,
                no_cache: true,
                only_if_cached: false,
                request_id: RequestId::random(),
            };
            match self.fetch(&want, Instant::now()).await {
                Ok(Fetched { content: Content::Whole(_), .. }) => {
                    // Somebody may have put it back between the look and the note that it is lost.
                    self.catalog.note_found(digest).await?;
                    self.metrics.scrub_healed.inc();
                    tracing::info!(sha256 = %digest, source_url = %want.url.masked(), "lost file fetched again");
                    return Ok(Scrubbed::Healed);
                }
                Ok(_) => failure = "it still arrives".to_owned(),
                Err(error) => failure = error.to_string(),
            }
        }
        tracing::error!(
            sha256 = %digest,
            source_urls = %masked(urls),
            error = failure,
            "lost file can't be fetched again, will be tried every day; is there a backup?"
        );
        Ok(Scrubbed::Lost)
    }

    /// Looks at a blob of which a reader got other bytes than it should have, as a task of its own.
    pub(super) fn suspect(self: &Arc<Self>, stored: &Stored) {
        let blob = Blob { digest: stored.version.digest, size: stored.version.size, is_missing: false };
        if !self.suspects.lock().insert(blob.digest) {
            return;
        }
        let cache = self.clone();
        tokio::spawn(async move {
            let looked = cache.look_closely(blob).await;
            cache.suspects.lock().remove(&blob.digest);
            if let Err(error) = looked {
                tracing::error!(sha256 = %blob.digest, error = %error, "a rotten file could not be looked at");
            }
        });
    }

    async fn look_closely(self: &Arc<Self>, blob: Blob) -> Result<(), Error> {
        let blobs = self.blobs.clone();
        let forgotten =
            tokio::task::spawn_blocking(move || blobs.forget_cached(blob.digest, blob.size)).await;
        forgotten.map_err(|cause| failed(&std::io::Error::other(cause)))?;
        if self.scrub(blob, |_| true).await? == Scrubbed::Whole {
            // Memory had it wrong, or the file that was read has been replaced.
            self.catalog.forget_remembered();
            tracing::warn!(sha256 = %blob.digest, "a file was read wrongly, but is whole on the disk");
        }
        Ok(())
    }
}

enum Judged {
    Is(Scrubbed),
    Lost(Loss),
}

fn failed(cause: &std::io::Error) -> Error {
    Error::io("Failed to read cache storage", cause)
}

/// The URLs, fit for a log line.
fn masked(urls: &[String]) -> String {
    let url = |url: &String| match SourceUrl::parse(url, &QueryGlobs::default()) {
        Ok(url) => url.masked().into_owned(),
        Err(_) => "-".to_owned(),
    };
    urls.iter().take(10).map(url).collect::<Vec<_>>().join(" ")
}
