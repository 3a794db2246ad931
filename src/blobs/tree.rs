//! Directories laid out like the store, and blobs on their way from one to another: backing up and restoring.
//!
//! - Nothing damaged is ever copied: a copy is hashed while it is made, and only kept if it is what its name says.
//! - A blob has its name in a tree only when its bytes are on disk there; the names are, after [`Tree::sync`].
//! - A blob that is there with the right size is left alone, so going on after an interruption costs little. If it is
//!   to be verified and isn't good, it goes only when a good one takes its place.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{self, Read, Write},
    path::{Path, PathBuf},
};

use rustix::fs::Advice;

use super::{Blobs, Held, SPOOL_DIR, held, list, place, sync_dir};
use crate::artifact::{Digest, digest::Hasher};

/// What a copy has until it is verified; one at a time. In the spool directory, which the service clears at start.
const UNFINISHED: &str = "copying";
const COPY_BUFFER_BYTES: usize = 1 << 20;

/// How a blob gets into another tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// As a file of its own, hashed on the way.
    Copy,
    /// As another name of the same file: no space, no time, and no protection from rot.
    Link,
}

/// What came of taking a blob over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Taken {
    /// It is there now.
    New,
    /// It was there, with the right size.
    There,
    /// The source has nothing of that name.
    Missing,
    /// What the source has is not that blob: why not.
    Damaged(String),
}

/// A tree of blobs. At most one process at a time may take blobs into it; the caller has a lock on it.
#[derive(Debug)]
pub struct Tree {
    base: PathBuf,
    /// Directories whose entries may not be on disk yet.
    unsynced: BTreeSet<PathBuf>,
}

impl Tree {
    /// The tree at `base`, which need not exist.
    pub fn new(base: &Path) -> Tree {
        Tree { base: base.to_owned(), unsynced: BTreeSet::new() }
    }

    /// Makes sure that this tree has a blob, taking it over from another tree if it hasn't. To `verify` is to hash what is
    /// there already, and to read back what is new.
    ///
    /// # Errors
    /// When this tree can't be written, or the source can't be opened for a reason that is not the blob's own; with
    /// the path. That the disk can't read it is an answer.
    pub fn take(
        &mut self,
        from: &Tree,
        digest: Digest,
        size: u64,
        way: Way,
        verify: bool,
    ) -> io::Result<Taken> {
        let to = place(&self.base, digest);
        // Also for what is there: an earlier run may have died between the name and its sync.
        self.unsynced.extend(to.ancestors().skip(1).take(3).map(Path::to_owned));
        let is_there = matches!(held(&to, size).map_err(at(&to))?, Held::Whole(_));
        let doubt = if is_there && verify { self.problem(digest, size) } else { None };
        let Some(doubt) = doubt else {
            return if is_there { Ok(Taken::There) } else { self.replace(from, digest, size, way, verify) };
        };
        // It may be the last copy, and only its disk at fault: it stays unless there is a better one.
        Ok(match self.replace(from, digest, size, way, verify)? {
            Taken::Missing => Taken::Damaged(format!("{doubt}, and its source is missing")),
            Taken::Damaged(problem) => Taken::Damaged(format!("{doubt}, and its source {problem}")),
            taken => taken,
        })
    }

    /// Takes a blob over, in place of whatever is there. That stays if there is no good one to replace it.
    fn replace(&self, from: &Tree, digest: Digest, size: u64, way: Way, verify: bool) -> io::Result<Taken> {
        let to = place(&self.base, digest);
        let source = match held(&place(&from.base, digest), size) {
            Ok(Held::Whole(file)) => file,
            Ok(Held::Missing) => return Ok(Taken::Missing),
            Ok(Held::Damaged(problem)) => return Ok(Taken::Damaged(problem)),
            Err(cause) if is_bad_sector(&cause) => return Ok(Taken::Damaged(unreadable(&cause))),
            Err(cause) => return Err(at(&place(&from.base, digest))(cause)),
        };
        let unfinished = self.base.join(SPOOL_DIR).join(UNFINISHED);
        for dir in [unfinished.parent(), to.parent()].into_iter().flatten() {
            fs::create_dir_all(dir).map_err(at(dir))?;
        }
        remove_if_there(&unfinished).map_err(at(&unfinished))?;
        let problem = match way {
            Way::Copy => copy(source, &unfinished, digest).map_err(at(&unfinished))?,
            Way::Link => {
                fs::hard_link(place(&from.base, digest), &unfinished).map_err(at(&unfinished))?;
                None
            }
        };
        let problem = problem.or_else(|| if verify { problem_at(&unfinished, digest, size) } else { None });
        if problem.is_none() {
            fs::rename(&unfinished, &to).map_err(at(&to))?;
        }
        // Nor does renaming do anything between two names of one file.
        remove_if_there(&unfinished).map_err(at(&unfinished))?;
        Ok(problem.map_or(Taken::New, Taken::Damaged))
    }

    /// Puts everything taken over on disk, names too.
    pub fn sync(&mut self) -> io::Result<()> {
        // Longest first, which is from the inside out.
        while let Some(dir) = self.unsynced.pop_last() {
            match sync_dir(&dir) {
                // Nothing was put there after all.
                Err(cause) if cause.kind() == io::ErrorKind::NotFound => {}
                // Some network file systems have no such call: nothing more can be done there.
                Err(cause) if cause.kind() == io::ErrorKind::InvalidInput => {}
                synced => synced.map_err(at(&dir))?,
            }
        }
        Ok(())
    }

    /// Hashes a blob: `None` if it is what its name says, else what is wrong with it.
    pub fn problem(&self, digest: Digest, size: u64) -> Option<String> {
        problem_at(&place(&self.base, digest), digest, size)
    }

    /// Whether a blob is there with the right size.
    pub fn holds(&self, digest: Digest, size: u64) -> bool {
        matches!(held(&place(&self.base, digest), size), Ok(Held::Whole(_)))
    }

    /// Removes the blobs that `unwanted` names, and nothing else; says how many.
    pub fn remove(&self, unwanted: impl Fn(Digest) -> io::Result<bool>) -> io::Result<u64> {
        let mut removed = 0;
        for first in 0..=u8::MAX {
            for digest in list(&self.base, first).map_err(at(&self.base))? {
                if unwanted(digest)? {
                    let path = place(&self.base, digest);
                    fs::remove_file(&path).map_err(at(&path))?;
                    removed += 1;
                }
            }
        }
        Ok(removed)
    }
}

impl Blobs {
    /// The store as a tree, for whoever holds it locked.
    pub fn tree(&self) -> Tree {
        Tree::new(&self.base)
    }
}

/// Copies to a new file and puts its bytes on disk. Says what is wrong with the source, if it isn't what its digest
/// says. Errors are the destination's.
fn copy(mut source: File, to: &Path, digest: Digest) -> io::Result<Option<String>> {
    let mut file = File::create_new(to)?;
    let mut buffer = vec![0; COPY_BUFFER_BYTES];
    let mut hasher = Hasher::new();
    // A hint: what the service's clients want should stay in the page cache, not what is read once.
    let _ = rustix::fs::fadvise(&source, 0, None, Advice::NoReuse);
    loop {
        let length = match source.read(&mut buffer) {
            Ok(0) => break,
            Ok(length) => length,
            Err(cause) if cause.kind() == io::ErrorKind::Interrupted => continue,
            Err(cause) => return Ok(Some(unreadable(&cause))),
        };
        hasher.update(&buffer[..length]);
        file.write_all(&buffer[..length])?;
    }
    let found = hasher.finish();
    if found != digest {
        return Ok(Some(format!("has the SHA-256 {found}")));
    }
    file.sync_all()?;
    // The copy is not read again soon; and when it is verified, it should come from the disk.
    let _ = rustix::fs::fadvise(&file, 0, None, Advice::DontNeed);
    Ok(None)
}

/// Why the file at `path` is not the blob of this digest, if it isn't. Looked at twice, because a single look may be all
/// that is wrong: too many open files, or a bit that was lost on its way from the disk.
fn problem_at(path: &Path, digest: Digest, size: u64) -> Option<String> {
    problem_now(path, digest, size).and_then(|_| problem_now(path, digest, size))
}

fn problem_now(path: &Path, digest: Digest, size: u64) -> Option<String> {
    match held(path, size) {
        Ok(Held::Whole(file)) => match hash(file) {
            Ok(found) if found == digest => None,
            Ok(found) => Some(format!("has the SHA-256 {found}")),
            Err(cause) => Some(unreadable(&cause)),
        },
        Ok(Held::Missing) => Some("is missing".to_owned()),
        Ok(Held::Damaged(problem)) => Some(problem),
        Err(cause) => Some(unreadable(&cause)),
    }
}

fn hash(mut file: File) -> io::Result<Digest> {
    let mut buffer = vec![0; COPY_BUFFER_BYTES];
    let mut hasher = Hasher::new();
    let _ = rustix::fs::fadvise(&file, 0, None, Advice::NoReuse);
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(hasher.finish()),
            Ok(length) => hasher.update(&buffer[..length]),
            Err(cause) if cause.kind() == io::ErrorKind::Interrupted => {}
            Err(cause) => return Err(cause),
        }
    }
}

/// The disk itself has lost it; anything else (too many open files, a missing right) says nothing of the blob.
fn is_bad_sector(cause: &io::Error) -> bool {
    cause.raw_os_error() == Some(libc::EIO)
}

fn unreadable(cause: &io::Error) -> String {
    format!("can't be read: {cause}")
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(cause) if cause.kind() != io::ErrorKind::NotFound => Err(cause),
        _ => Ok(()),
    }
}

/// Gives an error its path, which the system leaves out.
fn at(path: &Path) -> impl Fn(io::Error) -> io::Error {
    let path = path.to_owned();
    move |cause| {
        let hint = match cause.kind() {
            io::ErrorKind::CrossesDevices => "; hard links need one file system: copy instead",
            _ => "",
        };
        io::Error::new(cause.kind(), format!("{}: {cause}{hint}", path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ABC: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    fn tree_with(content: &[u8]) -> (tempfile::TempDir, Tree, Digest) {
        let dir = tempfile::tempdir().unwrap();
        let digest = ABC.parse().unwrap();
        let path = place(dir.path(), digest);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
        let tree = Tree::new(dir.path());
        (dir, tree, digest)
    }

    #[test]
    fn what_is_damaged_is_never_taken() {
        for (content, way) in [(&b"abd"[..], Way::Copy), (b"abcd", Way::Copy), (b"ab", Way::Link)] {
            let (_source, from, digest) = tree_with(content);
            let dir = tempfile::tempdir().unwrap();
            let mut to = Tree::new(dir.path());
            assert!(
                matches!(to.take(&from, digest, 3, way, false).unwrap(), Taken::Damaged(_)),
                "{content:?}"
            );
            assert!(!to.holds(digest, 3) && to.problem(digest, 3).is_some());
            to.sync().unwrap();
        }
    }

    #[test]
    fn a_good_one_is_taken_once_and_replaces_one_of_another_size() {
        let (_source, from, digest) = tree_with(b"abc");
        let (_target, mut to, _) = tree_with(b"abcdef");
        for way in [Way::Copy, Way::Link] {
            assert_eq!(to.take(&from, digest, 3, way, false).unwrap(), Taken::New);
            assert_eq!(to.take(&from, digest, 3, way, false).unwrap(), Taken::There);
            assert_eq!(to.problem(digest, 3), None);
            to.sync().unwrap();
            assert_eq!(to.remove(|found| Ok(found == digest)).unwrap(), 1);
        }
        assert_eq!(from.problem(digest, 3), None, "the source is untouched");
    }

    #[test]
    fn what_is_in_doubt_stays_until_a_good_one_takes_its_place() {
        let (doubtful, mut to, digest) = tree_with(b"abX");
        let nothing = tempfile::tempdir().unwrap();
        let (_bad, bad, _) = tree_with(b"abY");
        for from in [Tree::new(nothing.path()), bad] {
            for way in [Way::Copy, Way::Link] {
                let taken = to.take(&from, digest, 3, way, true).unwrap();
                assert!(matches!(taken, Taken::Damaged(_)), "{taken:?}");
                assert_eq!(fs::read(place(doubtful.path(), digest)).unwrap(), b"abX", "{way:?}");
            }
        }
        let (_good, good, _) = tree_with(b"abc");
        assert_eq!(to.take(&good, digest, 3, Way::Link, true).unwrap(), Taken::New);
        assert_eq!(to.take(&good, digest, 3, Way::Link, true).unwrap(), Taken::There);
        assert!(!doubtful.path().join(SPOOL_DIR).join(UNFINISHED).exists());
    }
}
