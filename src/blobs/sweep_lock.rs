//! Keeps blob deletion and backups apart, across processes: `base_path/.sweep.lock`.
//!
//! A backup holds the lock shared from before its snapshot of the database until its last blob is copied: what the
//! snapshot names must still be there. The sweep takes it exclusively, and lets its turn pass when it can't have it; so
//! does a restore, which refuses then. Publishing needs no lock: what it replaces was damaged, or has the same bytes. The
//! lock goes with its process, so nothing is left to clean up.

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
        open_to_read(base_path).map(drop)
    }

    /// For a backup: no blob is deleted while this is held. Waits for a sweep to end its turn.
    pub fn shared(base_path: &Path) -> io::Result<SweepLock> {
        let file = open_to_read(base_path)?;
        file.lock_shared()?;
        Ok(SweepLock { _file: file })
    }

    /// For a sweep or a restore: `None` while a backup runs. Never waits.
    pub fn try_exclusive(base_path: &Path) -> io::Result<Option<SweepLock>> {
        let file = open_to_write(base_path)?;
        match file.try_lock() {
            Ok(()) => Ok(Some(SweepLock { _file: file })),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(cause)) => Err(cause),
        }
    }
}

/// Reading is enough to share it.
fn open_to_read(base_path: &Path) -> io::Result<File> {
    match File::open(base_path.join(SWEEP_LOCK_FILE)) {
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => open_to_write(base_path),
        opened => opened,
    }
}

/// NFS gives nobody a file alone who can't write to it. Local file systems do, and there somebody else, such as a backup
/// run by root, may have made it.
fn open_to_write(base_path: &Path) -> io::Result<File> {
    let path = base_path.join(SWEEP_LOCK_FILE);
    match File::options().read(true).write(true).create(true).truncate(false).open(&path) {
        Err(cause)
            if matches!(
                cause.kind(),
                io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem
            ) =>
        {
            File::open(&path).map_err(|_| cause)
        }
        opened => opened,
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::{OFlags, fcntl_getfl};

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

    /// What NFS asks for. Whoever has made the file, it is opened again here.
    #[test]
    fn who_has_it_alone_can_write_it_and_who_shares_it_need_not() {
        let dir = tempfile::tempdir().unwrap();
        SweepLock::prepare(dir.path()).unwrap();
        let mode = |lock: &SweepLock| fcntl_getfl(&lock._file).unwrap() & OFlags::ACCMODE;
        let sweep = SweepLock::try_exclusive(dir.path()).unwrap().unwrap();
        assert_eq!(mode(&sweep), OFlags::RDWR);
        drop(sweep);
        assert_eq!(mode(&SweepLock::shared(dir.path()).unwrap()), OFlags::RDONLY);
    }
}
