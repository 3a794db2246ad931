//! The real binary, started, watched and stopped; what it must never leave behind is asserted when it is dropped.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::client::{Client, Response};
use super::{PATIENCE, eventually, fetch_sha_target, fetch_target, raise_file_limit};

/// The binary under test.
pub const BINARY: &str = env!("CARGO_BIN_EXE_artifact-cache");

/// How to start the service: environment, arguments and a directory.
#[derive(Clone)]
pub struct Service {
    env: BTreeMap<String, String>,
    starter: Vec<String>,
    args: Vec<String>,
    dir: Arc<tempfile::TempDir>,
}

impl Service {
    /// Free ports, a fresh directory, loopback allowed as upstream, and no early streaming unless a test asks for it.
    pub fn new() -> Service {
        let dir = Arc::new(tempfile::tempdir().unwrap());
        let (env, starter, args) = (BTreeMap::new(), Vec::new(), vec!["serve".to_string()]);
        let service = Service { env, starter, args, dir };
        let path = |name: &str| service.dir.path().join(name).display().to_string();
        let (base, database) = (path("cache"), path("metadata.db"));
        service
            .env("SERVER__PORT", "0")
            .env("SERVER__METRICS_PORT", "0")
            .env("STORAGE__BASE_PATH", &base)
            .env("STORAGE__DATABASE", &database)
            .env("STORAGE__MIN_FREE_BYTES", "1MiB")
            .env("UPSTREAM__ALLOW_PRIVATE_NETWORKS", "127.0.0.0/8,::1/128")
            .env("FETCH__STREAM_AFTER_SECONDS", "60")
    }

    /// Sets `ARTIFACT_CACHE__<key>`.
    pub fn env(mut self, key: &str, value: &str) -> Service {
        self.env.insert(format!("ARTIFACT_CACHE__{key}"), value.to_string());
        self
    }

    /// Sets a variable by its full name.
    pub fn variable(mut self, name: &str, value: &str) -> Service {
        self.env.insert(name.to_string(), value.to_string());
        self
    }

    /// Leaves `ARTIFACT_CACHE__<key>` to the default.
    pub fn without(mut self, key: &str) -> Service {
        self.env.remove(&format!("ARTIFACT_CACHE__{key}"));
        self
    }

    /// The environment it starts with.
    #[allow(dead_code)] // for tests/deploy
    pub fn environment(&self) -> &BTreeMap<String, String> {
        &self.env
    }

    /// Starts it by another program: its name and first arguments; the binary and its arguments follow.
    #[allow(dead_code)] // for tests/deploy
    pub fn started_by(mut self, starter: &[String]) -> Service {
        self.starter = starter.to_vec();
        self
    }

    /// Streams a miss early: after a fifth of a second.
    pub fn streaming(self) -> Service {
        self.env("FETCH__STREAM_AFTER_SECONDS", "0.2")
    }

    /// Replaces the arguments (`serve`).
    pub fn args(mut self, args: &[&str]) -> Service {
        self.args = args.iter().map(|arg| arg.to_string()).collect();
        self
    }

    /// The directory of this service's data.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The blob store.
    pub fn base_path(&self) -> PathBuf {
        self.env["ARTIFACT_CACHE__STORAGE__BASE_PATH"].clone().into()
    }

    /// The database file.
    pub fn database(&self) -> PathBuf {
        self.env["ARTIFACT_CACHE__STORAGE__DATABASE"].clone().into()
    }

    /// Starts it with a shared object in front of the C library.
    pub fn preload(mut self, shim: &Path) -> Service {
        self.env.insert("LD_PRELOAD".to_string(), shim.display().to_string());
        self
    }

    /// Another verb of the same binary on the same configuration.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(BINARY);
        command.env_clear().envs(&self.env).args(args).current_dir(self.dir.path()).stdin(Stdio::null());
        command
    }

    fn spawn(&self) -> Child {
        // Hundreds of clients of several tests live in this process; where that can't be had, a test will say so.
        raise_file_limit(8_000);
        let line: Vec<&str> = self.starter.iter().map(String::as_str).chain([BINARY]).collect();
        let mut command = Command::new(line[0]);
        command.args(&line[1..]).args(&self.args);
        command.env_clear().envs(&self.env).current_dir(self.dir.path());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().expect("the binary starts")
    }

    /// Starts it and waits for its `listening` line.
    #[track_caller]
    pub fn start(self) -> Running {
        self.try_start().unwrap_or_else(|(status, stderr)| panic!("it refuses to start: {status} {stderr}"))
    }

    /// The same; exit status and stderr when it ends instead.
    #[track_caller]
    pub fn try_start(self) -> Result<Running, (ExitStatus, String)> {
        let mut child = self.spawn();
        let log = Log::default();
        let stdout = log.follow(child.stdout.take().unwrap());
        let stderr = collect(child.stderr.take().unwrap());
        let mut running = Running {
            pid: Pid::from_child(&child),
            child: Some(child),
            log,
            readers: Some((stdout, stderr)),
            service: self,
            api: ([127, 0, 0, 1], 0).into(),
            metrics: None,
            unfinished: false,
        };
        let Some(line) = running.find_log(|line| line["msg"] == "listening") else {
            return Err(running.wait_exit());
        };
        let address = |key: &str| line[key].as_str().and_then(|text| text.parse().ok());
        running.api =
            address("api").unwrap_or_else(|| panic!("the start line names the API's address: {line}"));
        running.metrics = address("metrics");
        Ok(running)
    }

    /// Starts it, expecting that it refuses: exit code, and what it said on stderr.
    #[track_caller]
    pub fn refused(&self) -> (i32, String) {
        let mut child = self.spawn();
        let log = Log::default();
        let stdout = log.follow(child.stdout.take().unwrap());
        let stderr = collect(child.stderr.take().unwrap());
        let status = wait(&mut child).unwrap_or_else(|| {
            let _ = child.kill();
            panic!("it should have refused to start, but runs: {:?}", log.lines())
        });
        stdout.join().unwrap();
        (status.code().unwrap_or(-1), stderr.join().unwrap())
    }
}

/// Waits for the end of a process, at most [`PATIENCE`].
fn wait(child: &mut Child) -> Option<ExitStatus> {
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        if let Some(status) = child.try_wait().unwrap() {
            return Some(status);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    None
}

fn collect(mut pipe: impl Read + Send + 'static) -> JoinHandle<String> {
    std::thread::spawn(move || {
        let mut text = Vec::new();
        let _ = pipe.read_to_end(&mut text);
        String::from_utf8_lossy(&text).into_owned()
    })
}

/// The service's log lines as they come; a line that is no JSON object is kept as a string.
#[derive(Clone, Default)]
struct Log(Arc<(Mutex<Vec<Value>>, Condvar)>, Arc<AtomicBool>);

impl Log {
    fn follow(&self, pipe: impl Read + Send + 'static) -> JoinHandle<()> {
        let log = self.clone();
        std::thread::spawn(move || {
            let (mut pipe, mut line) = (BufReader::new(pipe), Vec::new());
            // A line without an end is that of a process that was killed while it wrote it.
            while pipe.read_until(b'\n', &mut line).is_ok() && line.pop() == Some(b'\n') {
                while log.1.load(Ordering::SeqCst) {
                    std::thread::sleep(Duration::from_millis(10));
                }
                let text = String::from_utf8_lossy(&std::mem::take(&mut line)).into_owned();
                let value = serde_json::from_str(&text).unwrap_or(Value::String(text));
                log.lock().push(value);
                log.0.1.notify_all();
            }
        })
    }

    /// A test that failed while it looked at the lines has poisoned nothing: they are whole.
    fn lock(&self) -> MutexGuard<'_, Vec<Value>> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lines(&self) -> Vec<Value> {
        self.lock().clone()
    }
}

/// A running service.
pub struct Running {
    child: Option<Child>,
    pid: Pid,
    log: Log,
    readers: Option<(JoinHandle<()>, JoinHandle<String>)>,
    service: Service,
    /// Where the API listens.
    pub api: SocketAddr,
    /// Where the second listener for metrics is, if it is on.
    pub metrics: Option<SocketAddr>,
    unfinished: bool,
}

impl Running {
    /// How it was started.
    pub fn service(&self) -> &Service {
        &self.service
    }

    /// A new connection to the API.
    pub fn connect(&self) -> Client {
        Client::connect(self.api)
    }

    /// One request on a connection of its own.
    #[track_caller]
    pub fn request(&self, method: &str, target: &str, fields: &[(&str, &str)]) -> Response {
        let mut client = self.connect();
        let fields = [fields, &[("Connection", "close")]].concat();
        client.request(method, target, &fields);
        client.response(method)
    }

    /// GET of a target of the service itself.
    #[track_caller]
    pub fn get(&self, target: &str) -> Response {
        self.request("GET", target, &[])
    }

    /// GET of an artifact.
    #[track_caller]
    pub fn fetch(&self, url: &str) -> Response {
        self.get(&fetch_target(url))
    }

    /// GET of an artifact with an expected digest.
    #[track_caller]
    pub fn fetch_sha(&self, url: &str, sha256: &str) -> Response {
        self.get(&fetch_sha_target(url, sha256))
    }

    /// GET of an artifact with header fields.
    #[track_caller]
    pub fn fetch_with(&self, url: &str, fields: &[(&str, &str)]) -> Response {
        self.request("GET", &fetch_target(url), fields)
    }

    /// Stops reading the service's log, so that its pipe fills; or reads on.
    pub fn block_log(&self, blocked: bool) {
        self.log.1.store(blocked, Ordering::SeqCst);
    }

    /// All log lines so far.
    pub fn logs(&self) -> Vec<Value> {
        self.log.lines()
    }

    /// The first log line, past or coming, that `wanted` accepts.
    #[track_caller]
    pub fn wait_log(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        self.find_log(wanted).unwrap_or_else(|| panic!("no log line {what:?} in {:#?}", self.logs()))
    }

    /// The same; `None` when the service ends without it, or [`PATIENCE`] does.
    fn find_log(&self, wanted: impl Fn(&Value) -> bool) -> Option<Value> {
        let deadline = Instant::now() + PATIENCE;
        let mut lines = self.log.lock();
        loop {
            if let Some(line) = lines.iter().find(|line| wanted(line)) {
                return Some(line.clone());
            }
            let left = deadline.saturating_duration_since(Instant::now()).min(Duration::from_millis(200));
            if left.is_zero() || self.readers.as_ref().is_none_or(|(stdout, _)| stdout.is_finished()) {
                return None;
            }
            lines = self.log.0.1.wait_timeout(lines, left).unwrap().0;
        }
    }

    /// Every series of `/metrics` by its full name, labels included.
    #[track_caller]
    pub fn series(&self) -> BTreeMap<String, f64> {
        parse_metrics(&String::from_utf8_lossy(&self.get("/metrics").body))
    }

    /// One series; panics when it isn't there.
    #[track_caller]
    pub fn metric(&self, name: &str) -> f64 {
        let series = self.series();
        *series.get(name).unwrap_or_else(|| panic!("no series {name} in {:?}", series.keys()))
    }

    /// Waits until a series has a value. (A request is counted when its body ends, which a client may see first.)
    #[track_caller]
    pub fn wait_metric(&self, name: &str, value: f64) {
        eventually(&format!("{name} = {value}, is {}", self.metric(name)), || {
            (self.metric(name) == value).then_some(())
        });
    }

    /// `/api/stats`.
    #[track_caller]
    pub fn stats(&self) -> Value {
        self.get("/api/stats").json()
    }

    /// A connection to its database beside it, as an operator's `sqlite3`.
    pub fn sqlite(&self) -> rusqlite::Connection {
        let connection = rusqlite::Connection::open(self.service.database()).unwrap();
        connection.busy_timeout(PATIENCE).unwrap();
        connection
    }

    /// One number from its database.
    #[track_caller]
    pub fn count_rows(&self, sql: &str) -> i64 {
        self.sqlite().query_row(sql, [], |row| row.get(0)).unwrap()
    }

    /// Where the blob of a digest is, or would be.
    pub fn blob(&self, sha256: &str) -> PathBuf {
        self.service.base_path().join(&sha256[..2]).join(&sha256[2..4]).join(sha256)
    }

    /// Blob files in the store, whatever the catalogue says.
    pub fn blobs_on_disk(&self) -> usize {
        let listed = |dir: PathBuf| std::fs::read_dir(dir).into_iter().flatten().flatten();
        let fan = |dir: PathBuf| {
            listed(dir).map(|e| e.path()).filter(|p| p.file_name().is_some_and(|n| n.len() == 2))
        };
        fan(self.service.base_path()).flat_map(fan).flat_map(listed).count()
    }

    /// Files in the spool directory.
    pub fn spooled(&self) -> Vec<PathBuf> {
        let entries =
            std::fs::read_dir(self.service.base_path().join(".spool")).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).collect()
    }

    /// Downloads that are running.
    pub fn inflight(&self) -> f64 {
        self.metric("artifact_cache_inflight_downloads")
    }

    /// Asserts that nothing was kept: no row, no blob.
    #[track_caller]
    pub fn assert_nothing_stored(&self) {
        eventually("no download runs", || (self.inflight() == 0.0).then_some(()));
        assert_eq!(self.stats()["total_items"], 0, "no artifact is recorded");
        assert_eq!(self.blobs_on_disk(), 0, "no blob is on disk");
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.pid.as_raw_nonzero().get() as u32
    }

    /// Peak resident memory so far, in bytes.
    pub fn peak_rss_bytes(&self) -> u64 {
        self.proc_status("VmHWM:") * 1024
    }

    /// A number that proc_pid_status(5) has; `field` with its colon.
    pub fn proc_status(&self, field: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find(|line| line.starts_with(field)).expect("Linux has this field");
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    /// This test leaves a download running on purpose.
    pub fn leave_unfinished(&mut self) {
        self.unfinished = true;
    }

    /// Sends a signal and returns at once.
    pub fn signal(&self, signal: Signal) {
        kill_process(self.pid, signal).expect("the process is there");
    }

    /// Sends SIGTERM and returns at once.
    pub fn signal_term(&self) {
        self.signal(Signal::TERM);
    }

    /// Waits for the end and returns exit status and stderr.
    #[track_caller]
    pub fn wait_exit(&mut self) -> (ExitStatus, String) {
        let mut child = self.child.take().expect("it still runs");
        let status = wait(&mut child).unwrap_or_else(|| {
            let _ = child.kill();
            panic!("the service does not end; its log: {:#?}", self.log.lines())
        });
        let (stdout, stderr) = self.readers.take().unwrap();
        stdout.join().unwrap();
        (status, stderr.join().unwrap())
    }

    /// SIGTERM, and the end that must come of it: exit code 0.
    #[track_caller]
    pub fn term(&mut self) {
        self.signal_term();
        let (status, stderr) = self.wait_exit();
        assert_eq!(status.code(), Some(0), "SIGTERM ends in exit 0: {status} {stderr}");
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        self.signal(Signal::KILL);
        self.wait_exit();
    }

    /// The same configuration on the same directory, for a new start (after `term` or `kill`).
    pub fn again(&self) -> Service {
        self.service.clone()
    }

    /// What must hold when a test is over and the service still runs.
    fn check_idle(&self) {
        if !self.unfinished {
            eventually("no download is left running", || (self.inflight() == 0.0).then_some(()));
            assert_eq!(
                self.spooled(),
                Vec::<PathBuf>::new(),
                "the spool is empty when nothing is downloaded"
            );
        }
    }

    fn check_log(&self) {
        for line in self.log.lines() {
            assert!(line.is_object(), "a log line that is no JSON object: {line}");
            let is_wanted = self.service.env.contains_key("ARTIFACT_CACHE_PANIC_POINT");
            assert!(is_wanted || line["msg"] != "panic", "the service panicked: {line}");
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if std::thread::panicking() {
            if let Some(mut child) = self.child.take() {
                let _ = child.kill();
                let _ = child.wait();
                eprintln!("--- log of the service:");
                self.log.lines().iter().rev().take(40).rev().for_each(|line| eprintln!("{line}"));
                let stderr = self.readers.take().and_then(|(_, stderr)| stderr.join().ok());
                eprintln!("--- its stderr: {}", stderr.unwrap_or_default());
            }
            return;
        }
        if self.child.is_some() {
            self.check_idle();
            self.term();
        }
        self.check_log();
    }
}

/// Parses the classic text format; help and type lines are left out.
pub fn parse_metrics(text: &str) -> BTreeMap<String, f64> {
    let samples = text.lines().filter(|line| !line.starts_with('#') && !line.is_empty());
    let pair = |line: &str| {
        line.rsplit_once(' ').map(|(name, value)| (name.to_string(), value.parse().unwrap_or(f64::NAN)))
    };
    samples.filter_map(pair).collect()
}
