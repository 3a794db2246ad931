//! A process in hard conditions: a disk that fails, too few descriptors, an output that nobody reads.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::time::Instant;

use rustix::process::{Pid, Signal, kill_process};

use crate::harness::service::{BINARY, parse_metrics};
use crate::harness::{
    Client, Content, End, Gate, PATIENCE, Reply, Response, Upstream, eventually, fetch_target,
    raise_file_limit, skip,
};

/// The service without the harness's care, started by any command that ends in `exec`, and killed in the end.
struct Bare {
    child: Child,
    /// Kept open, but read no further.
    _stdout: BufReader<ChildStdout>,
    api: SocketAddr,
    dir: tempfile::TempDir,
}

impl Bare {
    /// Starts it and reads its output up to the `listening` line, and no further.
    #[track_caller]
    fn start(mut command: Command, env: &[(&str, &str)]) -> Bare {
        let dir = tempfile::tempdir().unwrap();
        let defaults = [
            ("SERVER__PORT", "0"),
            ("SERVER__METRICS_PORT", "0"),
            ("STORAGE__MIN_FREE_BYTES", "1MiB"),
            ("UPSTREAM__ALLOW_PRIVATE_NETWORKS", "127.0.0.0/8"),
        ];
        let all = defaults.iter().chain(env);
        let env = all.map(|(key, value)| (format!("ARTIFACT_CACHE__{key}"), value));
        command.envs(env).current_dir(dir.path());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().expect("the command starts");
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        let api = loop {
            line.clear();
            assert_ne!(stdout.read_line(&mut line).unwrap(), 0, "it ended before it listened");
            let Ok(said) = serde_json::from_str::<serde_json::Value>(&line) else { continue };
            if said["msg"] == "listening" {
                break said["api"].as_str().and_then(|api| api.parse().ok()).expect("an address");
            }
        };
        Bare { child, _stdout: stdout, api, dir }
    }

    #[track_caller]
    fn get(&self, target: &str, fields: &[(&str, &str)]) -> Response {
        let mut client = Client::connect(self.api);
        client.request("GET", target, &[fields, &[("Connection", "close")]].concat());
        client.response("GET")
    }

    #[track_caller]
    fn fetch(&self, url: &str) -> Response {
        self.get(&fetch_target(url), &[])
    }

    /// Nothing runs, and what was begun has left no file.
    #[track_caller]
    fn assert_given_up(&self) {
        eventually("no download is left running", || {
            let series = parse_metrics(&String::from_utf8_lossy(&self.get("/metrics", &[]).body));
            (series["artifact_cache_inflight_downloads"] == 0.0).then_some(())
        });
        let spool = self.dir.path().join("data/cache/.spool");
        assert_eq!(std::fs::read_dir(spool).unwrap().count(), 0, "the spool is empty");
    }

    /// SIGTERM, and the end within [`PATIENCE`].
    fn term(&mut self) -> Option<ExitStatus> {
        kill_process(Pid::from_child(&self.child), Signal::TERM).expect("the process is there");
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.child.try_wait().unwrap() {
                None if Instant::now() < deadline => std::thread::sleep(PATIENCE / 1000),
                ended => return ended,
            }
        }
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What stands between the service and its disk. Writes to the spool take a moment each. With `FAIL=fsync` the first
/// fsync of a spool file fails, with `FAIL=first fdatasync` or `second fdatasync` that one; with `FAIL=write` the disk is
/// full at 2 MiB of every spool file but the first.
const SHIM: &str = r#"
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char first[4096];
static int synced;

static int fails(const char *what) {
    const char *chosen = getenv("FAIL");
    return chosen && !strcmp(chosen, what);
}

static int spooled(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, 4095);
    path[length < 0 ? 0 : length] = 0;
    return strstr(path, "/.spool/") != NULL;
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
    ssize_t (*real)(int, const struct iovec *, int) =
        (ssize_t (*)(int, const struct iovec *, int))dlsym(RTLD_NEXT, "writev");
    char path[4096];
    if (fails("write") && spooled(fd, path)) {
        off_t end = lseek(fd, 0, SEEK_CUR);
        for (int i = 0; i < count; i++) end += parts[i].iov_len;
        usleep(10000);
        if (!first[0]) strcpy(first, path);
        if (strcmp(first, path) && end > 2 << 20) {
            errno = ENOSPC;
            return -1;
        }
    }
    return real(fd, parts, count);
}

int fsync(int fd) {
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, "fsync");
    char path[4096];
    if (fails("fsync") && spooled(fd, path) && !__sync_fetch_and_add(&synced, 1)) {
        errno = EIO;
        return -1;
    }
    return real(fd);
}

int fdatasync(int fd) {
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, "fdatasync");
    char path[4096];
    int nth = fails("first fdatasync") ? 0 : fails("second fdatasync") ? 1 : -1;
    if (nth >= 0 && spooled(fd, path) && __sync_fetch_and_add(&synced, 1) == nth) {
        errno = EIO;
        return -1;
    }
    return real(fd);
}
"#;

/// Builds the shim in `dir`; without a compiler the test called `name` is skipped.
fn build_shim(dir: &Path, name: &str) -> Option<PathBuf> {
    let (source, shim) = (dir.join("shim.c"), dir.join("shim.so"));
    std::fs::write(&source, SHIM).unwrap();
    let mut cc = Command::new("cc");
    cc.args(["-shared", "-fPIC", "-O1", "-o"]).arg(&shim).arg(&source).arg("-ldl");
    match cc.output() {
        Ok(output) if output.status.success() => Some(shim),
        Ok(output) => panic!("cc: {}", String::from_utf8_lossy(&output.stderr)),
        Err(e) => {
            skip(name, &format!("cc: {e}"));
            None
        }
    }
}

fn failing(shim: &Path, call: &str) -> Command {
    let mut command = Command::new(BINARY);
    command.arg("serve").env_clear().env("LD_PRELOAD", shim).env("FAIL", call);
    command
}

#[test]
fn a_disk_that_fills_while_followers_wait_to_be_carried_on_ends_the_download() {
    const SIZE: u64 = 3 << 20;
    const CUT: u64 = (5 << 20) / 2;
    let dir = tempfile::tempdir().unwrap();
    let name = "hardship::a_disk_that_fills_while_followers_wait_to_be_carried_on_ends_the_download";
    let Some(shim) = build_shim(dir.path(), name) else { return };
    let (up, gate, content) = (Upstream::start(), Gate::new(), Content::new(300, SIZE));
    let service = Bare::start(failing(&shim, "write"), &[("FETCH__STREAM_AFTER_SECONDS", "0")]);
    let (door, served) = (gate.clone(), content.clone());
    // The second attempt begins anew, and its disk is full short of what the first has released.
    let url = up.on("/full", move |x| match x.attempt {
        1 => {
            x.send(&Reply::ok(&served).head(200, 0))?;
            x.body(&served, 0, CUT)?;
            door.wait();
            Ok(())
        }
        _ => x.reply(&Reply::ok(&served).without_ranges()),
    });
    let mut client = Client::connect(service.api);
    client.request("GET", &fetch_target(&url), &[]);
    assert_eq!(client.head().status(), 200);
    assert_eq!(client.take(CUT as usize - 1000).len() as u64, CUT - 1000);
    gate.open();
    assert_ne!(client.end(), End::Complete);
    // The place is free again, and the next client neither joins a dead download nor waits for it.
    service.assert_given_up();
    let answer = service.get(&fetch_target(&url), &[("Prefer", "wait")]);
    assert_eq!(answer.assert_error(500, "internal_error")["details"], "disk full");
    service.assert_given_up();
}

#[test]
fn a_failed_fsync_fails_the_download_and_the_next_begins_anew() {
    let dir = tempfile::tempdir().unwrap();
    let name = "hardship::a_failed_fsync_fails_the_download_and_the_next_begins_anew";
    let Some(shim) = build_shim(dir.path(), name) else { return };
    let (up, content) = (Upstream::start(), Content::new(301, 100_000));
    let service = Bare::start(failing(&shim, "fsync"), &[]);
    let url = up.serve("/synced", Reply::ok(&content));
    service.fetch(&url).assert_error(500, "internal_error");
    service.assert_given_up();
    assert_eq!(service.fetch(&url).assert_ok(&content.bytes()).cache_status(), "MISS");
    assert_eq!(up.count("/synced"), 2, "what was not synced is not taken for stored");
    assert_eq!(service.fetch(&url).assert_ok(&content.bytes()).cache_status(), "HIT");
}

#[test]
fn a_failed_sync_at_a_checkpoint_fails_the_download_and_no_earlier_checkpoint_is_believed() {
    let dir = tempfile::tempdir().unwrap();
    let name =
        "hardship::a_failed_sync_at_a_checkpoint_fails_the_download_and_no_earlier_checkpoint_is_believed";
    let Some(shim) = build_shim(dir.path(), name) else { return };
    let (up, content) = (Upstream::start(), Content::new(302, 8 << 20));
    let service = Bare::start(failing(&shim, "second fdatasync"), &[("STORAGE__CHECKPOINT_BYTES", "1MiB")]);
    let reply = Reply::ok(&content).field("ETag", "\"one\"");
    // The first time it goes on until the service has had enough, at its second checkpoint.
    let url = up.on("/checked", move |x| match x.attempt {
        1 => {
            x.send("HTTP/1.1 200 OK\r\nETag: \"one\"\r\nTransfer-Encoding: chunked\r\n\r\n")?;
            let began = Instant::now();
            while began.elapsed() < PATIENCE {
                x.chunk(&[1; 64 << 10])?;
                std::thread::sleep(PATIENCE / 3000);
            }
            Ok(())
        }
        _ => x.reply(&reply),
    });
    let details = service.fetch(&url).assert_error(500, "internal_error")["details"].to_string();
    assert!(details.contains("I/O error"), "{details}");
    service.assert_given_up();
    service.fetch(&url).assert_ok(&content.bytes());
    let ranges: Vec<_> = up.requests("/checked").iter().map(|head| head.get("Range").is_some()).collect();
    assert_eq!(ranges, [false, false], "it begins anew");
}

#[test]
fn a_large_download_is_synced_while_it_arrives_and_fails_when_that_does() {
    let dir = tempfile::tempdir().unwrap();
    let name = "hardship::a_large_download_is_synced_while_it_arrives_and_fails_when_that_does";
    let Some(shim) = build_shim(dir.path(), name) else { return };
    let (up, content) = (Upstream::start(), Content::new(304, 40 << 20));
    // Without checkpoints nothing else is an fdatasync of a spool.
    let service = Bare::start(failing(&shim, "first fdatasync"), &[("STORAGE__PARTIAL_MAX_BYTES", "0")]);
    let url = up.serve("/large", Reply::ok(&content));
    service.fetch(&url).assert_error(500, "internal_error");
    service.assert_given_up();
    assert_eq!(service.fetch(&url).assert_ok(&content.bytes()).cache_status(), "MISS");
}

#[test]
fn a_checkpoint_that_cannot_be_written_costs_nothing_but_itself() {
    let dir = tempfile::tempdir().unwrap();
    let name = "hardship::a_checkpoint_that_cannot_be_written_costs_nothing_but_itself";
    let Some(shim) = build_shim(dir.path(), name) else { return };
    let (up, content) = (Upstream::start(), Content::new(303, 8 << 20));
    // The first fsync there is that of the first checkpoint.
    let service = Bare::start(failing(&shim, "fsync"), &[("STORAGE__CHECKPOINT_BYTES", "1MiB")]);
    let url = up.serve("/unchecked", Reply::ok(&content).field("ETag", "\"one\""));
    service.fetch(&url).assert_ok(&content.bytes());
    service.assert_given_up();
    assert_eq!(service.fetch(&url).assert_ok(&content.bytes()).cache_status(), "HIT");
}

#[test]
fn more_idle_connections_than_descriptors_keep_nobody_out() {
    raise_file_limit(8_000);
    let up = Upstream::start();
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -n 256 && exec \"$0\" serve", BINARY]).env_clear();
    let service = Bare::start(command, &[]);
    let url = up.serve("/known", Reply::ok(&Content::of(b"known")));
    service.fetch(&url).assert_ok(b"known");
    let idle: Vec<Client> = (0..300)
        .map(|_| {
            let mut client = Client::connect(service.api);
            client.request("GET", "/health", &[]);
            client
        })
        .collect();
    for n in 0..5 {
        service.fetch(&url).assert_ok(b"known");
        let fresh = up.serve(&format!("/fresh{n}"), Reply::ok(&Content::of(b"fresh")));
        service.fetch(&fresh).assert_ok(b"fresh");
    }
    drop(idle);
}

#[test]
fn an_output_that_nobody_reads_does_not_keep_the_process() {
    let mut command = Command::new(BINARY);
    command.arg("serve").env_clear();
    let mut service = Bare::start(command, &[]);
    let mut client = Client::connect(service.api);
    // Each of these is a line, and together they are several times what a pipe holds.
    for _ in 0..2_000 {
        client.request("GET", "/fetch?url=nonsense", &[]);
        client.response("GET").assert_error(400, "invalid_parameter");
    }
    let ended = service.term();
    assert_eq!(ended.and_then(|status| status.code()), Some(0), "it ends though its output is full");
}
