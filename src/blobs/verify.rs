//! Reading a whole blob again, to see whether it still is what its name says, and setting it aside if it isn't.
//!
//! A disk can change what it was given, and says nothing. So a check reads past the page cache where the file system
//! allows it: what is hashed is what the disk has, and what clients use stays in memory.

use std::{
    fs::File,
    io,
    os::{fd::AsFd, unix::fs::FileExt, unix::fs::MetadataExt},
    path::Path,
};

use rustix::{
    fs::{Advice, OFlags},
    io::Errno,
};

use super::{Blobs, Held, held, is_rot, place};
use crate::{
    artifact::{Digest, Hasher},
    error::Error,
};

/// Read at a time.
const BLOCK_BYTES: usize = 1 << 20;
/// What direct reads want of memory, offset and length; a multiple of every usual sector.
const ALIGNMENT: usize = 4096;

/// What a check came to.
#[derive(Debug)]
pub enum Checked {
    /// It is what its name says.
    Whole,
    /// It isn't.
    Lost(Loss),
    /// It was told to stop.
    Stopped,
}

/// What is wrong with a blob.
#[derive(Debug, Clone)]
pub struct Loss {
    /// Continues "the stored file …".
    pub problem: String,
    /// Nothing at all is there.
    pub is_absent: bool,
    /// Which file was read, if it had the right kind and size.
    file: Option<Identity>,
}

impl Loss {
    /// Of what can't be opened or read, for whatever reason.
    pub fn unreadable(cause: &io::Error) -> Loss {
        Loss { problem: format!("can't be read: {cause}"), is_absent: false, file: None }
    }
}

/// Tells a file from another one under the same name, and from itself before a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
    modified: (i64, i64),
}

impl Identity {
    fn of(file: &File) -> io::Result<Identity> {
        let found = file.metadata()?;
        let modified = (found.mtime(), found.mtime_nsec());
        Ok(Identity { device: found.dev(), inode: found.ino(), modified })
    }
}

/// Reads a blob of a store at `base`, whoever has it locked.
///
/// `go_on` is told after each read how many bytes that brought; it may wait, and `false` ends the check.
///
/// # Errors
/// When it can't be opened or read for a reason that is not its own. Bytes that the disk has lost are a loss.
pub fn check(
    base: &Path,
    digest: Digest,
    size: u64,
    go_on: &mut dyn FnMut(u64) -> bool,
) -> io::Result<Checked> {
    let lost = |problem: String, file| Ok(Checked::Lost(Loss { problem, is_absent: false, file }));
    match held(&place(base, digest), size)? {
        Held::Missing => {
            Ok(Checked::Lost(Loss { problem: "is missing".to_owned(), is_absent: true, file: None }))
        }
        Held::Damaged(problem) => lost(problem, None),
        Held::Whole(file) => {
            let identity = Some(Identity::of(&file)?);
            match hash(&file, size, go_on) {
                Ok(None) => Ok(Checked::Stopped),
                Ok(Some(found)) if found == digest => Ok(Checked::Whole),
                Ok(Some(found)) => lost(format!("has the SHA-256 {found}"), identity),
                Err(cause) if is_rot(&cause) => lost(format!("can't be read: {cause}"), identity),
                Err(cause) => Err(cause),
            }
        }
    }
}

impl Blobs {
    /// Reads a blob; see [`check`].
    pub fn check(
        &self,
        digest: Digest,
        size: u64,
        go_on: &mut dyn FnMut(u64) -> bool,
    ) -> Result<Checked, Error> {
        check(&self.base, digest, size, go_on)
            .map_err(|cause| Error::io("Failed to read cache storage", &cause))
    }

    /// Makes the next reader of a blob ask the disk. What memory had of it may have been the only thing wrong.
    pub fn forget_cached(&self, digest: Digest, size: u64) {
        if let Ok(Held::Whole(file)) = held(&self.path(digest), size) {
            // A hint: where it has no effect, the next reader gets the same bytes again, and notices again.
            let _ = rustix::fs::fadvise(file, 0, None, Advice::DontNeed);
        }
    }

    /// Moves what a check found damaged out of the way, unless somebody has put another file there since, or nobody
    /// wants it any more: `is_wanted` is asked while nothing can be published or deleted there. Says whether the blob
    /// is lost. Nothing is deleted.
    pub fn set_aside(
        &self,
        digest: Digest,
        size: u64,
        loss: &Loss,
        is_wanted: impl FnOnce() -> Result<bool, Error>,
    ) -> Result<bool, Error> {
        let failed = |cause: io::Error| Error::io("Failed to set damaged content aside", &cause);
        let mut shard = self.shard(digest);
        if !is_wanted()? {
            return Ok(false);
        }
        match held(&self.path(digest), size).map_err(failed)? {
            Held::Whole(file) if loss.file != Some(Identity::of(&file).map_err(failed)?) => return Ok(false),
            Held::Missing => {}
            Held::Whole(_) | Held::Damaged(_) => self.clear_place(&mut shard, digest).map_err(failed)?,
        }
        Ok(true)
    }
}

/// `None` if it was told to stop.
fn hash(file: &File, size: u64, go_on: &mut dyn FnMut(u64) -> bool) -> io::Result<Option<Digest>> {
    let mut memory = vec![0; BLOCK_BYTES + ALIGNMENT];
    let start = memory.as_ptr().align_offset(ALIGNMENT);
    let block = &mut memory[start..start + BLOCK_BYTES];
    let mut hasher = Hasher::new();
    let mut offset = 0;
    let mut is_direct = set_direct(file, true).is_ok();
    if !is_direct {
        // Else what is read once would push out what is read often.
        let _ = rustix::fs::fadvise(file, 0, None, Advice::NoReuse);
    }
    while offset < size {
        match file.read_at(block, offset) {
            Ok(0) => break,
            Ok(length) => {
                hasher.update(&block[..length]);
                offset += length as u64;
                if !go_on(length as u64) {
                    return Ok(None);
                }
            }
            Err(cause) if cause.kind() == io::ErrorKind::Interrupted => {}
            // A device that wants more alignment than this, or a short read has brought the offset out of step.
            Err(cause) if is_direct && cause.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => {
                set_direct(file, false)?;
                is_direct = false;
            }
            Err(cause) => return Err(cause),
        }
    }
    Ok(Some(hasher.finish()))
}

fn set_direct(file: &File, direct: bool) -> io::Result<()> {
    let mut flags = rustix::fs::fcntl_getfl(file.as_fd())?;
    flags.set(OFlags::DIRECT, direct);
    Ok(rustix::fs::fcntl_setfl(file.as_fd(), flags)?)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::config::Config;

    fn store(size: usize) -> (tempfile::TempDir, Digest, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let content: Vec<u8> = (0..size).map(|at| (at % 251) as u8).collect();
        let mut hasher = Hasher::new();
        hasher.update(&content);
        let digest = hasher.finish();
        let path = place(dir.path(), digest);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        (dir, digest, path)
    }

    #[test]
    fn a_blob_of_any_size_is_whole_until_any_byte_of_it_changes() {
        for size in [0, 1, 4095, 4096, 4097, BLOCK_BYTES, BLOCK_BYTES + 1, 3 * BLOCK_BYTES + 5000] {
            let (dir, digest, path) = store(size);
            let mut read = 0;
            let mut count = |bytes| {
                read += bytes;
                true
            };
            let checked = check(dir.path(), digest, size as u64, &mut count).unwrap();
            assert!(matches!(checked, Checked::Whole), "{size}: {checked:?}");
            assert_eq!(read, size as u64);
            for at in [0, size / 2, size.saturating_sub(1)].into_iter().filter(|&at| at < size) {
                let mut content = fs::read(&path).unwrap();
                content[at] ^= 1;
                fs::write(&path, &content).unwrap();
                let checked = check(dir.path(), digest, size as u64, &mut |_| true).unwrap();
                assert!(matches!(checked, Checked::Lost(_)), "{size}, byte {at}: {checked:?}");
                content[at] ^= 1;
                fs::write(&path, &content).unwrap();
            }
        }
    }

    #[test]
    fn it_stops_when_it_is_told_to() {
        let (dir, digest, _) = store(5 * BLOCK_BYTES);
        let mut reads = 0;
        let mut twice = |_| {
            reads += 1;
            reads < 2
        };
        let checked = check(dir.path(), digest, 5 * BLOCK_BYTES as u64, &mut twice).unwrap();
        assert!(matches!(checked, Checked::Stopped));
        assert_eq!(reads, 2);
    }

    #[test]
    fn only_the_file_that_was_read_is_set_aside() {
        // Where this file is compiled for tests/schedules, its locks work in a schedule only.
        if module_path!().starts_with("schedules") {
            return;
        }
        let (dir, digest, path) = store(5000);
        let storage =
            crate::config::Storage { base_path: dir.path().to_owned(), ..Config::default().storage };
        let blobs = Blobs::open(&storage).unwrap();
        let good = fs::read(&path).unwrap();
        let rot = || {
            fs::write(&path, vec![7; 5000]).unwrap();
            match blobs.check(digest, 5000, &mut |_| true).unwrap() {
                Checked::Lost(loss) => loss,
                other => panic!("{other:?}"),
            }
        };
        // Published again while it was read.
        let loss = rot();
        let new = dir.path().join("new");
        fs::write(&new, &good).unwrap();
        fs::rename(&new, &path).unwrap();
        assert!(!blobs.set_aside(digest, 5000, &loss, || Ok(true)).unwrap());
        assert_eq!(fs::read(&path).unwrap(), good);
        // Deleted while it was read.
        let loss = rot();
        assert!(!blobs.set_aside(digest, 5000, &loss, || Ok(false)).unwrap());
        assert!(path.exists());
        assert!(blobs.set_aside(digest, 5000, &loss, || Ok(true)).unwrap());
        assert!(!path.exists());
        // Nothing there is a loss as well.
        assert!(blobs.set_aside(digest, 5000, &loss, || Ok(true)).unwrap());
    }
}
