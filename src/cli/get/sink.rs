//! Where the bytes of a transfer go: `FILE.part`, which becomes FILE in the end, or a stream that takes nothing back.

use std::{
    fs::{self, File, TryLockError},
    io::{self, Read, Seek, Write},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use super::outcome::{Failure, Fetched};
use crate::artifact::{Digest, Hasher};

/// Takes bytes in order and hashes them.
pub(super) struct Sink {
    out: Out,
    hasher: Hasher,
    size_bytes: u64,
}

enum Out {
    Part { file: File, part: PathBuf, target: PathBuf },
    Stream { stream: Box<dyn Write>, label: String },
}

impl Sink {
    /// `target` through `target.part`, which is read first if it is there. What is there and is no regular file, such as
    /// a device or a pipe, is written to as it is.
    ///
    /// # Errors
    /// A message that names the file.
    pub(super) fn file(target: PathBuf) -> Result<Sink, String> {
        // A link stays a link; what it points to is replaced.
        let target = fs::canonicalize(&target).unwrap_or(target);
        let said = |path: &Path, cause: &io::Error| format!("{}: {cause}", path.display());
        match fs::metadata(&target) {
            Ok(found) if found.is_dir() => {
                return Err(format!("{}: is a directory; name a file in it", target.display()));
            }
            Ok(found) if !found.is_file() => {
                let stream = File::options().write(true).open(&target).map_err(|e| said(&target, &e))?;
                return Ok(Sink::stream(Box::new(stream), target.display().to_string()));
            }
            _ => {}
        }
        let part = with_part(&target);
        let mut file = File::options()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(&part)
            .map_err(|cause| said(&part, &cause))?;
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => {
                return Err(format!("{}: another get is writing it", part.display()));
            }
            // Some file systems know no locks; then there is none to respect.
            Ok(()) | Err(TryLockError::Error(_)) => {}
        }
        // The one before us may have renamed it between our opening and our locking it.
        let is_same =
            |there: fs::Metadata, here: fs::Metadata| (there.dev(), there.ino()) == (here.dev(), here.ino());
        if !fs::metadata(&part).and_then(|there| Ok(is_same(there, file.metadata()?))).unwrap_or(false) {
            return Err(format!("{}: another get has just finished it", part.display()));
        }
        let (hasher, size_bytes) = hash(&mut file).map_err(|cause| said(&part, &cause))?;
        Ok(Sink { out: Out::Part { file, part, target }, hasher, size_bytes })
    }

    pub(super) fn stdout() -> Sink {
        Sink::stream(Box::new(io::stdout().lock()), "standard output".to_owned())
    }

    fn stream(stream: Box<dyn Write>, label: String) -> Sink {
        Sink { out: Out::Stream { stream, label }, hasher: Hasher::new(), size_bytes: 0 }
    }

    /// What people call it.
    pub(super) fn label(&self) -> String {
        match &self.out {
            Out::Part { target, .. } => {
                target.file_name().unwrap_or(target.as_os_str()).to_string_lossy().into_owned()
            }
            Out::Stream { label, .. } => label.clone(),
        }
    }

    /// The bytes that it has.
    pub(super) fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// The SHA-256 of the bytes that it has.
    pub(super) fn digest(&self) -> Digest {
        self.hasher.clone().finish()
    }

    /// What came of it if the target has the expected content already, or the part has, which then becomes the target.
    pub(super) fn already_has(&mut self, expected: Digest) -> Result<Option<Fetched>, Failure> {
        let Out::Part { target, .. } = &self.out else { return Ok(None) };
        let fetched = |file, size_bytes| {
            Some(Fetched {
                file,
                digest: expected,
                size_bytes,
                cache_status: None,
                resumed_bytes: size_bytes,
            })
        };
        if self.size_bytes > 0 && self.digest() == expected {
            return Ok(fetched(self.keep()?, self.size_bytes));
        }
        // A target that can't be read is one to be replaced.
        match File::open(target).and_then(|mut file| hash(&mut file)) {
            Ok((hasher, size_bytes)) if hasher.clone().finish() == expected => {
                self.abandon();
                Ok(fetched(Some(target.clone()), size_bytes))
            }
            _ => Ok(None),
        }
    }

    /// Takes in the next bytes.
    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        let written = match &mut self.out {
            Out::Part { file, .. } => file.write_all(bytes),
            Out::Stream { stream, .. } => stream.write_all(bytes),
        };
        written.map_err(|cause| self.failed(&cause))?;
        self.hasher.update(bytes);
        self.size_bytes += bytes.len() as u64;
        Ok(())
    }

    /// Forgets all bytes. False if they can't be taken back.
    pub(super) fn restart(&mut self) -> Result<bool, Failure> {
        match &mut self.out {
            _ if self.size_bytes == 0 => {}
            Out::Part { file, .. } => {
                let emptied = file.set_len(0).and_then(|()| file.rewind());
                emptied.map_err(|cause| self.failed(&cause))?;
            }
            Out::Stream { .. } => return Ok(false),
        }
        (self.hasher, self.size_bytes) = (Hasher::new(), 0);
        Ok(true)
    }

    /// Makes the verified part the target, durably, and says where it is; `None` for a stream.
    pub(super) fn keep(&mut self) -> Result<Option<PathBuf>, Failure> {
        let kept = match &mut self.out {
            Out::Part { file, part, target } => replace(file, part, target).map(|()| Some(target.clone())),
            Out::Stream { stream, .. } => stream.flush().map(|()| None),
        };
        kept.map_err(|cause| self.failed(&cause))
    }

    /// Leaves no empty part behind.
    pub(super) fn abandon(&self) {
        if let Out::Part { part, .. } = &self.out
            && self.size_bytes == 0
        {
            let _ = fs::remove_file(part);
        }
    }

    fn failed(&self, cause: &io::Error) -> Failure {
        let place = match &self.out {
            Out::Part { part, .. } => part.display().to_string(),
            Out::Stream { label, .. } => label.clone(),
        };
        Failure::Local(format!("can't write {place}: {cause}"))
    }
}

fn with_part(target: &Path) -> PathBuf {
    let mut name = target.as_os_str().to_owned();
    name.push(".part");
    name.into()
}

fn replace(file: &File, part: &Path, target: &Path) -> io::Result<()> {
    if let Ok(replaced) = fs::metadata(target) {
        // A program stays one.
        file.set_permissions(replaced.permissions())?;
    }
    file.sync_all()?;
    fs::rename(part, target)
}

/// Reads a file from its beginning to its end, where the next write then goes.
fn hash(file: &mut File) -> io::Result<(Hasher, u64)> {
    let (mut hasher, mut size_bytes, mut buffer) = (Hasher::new(), 0, vec![0; 1 << 20]);
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok((hasher, size_bytes)),
            n => {
                hasher.update(&buffer[..n]);
                size_bytes += n as u64;
            }
        }
    }
}
