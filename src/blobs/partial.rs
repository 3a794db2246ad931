//! Downloads that broke off, kept so that a later one can go on where they ended.
//!
//! Beside the spool file `NUMBER` lies `NUMBER.checkpoint`: what it is of, how much of it was on the disk when that was
//! written, and the SHA-256 of that much. It is written after the data's fdatasync and believed only when the data
//! hashes to what it says: a file that was not synced reads back as zeros after a power cut, and where no client knows
//! the digest those would become the truth.
//!
//! Nothing else in the spool directory outlives a start.

use std::{
    collections::{HashMap, HashSet},
    ffi::OsStr,
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::{Duration, Instant, SystemTime},
};

use serde::{Deserialize, Serialize};

use super::{OpenError, spool::SpoolFile, sync_dir};
use crate::{artifact::digest::Hasher, config::Storage, kill_point};

const EXTENSION: &str = "checkpoint";
/// A checkpoint that is being written.
const NEW_EXTENSION: &str = "new";
/// No checkpoint is longer: a URL has at most 8 KiB, and a header field of an upstream not much more.
const MAX_CHECKPOINT_BYTES: u64 = 256 << 10;
/// Times as long as a checkpoint took are waited before the next, so that they never take more than a tenth of the
/// disk: what a kill may cost is time, and a fast download makes up for it fast.
const REST: u32 = 9;

/// What a download is of, so that a later one can tell whether it may go on with it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Origin {
    /// The canonical URL.
    pub source_url: String,
    /// What its upstream said of the content, in its caller's own form.
    pub head: serde_json::Value,
}

/// The first `offset` bytes are on the disk and have this digest.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Checkpoint {
    #[serde(flatten)]
    origin: Origin,
    pub(super) offset: u64,
    sha256: String,
}

impl Checkpoint {
    pub(super) fn new(origin: Origin, offset: u64, hasher: Hasher) -> Checkpoint {
        Checkpoint { origin, offset, sha256: hasher.finish().to_string() }
    }

    /// Whether this is the hash of the bytes it speaks of.
    pub(super) fn agrees(&self, hasher: Hasher) -> bool {
        hasher.finish().to_string() == self.sha256
    }
}

/// A download that broke off, with its checkpoint.
#[derive(Debug)]
pub struct Partial {
    pub(super) path: PathBuf,
    pub(super) checkpoint: Checkpoint,
    expires: Instant,
}

impl Partial {
    /// What it is of.
    pub fn origin(&self) -> &Origin {
        &self.checkpoint.origin
    }

    /// Removes it from the disk.
    pub(super) fn give_up(self) {
        remove(&self.path, true);
    }
}

/// The downloads that broke off and nobody goes on with at the moment.
#[derive(Debug)]
pub(super) struct Partials {
    keep: Duration,
    max_bytes: u64,
    checkpoint_bytes: u64,
    /// By canonical URL.
    waiting: Mutex<HashMap<String, Partial>>,
}

impl Partials {
    /// Takes stock of the spool directory: what can be continued is kept, everything else in it is removed.
    pub(super) fn open(dir: &Path, config: &Storage) -> Result<Partials, OpenError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |cause| OpenError::Io { path, cause }
        };
        let partials = Partials {
            keep: config.partial_keep,
            max_bytes: config.partial_max_bytes,
            checkpoint_bytes: config.checkpoint_bytes,
            waiting: Mutex::default(),
        };
        let paths: Vec<PathBuf> = fs::read_dir(dir)
            .and_then(|entries| entries.map(|e| e.map(|e| e.path())).collect())
            .map_err(failed(dir))?;
        for path in paths.iter().filter(|path| path.extension() == Some(OsStr::new(EXTENSION))) {
            match partials.load(path) {
                Ok(Some(partial)) => partials.put(partial),
                Ok(None) => {}
                Err(cause) => {
                    tracing::warn!(path = %path.display(), error = %cause, "a download that broke off can't be continued");
                }
            }
        }
        let kept: HashSet<PathBuf> =
            partials.waiting().values().flat_map(|p| [p.path.clone(), checkpoint_path(&p.path)]).collect();
        for path in paths.iter().filter(|path| !kept.contains(*path)) {
            match fs::remove_file(path) {
                Err(cause) if cause.kind() != io::ErrorKind::NotFound => return Err(failed(path)(cause)),
                _ => {}
            }
        }
        Ok(partials)
    }

    /// Reads a checkpoint; `None` when it has been kept long enough. Gives back what was allocated behind its offset.
    fn load(&self, path: &Path) -> io::Result<Option<Partial>> {
        let file = open_regular(OpenOptions::new().read(true), path)?;
        let age = SystemTime::now().duration_since(file.metadata()?.modified()?).unwrap_or_default();
        let Some(left) = self.keep.checked_sub(age).filter(|left| !left.is_zero()) else { return Ok(None) };
        let mut text = Vec::new();
        file.take(MAX_CHECKPOINT_BYTES).read_to_end(&mut text)?;
        let checkpoint: Checkpoint = serde_json::from_slice(&text)?;
        let path = path.with_extension("");
        let data = open_regular(OpenOptions::new().write(true), &path)?;
        if data.metadata()?.len() < checkpoint.offset {
            return Err(io::Error::other("its file is shorter than its checkpoint says"));
        }
        data.set_len(checkpoint.offset)?;
        Ok(Some(Partial { path, checkpoint, expires: Instant::now() + left }))
    }

    /// The first number that no file of a kept download has.
    pub(super) fn next_number(&self) -> u64 {
        let number = |partial: &Partial| u64::from_str_radix(partial.path.file_name()?.to_str()?, 16).ok();
        self.waiting().values().filter_map(number).max().map_or(0, |number| number.wrapping_add(1))
    }

    /// Checkpoints for a new download; `None` when none are kept.
    pub(super) fn checkpoints(self: &Arc<Self>, origin: Origin) -> Option<Checkpoints> {
        let wanted = self.max_bytes > 0 && !self.keep.is_zero();
        let partials = self.clone();
        wanted.then(|| Checkpoints::new(partials, origin, 0, None))
    }

    /// The download of a URL that broke off, which is the caller's from now on.
    pub(super) fn take(&self, source_url: &str) -> Option<Partial> {
        let partial = self.waiting().remove(source_url)?;
        if partial.expires <= Instant::now() {
            partial.give_up();
            return None;
        }
        Some(partial)
    }

    /// Lets a download wait for somebody who goes on with it. The oldest go when that makes them too many.
    fn put(&self, partial: Partial) {
        let replaced = self.waiting().insert(partial.origin().source_url.clone(), partial);
        replaced.into_iter().for_each(Partial::give_up);
        while self.bytes() > self.max_bytes && self.give_up_oldest() {}
    }

    /// Removes the one that would be removed next; false when there is none.
    pub(super) fn give_up_oldest(&self) -> bool {
        let oldest = {
            let mut waiting = self.waiting();
            let oldest = waiting.iter().min_by_key(|(_, partial)| partial.expires);
            let oldest = oldest.map(|(source_url, _)| source_url.clone());
            oldest.and_then(|source_url| waiting.remove(&source_url))
        };
        oldest.map(Partial::give_up).is_some()
    }

    /// Removes those that nobody went on with in time.
    pub(super) fn give_up_expired(&self) {
        let now = Instant::now();
        let expired: Vec<Partial> = self
            .waiting()
            .extract_if(|_, partial| partial.expires <= now)
            .map(|(_, partial)| partial)
            .collect();
        expired.into_iter().for_each(Partial::give_up);
    }

    /// Bytes that they take.
    pub(super) fn bytes(&self) -> u64 {
        self.waiting().values().map(|partial| partial.checkpoint.offset).sum()
    }

    fn waiting(&self) -> MutexGuard<'_, HashMap<String, Partial>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The checkpoints of one download. They are written by a thread of their own, so that the download never waits for
/// the disk; while one is being written, the next has to wait.
#[derive(Debug)]
pub(super) struct Checkpoints {
    partials: Arc<Partials>,
    origin: Origin,
    /// The offset of the last one that was begun.
    begun: u64,
    /// The last one that is on the disk.
    last: Option<Checkpoint>,
    /// The one that is being written: what has come of it, and how long that took.
    pending: Option<JoinHandle<(io::Result<Option<Checkpoint>>, Duration)>>,
    rest_until: Instant,
}

impl Checkpoints {
    /// Those of a download that is gone on with.
    pub(super) fn of(partials: &Arc<Partials>, checkpoint: Checkpoint) -> Checkpoints {
        let (origin, offset) = (checkpoint.origin.clone(), checkpoint.offset);
        Checkpoints::new(partials.clone(), origin, offset, Some(checkpoint))
    }

    fn new(partials: Arc<Partials>, origin: Origin, begun: u64, last: Option<Checkpoint>) -> Checkpoints {
        Checkpoints { partials, origin, begun, last, pending: None, rest_until: Instant::now() }
    }

    /// Begins a checkpoint when it is time for one. `hasher` has taken in the first `written` bytes of the file.
    ///
    /// # Errors
    /// When the data of this one or the one before can't be brought to the disk: the file must not be used any more.
    pub(super) fn advance(&mut self, file: &Arc<SpoolFile>, written: u64, hasher: &Hasher) -> io::Result<()> {
        let is_busy = self.pending.as_ref().is_some_and(|pending| !pending.is_finished());
        if written - self.begun < self.partials.checkpoint_bytes || is_busy {
            return Ok(());
        }
        self.settle()?;
        if Instant::now() < self.rest_until {
            return Ok(());
        }
        self.begun = written;
        let (file, checkpoint) = (file.clone(), self.checkpoint(written, hasher));
        let thread = std::thread::Builder::new().name("checkpoint".to_owned());
        // Where no thread is to be had, the next one may be.
        let work = move || {
            let began = Instant::now();
            (write(&file, checkpoint), began.elapsed())
        };
        self.pending = thread.spawn(work).ok();
        Ok(())
    }

    /// Waits for the checkpoint that is being written, if there is one.
    ///
    /// # Errors
    /// As [`Checkpoints::advance`].
    pub(super) fn settle(&mut self) -> io::Result<()> {
        if let Some(pending) = self.pending.take() {
            let (written, took) = pending.join().map_err(|_| io::Error::other("checkpoint panicked"))?;
            self.last = written?.or(self.last.take());
            self.rest_until = Instant::now() + took * REST;
        }
        Ok(())
    }

    /// Leaves a file that ends at `written` to a later download, with a last checkpoint. A file that is too short to be
    /// worth one is removed.
    ///
    /// # Errors
    /// As [`Checkpoints::advance`].
    pub(super) fn leave(mut self, file: &Arc<SpoolFile>, written: u64, hasher: &Hasher) -> io::Result<()> {
        self.settle()?;
        let is_wanted = match &self.last {
            Some(last) => last.offset < written,
            None => self.partials.checkpoint_bytes <= written,
        };
        if is_wanted {
            let checkpoint = self.checkpoint(written, hasher);
            self.last = write(file, checkpoint)?.or(self.last.take());
        }
        match (self.last, file.take_name()) {
            (Some(checkpoint), Some(path)) => {
                let expires = Instant::now() + self.partials.keep;
                self.partials.put(Partial { path, checkpoint, expires });
            }
            (None, Some(path)) => remove(&path, true),
            (_, None) => {}
        }
        Ok(())
    }

    fn checkpoint(&self, offset: u64, hasher: &Hasher) -> Checkpoint {
        Checkpoint::new(self.origin.clone(), offset, hasher.clone())
    }
}

/// Brings a file to the disk, then what is to be known of it. `None` when only the latter failed: what the checkpoint
/// before this one says is still true then.
fn write(file: &SpoolFile, checkpoint: Checkpoint) -> io::Result<Option<Checkpoint>> {
    file.file().sync_data()?;
    kill_point::pass("checkpoint.synced");
    let Some(path) = file.path() else { return Ok(None) };
    let new = path.with_extension(NEW_EXTENSION);
    match store(file, &path, &new, &checkpoint) {
        Ok(true) => Ok(Some(checkpoint)),
        Ok(false) => Ok(None),
        Err(cause) => {
            tracing::warn!(error = %cause, "a download can't be made safe to be continued after a restart");
            let _ = fs::remove_file(&new);
            Ok(None)
        }
    }
}

/// Puts a checkpoint beside its file, unless that has lost its name meanwhile.
fn store(file: &SpoolFile, path: &Path, new: &Path, checkpoint: &Checkpoint) -> io::Result<bool> {
    let mut text = serde_json::to_vec(checkpoint)?;
    text.push(b'\n');
    let mut written = File::create(new)?;
    written.write_all(&text)?;
    written.sync_all()?;
    kill_point::pass("checkpoint.written");
    if !file.make_resumable(|| fs::rename(new, checkpoint_path(path)))? {
        fs::remove_file(new)?;
        return Ok(false);
    }
    kill_point::pass("checkpoint.renamed");
    path.parent().map_or(Ok(()), sync_dir)?;
    kill_point::pass("checkpoint.durable");
    Ok(true)
}

/// Removes a spool file, and first the checkpoint beside it if there may be one.
pub(super) fn remove(path: &Path, has_checkpoint: bool) {
    if has_checkpoint {
        remove_checkpoint(path);
    }
    match fs::remove_file(path) {
        Err(cause) if cause.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(error = %cause, "leftover spool file, removed at the next start");
        }
        _ => {}
    }
}

/// Removes the checkpoint beside a spool file.
pub(super) fn remove_checkpoint(path: &Path) {
    if let Err(cause) = fs::remove_file(checkpoint_path(path)) {
        tracing::warn!(error = %cause, "leftover checkpoint, removed at the next start");
    }
}

fn checkpoint_path(path: &Path) -> PathBuf {
    path.with_extension(EXTENSION)
}

/// Opens what must be a regular file itself, not something that a link or a pipe leads to.
pub(super) fn open_regular(how: &mut OpenOptions, path: &Path) -> io::Result<File> {
    let file = how.custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path)?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(io::Error::other("not a regular file")),
    }
}
