//! A Docker engine of the test's own, in namespaces: no image, network or container of the machine is seen or touched.

use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::harness::{eventually, skip};
use crate::machine::on_network_of;
use crate::program::{need, test_name};
use crate::root;

/// Belongs to the engine's network alone, and looks as if it were somewhere on the internet.
pub const OUTSIDE: Ipv4Addr = Ipv4Addr::new(11, 22, 33, 44);

/// A running engine; it is gone when dropped, and nothing of it stays.
pub struct Engine {
    unshare: Child,
    dir: tempfile::TempDir,
}

impl Engine {
    /// Starts one; none, and the test is skipped, where that can't be done.
    pub fn start() -> Option<Engine> {
        for program in ["dockerd", "docker", "docker-compose", "unshare", "setpriv", "ip"] {
            need(program)?;
        }
        let there = |name: &str| root().join("target").join(name).is_dir();
        if !rustix::process::geteuid().is_root() || !there("debian") || !there("compiler") {
            skip(&test_name(), "needs root, and the Debian and the compiler of tests/deploy/install");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let mut command = Command::new(root().join("tests/deploy/engine"));
        command.arg(dir.path()).arg(OUTSIDE.to_string());
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        // A group of its own: what is typed at the terminal is not for it.
        let unshare = command.process_group(0).spawn().unwrap();
        let mut engine = Engine { unshare, dir };
        let ended = eventually("the engine answers", || {
            let answers = engine.docker(&["version"]).output().unwrap().status.success();
            let ended = engine.unshare.try_wait().unwrap();
            (answers || ended.is_some()).then_some(ended.is_some())
        });
        if ended {
            let log = fs::read_to_string(engine.path().join("engine.log")).unwrap_or_default();
            let last = log.lines().last().unwrap_or("it says nothing").to_string();
            skip(&test_name(), &format!("no Docker engine can run here: {last}"));
        }
        (!ended).then_some(engine)
    }

    /// A directory for the test's files.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    fn client(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("DOCKER_HOST", format!("unix://{}/docker.sock", self.path().display()));
        // Nobody's own settings, and the builder that needs no plugin.
        command.env("DOCKER_CONFIG", self.path().join("client")).env("DOCKER_BUILDKIT", "0");
        command.stdin(Stdio::null());
        command
    }

    /// `docker` with this engine.
    pub fn docker(&self, args: &[&str]) -> Command {
        let mut command = self.client("docker");
        command.args(args);
        command
    }

    /// `docker-compose` in this directory with this engine.
    pub fn compose(&self, directory: &Path, args: &[&str]) -> Command {
        let mut command = self.client("docker-compose");
        command.args(args).current_dir(directory);
        command
    }

    /// Does `act` on the engine's network, where its published ports are. A socket made there stays there.
    pub fn on_its_network<T: Send>(&self, act: impl FnOnce() -> T + Send) -> T {
        on_network_of(&self.unshare.id().to_string(), act)
    }

    /// Has the engine make an image of what `tar` packs with these arguments.
    pub fn image(&self, tar: &[&str], args: &[&str]) {
        let mut packed =
            Command::new("tar").arg("--create").args(tar).stdout(Stdio::piped()).spawn().unwrap();
        let output = self.docker(args).stdin(packed.stdout.take().unwrap()).output().unwrap();
        assert!(packed.wait().unwrap().success(), "tar {tar:?}");
        assert!(output.status.success(), "docker {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// A property of a `container` or an `image`, in the words of `--format`.
    #[track_caller]
    pub fn inspect(&self, kind: &str, name: &str, format: &str) -> String {
        let output = self.docker(&[kind, "inspect", "--format", format, name]).output().unwrap();
        assert!(output.status.success(), "{kind} {name}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).trim().to_string()
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // With unshare the first process of the namespaces ends, and with that one all others do.
        let _ = self.unshare.kill();
        let _ = self.unshare.wait();
        let cgroup = fs::read_to_string(self.path().join("cgroup")).unwrap_or_default();
        let until = Instant::now() + Duration::from_secs(20);
        while !cgroup.is_empty() && remove_cgroup(&PathBuf::from(cgroup.trim())).is_err() {
            if Instant::now() > until {
                eprintln!("{} stays: it is still used", cgroup.trim());
                break;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// A group can be removed when no process is in it and in those below it.
fn remove_cgroup(path: &Path) -> std::io::Result<()> {
    for below in fs::read_dir(path)?.flatten().filter(|entry| entry.path().is_dir()) {
        remove_cgroup(&below.path())?;
    }
    fs::remove_dir(path)
}
