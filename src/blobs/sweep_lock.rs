//! Keeps blob deletion and backups apart, across processes: `base_path/.sweep.lock`.
//!
//! A backup holds the lock shared from before its snapshot of the database until its last blob is copied: what the
//! snapshot names must still be there. The sweep and a restore take it exclusively, and let it be when they can't have it.
//! Whoever publishes a blob again, or moves a damaged one aside, does without: the one puts the same bytes in its place,
//! and of the other there is nothing to copy. The lock goes with its process, so nothing is left to clean up.

use std::{
    fs::{File, TryLockError},
    io,
    path::Path,
};

const SWEEP_LOCK_FILE: &str = ".sweep.lock";

/// Held as long as it lives.
#[derive(Debug)]
pub struct SweepLock {
    _file: File,
}

impl SweepLock {
    /// Makes the file, so that a backup may be run by a user who can't write to the store.
    pub(super) fn prepare(base_path: &Path) -> io::Result<()> {
        open(base_path).map(drop)
    }

    /// For a backup: no blob is deleted while this is held. Waits for a sweep to end its turn.
    pub fn shared(base_path: &Path) -> io::Result<SweepLock> {
        let file = open(base_path)?;
        file.lock_shared()?;
        Ok(SweepLock { _file: file })
    }

    /// For a sweep: `None` while a backup runs. Never waits.
    pub fn try_exclusive(base_path: &Path) -> io::Result<Option<SweepLock>> {
        let file = open(base_path)?;
        match file.try_lock() {
            Ok(()) => Ok(Some(SweepLock { _file: file })),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(cause)) => Err(cause),
        }
    }
}

/// Reading is enough to lock it.
fn open(base_path: &Path) -> io::Result<File> {
    let path = base_path.join(SWEEP_LOCK_FILE);
    match File::open(&path) {
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => {
            File::options().read(true).write(true).create(true).truncate(false).open(&path)
        }
        opened => opened,
    }
}

#[cfg(test)]
mod tests {
    use super::SweepLock;

    #[test]
    fn backups_share_it_and_a_sweep_has_it_alone() {
        let dir = tempfile::tempdir().unwrap();
        let (one, other) = (SweepLock::shared(dir.path()).unwrap(), SweepLock::shared(dir.path()).unwrap());
        assert!(SweepLock::try_exclusive(dir.path()).unwrap().is_none());
        drop((one, other));
        let sweep = SweepLock::try_exclusive(dir.path()).unwrap();
        assert!(sweep.is_some());
        assert!(SweepLock::try_exclusive(dir.path()).unwrap().is_none());
    }
}
