//! Directories laid out like the store, and blobs on their way from one to another: backing up and restoring.
//!
//! - Nothing damaged is ever copied: a copy is hashed while it is made, and only kept if it is what its name says.
//! - A blob has its name in a tree only when its bytes are on disk there; the names are, after [`Tree::sync`].
//! - A blob that is there with the right size is left alone, so going on after an interruption costs little.

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

    /// Makes sure that this tree has a blob, taking it over from another tree if it hasn't.
    ///
    /// # Errors
    /// When this tree can't be written, with the path. That the source can't be read is an answer.
    pub fn take(&mut self, from: &Tree, digest: Digest, size: u64, way: Way) -> io::Result<Taken> {
        let to = place(&self.base, digest);
        // Also for what is there: an earlier run may have died between the name and its sync.
        self.unsynced.extend(to.ancestors().skip(1).take(3).map(Path::to_owned));
        if matches!(held(&to, size).map_err(at(&to))?, Held::Whole(_)) {
            return Ok(Taken::There);
        }
        let source = match held(&place(&from.base, digest), size) {
            Ok(Held::Whole(file)) => file,
            Ok(Held::Missing) => return Ok(Taken::Missing),
            Ok(Held::Damaged(problem)) => return Ok(Taken::Damaged(problem)),
            Err(cause) => return Ok(Taken::Damaged(format!("can't be read: {cause}"))),
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
        if let Some(problem) = problem {
            remove_if_there(&unfinished).map_err(at(&unfinished))?;
            return Ok(Taken::Damaged(problem));
        }
        fs::rename(&unfinished, &to).map_err(at(&to))?;
        Ok(Taken::New)
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
        match held(&place(&self.base, digest), size) {
            Ok(Held::Whole(file)) => match hash(file) {
                Ok(found) if found == digest => None,
                Ok(found) => Some(format!("has the SHA-256 {found}")),
                Err(cause) => Some(format!("can't be read: {cause}")),
            },
            Ok(Held::Missing) => Some("is missing".to_owned()),
            Ok(Held::Damaged(problem)) => Some(problem),
            Err(cause) => Some(format!("can't be read: {cause}")),
        }
    }

    /// Whether a blob is there with the right size.
    pub fn holds(&self, digest: Digest, size: u64) -> bool {
        matches!(held(&place(&self.base, digest), size), Ok(Held::Whole(_)))
    }

    /// Removes a copy that turned out bad.
    pub fn discard(&self, digest: Digest) -> io::Result<()> {
        let path = place(&self.base, digest);
        remove_if_there(&path).map_err(at(&path))
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
            Err(cause) => return Ok(Some(format!("can't be read: {cause}"))),
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
            assert!(matches!(to.take(&from, digest, 3, way).unwrap(), Taken::Damaged(_)), "{content:?}");
            assert!(!to.holds(digest, 3) && to.problem(digest, 3).is_some());
            to.sync().unwrap();
        }
    }

    #[test]
    fn a_good_one_is_taken_once_and_replaces_one_of_another_size() {
        let (_source, from, digest) = tree_with(b"abc");
        let (_target, mut to, _) = tree_with(b"abcdef");
        for way in [Way::Copy, Way::Link] {
            assert_eq!(to.take(&from, digest, 3, way).unwrap(), Taken::New);
            assert_eq!(to.take(&from, digest, 3, way).unwrap(), Taken::There);
            assert_eq!(to.problem(digest, 3), None);
            to.sync().unwrap();
            assert_eq!(to.remove(|found| Ok(found == digest)).unwrap(), 1);
        }
        assert_eq!(from.problem(digest, 3), None, "the source is untouched");
    }
}
