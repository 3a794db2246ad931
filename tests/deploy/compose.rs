//! `docker-compose up -d`, typed as the documents have it, in a copy of the repository as it stands, with a Docker engine of
//! the test's own.
//!
//! What the engine would pull is named as there and made here: the Rust image is a Debian with a C compiler and this
//! machine's Rust, the base is that Debian. Cargo really builds the release in there, which takes minutes; unless
//! `ARTIFACT_CACHE_TEST_SHIPPED` is set, without optimising it.

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::engine::{Engine, OUTSIDE};
use crate::harness::{Client, Content, PATIENCE, Reply, Response, Upstream, eventually, fetch_target};
use crate::program::need;
use crate::root;

/// The service's user in the compose file.
const OWNER: &str = "1000:1000";

/// A copy of the repository with an engine to type `docker-compose` at.
struct Checkout {
    engine: Engine,
    directory: PathBuf,
}

impl Checkout {
    /// As root clones it, images and all; none, and the test is skipped, where no engine runs.
    fn new() -> Option<Checkout> {
        need("rsync")?;
        let engine = Engine::start()?;
        let began = Instant::now();
        let directory = engine.path().join("artifact-cache");
        let status = Command::new("rsync")
            .args(["--archive", "--chown=0:0", "--exclude=target", "--exclude=.git", "--exclude=/data/*"])
            .arg(format!("{}/", root().display()))
            .arg(&directory)
            .status();
        assert!(status.unwrap().success(), "the repository is copied");
        let debian = root().join("target/debian");
        engine.image(&["--directory", text(&debian), "."], &["import", "-", "debian:bookworm-slim"]);
        let (compiler, here) = (root().join("target/compiler"), root().join("tests/deploy"));
        let (sysroot, crates) = (rust(), cargo_home());
        let mut packed = vec!["--directory", text(&here), "builder.Dockerfile"];
        packed.extend(["--directory", text(&compiler), "--exclude=usr/share", "usr"]);
        packed.extend(["--directory", &sysroot, "bin", "lib"]);
        packed.extend(["--directory", text(&crates), "registry/index", "registry/cache"]);
        let (named, profile) = (builder_image(), profile());
        let build =
            ["build", "--quiet", "--file", "builder.Dockerfile", "--target", profile, "--tag", &named, "-"];
        engine.image(&packed, &build);
        eprintln!("the images that would be pulled: {} s", began.elapsed().as_secs());
        Some(Checkout { engine, directory })
    }

    fn data(&self) -> PathBuf {
        self.directory.join("data")
    }

    fn compose(&self, args: &[&str]) -> Command {
        self.engine.compose(&self.directory, args)
    }

    /// Runs `docker-compose`, which must succeed: what it writes to standard output.
    #[track_caller]
    fn run(&self, args: &[&str]) -> String {
        let output = self.compose(args).output().unwrap();
        let [stdout, stderr] =
            [output.stdout, output.stderr].map(|b| String::from_utf8_lossy(&b).into_owned());
        assert!(output.status.success(), "docker-compose {args:?}: {stdout}\n{stderr}");
        stdout
    }

    /// A property of the service's container.
    fn state(&self, format: &str) -> String {
        self.engine.inspect("container", "artifact-cache", format)
    }

    fn connect(&self) -> Client {
        let api = SocketAddr::from((Ipv4Addr::LOCALHOST, 8080));
        self.engine.on_its_network(|| Client::connect(api))
    }

    /// GET at the published port.
    fn get(&self, target: &str) -> Response {
        let mut client = self.connect();
        client.request("GET", target, &[("Connection", "close")]);
        client.response("GET")
    }

    /// What the document's `curl` prints.
    fn curl(&self, url: &str) -> Option<String> {
        let curl = || Command::new("curl").args(["--fail", "--silent", "--show-error", url]).output();
        let output = self.engine.on_its_network(curl).unwrap();
        output.status.success().then(|| String::from_utf8(output.stdout).unwrap())
    }

    #[track_caller]
    fn becomes_healthy(&self) {
        let url = "http://localhost:8080/health";
        let answer = eventually("the published port answers", || self.curl(url));
        let answer: Value = serde_json::from_str(&answer).unwrap();
        assert_eq!(answer["status"], "healthy");
    }

    fn chown(&self, owner: &str) {
        let done = Command::new("chown").args(["-R", owner, "data"]).current_dir(&self.directory).status();
        assert!(done.unwrap().success());
    }

    /// The service's log, one value a line. `docker-compose` would put a line of its own on top.
    #[track_caller]
    fn log(&self) -> Vec<Value> {
        let output = self.engine.docker(&["logs", "artifact-cache"]).output().unwrap();
        let log = String::from_utf8(output.stdout).unwrap();
        let value = |line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line:?} in {log}"));
        log.lines().map(value).collect()
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Where the compiler that runs these tests is installed.
fn rust() -> String {
    let rustc = std::env::var_os("RUSTC").unwrap_or("rustc".into());
    let output = Command::new(rustc).args(["--print", "sysroot"]).current_dir(root()).output().unwrap();
    String::from_utf8(output.stdout).unwrap().trim().to_string()
}

/// Where cargo keeps the crates.
fn cargo_home() -> PathBuf {
    let home = || PathBuf::from(std::env::var_os("HOME").expect("HOME is set")).join(".cargo");
    std::env::var_os("CARGO_HOME").map_or_else(home, PathBuf::from)
}

/// Which of the images of `builder.Dockerfile` is taken.
fn profile() -> &'static str {
    if std::env::var_os("ARTIFACT_CACHE_TEST_SHIPPED").is_some() { "shipped" } else { "quick" }
}

/// The image that the Dockerfile builds with.
fn builder_image() -> String {
    let file = fs::read_to_string(root().join("Dockerfile")).unwrap();
    let line = file.lines().find_map(|line| line.strip_prefix("ARG BUILDER="));
    line.expect("it has a default").to_string()
}

/// An upstream that the container sees on what it takes for the internet: the URL of the artifact it serves.
fn upstream(checkout: &Checkout, content: &Content) -> (Upstream, String) {
    let listener = checkout.engine.on_its_network(|| TcpListener::bind((OUTSIDE, 0)).unwrap());
    let up = Upstream::on_listener(listener, None);
    let url = up.serve("/from-outside.bin", Reply::ok(content));
    (up, fetch_target(&url))
}

#[test]
fn docker_compose_up_builds_and_runs_the_service_as_the_documents_have_it() {
    let Some(checkout) = Checkout::new() else { return };
    builds_and_names_the_cure_of_a_wrong_owner(&checkout);
    let content = Content::new(91, 1_000_000);
    let (up, target) = upstream(&checkout, &content);
    let fetch = |status| {
        assert_eq!(checkout.get(&target).assert_ok(&content.bytes()).cache_status(), status);
    };
    // A container that never saw a wrong owner.
    checkout.run(&["down"]);
    checkout.run(&["up", "-d"]);
    checkout.becomes_healthy();
    for status in ["MISS", "HIT"] {
        fetch(status);
    }
    let metrics = checkout.curl("http://localhost:9090/metrics").expect("the metrics' port is published");
    assert!(metrics.contains("artifact_cache_requests_total"), "{metrics}");
    confined(&checkout);
    logs(&checkout, &target);
    let stats = checkout.run(&["exec", "-T", "artifact-cache", "artifact-cache", "stats"]);
    assert!(stats.lines().any(|line| line.starts_with("artifacts  ") && line.contains(" 1 ")), "{stats}");
    found_healthy_by_docker(&checkout);
    checkout.run(&["restart"]);
    checkout.becomes_healthy();
    fetch("HIT");
    backup_and_recovery(&checkout);
    fetch("HIT");
    assert_eq!(up.count("/from-outside.bin"), 1, "all that, and the upstream was asked once");
    checkout.run(&["down"]);
    let left = checkout.engine.docker(&["ps", "--all", "--quiet"]).output().unwrap();
    assert!(left.status.success() && left.stdout.is_empty(), "{left:?}");
    assert!(checkout.data().join("metadata.db").exists(), "the data stay");
}

/// A repository that root cloned: `./data` is root's.
fn builds_and_names_the_cure_of_a_wrong_owner(checkout: &Checkout) {
    let began = Instant::now();
    checkout.run(&["up", "-d"]);
    let took = began.elapsed().as_secs();
    let size = |image: &str| checkout.engine.inspect("image", image, "{{.Size}}").parse::<u64>().unwrap();
    let (all, base) = (size("artifact-cache"), size("debian:bookworm-slim"));
    eprintln!(
        "docker-compose up -d, {}: {took} s; the image is {all} bytes, {} on its base",
        profile(),
        all - base
    );
    let cure = format!("chown -R {OWNER} /data ");
    eventually("the log has the cure", || checkout.run(&["logs"]).contains(&cure).then_some(()));
    checkout.chown(OWNER);
    // `restart: unless-stopped` does the rest.
    checkout.becomes_healthy();
}

/// What the container may do, asked from within.
fn confined(checkout: &Checkout) {
    let shell = |script: &str| {
        let args = ["exec", "-T", "artifact-cache", "sh", "-c", script];
        let output = checkout.compose(&args).output().unwrap();
        (
            output.status.success(),
            String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned(),
        )
    };
    for directory in ["/app", "/tmp", "/var/tmp", "/usr/local/bin"] {
        let (written, said) = shell(&format!("touch {directory}/new"));
        assert!(!written && said.contains("Read-only file system"), "{directory}: {said}");
    }
    let (written, said) = shell("touch /data/new && rm /data/new");
    assert!(written, "{said}");
    let (_, status) = shell("cat /proc/1/status");
    for line in [
        "Name:\tartifact-cache",
        "Uid:\t1000\t1000\t1000\t1000",
        "Gid:\t1000\t1000\t1000\t1000",
        "CapBnd:\t0000000000000000",
        "NoNewPrivs:\t1",
        "Seccomp:\t2",
    ] {
        assert!(status.lines().any(|found| found == line), "{line} in {status}");
    }
}

/// The log is lines of JSON, and can be followed.
fn logs(checkout: &Checkout, target: &str) {
    let log = checkout.log();
    let messages: Vec<_> = log.iter().map(|line| line["msg"].as_str().unwrap_or_default()).collect();
    for message in ["listening", "cache MISS - downloaded from upstream", "cache HIT"] {
        assert!(messages.contains(&message), "{message:?} in {messages:?}");
    }
    let mut following = checkout
        .compose(&["logs", "-f", "--tail=100", "artifact-cache"])
        // As at a terminal: Python would keep the lines back.
        .env("PYTHONUNBUFFERED", "1")
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let lines = BufReader::new(following.stdout.take().unwrap()).lines().map_while(Result::ok);
    let (said, heard) = std::sync::mpsc::channel();
    std::thread::spawn(move || lines.for_each(|line| drop(said.send(line))));
    let next = |what: &str| heard.recv_timeout(PATIENCE).unwrap_or_else(|e| panic!("{what}: {e}"));
    while !next("the old lines").contains("cache HIT") {}
    checkout.get(&format!("{target}&sha256={}", crate::harness::WRONG_SHA));
    while !next("the line of a new request").contains("fetch failed") {}
    following.kill().unwrap();
    following.wait().unwrap();
}

/// The image's own health check, which Docker asks every 30 s.
fn found_healthy_by_docker(checkout: &Checkout) {
    let until = Instant::now() + PATIENCE * 4;
    let health = || checkout.state("{{.State.Health.Status}}");
    while health() == "starting" && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(200));
    }
    let about = checkout.state("{{json .State.Health}}");
    assert_eq!(health(), "healthy", "{about}");
    assert!(about.contains("\"ExitCode\":0"), "{about}");
    assert_eq!(checkout.state("{{.RestartCount}}"), "0");
}

/// The document's backup script and its recovery procedure, but for `/data` and `/backup`, which are the machine's there, and
/// the date.
fn backup_and_recovery(checkout: &Checkout) {
    let backups = checkout.engine.path().join("backup");
    fs::create_dir(&backups).unwrap();
    let shell = |script: &str| {
        let output = Command::new("bash")
            .args(["-euc", script])
            .current_dir(&checkout.directory)
            .env("BACKUP_DIR", backups.join("20241117"))
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
    };
    let began = Instant::now();
    checkout.run(&["stop", "artifact-cache"]);
    let (took, grace) = (began.elapsed(), Duration::from_secs(15));
    assert!(took < grace, "killed, not stopped: {took:?}");
    assert_eq!(checkout.state("{{.State.Status}} {{.State.ExitCode}}"), "exited 0");
    shell(
        r#"mkdir -p "$BACKUP_DIR"
           cp data/metadata.db "$BACKUP_DIR/"
           rsync -av --delete data/cache/ "$BACKUP_DIR/cache/"
           cp deploy/config.yaml "$BACKUP_DIR/""#,
    );
    checkout.run(&["start", "artifact-cache"]);
    checkout.becomes_healthy();
    shell(r#"tar -czf "$BACKUP_DIR.tar.gz" -C "$BACKUP_DIR/.." 20241117; rm -rf "$BACKUP_DIR""#);
    checkout.run(&["down"]);
    // All is lost.
    fs::remove_dir_all(checkout.data()).unwrap();
    shell(
        r#"tar -xzf "$BACKUP_DIR.tar.gz" -C ..
           mkdir -p data/cache
           cp ../20241117/metadata.db data/
           rsync -av ../20241117/cache/ data/cache/"#,
    );
    let check = rusqlite::Connection::open(checkout.data().join("metadata.db")).unwrap();
    let said: String = check.query_row("PRAGMA integrity_check", [], |row| row.get(0)).unwrap();
    assert_eq!(said, "ok");
    drop(check);
    // Root unpacked it, so root's it is.
    checkout.chown(OWNER);
    checkout.run(&["up", "-d"]);
    checkout.becomes_healthy();
}
