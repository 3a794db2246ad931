//! `artifact-cache doctor`: each kind of trouble is made, found, and comes with a cure.

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::harness::service::BINARY;
use crate::harness::{Content, Reply, Running, Service, Upstream, skip};

/// A deployment in a directory of its own, not running.
struct Deployment {
    dir: tempfile::TempDir,
    env: Vec<(String, String)>,
}

/// What the doctor says.
struct Diagnosis {
    code: Option<i32>,
    json: Value,
}

impl Diagnosis {
    /// The findings of a check.
    fn all(&self, check: &str) -> Vec<&Value> {
        let findings = self.json["findings"].as_array().unwrap();
        findings.iter().filter(|finding| finding["check"] == check).collect()
    }

    /// Asserts that a check has a finding with this verdict and these words, and a cure unless all is well.
    #[track_caller]
    fn assert(&self, check: &str, verdict: &str, words: &str) {
        let is_it = |finding: &&&Value| {
            finding["verdict"] == verdict && finding["found"].as_str().unwrap().contains(words)
        };
        let all = self.all(check);
        let finding =
            all.iter().find(is_it).unwrap_or_else(|| panic!("{check} {verdict} {words:?}: {}", self.json));
        assert_eq!(finding["cure"].is_string(), verdict != "ok", "{finding}");
        assert_eq!(self.code == Some(1), self.json["verdict"] == "fail", "{}", self.json);
        assert!(verdict != "fail" || self.code == Some(1));
    }
}

impl Deployment {
    fn new() -> Deployment {
        let deployment = Deployment { dir: tempfile::tempdir().unwrap(), env: Vec::new() };
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string();
        deployment
            .with("SERVER__PORT", &port)
            .with("SERVER__METRICS_PORT", "0")
            .with("STORAGE__MIN_FREE_BYTES", "1MiB")
    }

    /// The one that this service runs.
    fn of(service: &Running) -> Deployment {
        let base = service.service().base_path().display().to_string();
        let database = service.service().database().display().to_string();
        Deployment::new()
            .with("SERVER__PORT", &service.api.port().to_string())
            .with("STORAGE__BASE_PATH", &base)
            .with("STORAGE__DATABASE", &database)
    }

    fn with(mut self, key: &str, value: &str) -> Deployment {
        let name = format!("ARTIFACT_CACHE__{key}");
        self.env.retain(|(other, _)| *other != name);
        self.env.push((name, value.to_owned()));
        self
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(BINARY);
        command.env_clear().envs(self.env.iter().cloned()).current_dir(self.dir.path());
        command.arg("doctor").args(args).stdin(Stdio::null());
        command
    }

    #[track_caller]
    fn ask(&self, args: &[&str]) -> Diagnosis {
        diagnosis(self.command(&[args, &["--json"]].concat()))
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }
}

#[track_caller]
fn diagnosis(mut command: Command) -> Diagnosis {
    let output = command.output().expect("the binary runs");
    let json = serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {output:?}"));
    Diagnosis { code: output.status.code(), json }
}

#[test]
fn a_deployment_before_its_first_start_is_fine_and_stays_untouched() {
    let deployment = Deployment::new();
    let found = deployment.ask(&[]);
    assert_eq!(found.code, Some(0), "{}", found.json);
    found.assert("artifacts", "ok", "is not there yet and can be made");
    found.assert("database", "ok", "is not there yet");
    found.assert("port", "ok", "is free");
    found.assert("internal networks", "ok", "refused");
    found.assert("trusted proxies", "ok", "127.0.0.1/32, ::1/128");
    found.assert("clock", "ok", "20");
    assert_eq!(fs::read_dir(deployment.dir.path()).unwrap().count(), 0, "it made nothing");
}

#[test]
fn people_get_lines_with_cures() {
    let output = Deployment::new().with("STORAGE__MIN_FREE_BYTES", "1000TiB").command(&[]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let at =
        text.lines().position(|line| line.starts_with("FAIL  free disk")).unwrap_or_else(|| panic!("{text}"));
    assert!(text.lines().nth(at + 1).unwrap().trim_start().starts_with("→ make room"), "{text}");
    assert!(text.contains("ok    configuration"), "{text}");
}

#[test]
fn a_running_service_is_recognised_and_not_disturbed() {
    let (service, up) = (Service::new().start(), Upstream::start());
    service.fetch(&up.serve("/x", Reply::ok(&Content::of(b"x"))));
    let found = Deployment::of(&service).ask(&[]);
    assert_eq!(found.code, Some(0), "{}", found.json);
    found.assert("port", "ok", "healthy");
    found.assert("version", "ok", env!("CARGO_PKG_VERSION"));
    found.assert("database", "ok", "sound");
    found.assert("artifacts", "ok", "can be written");
    service.fetch(&up.serve("/y", Reply::ok(&Content::of(b"y")))).assert_ok(b"y");
}

#[test]
fn a_wrong_configuration_is_the_first_finding() {
    let found = Deployment::new().with("SERVER__PORT", "x").ask(&[]);
    found.assert("configuration", "fail", "ARTIFACT_CACHE__SERVER__PORT");
}

#[test]
fn places_that_cannot_be_used() {
    let deployment =
        Deployment::new().with("STORAGE__BASE_PATH", "file/cache").with("STORAGE__DATABASE", "file");
    fs::write(deployment.path("file"), "no database but a text".repeat(100)).unwrap();
    let found = deployment.ask(&[]);
    found.assert("artifacts", "fail", "is no directory");
    found.assert("database", "fail", "not a database");
    fs::remove_file(deployment.path("file")).unwrap();
    fs::create_dir_all(deployment.path("file")).unwrap();
    deployment.ask(&[]).assert("database", "fail", "is no file");
}

/// Runs the doctor as nobody, on a directory that is root's.
#[test]
fn rights_are_judged_for_the_user_that_runs_it() {
    if !rustix::process::getuid().is_root() {
        return skip(
            "doctor::rights_are_judged_for_the_user_that_runs_it",
            "needs root to become another user",
        );
    }
    use std::os::unix::process::CommandExt;
    let deployment = Deployment::new();
    // The way there is open to everybody, and the place itself is not.
    let open = |path: &Path, mode| {
        fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap()
    };
    open(deployment.dir.path(), 0o755);
    fs::create_dir_all(deployment.path("data/cache")).unwrap();
    // The binary may lie where only root can go.
    let binary = deployment.path("binary");
    fs::copy(BINARY, &binary).unwrap();
    open(&binary, 0o755);
    let mut command = Command::new(&binary);
    command.env_clear().envs(deployment.env.iter().cloned()).current_dir(deployment.dir.path());
    let found = diagnosis({
        command.args(["doctor", "--json"]).uid(65534).gid(65534);
        command
    });
    found.assert("user", "ok", "65534");
    found.assert("artifacts", "fail", "Permission denied");
    assert!(
        found.all("artifacts")[0]["cure"].as_str().unwrap().contains("chown -R 65534:65534 ./data/cache")
    );
    deployment.ask(&[]).assert("user", "warn", "root");
}

#[test]
fn memory_is_no_archive() {
    let Ok(memory) = tempfile::tempdir_in("/dev/shm") else {
        return skip("doctor::memory_is_no_archive", "no /dev/shm");
    };
    let place = memory.path().display().to_string();
    let found = Deployment::new().with("STORAGE__BASE_PATH", &place).ask(&[]);
    found.assert("artifacts", "warn", "tmpfs");
}

#[test]
fn a_disk_that_is_too_full() {
    Deployment::new().with("STORAGE__MIN_FREE_BYTES", "1000TiB").ask(&[]).assert(
        "free disk",
        "fail",
        "nothing new",
    );
}

#[test]
fn a_database_that_is_damaged_newer_or_none() {
    let mut service = Service::new().start();
    let up = Upstream::start();
    for n in 0..40 {
        service.fetch(&up.serve(&format!("/{n}"), Reply::ok(&Content::of(format!("{n}").as_bytes()))));
    }
    service.term();
    let (deployment, database) = (Deployment::of(&service), service.service().database());
    deployment.ask(&[]).assert("database", "ok", "sound");
    let beside = |suffix: &str| Path::new(&format!("{}{suffix}", database.display())).exists();
    assert!(!beside("-wal") && !beside("-shm"), "looking leaves no files that may be another user's");
    let good = fs::read(&database).unwrap();
    let mut bad = good.clone();
    let middle = bad.len() / 2;
    bad[middle..].fill(0x5a);
    fs::write(&database, &bad).unwrap();
    let found = deployment.ask(&[]);
    assert_eq!(found.all("database")[0]["verdict"], "fail", "{}", found.json);
    fs::write(&database, &good).unwrap();
    let newer = rusqlite::Connection::open(&database).unwrap();
    newer.pragma_update(None, "user_version", 9_000).unwrap();
    drop(newer);
    deployment.ask(&[]).assert("database", "fail", "schema 9000");
}

#[test]
fn snapshots_that_are_old_or_switched_off() {
    let deployment = Deployment::new();
    fs::create_dir(deployment.path("data")).unwrap();
    deployment.ask(&[]).assert("snapshots", "ok", "none yet");
    fs::write(deployment.path("data/metadata.db.snapshot-20200102T030405Z"), "").unwrap();
    deployment.ask(&[]).assert("snapshots", "warn", "days old");
    deployment.with("JOBS__SNAPSHOTS_KEPT", "0").ask(&[]).assert("snapshots", "warn", "switched off");
}

#[test]
fn ports_that_are_anothers() {
    let other = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = other.local_addr().unwrap().port().to_string();
    // Accepts and never answers would cost the whole patience; an HTTP server of another kind answers.
    drop(other);
    let web = Upstream::bind(&format!("127.0.0.1:{port}"), None);
    web.serve("/health", Reply::ok(&Content::of(b"<html>")));
    let found = Deployment::new().with("SERVER__PORT", &port).ask(&[]);
    found.assert("port", "fail", "taken by something else");
    assert!(found.all("port")[0]["cure"].as_str().unwrap().contains(&format!("sport = :{port}")));
    Deployment::new().with("SERVER__HOST", "192.0.2.1").ask(&[]).assert("port", "fail", "192.0.2.1");
}

#[test]
fn degraded_is_a_warning_and_failing_fails() {
    let web = Upstream::start();
    web.serve("/health", Reply::ok(&Content::of(br#"{"status": "degraded", "checks": {"disk": "full"}}"#)));
    let deployment = Deployment::new().with("SERVER__PORT", &web.address().port().to_string());
    deployment.ask(&[]).assert("port", "warn", "full");
    web.serve("/health", Reply::new(503, Content::of(br#"{"status": "failing"}"#)));
    deployment.ask(&[]).assert("port", "fail", "failing");
}

#[test]
fn another_version_that_runs() {
    let web = Upstream::start();
    web.serve("/health", Reply::ok(&Content::of(br#"{"status": "healthy"}"#)));
    let deployment = Deployment::new().with("SERVER__PORT", &web.address().port().to_string());
    deployment.ask(&[]).assert("version", "warn", "tells none");
    web.serve("/metrics", Reply::ok(&Content::of(b"artifact_cache_build_info{version=\"0.0.1\"} 1\n")));
    deployment.ask(&[]).assert("version", "warn", "the running service is 0.0.1");
}

#[test]
fn doors_that_are_too_wide() {
    let found = Deployment::new()
        .with("UPSTREAM__ALLOW_PRIVATE_NETWORKS", "127.0.0.0/8,169.254.0.0/16")
        .with("SERVER__TRUSTED_PROXIES", "10.0.0.0/8,0.0.0.0/0")
        .with("UPSTREAM__PROXY", "http://192.0.2.1:3128")
        .ask(&[]);
    found.assert(
        "internal networks",
        "warn",
        "reaches 127.0.0.1, 169.254.169.254, [::ffff:127.0.0.1] through it",
    );
    found.assert("internal networks", "warn", "upstream.proxy resolves names itself");
    found.assert("trusted proxies", "warn", "0.0.0.0/0");
}

#[test]
fn authorities_that_cannot_be_read() {
    let found = Deployment::new().with("UPSTREAM__CA_FILE", "none.pem").ask(&[]);
    found.assert("TLS authorities", "fail", "none.pem");
}

#[test]
fn too_few_open_files() {
    let deployment = Deployment::new();
    let mut command = Command::new("sh");
    command.env_clear().envs(deployment.env.iter().cloned()).current_dir(deployment.dir.path());
    let found = diagnosis({
        command.args(["-c", "ulimit -n 512; exec \"$0\" doctor --json", BINARY]);
        command
    });
    found.assert("open files", "warn", "at most 512");
}

#[test]
fn the_server_that_clients_name() {
    let service = Service::new().start();
    let server = format!("http://{}", service.api);
    let found = Deployment::of(&service).ask(&["--server", &server]);
    found.assert("server", "ok", "200");
    found.assert("server's clock", "ok", "as here");
    found.assert("server's version", "ok", env!("CARGO_PKG_VERSION"));
    found.assert("client addresses", "ok", "127.0.0.1 is a trusted proxy itself");
    let found = Deployment::of(&service).ask(&["--server", "http://127.0.0.1:1"]);
    found.assert("server", "fail", "can't be reached");
}

#[test]
fn whether_the_service_sees_its_clients() {
    // It trusts nobody, so it sees the peer whatever is claimed.
    let careful = Service::new().env("SERVER__TRUSTED_PROXIES", "").start();
    let deployment =
        |service: &Running| Deployment::of(service).with("SERVER__TRUSTED_PROXIES", "10.0.0.0/8");
    let server = |service: &Running| format!("http://{}", service.api);
    let found = deployment(&careful).ask(&["--server", &server(&careful)]);
    found.assert("client addresses", "ok", "sees 127.0.0.1, as it is");
    // It trusts us, and the doctor's configuration says that we are no proxy: anybody could claim anything.
    let credulous = Service::new().start();
    let found = deployment(&credulous).ask(&["--server", &server(&credulous)]);
    found.assert("client addresses", "warn", "claimed to be 192.0.2.77, and the service believed it");
    // Something in between that the service does not trust is all it sees.
    let front = Upstream::start();
    front.on("/health", |x| {
        x.send("HTTP/1.1 200 OK\r\nVia: 1.1 front\r\nX-Client-IP: 10.0.0.9\r\nContent-Length: 20\r\n\r\n{\"status\":\"healthy\"}")
    });
    let found = deployment(&careful).ask(&["--server", &front.url("")]);
    found.assert("client addresses", "warn", "sees 10.0.0.9 instead of 127.0.0.1");
    front.on("/health", |x| {
        x.send("HTTP/1.1 200 OK\r\nDate: Sun, 06 Nov 1994 08:49:37 GMT\r\nContent-Length: 20\r\n\r\n{\"status\":\"healthy\"}")
    });
    let found = deployment(&careful).ask(&["--server", &front.url("")]);
    found.assert("client addresses", "warn", "does not say whom it sees");
    found.assert("server's clock", "warn", "s from this machine's");
}

#[test]
fn an_upstream_is_asked_only_on_request() {
    let up = Upstream::start();
    let url = up.serve("/x", Reply::ok(&Content::of(b"x")));
    let deployment = Deployment::new();
    deployment.ask(&[&format!("--online={url}")]).assert("upstream", "fail", "allow_private_networks");
    let deployment = deployment.with("UPSTREAM__ALLOW_PRIVATE_NETWORKS", "127.0.0.0/8");
    assert!(deployment.ask(&[]).all("upstream").is_empty());
    assert_eq!(up.total(), 0);
    deployment.ask(&["--online", &url]).assert("upstream", "ok", "answers");
    assert_eq!(up.requests("/x")[0].line.split(' ').next(), Some("HEAD"), "nothing is downloaded");
    deployment.ask(&["--online", &up.url("/gone")]).assert("upstream", "fail", "404");
}
