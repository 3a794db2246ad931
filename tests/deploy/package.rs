//! The Debian package in a Debian with systemd as its first process, in namespaces of its own: installed, started,
//! watched, woken by a socket, upgraded, removed and purged.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::harness::service::BINARY;
use crate::harness::{Content, Reply, eventually, fetch_target};
use crate::machine::{Machine, UNIT};
use crate::program::need;
use crate::root;

/// Its units.
const UNITS: [&str; 3] = [UNIT, "artifact-cache.socket", "artifact-cache-metrics.socket"];

/// Its configuration.
const CONFIG: &str = "/etc/artifact-cache/config.yaml";

/// What dpkg knows of the installed package.
#[track_caller]
fn about(machine: &Machine, field: &str) -> String {
    let format = format!("--showformat={field}");
    machine.run("dpkg-query", &["--show", &format, "artifact-cache"])
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

#[test]
fn the_package_lives_a_whole_life_under_systemd() {
    let dir = tempfile::tempdir().unwrap();
    let (Some(package), Some(machine)) = (build_package(dir.path()), Machine::boot()) else { return };
    machine.put(&package, "/root/artifact-cache.deb");
    let content = Content::new(100, 300_000);
    let up = machine.upstream();
    let url = fetch_target(&up.serve("/a.bin", Reply::ok(&content)));

    install(&machine);
    serves(&machine, &url, &content);
    a_hang_ends_in_a_restart(&machine, &url, &content);
    sockets_start_it(&machine, &url, &content);
    reinstall(&machine, &url, &content);
    a_service_that_cannot_start_is_installed_all_the_same(&machine);
    remove_and_purge(&machine);
}

fn install(machine: &Machine) {
    machine.run("dpkg", &["--install", "/root/artifact-cache.deb"]);
    assert!(machine.is_active(UNIT), "started when installed: {}", machine.journal());
    assert_eq!(machine.run("systemctl", &["is-enabled", UNIT]).trim(), "enabled");
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
    assert_eq!(machine.run("artifact-cache", &["config", "check", "--config", CONFIG]).lines().count(), 1);
}

fn serves(machine: &Machine, url: &str, content: &Content) {
    assert_eq!(machine.get(8080, url), None, "internal networks are refused as installed");
    let config = machine.file(CONFIG);
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, text + "\nupstream:\n  allow_private_networks: [127.0.0.0/8]\n").unwrap();
    machine.run("systemctl", &["restart", "artifact-cache"]);
    for _ in 0..2 {
        assert!(machine.get(8080, url).as_deref() == Some(&content.bytes()), "{}", machine.journal());
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

fn a_hang_ends_in_a_restart(machine: &Machine, url: &str, content: &Content) {
    let dir = machine.file("/run/systemd/system/artifact-cache.service.d");
    fs::create_dir_all(&dir).unwrap();
    fs::write(dir.join("watchdog.conf"), "[Service]\nWatchdogSec=2s\nRestartSec=100ms\n").unwrap();
    machine.run("systemctl", &["daemon-reload"]);
    machine.run("systemctl", &["restart", "artifact-cache"]);
    let hung = machine.property("MainPID");
    machine.run("systemctl", &["kill", "--signal=STOP", "--kill-whom=main", "artifact-cache"]);
    eventually("it is killed and started again", || {
        (machine.property("NRestarts") == "1" && machine.is_active(UNIT)).then_some(())
    });
    assert_ne!(machine.property("MainPID"), hung);
    let again = machine.get(8080, url);
    assert!(again.as_deref() == Some(&content.bytes()), "nothing is lost: {}", machine.journal());
    fs::remove_file(dir.join("watchdog.conf")).unwrap();
    machine.run("systemctl", &["daemon-reload"]);
}

fn sockets_start_it(machine: &Machine, url: &str, content: &Content) {
    machine.run("systemctl", &["stop", "artifact-cache"]);
    assert_eq!(machine.property("Result"), "success", "stopped well");
    machine.run("systemctl", &["start", UNITS[1], UNITS[2]]);
    assert!(!machine.is_active(UNIT));
    let first = machine.get(8080, url);
    assert!(first.as_deref() == Some(&content.bytes()), "the request that starts it is answered");
    assert!(machine.is_active(UNIT));
    assert!(machine.get(9090, "/metrics").is_some());
    assert_eq!(machine.get(9090, url), None, "no /fetch here");
    assert!(
        machine.journal().contains(r#""api":"127.0.0.1:8080","metrics":"127.0.0.1:9090""#),
        "its own sockets"
    );
}

fn reinstall(machine: &Machine, url: &str, content: &Content) {
    let before = machine.property("MainPID");
    machine.run("dpkg", &["--install", "/root/artifact-cache.deb"]);
    assert!(machine.is_active(UNIT));
    assert_ne!(machine.property("MainPID"), before, "the new version runs");
    // It would be 403 if the changed configuration had been replaced and the hit lost.
    let hit = machine.get(8080, url);
    assert!(hit.as_deref() == Some(&content.bytes()), "configuration and archive stay");
}

fn a_service_that_cannot_start_is_installed_all_the_same(machine: &Machine) {
    let config = machine.file(CONFIG);
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, text + "\nnonsense: true\n").unwrap();
    let said = machine.run("dpkg", &["--install", "/root/artifact-cache.deb"]);
    assert!(said.contains("artifact-cache: installed, but it does not start"), "{said}");
    assert_eq!(about(machine, "${db:Status-Status}"), "installed");
    assert!(!machine.is_active(UNIT));
    assert!(machine.journal().contains("nonsense"), "the journal has the reason: {}", machine.journal());
}

fn remove_and_purge(machine: &Machine) {
    machine.run("dpkg", &["--remove", "artifact-cache"]);
    assert_eq!(machine.get(8080, "/health"), None, "it is stopped");
    assert!(!machine.file("/usr/bin/artifact-cache").exists());
    assert!(machine.file(CONFIG).exists(), "removal keeps the configuration");
    let said = machine.run("dpkg", &["--purge", "artifact-cache"]);
    assert!(said.contains("the archive stays in /var/lib/artifact-cache"), "{said}");
    assert!(machine.file("/var/lib/artifact-cache/metadata.db").exists(), "purging keeps the archive");
    let search = ["/", "-xdev", "-name", "*artifact-cache*", "-not", "-path", "/root/*"];
    let left = machine.run("find", &search);
    assert_eq!(left.trim(), "/var/lib/artifact-cache", "nothing else is left");
}

/// Makes an older version of a package: the same program under a lower number, with another configuration as installed.
fn older(package: &Path, dir: &Path) -> PathBuf {
    let (tree, older) = (dir.join("older"), dir.join("older.deb"));
    let dpkg_deb = |options: &[&str], from: &Path, to: &Path| {
        let done = Command::new("dpkg-deb").args(options).args([from, to]).output().unwrap();
        assert!(done.status.success(), "{done:?}");
    };
    dpkg_deb(&["--raw-extract"], package, &tree);
    let (control, config) = (tree.join("DEBIAN/control"), tree.join(&CONFIG[1..]));
    let text = fs::read_to_string(&control).unwrap();
    let lower = text.replace(concat!("Version: ", env!("CARGO_PKG_VERSION")), "Version: 0.0.1");
    assert_ne!(lower, text);
    fs::write(control, lower).unwrap();
    let text = fs::read_to_string(&config).unwrap();
    fs::write(config, text + "\n# As the older version had it.\n").unwrap();
    dpkg_deb(&["-Zgzip", "-z1", "--root-owner-group", "--build"], &tree, &older);
    older
}

/// apt as it is used unattended; what of it may not prompt is in docs/install.md.
fn apt<'a>(package: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&["install", "--yes", "--quiet", "-o", "Dpkg::Options::=--force-confold", package], more].concat()
}

#[test]
fn an_upgrade_keeps_configuration_archive_and_unfinished_downloads() {
    const CUT: u64 = 3 << 20;
    let dir = tempfile::tempdir().unwrap();
    let (Some(package), Some(machine)) = (build_package(dir.path()), Machine::boot()) else { return };
    machine.put(&older(&package, dir.path()), "/root/older.deb");
    machine.put(&package, "/root/newer.deb");
    let (up, small, large) = (machine.upstream(), Content::new(102, 300_000), Content::new(103, CUT + 1000));
    let url = fetch_target(&up.serve("/a.bin", Reply::ok(&small)));
    let (reply, cut) = (Reply::ok(&large).field("ETag", "\"one\""), large.clone());
    let large_url = fetch_target(&up.on("/large.bin", move |x| match x.attempt {
        1 => {
            x.send(&reply.head(200, 0))?;
            x.body(&cut, 0, CUT)?;
            x.hang()
        }
        _ => x.reply(&reply),
    }));

    machine.run("apt-get", &apt("/root/older.deb", &[]));
    let installed = fs::read_to_string(machine.file(CONFIG)).unwrap();
    let configured = installed
        .replace("  port: 8080\n", "  port: 8080\n  shutdown_grace_seconds: 0.1\n")
        .replace("\nstorage:\n", "\nstorage:\n  checkpoint_bytes: 1MiB\n")
        + "\nupstream:\n  allow_private_networks: [127.0.0.0/8]\n";
    fs::write(machine.file(CONFIG), &configured).unwrap();
    machine.run("systemctl", &["restart", UNIT]);
    assert!(machine.get(8080, &url) == Some(small.bytes()), "{}", machine.journal());
    std::thread::scope(|scope| {
        let broken_off = scope.spawn(|| machine.get(8080, &large_url));
        eventually("it is being downloaded", || {
            let spool = fs::read_dir(machine.file("/var/lib/artifact-cache/cache/.spool")).unwrap();
            let is_checkpoint =
                |entry: fs::DirEntry| entry.file_name().to_string_lossy().ends_with(".checkpoint");
            spool.flatten().any(is_checkpoint).then_some(())
        });
        machine.run("apt-get", &apt("/root/newer.deb", &[]));
        assert_ne!(broken_off.join().unwrap(), Some(large.bytes()));
    });

    assert_eq!(about(&machine, "${Version}"), env!("CARGO_PKG_VERSION"));
    assert!(machine.is_active(UNIT), "{}", machine.journal());
    assert_eq!(machine.starts(), 3, "installed, configured, upgraded: {}", machine.journal());
    assert_eq!(fs::read_to_string(machine.file(CONFIG)).unwrap(), configured);
    assert!(machine.has(&format!("{CONFIG}.dpkg-dist")), "the new version's own is beside it");
    assert!(machine.get(8080, &url) == Some(small.bytes()), "{}", machine.journal());
    assert_eq!(up.count("/a.bin"), 1, "a hit after it");
    assert!(machine.get(8080, &large_url) == Some(large.bytes()), "{}", machine.journal());
    let ranges: Vec<_> =
        up.requests("/large.bin").iter().map(|head| head.get("Range").map(String::from)).collect();
    assert_eq!(ranges, [None, Some(format!("bytes={CUT}-"))], "it goes on where it was");

    let refused = machine.run_refused("apt-get", &apt("/root/older.deb", &[]));
    assert!(refused.contains("--allow-downgrades"), "{refused}");
    assert_eq!((about(&machine, "${Version}").as_str(), machine.starts()), (env!("CARGO_PKG_VERSION"), 3));
    machine.run("apt-get", &apt("/root/older.deb", &["--allow-downgrades"]));
    assert_eq!((about(&machine, "${Version}").as_str(), machine.starts()), ("0.0.1", 4));
    assert!(machine.get(8080, &url) == Some(small.bytes()), "{}", machine.journal());
    assert_eq!(fs::read_to_string(machine.file(CONFIG)).unwrap(), configured);
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
