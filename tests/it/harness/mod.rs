//! The harness: the real binary, a raw client, an upstream that misbehaves on command.
//!
//! All of it is blocking code on plain threads. A test then reads from top to bottom, and what is on the wire at
//! each moment is exactly what the test put there. Everything stays on loopback.

pub mod client;
pub mod content;
pub mod service;
pub mod tls;
pub mod upstream;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

pub use client::{Client, End, Response};
pub use content::Content;
pub use service::{Running, Service};
pub use upstream::{Exchange, Reply, Upstream};

/// The longest any single wait of a test may take: a safety net, never a measurement.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// How long "nothing more comes" is watched. Too short can only make a test blind, never red.
pub const QUIET: Duration = Duration::from_millis(250);

/// Runs `probe` until it yields a value; panics with `what` after [`PATIENCE`].
#[track_caller]
pub fn eventually<T>(what: &str, mut probe: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = probe() {
            return value;
        }
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A door that a scripted upstream waits at until the test opens it.
#[derive(Clone, Default)]
pub struct Gate(Arc<(Mutex<bool>, Condvar)>);

impl Gate {
    /// A closed door.
    pub fn new() -> Gate {
        Gate::default()
    }

    /// Lets everyone through, now and later.
    pub fn open(&self) {
        *self.0.0.lock().unwrap() = true;
        self.0.1.notify_all();
    }

    /// Waits until it is open, at most twice [`PATIENCE`].
    pub fn wait(&self) {
        let open = self.0.0.lock().unwrap();
        drop(self.0.1.wait_timeout_while(open, PATIENCE * 2, |open| !*open).unwrap());
    }
}

/// Says loudly that a test could not run here, and leaves its name where a test command can count it
/// (the file named by `ARTIFACT_CACHE_TEST_SKIPS`).
pub fn skip(name: &str, why: &str) {
    // Not by `eprintln!`, which the test runner keeps to itself when a test passes.
    let _ = writeln!(std::io::stderr(), "SKIPPED ({why}): {name}");
    let Some(list) = std::env::var_os("ARTIFACT_CACHE_TEST_SKIPS") else { return };
    let file = std::fs::File::options().create(true).append(true).open(list);
    writeln!(file.expect("the list of skipped tests can be written"), "{name}: {why}").unwrap();
}

/// Runs `test` in fresh network and mount namespaces, where nothing is reached but loopback. The test binary calls itself for
/// that; `name` is the test's own, with its module.
pub fn in_a_network_of_its_own(name: &str, test: impl FnOnce()) {
    const INSIDE: &str = "ARTIFACT_CACHE_TEST_NAMESPACE";
    if std::env::var_os(INSIDE).is_some() {
        let done = Command::new("ip").args(["link", "set", "lo", "up"]).status().expect("ip is there");
        assert!(done.success(), "ip link set lo up");
        return test();
    }
    if !rustix::process::geteuid().is_root() {
        return skip(name, "needs root");
    }
    let exe = std::env::current_exe().unwrap();
    let mut command = Command::new("unshare");
    command.args(["--net", "--mount", "--"]).arg(exe).args([name, "--exact", "--nocapture"]).env(INSIDE, "1");
    let output = match command.output() {
        Ok(output) => output,
        Err(e) => return skip(name, &format!("unshare: {e}")),
    };
    let said =
        [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
    if said.contains("unshare failed") {
        return skip(name, "needs root and namespaces");
    }
    assert!(output.status.success() && said.contains("1 passed"), "inside the namespace:\n{said}");
}

/// Builds a shared object from C for [`Service::preload`], in `dir`; in its source `TRIGGER` is that path. Without a
/// compiler the test called `name` is skipped.
pub fn build_shim(dir: &Path, source: &str, trigger: &Path, name: &str) -> Option<PathBuf> {
    let (file, shim) = (dir.join("shim.c"), dir.join("shim.so"));
    std::fs::write(&file, source).unwrap();
    let mut cc = Command::new("cc");
    cc.args(["-shared", "-fPIC", "-O1", "-o"]).arg(&shim).arg(&file).arg("-ldl");
    cc.arg(format!("-DTRIGGER=\"{}\"", trigger.display()));
    match cc.output() {
        Ok(output) if output.status.success() => Some(shim),
        Ok(output) => panic!("cc: {}", String::from_utf8_lossy(&output.stderr)),
        Err(cause) => {
            skip(name, &format!("cc: {cause}"));
            None
        }
    }
}

/// As [`build_shim`]: a `fsync` that does `first` before the real one, where `path` is what is synced.
#[allow(dead_code)] // for tests/it
pub fn build_fsync_shim(dir: &Path, first: &str, trigger: &Path, name: &str) -> Option<PathBuf> {
    const SOURCE: &str = r#"
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

int fsync(int fd) {
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, "fsync");
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    path[length < 0 ? 0 : length] = 0;
    FIRST
    return real(fd);
}
"#;
    build_shim(dir, &SOURCE.replace("FIRST", first), trigger, name)
}

/// Raises the limit of open files, for this process and the services it starts; false when `wanted` can't be had.
pub fn raise_file_limit(wanted: u64) -> bool {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let current = limit.current.unwrap_or(u64::MAX);
    let raised = Rlimit { current: Some(wanted.max(current)), maximum: limit.maximum };
    current >= wanted || setrlimit(Resource::Nofile, raised).is_ok()
}

/// Percent-encodes everything but RFC 3986's unreserved characters.
pub fn encode(text: &str) -> String {
    use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
    const RESERVED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');
    utf8_percent_encode(text, RESERVED).to_string()
}

/// The request target that asks for `url`.
pub fn fetch_target(url: &str) -> String {
    format!("/fetch?url={}", encode(url))
}

/// The same with an expected digest.
pub fn fetch_sha_target(url: &str, sha256: &str) -> String {
    format!("/fetch?url={}&sha256={sha256}", encode(url))
}

/// 64 hex digits which are nobody's digest.
pub const WRONG_SHA: &str = "00000000000000000000000000000000000000000000000000000000deadbeef";
