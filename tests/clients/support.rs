//! A stage for one client: upstream, service, a proxy or none, a directory to download into; and how its run ended.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::harness::{
    Content, Reply, Running, Service, Upstream, WRONG_SHA, eventually, fetch_sha_target, fetch_target,
};
use crate::program::run;
pub use crate::program::{Ended, find, need, test_name};
use crate::proxies::{Front, Proxy};

/// Size of a download that is large enough to be streamed, and to be split.
pub const SIZE: u64 = 1 << 20;

/// When upstream last changed its files: long ago, and a valid `Last-Modified`.
pub const LAST_MODIFIED: &str = "Sun, 06 Nov 2022 08:49:37 GMT";

/// How long an upstream that is to be streamed stops before its last byte: several times what the service waits.
const PAUSE: Duration = Duration::from_millis(700);

/// Declares one test for each way to the service, all with the same body.
macro_rules! on_each_front {
    ($(#[$about:meta])* fn $name:ident($stage:ident: &Stage) $body:block) => {
        $(#[$about])*
        mod $name {
            use super::*;
            use crate::proxies::Front;

            fn check($stage: &Stage) $body

            #[test]
            fn direct() {
                $crate::support::with(Front::Direct, check);
            }

            #[test]
            fn through_nginx() {
                $crate::support::with(Front::Nginx, check);
            }

            #[test]
            fn through_nginx_with_default_settings() {
                $crate::support::with(Front::NginxDefaults, check);
            }

            #[test]
            fn through_caddy_with_tls() {
                $crate::support::with(Front::Caddy, check);
            }
        }
    };
}

/// Declares one test for each way to the service on which a streamed miss is broken off, all with the same body.
///
/// Some clients (`careless`) don't compare what came with `Content-Length`: the service lets them wait behind a proxy.
macro_rules! on_each_broken_stream {
    ($(#[$about:meta])* fn $name:ident($stage:ident: &Stage) $body:block) => {
        on_each_broken_stream! { @with false, $(#[$about])* fn $name($stage: &Stage) $body }
    };
    (careless: $(#[$about:meta])* fn $name:ident($stage:ident: &Stage) $body:block) => {
        on_each_broken_stream! { @with true, $(#[$about])* fn $name($stage: &Stage) $body }
    };
    (@with $careless:literal, $(#[$about:meta])* fn $name:ident($stage:ident: &Stage) $body:block) => {
        $(#[$about])*
        mod $name {
            use super::*;
            use crate::proxies::Front;

            fn check($stage: &Stage) $body

            #[test]
            fn direct() {
                $crate::support::with_broken_stream(Front::Direct, $careless, check);
            }

            #[test]
            fn through_nginx() {
                $crate::support::with_broken_stream(Front::Nginx, $careless, check);
            }

            #[test]
            fn through_nginx_with_default_settings() {
                $crate::support::with_broken_stream(Front::NginxDefaults, $careless, check);
            }

            #[test]
            fn through_caddy_with_tls() {
                $crate::support::with_broken_stream(Front::Caddy, $careless, check);
            }
        }
    };
}

/// A program of the Python environment that `install` makes; a missing one skips the calling test.
pub fn need_in_venv(program: &str) -> Option<PathBuf> {
    need(&format!("{}/target/clients-venv/bin/{program}", env!("CARGO_MANIFEST_DIR")))
}

/// How many tasks changed something, from the recap of a playbook that succeeded.
#[track_caller]
pub fn changed_tasks(ended: &Ended) -> u32 {
    ended.assert_success();
    let count = ended.stdout.rsplit_once("changed=").and_then(|(_, rest)| rest.split_whitespace().next());
    count.and_then(|count| count.parse().ok()).unwrap_or_else(|| panic!("no recap in {ended:?}"))
}

/// Runs `check` on a stage with this front, or skips the test if the front is not installed.
pub fn with(front: Front, check: impl FnOnce(&Stage)) {
    if let Some(stage) = Stage::new(front, Service::new().streaming()) {
        check(&stage);
    }
}

/// Like [`with`], for a stream that will be broken off.
pub fn with_broken_stream(front: Front, careless: bool, check: impl FnOnce(&Stage)) {
    if let Some(mut stage) = Stage::new(front, Service::new().streaming()) {
        stage.waits = careless && !front.shows_broken_streams();
        check(&stage);
    }
}

/// All that a client needs.
pub struct Stage {
    // The proxy goes first: it keeps connections open that the service would wait for.
    proxy: Option<Proxy>,
    pub service: Running,
    pub up: Upstream,
    pub front: Front,
    /// The service does not stream to this client on this way.
    waits: bool,
    dir: tempfile::TempDir,
}

impl Stage {
    /// Starts everything; none, and the test is skipped, if the proxy is not installed.
    pub fn new(front: Front, service: Service) -> Option<Stage> {
        if let Some(program) = front.program() {
            need(program)?;
        }
        let service = service.start();
        let proxy = Proxy::start(front, service.api);
        Some(Stage {
            proxy,
            service,
            up: Upstream::start(),
            front,
            waits: false,
            dir: tempfile::tempdir().unwrap(),
        })
    }

    /// Where clients find the service.
    fn base(&self) -> String {
        self.proxy.as_ref().map_or_else(|| format!("http://{}", self.service.api), |proxy| proxy.base.clone())
    }

    /// The authority that clients must trust, if any.
    pub fn authority(&self) -> Option<&Path> {
        self.proxy.as_ref()?.authority.as_deref()
    }

    /// The URL of an artifact here.
    pub fn url(&self, source: &str) -> String {
        self.base() + &fetch_target(source)
    }

    /// The same with an expected digest.
    pub fn url_sha(&self, source: &str, sha256: &str) -> String {
        self.base() + &fetch_sha_target(source, sha256)
    }

    /// The path form: it ends in the file's name.
    pub fn path_url(&self, source: &str) -> String {
        format!("{}/fetch/{source}", self.base())
    }

    /// The path form with an expected digest.
    pub fn path_url_sha(&self, source: &str, sha256: &str) -> String {
        format!("{}/fetch/sha256={sha256}/{source}", self.base())
    }

    /// A file in the client's directory.
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Puts a file upstream, dated [`LAST_MODIFIED`]; returns its URL there.
    pub fn publish(&self, path: &str, content: &Content) -> String {
        self.up.serve(path, Reply::ok(content).field("Last-Modified", LAST_MODIFIED))
    }

    /// Puts a file upstream that stops before its last byte for so long that the service streams it.
    pub fn publish_slowly(&self, path: &str, content: &Content) -> String {
        let content = content.clone();
        self.up.on(path, move |x| {
            x.send(&Reply::ok(&content).head(200, 0))?;
            x.body(&content, 0, content.len() - 1)?;
            std::thread::sleep(PAUSE);
            x.body(&content, content.len() - 1, content.len())
        })
    }

    /// Runs a client to its end in the stage's directory, with no environment but what it needs.
    pub fn run(&self, program: &Path, args: &[&str]) -> Ended {
        let mut command = Command::new(program);
        command.args(args).current_dir(self.dir.path()).env_clear();
        command.env("PATH", std::env::var_os("PATH").unwrap_or_default());
        command.env("HOME", self.dir.path()).env("LANG", "C.UTF-8");
        if let Some(authority) = self.authority() {
            for name in ["CURL_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE", "PIP_CERT"] {
                command.env(name, authority);
            }
        }
        run(command)
    }

    /// Downloads twice with `client` (its arguments: URL, file to write) and asserts that both files are right and
    /// that upstream was asked once.
    #[track_caller]
    pub fn assert_cold_and_hot(&self, client: impl Fn(&str, &Path) -> Ended) {
        let content = Content::new(70, SIZE + 1);
        let source = self.publish("/cold-and-hot.bin", &content);
        for temperature in ["cold", "hot"] {
            let file = self.file(temperature);
            client(&self.url(&source), &file).assert_success();
            assert_same(&file, &content);
        }
        assert_eq!(self.up.count("/cold-and-hot.bin"), 1, "downloaded once");
        self.wait_for_hit(&source);
    }

    /// Downloads a streamed miss with `client` (its arguments: URL, file to write) whose checksum turns out wrong, and
    /// asserts that the client fails and has not got the file.
    #[track_caller]
    pub fn assert_wrong_checksum_fails(&self, client: impl Fn(&str, &Path) -> Ended) {
        let (ended, content) = self.wrong_checksum(SIZE, client);
        assert!(!ended.success, "{:?}: a bad download is called a success: {ended:?}", self.front);
        let kept = fs::read(self.file("bad.bin")).unwrap_or_default();
        assert!(kept != content.bytes(), "the whole of a file with a wrong checksum was handed out");
    }

    /// Runs `client` on a streamed miss of `size` bytes with a wrong checksum: how it ended, and what it asked for.
    #[track_caller]
    pub fn wrong_checksum(&self, size: u64, client: impl Fn(&str, &Path) -> Ended) -> (Ended, Content) {
        let content = Content::new(71, size);
        let source = self.publish_slowly("/bad.bin", &content);
        let ended = client(&self.url_sha(&source, WRONG_SHA), &self.file("bad.bin"));
        self.assert_streamed_and_broken();
        assert_eq!(self.up.count("/bad.bin"), 1, "a retry is answered from memory");
        (ended, content)
    }

    /// Asserts that a body was begun, then broken off for its checksum; or was not begun, where the client has to wait.
    #[track_caller]
    pub fn assert_streamed_and_broken(&self) {
        // A 409 is a warning, a broken body an error.
        let level = if self.waits { "WARN" } else { "ERROR" };
        self.service.wait_log("a checksum mismatch, met in the expected way", |line| {
            line["code"] == "checksum_mismatch" && line["level"] == level
        });
        self.service.assert_nothing_stored();
    }

    /// Waits for the log line of a hit. (It is written when the body has ended, which the client may see first.)
    #[track_caller]
    pub fn wait_for_hit(&self, source: &str) {
        let hit = || self.ended(source).iter().any(|message| message == "cache HIT").then_some(());
        eventually("a hit is logged", hit);
    }

    /// What the log says of each request for an artifact that has ended, also of those that the client left.
    pub fn ended(&self, source: &str) -> Vec<String> {
        let of_it = |line: &serde_json::Value| line["source_url"] == source && line["client_ip"].is_string();
        let message = |line: serde_json::Value| line["msg"].as_str().unwrap_or_default().to_string();
        self.service.logs().into_iter().filter(of_it).map(message).collect()
    }
}

/// Asserts that a file has exactly this content.
#[track_caller]
pub fn assert_same(file: &Path, content: &Content) {
    let bytes = fs::read(file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
    assert_eq!(bytes.len() as u64, content.len(), "size of {}", file.display());
    assert!(bytes == content.bytes(), "{} differs from the artifact", file.display());
}

/// A path as an argument.
pub fn arg(path: &Path) -> &str {
    path.to_str().expect("temporary paths are text")
}
