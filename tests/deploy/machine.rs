//! A Debian of the tests' own, in namespaces of its own: booted with systemd as its first process, or without it, as a
//! container would have it. Nothing of it stays.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::harness::{Upstream, eventually, skip};
use crate::program::{find, need, test_name};
use crate::root;

/// The service's unit.
pub const UNIT: &str = "artifact-cache.service";

/// A running Debian; it is gone when dropped.
pub struct Machine {
    unshare: Child,
    init: Pid,
}

impl Machine {
    /// Boots one; none, and the test is skipped, where that can't be done.
    pub fn boot() -> Option<Machine> {
        let machine = Machine::start(&[])?;
        eventually("it has booted", || {
            let state = machine.command("systemctl", &["is-system-running"]).output().unwrap();
            let state = String::from_utf8_lossy(&state.stdout).trim().to_string();
            assert_ne!(state, "degraded", "{}", machine.run("systemctl", &["--failed", "--no-pager"]));
            (state == "running").then_some(())
        });
        Some(machine)
    }

    /// The same Debian, in which systemd is installed and something else is the first process.
    pub fn without_systemd() -> Option<Machine> {
        let machine = Machine::start(&["/usr/bin/sleep", "infinity"])?;
        eventually("its file systems are there", || {
            let name = fs::read_to_string(format!("/proc/{}/comm", machine.init.as_raw_nonzero())).ok()?;
            (name.trim() == "sleep").then_some(())
        });
        Some(machine)
    }

    /// Starts one with this first process.
    fn start(first: &[&str]) -> Option<Machine> {
        let debian = root().join("target/debian");
        if !rustix::process::geteuid().is_root() || !debian.is_dir() {
            skip(&test_name(), "needs root and the Debian of tests/deploy/install");
            return None;
        }
        need("curl")?;
        let mut command = Command::new(need("unshare")?);
        command.args(["--pid", "--fork", "--kill-child", "--mount", "--uts", "--ipc", "--cgroup", "--net"]);
        command.arg(root().join("tests/deploy/boot")).arg(debian).args(first).stdin(Stdio::null());
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        // A group of its own: what is typed at the terminal is not for it.
        let mut unshare = command.process_group(0).spawn().unwrap();
        let children = format!("/proc/{0}/task/{0}/children", unshare.id());
        let init = eventually("the first process", || {
            let ended = unshare.try_wait().unwrap();
            assert!(ended.is_none(), "no namespaces, or no boot: {:?}", unshare.stderr.take().map(read));
            Pid::from_raw(fs::read_to_string(&children).ok()?.trim().parse().ok()?)
        });
        Some(Machine { unshare, init })
    }

    /// The number of its first process, seen from outside: who it is for `nsenter --target`.
    pub fn init(&self) -> String {
        self.init.as_raw_nonzero().to_string()
    }

    fn enter(&self, namespaces: &[&str], program: &str, args: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.init()]).args(namespaces);
        command.arg("--").arg(program).args(args).stdin(Stdio::null());
        command.env("DEBIAN_FRONTEND", "noninteractive").env("LC_ALL", "C.UTF-8");
        command
    }

    /// A program of the machine.
    pub fn command(&self, program: &str, args: &[&str]) -> Command {
        self.enter(&["--all"], program, args)
    }

    /// Runs a program of the machine, which must succeed: what it says.
    #[track_caller]
    pub fn run(&self, program: &str, args: &[&str]) -> String {
        let (success, said) = self.outcome(program, args);
        assert!(success, "{program} {args:?}: {said}\n{}", self.journal());
        said
    }

    /// Runs one that must fail: what it says.
    #[track_caller]
    pub fn run_refused(&self, program: &str, args: &[&str]) -> String {
        let (success, said) = self.outcome(program, args);
        assert!(!success, "{program} {args:?} succeeds: {said}");
        said
    }

    fn outcome(&self, program: &str, args: &[&str]) -> (bool, String) {
        let output = self.command(program, args).output().unwrap();
        let said = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
        (output.status.success(), said.concat())
    }

    /// What the service said lately.
    pub fn journal(&self) -> String {
        let args = ["--unit", UNIT, "--no-pager", "--lines", "40"];
        let output = self.command("journalctl", &args).output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// How often the service has come to listen since the machine was booted.
    pub fn starts(&self) -> usize {
        self.run("journalctl", &["--sync"]);
        let said = self.run("journalctl", &["--unit", UNIT, "--no-pager", "--output", "cat"]);
        said.lines().filter(|line| line.contains(r#""msg":"listening""#)).count()
    }

    /// A property of the service.
    pub fn property(&self, name: &str) -> String {
        self.run("systemctl", &["show", UNIT, "--value", "--property", name]).trim().to_string()
    }

    /// Whether a unit runs.
    pub fn is_active(&self, unit: &str) -> bool {
        self.command("systemctl", &["is-active", "--quiet", unit]).status().unwrap().success()
    }

    /// GET on its loopback; none if nobody answers, or not with success.
    pub fn get(&self, port: u16, target: &str) -> Option<Vec<u8>> {
        let url = format!("http://127.0.0.1:{port}{target}");
        let curl = find("curl").expect("found when it was booted");
        let args = ["--fail", "--silent", "--max-time", "30", &url];
        let output = self.enter(&["--net"], curl.to_str().unwrap(), &args).output().unwrap();
        output.status.success().then_some(output.stdout)
    }

    /// An upstream of the tests on its loopback.
    pub fn upstream(&self) -> Upstream {
        on_network_of(&self.init(), Upstream::start)
    }

    /// A file of the machine, seen from outside.
    pub fn file(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{path}", self.init()))
    }

    /// Whether it has this file.
    pub fn has(&self, path: &str) -> bool {
        self.file(path).exists()
    }

    /// Puts a file of the outside there.
    pub fn put(&self, from: &Path, to: &str) {
        fs::copy(from, self.file(to)).unwrap();
    }
}

/// Does `act` on the network of this process. A socket made there belongs to that network, whoever uses it afterwards.
pub fn on_network_of<T: Send>(process: &str, act: impl FnOnce() -> T + Send) -> T {
    let network = File::open(format!("/proc/{process}/ns/net")).unwrap();
    let there = || {
        move_into_link_name_space(network.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
        act()
    };
    // A thread of its own, since it can't be moved back.
    std::thread::scope(|scope| scope.spawn(there).join()).unwrap_or_else(|e| std::panic::resume_unwind(e))
}

impl Drop for Machine {
    fn drop(&mut self) {
        // With the first process of a process namespace all others end.
        let _ = kill_process(self.init, Signal::KILL);
        let _ = self.unshare.kill();
        let _ = self.unshare.wait();
    }
}

fn read(mut pipe: impl std::io::Read) -> String {
    let mut text = String::new();
    let _ = pipe.read_to_string(&mut text);
    text
}
