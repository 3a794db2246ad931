//! The design document's playbooks and the collection in `deploy/ansible`, run by the real ansible-playbook. Its role
//! `server` needs a machine of its own: `tests/deploy/role.rs`.
//!
//! `playbooks/` has the document's text; the names of its hosts, its placeholders for checksums and its `/opt` are
//! replaced, and nothing else is.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::harness::{Content, WRONG_SHA};
use crate::proxies::Front;
use crate::support::{Ended, Stage, arg, assert_same, changed_tasks, need_in_venv, with};

const PROMETHEUS: &str =
    "/prometheus/prometheus/releases/download/v2.45.0/prometheus-2.45.0.linux-amd64.tar.gz";

fn in_repository(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// The artifacts that the playbooks name, published at the stage's upstream.
struct Artifacts {
    prometheus: Content,
    java: Content,
    app: Content,
}

impl Artifacts {
    fn publish(stage: &Stage) -> Artifacts {
        let all = Artifacts {
            prometheus: Content::new(90, 200_000),
            java: Content::new(91, 1_000),
            app: Content::new(92, 0x1234),
        };
        stage.publish(PROMETHEUS, &all.prometheus);
        stage.publish("/temurin-17.tar.gz", &all.java);
        stage.publish("/maven2/com/example/app.jar", &all.app);
        all
    }

    /// A text of the document with the names of this stage in it.
    fn localized(&self, stage: &Stage, text: &str) -> String {
        let fetch = stage.url("");
        let mut text = text.replace("https://artifactcache.lan", fetch.split("/fetch").next().unwrap());
        for host in ["https://github.com", "https://repo1.maven.org", "https://adoptium.net"] {
            text = text.replace(host, stage.up.url("").trim_end_matches('/'));
        }
        for (placeholder, content) in
            [("7a1b2c3d...", &self.prometheus), ("4e5f6a7b...", &self.java), ("abc123def456...", &self.app)]
        {
            text = text.replace(placeholder, &content.sha256());
        }
        text.replace("/opt/", &format!("{}/", stage.file("opt").display()))
    }
}

/// Writes the document's files, localized, into the stage's directory.
fn write_document(stage: &Stage, artifacts: &Artifacts) {
    for name in ["simple.yml", "variables.yml", "role.yml", "roles/cached_download/tasks/main.yml"] {
        let text = fs::read_to_string(in_repository("tests/clients/playbooks").join(name)).unwrap();
        let to = stage.file(name);
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::write(to, artifacts.localized(stage, &text)).unwrap();
    }
    for dir in ["opt/prometheus", "opt/java", "app"] {
        fs::create_dir_all(stage.file(dir)).unwrap();
    }
    fs::write(stage.file("inventory"), "localhost\n[appservers]\nlocalhost\n").unwrap();
}

/// Runs a playbook of the stage's directory; `None` without Ansible.
fn play(stage: &Stage, playbook: &str, more: &[&str]) -> Option<Ended> {
    let (ansible, python) = (need_in_venv("ansible-playbook")?, need_in_venv("python")?);
    let interpreter = format!("ansible_python_interpreter={}", arg(&python));
    let fixed = ["-i", "inventory", "-c", "local", "-e", &interpreter];
    Some(stage.run(&ansible, &[&fixed, more, &[playbook]].concat()))
}

fn the_documents_playbooks_run(stage: &Stage) {
    let artifacts = Artifacts::publish(stage);
    write_document(stage, &artifacts);
    let Some(ended) = play(stage, "simple.yml", &[]) else { return };
    assert_eq!(changed_tasks(&ended), 1);
    let app_dir = format!("app_dir={}", stage.file("app").display());
    assert_eq!(changed_tasks(&play(stage, "variables.yml", &["-e", &app_dir]).expect("Ansible is here")), 1);
    assert_same(&stage.file("app/app.jar"), &artifacts.app);
    assert_same(&stage.file("opt/prometheus/prometheus.tar.gz"), &artifacts.prometheus);
    fs::remove_file(stage.file("opt/prometheus/prometheus.tar.gz")).unwrap();
    assert_eq!(
        changed_tasks(&play(stage, "role.yml", &[]).expect("Ansible is here")),
        1,
        "a loop is one task"
    );
    assert_same(&stage.file("opt/prometheus/prometheus.tar.gz"), &artifacts.prometheus);
    assert_same(&stage.file("opt/java/jdk.tar.gz"), &artifacts.java);
    assert_eq!(stage.up.total(), 3, "each artifact was downloaded once, whoever asked for it");
}

#[test]
fn the_documents_playbooks() {
    with(Front::Direct, the_documents_playbooks_run);
}

#[test]
fn the_documents_playbooks_through_caddy_with_tls() {
    with(Front::Caddy, the_documents_playbooks_run);
}

/// Packs the collection and installs it as users would; the directory to name as ANSIBLE_COLLECTIONS_PATH.
#[track_caller]
fn install_collection(stage: &Stage) -> Option<PathBuf> {
    let galaxy = need_in_venv("ansible-galaxy")?;
    let (packed, to) = (stage.file("packed"), stage.file("collections"));
    let source = in_repository("deploy/ansible");
    stage
        .run(&galaxy, &["collection", "build", arg(&source), "--output-path", arg(&packed)])
        .assert_success();
    let archive = fs::read_dir(&packed).unwrap().next().expect("one archive").unwrap().path();
    stage
        .run(&galaxy, &["collection", "install", "--offline", arg(&archive), "-p", arg(&to)])
        .assert_success();
    Some(to)
}

#[test]
fn the_collections_role_downloads_verifies_and_then_changes_nothing() {
    with(Front::Direct, |stage| {
        let artifacts = Artifacts::publish(stage);
        write_document(stage, &artifacts);
        if install_collection(stage).is_none() {
            return;
        }
        fs::write(
            stage.file("ansible.cfg"),
            "[defaults]\ncollections_path = collections\ngathering = explicit\npipelining = true\n",
        )
        .unwrap();
        let server = format!("cached_download_server={}", stage.url("").split("/fetch").next().unwrap());
        // The document's own playbook, with the collection's role under its full name.
        let playbook = fs::read_to_string(stage.file("role.yml")).unwrap();
        let digest = artifacts.java.sha256();
        let ours = playbook.replace("- cached_download", "- homelab.artifact_cache.cached_download").replace(
            &format!("checksum: \"{digest}\""),
            &format!("checksum: \"sha256:{digest}\"\n        mode: \"0600\""),
        );
        fs::write(stage.file("ours.yml"), &ours).unwrap();
        let play_ours = |more: &[&str]| play(stage, "ours.yml", &[&["-e", &*server], more].concat()).unwrap();
        assert_eq!(changed_tasks(&play_ours(&["--check"])), 1);
        assert!(!stage.file("opt/java/jdk.tar.gz").exists(), "--check downloads nothing");
        assert_eq!(changed_tasks(&play_ours(&[])), 1);
        assert_same(&stage.file("opt/prometheus/prometheus.tar.gz"), &artifacts.prometheus);
        assert_same(&stage.file("opt/java/jdk.tar.gz"), &artifacts.java);
        let mode = fs::metadata(stage.file("opt/java/jdk.tar.gz")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(changed_tasks(&play_ours(&[])), 0, "all is there");

        fs::write(stage.file("ours.yml"), ours.replace(&digest, WRONG_SHA)).unwrap();
        fs::remove_file(stage.file("opt/java/jdk.tar.gz")).unwrap();
        let ended = play_ours(&["-e", "cached_download_retries=0"]);
        assert!(!ended.success && ended.stdout.contains("409"), "{ended:?}");
        assert!(!stage.file("opt/java/jdk.tar.gz").exists());

        fs::write(stage.file("ours.yml"), ours.replace("        dest:", "        destination:")).unwrap();
        let ended = play_ours(&[]);
        assert!(!ended.success && ended.stdout.contains("destination"), "a misspelt key is named: {ended:?}");
    });
}
