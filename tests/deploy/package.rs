//! The Debian package in a Debian with systemd as its first process, in namespaces of its own: installed, started,
//! watched, woken by a socket, upgraded, removed and purged.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};

use crate::harness::service::BINARY;
use crate::harness::{Content, eventually, fetch_target, skip};
use crate::program::{find, need, test_name};
use crate::root;

/// Its units.
const UNITS: [&str; 3] = ["artifact-cache.service", "artifact-cache.socket", "artifact-cache-metrics.socket"];

/// A booted Debian; it is gone when dropped, and nothing of it stays.
struct Machine {
    unshare: Child,
    init: Pid,
}

impl Machine {
    /// Boots one; none, and the test is skipped, where that can't be done.
    fn boot() -> Option<Machine> {
        let debian = root().join("target/debian");
        if !rustix::process::geteuid().is_root() || !debian.is_dir() {
            skip(&test_name(), "needs root and the Debian of tests/deploy/install");
            return None;
        }
        let mut command = Command::new(need("unshare")?);
        command.args(["--pid", "--fork", "--kill-child", "--mount", "--uts", "--ipc", "--cgroup", "--net"]);
        command.arg(root().join("tests/deploy/boot")).arg(debian).stdin(Stdio::null());
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        // A group of its own: what is typed at the terminal is not for it.
        let mut unshare = command.process_group(0).spawn().unwrap();
        let children = format!("/proc/{0}/task/{0}/children", unshare.id());
        let init = eventually("the first process", || {
            let ended = unshare.try_wait().unwrap();
            assert!(ended.is_none(), "no namespaces, or no boot: {:?}", unshare.stderr.take().map(read));
            Pid::from_raw(fs::read_to_string(&children).ok()?.trim().parse().ok()?)
        });
        let machine = Machine { unshare, init };
        eventually("it has booted", || {
            let state = machine.command("systemctl", &["is-system-running"]).output().unwrap();
            let state = String::from_utf8_lossy(&state.stdout).trim().to_string();
            assert_ne!(state, "degraded", "{}", machine.run("systemctl", &["--failed", "--no-pager"]));
            (state == "running").then_some(())
        });
        Some(machine)
    }

    fn enter(&self, namespaces: &[&str], program: &str, args: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.init.as_raw_nonzero().to_string()]).args(namespaces);
        command.arg("--").arg(program).args(args).stdin(Stdio::null());
        command.env("DEBIAN_FRONTEND", "noninteractive").env("LC_ALL", "C.UTF-8");
        command
    }

    /// A program of the machine.
    fn command(&self, program: &str, args: &[&str]) -> Command {
        self.enter(&["--all"], program, args)
    }

    /// A program of the outside on the machine's network.
    fn on_its_network(&self, program: &Path, args: &[&str]) -> Command {
        self.enter(&["--net"], program.to_str().unwrap(), args)
    }

    /// Runs a program of the machine, which must succeed: what it says.
    #[track_caller]
    fn run(&self, program: &str, args: &[&str]) -> String {
        let output = self.command(program, args).output().unwrap();
        let said =
            [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
        assert!(output.status.success(), "{program} {args:?}: {said}\n{}", self.journal());
        said
    }

    /// What the service said lately.
    fn journal(&self) -> String {
        let args = ["--unit", "artifact-cache", "--no-pager", "--lines", "40"];
        let output = self.command("journalctl", &args).output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// A property of the service.
    fn property(&self, name: &str) -> String {
        self.run("systemctl", &["show", "artifact-cache", "--value", "--property", name]).trim().to_string()
    }

    fn is_active(&self, unit: &str) -> bool {
        self.command("systemctl", &["is-active", "--quiet", unit]).status().unwrap().success()
    }

    /// GET on its loopback; none if nobody answers, or not with success.
    fn get(&self, port: u16, target: &str) -> Option<Vec<u8>> {
        let url = format!("http://127.0.0.1:{port}{target}");
        let curl = find("curl").expect("curl was found before");
        let output =
            self.on_its_network(&curl, &["--fail", "--silent", "--max-time", "30", &url]).output().unwrap();
        output.status.success().then_some(output.stdout)
    }

    /// A file of the machine, seen from outside.
    fn file(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{path}", self.init.as_raw_nonzero()))
    }
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

/// Builds the package of the program under test into `dir`; none, and the test is skipped, without dpkg-dev.
pub fn build_package(dir: &Path) -> Option<PathBuf> {
    need("dpkg-shlibdeps")?;
    let mut command = Command::new(root().join("deploy/debian/build"));
    command.arg(BINARY).arg(dir).env("SOURCE_DATE_EPOCH", "1700000000");
    // A release's compression would take most of the test's time.
    command.env("DPKG_DEB_COMPRESSOR_TYPE", "gzip").env("DPKG_DEB_COMPRESSOR_LEVEL", "1");
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Some(String::from_utf8(output.stdout).unwrap().trim().into())
}

/// An upstream on the machine's network.
struct Origin(Child);

impl Origin {
    fn start(machine: &Machine, dir: &Path) -> Option<Origin> {
        let python = need("python3")?;
        let args = ["-m", "http.server", "--bind", "127.0.0.1", "8000", "--directory", dir.to_str().unwrap()];
        let mut command = machine.on_its_network(&python, &args);
        let origin = Origin(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
        eventually("the upstream listens", || machine.get(8000, "/"));
        Some(origin)
    }
}

impl Drop for Origin {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn the_package_lives_a_whole_life_under_systemd() {
    if need("curl").is_none() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (Some(package), Some(machine)) = (build_package(dir.path()), Machine::boot()) else { return };
    fs::copy(&package, machine.file("/root/artifact-cache.deb")).unwrap();
    let content = Content::new(100, 300_000);
    fs::write(dir.path().join("a.bin"), content.bytes()).unwrap();
    let Some(_origin) = Origin::start(&machine, dir.path()) else { return };

    install(&machine);
    serves(&machine, &content);
    a_hang_ends_in_a_restart(&machine, &content);
    sockets_start_it(&machine, &content);
    reinstall(&machine, &content);
    remove_and_purge(&machine);
}

fn install(machine: &Machine) {
    machine.run("dpkg", &["--install", "/root/artifact-cache.deb"]);
    assert!(machine.is_active(UNITS[0]), "started when installed: {}", machine.journal());
    assert_eq!(machine.run("systemctl", &["is-enabled", UNITS[0]]).trim(), "enabled");
    assert_eq!(
        machine.run("systemd-analyze", &[&["verify", "--man=no"], &UNITS[..]].concat()),
        "",
        "without a word"
    );
    let health = String::from_utf8(machine.get(8080, "/health").expect("it listens")).unwrap();
    assert!(health.contains("\"healthy\""), "{health}");
    assert!(machine.get(9090, "/metrics").is_some(), "metrics on a port of their own");
    for page in ["artifact-cache.1.gz", "artifact-cache-serve.1.gz"] {
        assert!(machine.file("/usr/share/man/man1").join(page).is_file(), "manual page {page}");
    }
    let completions = "/usr/share/bash-completion/completions/artifact-cache";
    machine.run("bash", &["-c", &format!(". {completions} && complete -p artifact-cache")]);
    assert_eq!(
        machine
            .run("artifact-cache", &["config", "check", "--config", "/etc/artifact-cache/config.yaml"])
            .lines()
            .count(),
        1
    );
}

fn serves(machine: &Machine, content: &Content) {
    let url = fetch_target("http://127.0.0.1:8000/a.bin");
    assert_eq!(machine.get(8080, &url), None, "internal networks are refused as installed");
    let config = machine.file("/etc/artifact-cache/config.yaml");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, text + "\nupstream:\n  allow_private_networks: [127.0.0.0/8]\n").unwrap();
    machine.run("systemctl", &["restart", "artifact-cache"]);
    for _ in 0..2 {
        assert!(machine.get(8080, &url).as_deref() == Some(&content.bytes()), "{}", machine.journal());
    }
    let owner = machine.run(
        "stat",
        &["--format", "%U:%G %a", "/var/lib/artifact-cache", "/var/lib/artifact-cache/metadata.db"],
    );
    assert_eq!(owner.trim(), "artifact-cache:artifact-cache 750\nartifact-cache:artifact-cache 640");
    // All that its confinement takes away would show here. A line is written a little after its answer.
    let journal = eventually("the journal has the hit", || {
        Some(machine.journal()).filter(|journal| journal.contains("cache HIT"))
    });
    for level in ["\"WARN\"", "\"ERROR\""] {
        let complaints =
            journal.lines().filter(|line| line.contains(level) && !line.contains("fetch failed"));
        assert_eq!(complaints.collect::<Vec<_>>(), [""; 0], "{level}");
    }
}

fn a_hang_ends_in_a_restart(machine: &Machine, content: &Content) {
    let dir = machine.file("/run/systemd/system/artifact-cache.service.d");
    fs::create_dir_all(&dir).unwrap();
    fs::write(dir.join("watchdog.conf"), "[Service]\nWatchdogSec=2s\nRestartSec=100ms\n").unwrap();
    machine.run("systemctl", &["daemon-reload"]);
    machine.run("systemctl", &["restart", "artifact-cache"]);
    let hung = machine.property("MainPID");
    machine.run("systemctl", &["kill", "--signal=STOP", "--kill-whom=main", "artifact-cache"]);
    eventually("it is killed and started again", || {
        (machine.property("NRestarts") == "1" && machine.is_active(UNITS[0])).then_some(())
    });
    assert_ne!(machine.property("MainPID"), hung);
    let again = machine.get(8080, &fetch_target("http://127.0.0.1:8000/a.bin"));
    assert!(again.as_deref() == Some(&content.bytes()), "nothing is lost: {}", machine.journal());
    fs::remove_file(dir.join("watchdog.conf")).unwrap();
    machine.run("systemctl", &["daemon-reload"]);
}

fn sockets_start_it(machine: &Machine, content: &Content) {
    machine.run("systemctl", &["stop", "artifact-cache"]);
    assert_eq!(machine.property("Result"), "success", "stopped well");
    machine.run("systemctl", &["start", UNITS[1], UNITS[2]]);
    assert!(!machine.is_active(UNITS[0]));
    let first = machine.get(8080, &fetch_target("http://127.0.0.1:8000/a.bin"));
    assert!(first.as_deref() == Some(&content.bytes()), "the request that starts it is answered");
    assert!(machine.is_active(UNITS[0]));
    assert!(machine.get(9090, "/metrics").is_some());
    assert_eq!(machine.get(9090, &fetch_target("http://127.0.0.1:8000/a.bin")), None, "no /fetch here");
    assert!(
        machine.journal().contains(r#""api":"127.0.0.1:8080","metrics":"127.0.0.1:9090""#),
        "its own sockets"
    );
}

fn reinstall(machine: &Machine, content: &Content) {
    let before = machine.property("MainPID");
    machine.run("dpkg", &["--install", "/root/artifact-cache.deb"]);
    assert!(machine.is_active(UNITS[0]));
    assert_ne!(machine.property("MainPID"), before, "the new version runs");
    // It would be 403 if the changed configuration had been replaced and the hit lost.
    let hit = machine.get(8080, &fetch_target("http://127.0.0.1:8000/a.bin"));
    assert!(hit.as_deref() == Some(&content.bytes()), "configuration and archive stay");
}

fn remove_and_purge(machine: &Machine) {
    machine.run("dpkg", &["--remove", "artifact-cache"]);
    assert_eq!(machine.get(8080, "/health"), None, "it is stopped");
    assert!(!machine.file("/usr/bin/artifact-cache").exists());
    assert!(machine.file("/etc/artifact-cache/config.yaml").exists(), "removal keeps the configuration");
    let said = machine.run("dpkg", &["--purge", "artifact-cache"]);
    assert!(said.contains("the archive stays in /var/lib/artifact-cache"), "{said}");
    assert!(machine.file("/var/lib/artifact-cache/metadata.db").exists(), "purging keeps the archive");
    let search = ["/", "-xdev", "-name", "*artifact-cache*", "-not", "-path", "/root/*"];
    let left = machine.run("find", &search);
    assert_eq!(left.trim(), "/var/lib/artifact-cache", "nothing else is left");
}

#[test]
fn the_unit_is_as_confined_as_the_docs_say() {
    let Some(analyze) = need("systemd-analyze") else { return };
    let unit = root().join("deploy/systemd/artifact-cache.service");
    let output =
        Command::new(analyze).args(["security", "--offline=true", "--no-pager"]).arg(unit).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let verdict = text.lines().find(|line| line.contains("exposure level")).unwrap_or(&text);
    let score = verdict.split(": ").nth(1).and_then(|rest| rest.split(' ').next()).unwrap_or_default();
    let page = fs::read_to_string(root().join("docs/install.md")).unwrap();
    assert!(
        page.contains(&format!("exposure {score} of 10")),
        "docs/install.md says another score than {verdict:?}"
    );
}
