//! Programs that tests run: found or skipped, given an address, run to their end.

use std::fs;
use std::io::{Read, Seek};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use crate::harness::{PATIENCE, skip};

/// Where a program is; a path is only looked at.
pub fn find(program: &str) -> Option<PathBuf> {
    let directories = std::env::var_os("PATH").unwrap_or_default();
    // Servers live where only root's PATH goes.
    let all = std::env::split_paths(&directories).chain(["/usr/sbin".into(), "/sbin".into()]);
    all.map(|dir| dir.join(program)).find(|path| path.is_file())
}

/// The same, but a missing program skips the calling test by its name.
pub fn need(program: &str) -> Option<PathBuf> {
    let found = find(program);
    if found.is_none() {
        skip(&test_name(), &format!("{program} is not installed"));
    }
    found
}

/// The test harness names each test's thread after it.
pub fn test_name() -> String {
    std::thread::current().name().unwrap_or("?").to_string()
}

/// How a program ended.
#[derive(Debug)]
pub struct Ended {
    /// Exit code 0.
    pub success: bool,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Ended {
    /// Asserts exit code 0.
    #[track_caller]
    pub fn assert_success(&self) -> &Ended {
        assert!(self.success, "{self:?}");
        self
    }
}

/// Runs a command to its end; one that hangs fails the test.
#[track_caller]
pub fn run(mut command: Command) -> Ended {
    let (mut stdout, mut stderr) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
    command.stdin(Stdio::null());
    command.stdout(stdout.try_clone().unwrap()).stderr(stderr.try_clone().unwrap());
    let mut child = command.spawn().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let deadline = Instant::now() + PATIENCE * 2;
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break Some(status);
        }
        if Instant::now() > deadline {
            let _ = child.kill();
            let _ = child.wait();
            break None;
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    let text = |file: &mut fs::File| {
        let mut bytes = Vec::new();
        file.rewind().and_then(|()| file.read_to_end(&mut bytes)).unwrap();
        String::from_utf8_lossy(&bytes).into_owned()
    };
    let (stdout, stderr) = (text(&mut stdout), text(&mut stderr));
    let status = status.unwrap_or_else(|| panic!("{command:?} hangs: {stdout} {stderr}"));
    Ended { success: status.success(), stdout, stderr }
}

/// A port on a loopback address that no other test has: nobody can take it before its program does.
pub fn free_address() -> SocketAddr {
    static NEXT: AtomicU16 = AtomicU16::new(1);
    let [high, low] = NEXT.fetch_add(1, Ordering::Relaxed).to_be_bytes();
    let address = IpAddr::from(Ipv4Addr::new(127, 1 + std::process::id() as u8 % 250, high, low));
    TcpListener::bind((address, 0)).unwrap().local_addr().unwrap()
}
