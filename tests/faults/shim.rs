//! The library that stands between the service and its system calls (`shim.c`), and the page of memory it is aimed by.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::harness::{Service, skip};

/// A system call that can be aimed at. In the order of the shim's own list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    Fsync,
    Fdatasync,
    Rename,
    Openat,
    Mkdir,
    Pwrite64,
    Write,
    Pread64,
    Ftruncate,
    Unlink,
    Writev,
}

/// What becomes of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// It fails with this number.
    Fail(i32),
    /// The process dies before it.
    Kill,
    /// It isn't made, and says that it was.
    Lie,
}

/// Which one is meant, and whether the later ones are too.
#[derive(Debug, Clone, Copy)]
pub enum Which {
    /// The how manyth from now on; 1 is the next.
    Only(i64),
    /// That one and all after it.
    From(i64),
}

/// The built library and its page.
pub struct Shim {
    library: PathBuf,
    page: PathBuf,
    control: File,
    _dir: tempfile::TempDir,
}

/// Where the numbers are in the page, in bytes (`struct control`).
const CHOSEN: u64 = 16;
const SEEN: u64 = 24;
const INJECTED: u64 = 32;
const RESYNCED: u64 = 40;

impl Shim {
    /// Builds it; without a compiler the test called `name` is skipped.
    pub fn build(name: &str) -> Option<Shim> {
        let dir = tempfile::tempdir().unwrap();
        let library = dir.path().join("shim.so");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/faults/shim.c");
        let mut cc = Command::new("cc");
        cc.args(["-shared", "-fPIC", "-O1", "-Wall", "-Wno-nonnull-compare", "-o"]);
        match cc.arg(&library).arg(&source).arg("-ldl").output() {
            Err(error) => {
                skip(name, &format!("cc: {error}"));
                return None;
            }
            Ok(output) => {
                assert!(output.status.success(), "cc: {}", String::from_utf8_lossy(&output.stderr))
            }
        }
        let page = dir.path().join("control");
        let control = File::options().create(true).truncate(true).read(true).write(true).open(&page).unwrap();
        control.set_len(4096).unwrap();
        let shim = Shim { library, page, control, _dir: dir };
        shim.rest();
        Some(shim)
    }

    /// Puts it between `service` and its system calls on files below `root`.
    pub fn below(&self, service: Service, root: &Path) -> Service {
        let text = |path: &Path| path.display().to_string();
        service
            .variable("LD_PRELOAD", &text(&self.library))
            .variable("FAULT_CONTROL", &text(&self.page))
            .variable("FAULT_ROOT", &text(root))
    }

    /// The same for the service's own directory.
    pub fn before(&self, service: Service) -> Service {
        let root = service.dir().to_owned();
        self.below(service, &root)
    }

    /// Aims at a call, counting from now on.
    pub fn aim(&self, call: Call, which: Which, action: Action) {
        self.rest();
        let (lasting, chosen) = match which {
            Which::Only(number) => (0, number),
            Which::From(number) => (1, number),
        };
        let (action, error) = match action {
            Action::Fail(error) => (1, error),
            Action::Kill => (2, 0),
            Action::Lie => (3, 0),
        };
        self.control.write_all_at(&chosen.to_ne_bytes(), CHOSEN).unwrap();
        for offset in [SEEN, INJECTED] {
            self.control.write_all_at(&0i64.to_ne_bytes(), offset).unwrap();
        }
        // The call comes last: from then on the rest is believed.
        for (number, value) in [lasting, error, action, call as i32].into_iter().enumerate() {
            self.control.write_all_at(&value.to_ne_bytes(), 12 - 4 * number as u64).unwrap();
        }
    }

    /// Lets every call through.
    pub fn rest(&self) {
        self.control.write_all_at(&(-1i32).to_ne_bytes(), 0).unwrap();
    }

    /// How many calls were not made as they should have been since it was aimed.
    pub fn injected(&self) -> i64 {
        self.number(INJECTED)
    }

    /// Syncs and renames, ever, of spool files whose sync had failed.
    pub fn resynced(&self) -> i64 {
        self.number(RESYNCED)
    }

    fn number(&self, offset: u64) -> i64 {
        let mut bytes = [0; 8];
        self.control.read_exact_at(&mut bytes, offset).unwrap();
        i64::from_ne_bytes(bytes)
    }
}
