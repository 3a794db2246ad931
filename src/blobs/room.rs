//! The disk below the store: whether it takes what is written, how much of it is free, what downloads under way have
//! been promised of that, and what must stay free.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use rustix::fs::{Access, FallocateFlags};

use super::{OpenError, QUARANTINE_DIR, SPOOL_DIR, partial::Partials};
use crate::error::Error;

/// How far a file's blocks are allocated ahead of its writer, at most: a claimed length must not cost more.
const ALLOCATE_AHEAD: u64 = 64 << 20;
/// Below this, allocating ahead costs more than it saves.
const ALLOCATE_FROM: u64 = 1 << 20;
/// What is written to try the disk; smaller files may need no block of their own.
const PROBE: [u8; 8 << 10] = [0; 8 << 10];

/// The file system of the store.
#[derive(Debug)]
pub(super) struct Disk {
    base: PathBuf,
    min_free_bytes: u64,
    /// Bytes that downloads under way have announced and not yet allocated.
    reserved: AtomicU64,
    /// What can be given up before a download is refused.
    partials: Arc<Partials>,
    /// The last write failed.
    failed: AtomicBool,
}

impl Disk {
    pub(super) fn new(base: &Path, min_free_bytes: u64, partials: Arc<Partials>) -> Disk {
        let (reserved, failed) = (AtomicU64::new(0), AtomicBool::new(false));
        Disk { base: base.to_owned(), min_free_bytes, reserved, partials, failed }
    }

    /// Notes whether the last write has failed.
    pub(super) fn note_failure(&self, failed: bool) {
        self.failed.store(failed, Ordering::Relaxed);
    }

    /// Whether new blobs can be written. Tries it only if the last write failed, so that being asked wakes no disk.
    pub(super) fn is_writable(&self) -> bool {
        let is_allowed = |dir| rustix::fs::access(self.base.join(dir), Access::WRITE_OK).is_ok();
        if !is_allowed(SPOOL_DIR) || !is_allowed("") {
            return false;
        }
        if !self.failed.load(Ordering::Relaxed) {
            return true;
        }
        let failed = self.probe().is_err();
        self.note_failure(failed);
        !failed
    }

    /// Tries what downloads and repairs do: make a directory, write a file in the spool, move it there, move it aside.
    pub(super) fn probe(&self) -> Result<(), OpenError> {
        let dir = self.base.join(".probe");
        let [spooled, placed, aside] =
            [self.base.join(SPOOL_DIR), dir.clone(), self.base.join(QUARANTINE_DIR)]
                .map(|dir| dir.join("probe"));
        let at = |path: &Path| {
            let path = path.to_owned();
            move |cause: io::Error| match cause.kind() {
                io::ErrorKind::CrossesDevices => {
                    OpenError::OtherFileSystem { path: path.parent().unwrap_or(&path).to_owned() }
                }
                _ => OpenError::Io { path, cause },
            }
        };
        let tried = fs::create_dir_all(&dir)
            .map_err(at(&dir))
            .and_then(|()| fs::write(&spooled, PROBE).map_err(at(&spooled)))
            .and_then(|()| fs::rename(&spooled, &placed).map_err(at(&spooled)))
            .and_then(|()| fs::rename(&placed, &aside).map_err(at(&aside)));
        for leftover in [spooled, placed, aside] {
            let _ = fs::remove_file(leftover);
        }
        let _ = fs::remove_dir(dir);
        tried
    }

    /// Bytes free to an ordinary user.
    pub(super) fn free_bytes(&self) -> io::Result<u64> {
        let stat = rustix::fs::statvfs(&self.base)?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }

    /// Less than `storage.min_free_bytes` is left, even if every download that broke off were given up.
    pub(super) fn is_nearly_full(&self) -> io::Result<bool> {
        Ok(self.free_bytes()?.saturating_add(self.partials.bytes()) < self.min_free_bytes)
    }

    /// Whether `bytes` more than `storage.min_free_bytes` are free. Downloads that broke off are given up for it, the
    /// oldest first; none if all of them were not enough.
    pub(super) fn has_room(&self, bytes: u64) -> io::Result<bool> {
        let wanted = self.min_free_bytes.saturating_add(bytes);
        if self.free_bytes()?.saturating_add(self.partials.bytes()) < wanted {
            return Ok(false);
        }
        while !self.is_free(bytes)? {
            if !self.partials.give_up_oldest() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn is_free(&self, bytes: u64) -> io::Result<bool> {
        Ok(self.free_bytes()? >= self.min_free_bytes.saturating_add(bytes))
    }

    /// Claims room for a download of `announced` bytes, of which the first `present` are in its file already.
    ///
    /// # Errors
    /// When that would leave less than `storage.min_free_bytes`, with what other downloads have been promised.
    pub(super) fn reserve(self: &Arc<Self>, announced: Option<u64>, present: u64) -> Result<Room, Error> {
        let outstanding = announced.unwrap_or(0).saturating_sub(present);
        let others = self.reserved.fetch_add(outstanding, Ordering::Relaxed);
        // From here on dropping `room` gives the claim back.
        let room =
            Room { disk: self.clone(), outstanding, announced, allocated: present, can_allocate: true };
        match self.has_room(others.saturating_add(outstanding)) {
            Ok(true) => Ok(room),
            Ok(false) => Err(Error::disk_full()),
            Err(cause) => Err(Error::io("Failed to write to cache storage", &cause)),
        }
    }
}

/// One download's claim on the disk: what it announced and has not allocated yet is kept from other downloads.
#[derive(Debug)]
pub(super) struct Room {
    disk: Arc<Disk>,
    /// This download's part of `reserved`.
    outstanding: u64,
    announced: Option<u64>,
    allocated: u64,
    can_allocate: bool,
}

impl Room {
    /// The disk that it is on.
    pub(super) fn disk(&self) -> &Arc<Disk> {
        &self.disk
    }

    /// The length that was announced, in bytes.
    pub(super) fn announced(&self) -> Option<u64> {
        self.announced
    }

    /// Makes sure that the file may grow to `end`, allocating blocks in growing steps ahead of the writer.
    pub(super) fn make(&mut self, file: &File, end: u64) -> io::Result<()> {
        if end <= self.allocated {
            return Ok(());
        }
        let ahead = self.allocated.clamp(ALLOCATE_FROM, ALLOCATE_AHEAD);
        let mut target = match self.announced {
            Some(length) => (self.allocated + ahead).min(length).max(end),
            None => (self.allocated + ahead).max(end),
        };
        if self.announced.is_none_or(|length| end > length) {
            let promised = self.promised();
            if !self.disk.is_free(promised + (target - self.allocated))? {
                // What is only allocated ahead is not worth refusing the download, or giving anything up.
                target = end;
                if !self.disk.has_room(promised + (end - self.allocated))? {
                    return Err(io::Error::from(io::ErrorKind::StorageFull));
                }
            }
        }
        let step = target - self.allocated;
        if self.can_allocate
            && self.announced.is_none_or(|length| length > ALLOCATE_FROM)
            && target > ALLOCATE_FROM
        {
            match rustix::fs::fallocate(file, FallocateFlags::KEEP_SIZE, self.allocated, step) {
                Ok(()) => {}
                Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => self.can_allocate = false,
                Err(cause) => return Err(cause.into()),
            }
        }
        self.allocated = target;
        let settled = step.min(self.outstanding);
        self.outstanding -= settled;
        self.disk.reserved.fetch_sub(settled, Ordering::Relaxed);
        Ok(())
    }

    /// Bytes kept for other downloads, which announced their length.
    fn promised(&self) -> u64 {
        self.disk.reserved.load(Ordering::Relaxed).saturating_sub(self.outstanding)
    }

    /// Gives back blocks allocated past the end.
    pub(super) fn trim(&mut self, file: &File, length: u64) -> io::Result<()> {
        if self.allocated > length { file.set_len(length) } else { Ok(()) }
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.disk.reserved.fetch_sub(self.outstanding, Ordering::Relaxed);
    }
}
