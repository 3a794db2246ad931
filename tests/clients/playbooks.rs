//! The design document's playbooks and the collection in `deploy/ansible`, run by the real ansible-playbook.
//!
//! `playbooks/` has the document's text; the names of its hosts, its placeholders for checksums and its `/opt` are
//! replaced, and nothing else is.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::harness::service::BINARY;
use crate::harness::{Content, WRONG_SHA, skip};
use crate::proxies::Front;
use crate::support::{Ended, Stage, arg, assert_same, find, need_in_venv, test_name, with};

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

/// How many tasks changed something, from the recap.
#[track_caller]
fn changed(ended: &Ended) -> u32 {
    ended.assert_success();
    let count = ended.stdout.rsplit_once("changed=").and_then(|(_, rest)| rest.split_whitespace().next());
    count.and_then(|count| count.parse().ok()).unwrap_or_else(|| panic!("no recap in {ended:?}"))
}

fn the_documents_playbooks_run(stage: &Stage) {
    let artifacts = Artifacts::publish(stage);
    write_document(stage, &artifacts);
    let Some(ended) = play(stage, "simple.yml", &[]) else { return };
    assert_eq!(changed(&ended), 1);
    let app_dir = format!("app_dir={}", stage.file("app").display());
    assert_eq!(changed(&play(stage, "variables.yml", &["-e", &app_dir]).expect("Ansible is here")), 1);
    assert_same(&stage.file("app/app.jar"), &artifacts.app);
    assert_same(&stage.file("opt/prometheus/prometheus.tar.gz"), &artifacts.prometheus);
    fs::remove_file(stage.file("opt/prometheus/prometheus.tar.gz")).unwrap();
    assert_eq!(changed(&play(stage, "role.yml", &[]).expect("Ansible is here")), 1, "a loop is one task");
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
        assert_eq!(changed(&play_ours(&["--check"])), 1);
        assert!(!stage.file("opt/java/jdk.tar.gz").exists(), "--check downloads nothing");
        assert_eq!(changed(&play_ours(&[])), 1);
        assert_same(&stage.file("opt/prometheus/prometheus.tar.gz"), &artifacts.prometheus);
        assert_same(&stage.file("opt/java/jdk.tar.gz"), &artifacts.java);
        let mode = fs::metadata(stage.file("opt/java/jdk.tar.gz")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(changed(&play_ours(&[])), 0, "all is there");

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

/// Runs its arguments' script as root of a copy of this machine: what it writes to /etc, /usr/local and /var/lib is
/// gone afterwards.
const SANDBOX: &str = r#"
set -e
mount -t tmpfs none "$1"
for dir in etc usr/local var/lib; do
    mkdir -p "$1/$dir/up" "$1/$dir/work"
    mount -t overlay overlay -o "lowerdir=/$dir,upperdir=$1/$dir/up,workdir=$1/$dir/work" "/$dir"
done
shift
"$@"
"#;

/// Installs twice; then runs what was installed, as the user that was made, and asks it.
const INSTALL: &str = r#"
set -e
export ANSIBLE_COLLECTIONS_PATH="$PWD/collections" ANSIBLE_PIPELINING=true HOME="$PWD"
play() { "$1" ${more:+"$more"} -i inventory -c local -e "ansible_python_interpreter=$2" -e "binary=$3" server.yml; }
play "$@"
play "$@"
test "$(stat -c %U:%a /var/lib/artifact-cache)" = artifact-cache:750
test "$(getent passwd artifact-cache | cut -d: -f7)" = /usr/sbin/nologin
grep -q '^ExecStart=/usr/local/bin/artifact-cache serve' /etc/systemd/system/artifact-cache.service.d/places.conf
config=/etc/artifact-cache/config.yaml
as='setpriv --reuid=artifact-cache --regid=artifact-cache --clear-groups'
$as /usr/local/bin/artifact-cache doctor --config $config
$as /usr/local/bin/artifact-cache serve --config $config > served.log & pid=$!
for _ in $(seq 100); do grep -q listening served.log && break; sleep 0.1; done
/usr/local/bin/artifact-cache health --config $config
kill $pid
wait $pid
sed -i 's/port: 18080/port: none/' server.yml
more='--start-at-task=homelab.artifact_cache.server : Write the configuration'
if play "$@" > wrong.log 2>&1; then echo 'a wrong configuration was installed'; exit 1; fi
grep -q 'server.port' wrong.log || { cat wrong.log; exit 1; }
grep -q 'port: 18080' $config
"#;

#[test]
fn the_collection_installs_a_service() {
    if !rustix::process::getuid().is_root() || find("unshare").is_none() {
        return skip(&test_name(), "needs root and unshare for a copy of this machine");
    }
    with(Front::Direct, |stage| {
        let (Some(ansible), Some(python)) = (need_in_venv("ansible-playbook"), need_in_venv("python")) else {
            return;
        };
        if install_collection(stage).is_none() {
            return;
        }
        fs::write(stage.file("inventory"), "localhost\n").unwrap();
        fs::copy(in_repository("tests/clients/playbooks/server.yml"), stage.file("server.yml")).unwrap();
        fs::create_dir(stage.file("layers")).unwrap();
        let unshare = find("unshare").expect("found above");
        let layers = stage.file("layers");
        // A network of its own, so that its port is free.
        let own = ["--mount", "--net", "--propagation", "private", "sh", "-c"];
        let sandbox = |script: &[&str]| {
            stage.run(&unshare, &[&own[..], &[SANDBOX, "sandbox", arg(&layers)], script].concat())
        };
        if !sandbox(&["true"]).success {
            return skip(&test_name(), "no overlay mounts here");
        }
        let install = format!("ip link set lo up 2>/dev/null || true\n{INSTALL}");
        let ended = sandbox(&["bash", "-c", &install, "install", arg(&ansible), arg(&python), BINARY]);
        ended.assert_success();
        let recaps: Vec<&str> = ended.stdout.lines().filter(|line| line.contains("changed=")).collect();
        assert!(!recaps[0].contains("changed=0") && recaps[1].contains("changed=0"), "{recaps:?}");
        assert!(ended.stdout.contains("healthy\n"), "{ended:?}");
        assert!(
            !Path::new("/etc/artifact-cache").exists()
                || !Path::new("/usr/local/bin/artifact-cache").exists()
        );
    });
}
