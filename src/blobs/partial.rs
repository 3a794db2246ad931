//! Downloads that broke off, kept so that a later one can go on where they ended; and how a download gets to the disk
//! while it arrives, of which keeping it is a by-product.
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
/// A download is brought to the disk every so many bytes, if the disk keeps up with it. What a sync costs is for the most
/// part what has to be written anyway, and the disk's own cache, which nothing but a sync empties: at the end of 1 GiB
/// that took longer than all of the download (`docs/performance.md`).
const SYNC_EVERY: u64 = 32 << 20;

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

    /// For a new download.
    pub(super) fn checkpoints(self: &Arc<Self>, origin: Origin) -> Checkpoints {
        Checkpoints::new(self.clone(), origin, 0, None)
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

    /// Whether anything is kept of a download that breaks off.
    fn keeps(&self) -> bool {
        self.max_bytes > 0 && !self.keep.is_zero()
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

/// Brings one download to the disk while it arrives, and writes its checkpoints. A thread of its own does that, so that
/// the download never waits for the disk; while one part is being synced, the next has to wait.
#[derive(Debug)]
pub(super) struct Checkpoints {
    partials: Arc<Partials>,
    origin: Origin,
    /// How much the last sync that was begun brings to the disk.
    begun: u64,
    /// The offset of the last checkpoint that was begun.
    marked: u64,
    /// The last one that is on the disk.
    last: Option<Checkpoint>,
    /// The sync that is under way, and the checkpoint that comes of it.
    pending: Option<JoinHandle<io::Result<Option<Checkpoint>>>>,
}

impl Checkpoints {
    /// Those of a download that is gone on with.
    pub(super) fn of(partials: &Arc<Partials>, checkpoint: Checkpoint) -> Checkpoints {
        let (origin, offset) = (checkpoint.origin.clone(), checkpoint.offset);
        Checkpoints::new(partials.clone(), origin, offset, Some(checkpoint))
    }

    fn new(partials: Arc<Partials>, origin: Origin, begun: u64, last: Option<Checkpoint>) -> Checkpoints {
        Checkpoints { partials, origin, begun, marked: begun, last, pending: None }
    }

    /// Begins to bring the file to the disk when it is time to, and to write a checkpoint when one is due. `hasher` has
    /// taken in the first `written` bytes of the file.
    ///
    /// # Errors
    /// When this part or the one before can't be brought to the disk, or there is no hash: the file must not be used any
    /// more.
    pub(super) fn advance(
        &mut self,
        file: &Arc<SpoolFile>,
        written: u64,
        hasher: impl FnOnce() -> io::Result<Hasher>,
    ) -> io::Result<()> {
        let is_busy = self.pending.as_ref().is_some_and(|pending| !pending.is_finished());
        let is_due = self.partials.keeps() && written - self.marked >= self.partials.checkpoint_bytes;
        if is_busy || !(is_due || written - self.begun >= SYNC_EVERY) {
            return Ok(());
        }
        self.settle()?;
        self.begun = written;
        let hasher = is_due.then(hasher).transpose()?;
        let checkpoint = hasher.map(|hasher| {
            self.marked = written;
            self.checkpoint(written, hasher)
        });
        let file = file.clone();
        let thread = std::thread::Builder::new().name("spool sync".to_owned());
        // Where no thread is to be had, the next one may be.
        self.pending = thread.spawn(move || write(&file, checkpoint)).ok();
        Ok(())
    }

    /// Waits for the sync that is under way, if there is one.
    ///
    /// # Errors
    /// As [`Checkpoints::advance`].
    pub(super) fn settle(&mut self) -> io::Result<()> {
        if let Some(pending) = self.pending.take() {
            let written = pending.join().map_err(|_| io::Error::other("a sync panicked"))?;
            self.last = written?.or(self.last.take());
        }
        Ok(())
    }

    /// Leaves a file that ends at `written` to a later download, with a last checkpoint. A file that is too short to be
    /// worth one is removed.
    ///
    /// # Errors
    /// As [`Checkpoints::advance`].
    pub(super) fn leave(mut self, file: &Arc<SpoolFile>, written: u64, hasher: Hasher) -> io::Result<()> {
        self.settle()?;
        let is_wanted = match &self.last {
            Some(last) => last.offset < written,
            None => self.partials.keeps() && self.partials.checkpoint_bytes <= written,
        };
        if is_wanted {
            let checkpoint = self.checkpoint(written, hasher);
            self.last = write(file, Some(checkpoint))?.or(self.last.take());
        }
        match self.last {
            None => file.remove(),
            Some(checkpoint) => {
                if let Some(path) = file.take_name() {
                    let expires = Instant::now() + self.partials.keep;
                    self.partials.put(Partial { path, checkpoint, expires });
                }
            }
        }
        Ok(())
    }

    fn checkpoint(&self, offset: u64, hasher: Hasher) -> Checkpoint {
        Checkpoint::new(self.origin.clone(), offset, hasher)
    }
}

/// Brings a file to the disk, then what is to be known of it. `None` when nothing is, or only the latter failed: what the
/// checkpoint before this one says is still true then.
fn write(file: &SpoolFile, checkpoint: Option<Checkpoint>) -> io::Result<Option<Checkpoint>> {
    file.file().sync_data()?;
    let Some(checkpoint) = checkpoint else { return Ok(None) };
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn storage(keep: Duration) -> Storage {
        Storage { partial_keep: keep, ..Config::default().storage }
    }

    /// Leaves the bytes of a download and a checkpoint that says what `said` makes of the truth.
    fn leave(dir: &Path, number: u64, bytes: &[u8], said: impl FnOnce(&mut Checkpoint)) -> PathBuf {
        let path = dir.join(format!("{number:016x}"));
        fs::write(&path, bytes).unwrap();
        let mut hasher = Hasher::new();
        hasher.update(bytes);
        let origin = Origin { source_url: format!("http://h.test/{number}"), head: serde_json::Value::Null };
        let mut checkpoint = Checkpoint::new(origin, bytes.len() as u64, hasher);
        said(&mut checkpoint);
        fs::write(checkpoint_path(&path), serde_json::to_vec(&checkpoint).unwrap()).unwrap();
        path
    }

    #[test]
    fn one_that_nobody_asks_for_goes_while_the_process_runs() {
        let dir = tempfile::tempdir().unwrap();
        let path = leave(dir.path(), 7, b"some bytes", |_| {});
        let partials = Partials::open(dir.path(), &storage(Duration::from_secs(2))).unwrap();
        assert_eq!((partials.bytes(), partials.next_number()), (10, 8));
        partials.give_up_expired();
        assert!(path.exists(), "its time is not up");
        while partials.bytes() > 0 {
            std::thread::sleep(Duration::from_millis(20));
            partials.give_up_expired();
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn of_two_of_one_url_one_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        for number in [1, 2] {
            leave(dir.path(), number, b"some bytes", |said| {
                said.origin.source_url = "http://h.test/".to_owned()
            });
        }
        let partials = Partials::open(dir.path(), &storage(Duration::from_secs(3600))).unwrap();
        assert_eq!((partials.bytes(), fs::read_dir(dir.path()).unwrap().count()), (10, 2));
        assert!(partials.take("http://h.test/").is_some());
        assert!(partials.take("http://h.test/").is_none(), "it is the caller's now");
    }

    #[test]
    fn what_lies_behind_the_checkpoint_is_given_back_at_the_start() {
        let dir = tempfile::tempdir().unwrap();
        let path = leave(dir.path(), 1, b"some bytes", |said| said.offset = 4);
        let partials = Partials::open(dir.path(), &storage(Duration::from_secs(3600))).unwrap();
        assert_eq!((fs::read(path).unwrap(), partials.bytes()), (b"some".to_vec(), 4));
    }
}
