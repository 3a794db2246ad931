//! The role `server` of `deploy/ansible`, run by the real ansible-playbook against a booted Debian.
//!
//! What is replaced is named here: Ansible's `ssh` is a script that enters the machine's namespaces instead of reaching
//! it over a network.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::PathBuf;
use std::process::Command;

use serde_json::{Value, json};

use crate::harness::service::BINARY;
use crate::harness::{Content, Reply, fetch_target, skip};
use crate::machine::{Machine, UNIT};
use crate::program::{Ended, need, run, test_name};
use crate::root;
use crate::support::{changed_tasks, need_in_venv};

const CONFIG: &str = "/etc/artifact-cache/config.yaml";
const DATA: &str = "/var/lib/artifact-cache";
const ELSEWHERE: &str = "/srv/artifacts";

/// Runs the command that is ssh's last argument, as ssh would: with a shell, and nothing of our environment.
const SSH: &str = r#"#!/bin/sh
for command do :; done
exec nsenter --target INIT --all -- env -i HOME=/root PATH=/usr/sbin:/usr/bin:/sbin:/bin sh -c "$command"
"#;

/// The role as most would use it; it needs no facts.
const PLAYBOOK: &str =
    "- hosts: cachehost\n  gather_facts: false\n  roles: [homelab.artifact_cache.server]\n";

/// Where ansible-playbook runs, and the machine that it is about.
struct Controller {
    ansible: PathBuf,
    dir: tempfile::TempDir,
    machine: Machine,
}

impl Controller {
    /// For this machine; none, and the test is skipped, without Ansible here or Python there.
    fn of(machine: Option<Machine>) -> Option<Controller> {
        let (ansible, machine) = (need_in_venv("ansible-playbook")?, machine?);
        if !machine.has("/usr/bin/python3") {
            skip(&test_name(), "the Debian of tests/deploy/install has no Python");
            return None;
        }
        let controller = Controller { ansible, dir: tempfile::tempdir().unwrap(), machine };
        let ssh = controller.write("ssh", &SSH.replace("INIT", &controller.machine.init()));
        fs::set_permissions(ssh, PermissionsExt::from_mode(0o755)).unwrap();
        // Where Ansible would have put the collection.
        let collections = controller.dir.path().join("ansible_collections/homelab");
        fs::create_dir_all(&collections).unwrap();
        symlink(root().join("deploy/ansible"), collections.join("artifact_cache")).unwrap();
        // What is unstripped takes longer to send than all else.
        let program = controller.dir.path().join("program");
        let stripped = Command::new(need("strip")?).arg("-o").arg(program).arg(BINARY).status().unwrap();
        assert!(stripped.success());
        Some(controller)
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        fs::write(&path, text).unwrap();
        path
    }

    /// Runs a playbook's text on the machine.
    fn play(&self, text: &str, variables: &Value, options: &[&str]) -> Ended {
        let connection = json!({
            "ansible_connection": "ssh",
            "ansible_ssh_executable": self.dir.path().join("ssh"),
            "ansible_ssh_args": "",
            "ansible_ssh_transfer_method": "piped",
            "ansible_python_interpreter": "/usr/bin/python3",
            "artifact_cache_binary": self.dir.path().join("program"),
        });
        self.write("connection.json", &connection.to_string());
        self.write("variables.json", &variables.to_string());
        let playbook = self.write("site.yml", text);
        let mut command = Command::new(&self.ansible);
        command.args(["-i", "cachehost,", "-e", "@connection.json", "-e", "@variables.json"]);
        command.args(options).arg(playbook).current_dir(self.dir.path()).env_clear();
        command.env("PATH", std::env::var_os("PATH").unwrap_or_default());
        command.env("HOME", self.dir.path()).env("LANG", "C.UTF-8").env("ANSIBLE_PIPELINING", "true");
        command.env("ANSIBLE_COLLECTIONS_PATH", self.dir.path());
        run(command)
    }

    /// Runs the role with this configuration and these further variables.
    fn role(&self, config: &Value, more: &[(&str, &str)], options: &[&str]) -> Ended {
        let mut variables = json!({ "artifact_cache_config": config });
        for (name, value) in more {
            variables[name] = json!(value);
        }
        self.play(PLAYBOOK, &variables, options)
    }

    fn config(&self) -> String {
        fs::read_to_string(self.machine.file(CONFIG)).unwrap()
    }
}

/// A configuration that lets the service fetch from the test.
fn config() -> Value {
    json!({ "upstream": { "allow_private_networks": ["127.0.0.0/8"] }, "storage": { "min_free_bytes": "1MiB" } })
}

#[test]
fn it_installs_changes_moves_and_is_removed() {
    let Some(controller) = Controller::of(Machine::boot()) else { return };
    let machine = &controller.machine;
    let (up, content) = (machine.upstream(), Content::new(110, 300_000));
    let url = fetch_target(&up.serve("/a.bin", Reply::ok(&content)));
    let has_it = || assert!(machine.get(8080, &url) == Some(content.bytes()), "{}", machine.journal());

    a_check_of_an_empty_host_changes_nothing(&controller);
    installs_and_starts_once(&controller);
    has_it();
    a_second_run_changes_nothing(&controller);
    has_it();
    assert_eq!(up.count("/a.bin"), 1, "it came from the archive");
    what_changes_is_taken_with_one_restart(&controller);
    a_wrong_configuration_is_refused(&controller);
    has_it();
    assert_eq!(up.count("/a.bin"), 2, "the new archive began empty");
    removal_leaves_the_archive(&controller);
}

fn a_check_of_an_empty_host_changes_nothing(controller: &Controller) {
    let ended = controller.role(&config(), &[], &["--check", "--diff"]);
    assert!(changed_tasks(&ended) > 0, "{ended:?}");
    assert!(ended.stdout.contains("+  allow_private_networks:"), "the difference is shown: {ended:?}");
    for path in ["/usr/local/bin/artifact-cache", CONFIG, DATA, "/etc/systemd/system/artifact-cache.service"]
    {
        assert!(!controller.machine.has(path), "{path}");
    }
    controller.machine.run_refused("id", &["artifact-cache"]);
}

fn installs_and_starts_once(controller: &Controller) {
    let machine = &controller.machine;
    assert!(changed_tasks(&controller.role(&config(), &[], &[])) > 0);
    assert!(machine.is_active(UNIT), "{}", machine.journal());
    assert_eq!(machine.run("systemctl", &["is-enabled", UNIT]).trim(), "enabled");
    assert_eq!(machine.starts(), 1, "{}", machine.journal());
    let owner = machine.run("stat", &["--format", "%U:%G %a", DATA, "/var/lib/artifact-cache/metadata.db"]);
    assert_eq!(owner.trim(), "artifact-cache:artifact-cache 750\nartifact-cache:artifact-cache 640");
    let doctor =
        ["-u", "artifact-cache", "--", "/usr/local/bin/artifact-cache", "doctor", "--config", CONFIG];
    machine.run("runuser", &doctor);
    let user = machine.run("getent", &["passwd", "artifact-cache"]);
    assert!(user.trim().ends_with(":/var/lib/artifact-cache:/usr/sbin/nologin"), "{user}");
}

fn a_second_run_changes_nothing(controller: &Controller) {
    let before = controller.machine.property("MainPID");
    assert_eq!(changed_tasks(&controller.role(&config(), &[], &[])), 0);
    assert_eq!(controller.machine.property("MainPID"), before);
}

/// Other settings and another place for the data: four tasks change something, of which one is the restart.
fn what_changes_is_taken_with_one_restart(controller: &Controller) {
    let (machine, mut changed) = (&controller.machine, config());
    changed["server"] = json!({ "metrics_port": 9191 });
    let elsewhere = [("artifact_cache_data_dir", ELSEWHERE)];
    let before = (machine.property("MainPID"), controller.config());
    let ended = controller.role(&changed, &elsewhere, &["--check", "--diff"]);
    assert_eq!(changed_tasks(&ended), 4, "{ended:?}");
    assert!(ended.stdout.contains("+  metrics_port: 9191"), "{ended:?}");
    assert_eq!((machine.property("MainPID"), controller.config()), before, "a check changes nothing");

    let ended = controller.role(&changed, &elsewhere, &[]);
    assert_eq!(changed_tasks(&ended), 4, "{ended:?}");
    assert_eq!(machine.starts(), 2, "{}", machine.journal());
    assert!(machine.get(9191, "/metrics").is_some(), "the change counts: {}", machine.journal());
    for dir in [DATA, ELSEWHERE] {
        assert!(machine.has(&format!("{dir}/metadata.db")), "{dir}");
    }
    let user = machine.run("getent", &["passwd", "artifact-cache"]);
    assert!(user.contains(":/var/lib/artifact-cache:"), "a running service's user stays as it is: {user}");
}

fn a_wrong_configuration_is_refused(controller: &Controller) {
    let (machine, mut wrong) = (&controller.machine, config());
    wrong["server"] = json!({ "port": "none" });
    let before = (machine.property("MainPID"), controller.config());
    // What comes before has nothing to do and takes its time.
    let there = "--start-at-task=homelab.artifact_cache.server : Write the configuration";
    let ended = controller.role(&wrong, &[], &[there]);
    assert!(!ended.success && ended.stdout.contains("server.port"), "the key is named: {ended:?}");
    assert_eq!((machine.property("MainPID"), controller.config()), before, "nothing has changed");
    assert_eq!(machine.starts(), 2);
}

/// The play of the README.
fn removal_leaves_the_archive(controller: &Controller) {
    let machine = &controller.machine;
    let page = fs::read_to_string(root().join("deploy/ansible/README.md")).unwrap();
    let after = page.split_once("To remove it:").expect("the page says how to remove it").1;
    let text = after.split("```").nth(1).and_then(|block| block.strip_prefix("yaml\n")).expect("a playbook");
    let ended = controller.play(&text.replace("  become: true\n", ""), &json!({}), &[]);
    assert_eq!(changed_tasks(&ended), 2, "{ended:?}");
    assert_eq!(machine.get(8080, "/health"), None, "it is stopped");
    assert_eq!(machine.property("LoadState"), "not-found");
    let left = machine.run("find", &["/", "-xdev", "-name", "*artifact-cache*"]);
    assert_eq!(left.trim(), DATA, "nothing else is left");
    assert!(machine.has("/srv/artifacts/metadata.db") && machine.has("/var/lib/artifact-cache/metadata.db"));
    machine.run("rm", &["-r", DATA]);
    machine.run("userdel", &["artifact-cache"]);
}

#[test]
fn where_systemd_is_installed_but_does_not_run_it_starts_nothing() {
    let Some(controller) = Controller::of(Machine::without_systemd()) else { return };
    let machine = &controller.machine;
    assert!(changed_tasks(&controller.role(&config(), &[], &[])) > 0);
    let said = machine.run("/usr/local/bin/artifact-cache", &["config", "check", "--config", CONFIG]);
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(machine.has("/etc/systemd/system/artifact-cache.service"));
}
