//! The design document's section Usage: its commands and its script, word for word but for the hosts.
//!
//! Its Ansible tasks are run by tests/clients and by the tests of the collection.

use crate::harness::Content;
use crate::page::bash;
use crate::program::need;
use crate::stage::Stage;

const PROMETHEUS: &str =
    "/prometheus/prometheus/releases/download/v2.45.0/prometheus-2.45.0.linux-amd64.tar.gz";

const SIMPLE_FETCH: &str = r#"curl -o prometheus.tar.gz \
  "https://artifactcache.lan/fetch?url=https://github.com/prometheus/prometheus/releases/download/v2.45.0/prometheus-2.45.0.linux-amd64.tar.gz""#;
const WITH_CHECKSUM: &str = r#"curl -o file.jar \
  "https://artifactcache.lan/fetch?url=https://repo1.maven.org/maven2/org/example/artifact.jar&sha256=abc123def456...""#;
const WGET: &str = r#"wget -O output.tar.gz \
  "https://artifactcache.lan/fetch?url=https://example.com/file.tar.gz""#;
const PYTHON: &str = include_str!("download_cached.py");

fn read(stage: &Stage, name: &str) -> Vec<u8> {
    std::fs::read(stage.dir().join(name)).unwrap()
}

#[test]
fn curl_fetches_simply_and_with_a_checksum() {
    let Some(_) = need("curl") else { return };
    let (stage, content) = (Stage::new(), Content::new(94, 200_000));
    stage.publish(PROMETHEUS, &content);
    bash(&stage, SIMPLE_FETCH, &[]).assert_success();
    assert_eq!(read(&stage, "prometheus.tar.gz"), content.bytes());
    stage.publish("/maven2/org/example/artifact.jar", &content);
    bash(&stage, WITH_CHECKSUM, &[("abc123def456...", &content.sha256())]).assert_success();
    assert_eq!(read(&stage, "file.jar"), content.bytes());
    // As it stands there, the checksum is none: refused, in words.
    bash(&stage, WITH_CHECKSUM, &[]).assert_success();
    let refused: serde_json::Value = serde_json::from_slice(&read(&stage, "file.jar")).unwrap();
    assert_eq!((&refused["error"], &refused["parameter"]), (&"invalid_parameter".into(), &"sha256".into()));
}

#[test]
fn wget_fetches() {
    let Some(_) = need("wget") else { return };
    let (stage, content) = (Stage::new(), Content::new(95, 200_000));
    stage.publish("/file.tar.gz", &content);
    bash(&stage, WGET, &[]).assert_success();
    assert_eq!(read(&stage, "output.tar.gz"), content.bytes());
}

#[test]
fn the_python_script_downloads_and_tells_hit_from_miss() {
    let python = "/usr/bin/python3";
    let has_requests =
        need(python).is_some() && need("/usr/lib/python3/dist-packages/requests/__init__.py").is_some();
    if !has_requests {
        return;
    }
    let (stage, content) = (Stage::new(), Content::new(96, 200_000));
    stage.publish(PROMETHEUS, &content);
    let (file, digest) = (stage.dir().join("prometheus.tar.gz"), content.sha256());
    let also = [("/tmp/prometheus.tar.gz", file.to_str().unwrap()), ("7a1b2c3d4e5f...", digest.as_str())];
    let script = format!("{python} - <<'END'\n{PYTHON}END");
    for expected in ["Cache hit: False\n", "Cache hit: True\n"] {
        assert_eq!(bash(&stage, &script, &also).assert_success().stdout, expected);
        assert_eq!(read(&stage, "prometheus.tar.gz"), content.bytes());
        std::fs::remove_file(&file).unwrap();
    }
    // With the wrong checksum it is told so, and writes nothing.
    let wrong = [also[0], ("7a1b2c3d4e5f...", crate::harness::WRONG_SHA)];
    let refused =
        script.replace("print(f\"Cache hit: {result['cache_hit']}\")", "print(result['error']['error'])");
    assert_eq!(bash(&stage, &refused, &wrong).assert_success().stdout, "checksum_mismatch\n");
    assert!(!file.exists());
}
