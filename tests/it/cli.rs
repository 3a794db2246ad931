//! The command line and what it says when something is wrong.

use std::process::{Command, Output};

use crate::harness::Service;
use crate::harness::service::BINARY;

fn run(args: &[&str]) -> Output {
    Command::new(BINARY).env_clear().args(args).output().expect("the binary runs")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn help() {
    for args in [
        &["--help"][..],
        &["serve", "--help"],
        &["get", "--help"],
        &["health", "--help"],
        &["stats", "--help"],
        &["config", "--help"],
        &["doctor", "--help"],
        &["completions", "--help"],
        &["man", "--help"],
        &["backup", "--help"],
        &["restore", "--help"],
        &["delete", "--help"],
        &["verify", "--help"],
    ] {
        let output = run(args);
        assert_eq!(output.status.code(), Some(0));
        insta::assert_snapshot!(format!("help_{}", args[0].trim_start_matches("--")), text(&output.stdout));
    }
}

#[test]
fn version() {
    let output = run(&["--version"]);
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(text(&output.stdout), format!("artifact-cache {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn usage_errors_are_2() {
    for args in [&["--nonsense"][..], &["nonsense"], &["serve", "--port", "1"], &["serve", "--config"]] {
        let output = run(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(text(&output.stderr).starts_with("error: "), "{}", text(&output.stderr));
    }
}

#[test]
fn without_a_verb_it_serves() {
    let service = Service::new().args(&[]).start();
    assert_eq!(service.get("/health").status, 200);
}

#[test]
fn config_yaml_in_the_working_directory_is_read() {
    let service = Service::new().without("FETCH__STREAM_AFTER_SECONDS");
    std::fs::write(service.dir().join("config.yaml"), "upstream:\n  user_agent: from-the-file\n").unwrap();
    let up = crate::harness::Upstream::start();
    let url = up.serve("/x", crate::harness::Reply::ok(&crate::harness::Content::of(b"x")));
    service.start().fetch(&url).assert_ok(b"x");
    assert_eq!(up.requests("/x")[0].get("User-Agent"), Some("from-the-file"));
}

#[test]
fn the_environment_overrides_the_file() {
    let service = Service::new().env("UPSTREAM__USER_AGENT", "from-the-environment");
    let file = service.dir().join("own.yaml");
    std::fs::write(&file, "upstream:\n  user_agent: from-the-file\nlogging:\n  level: info\n").unwrap();
    let service = service.args(&["serve", "--config", &file.display().to_string()]).start();
    let up = crate::harness::Upstream::start();
    let url = up.serve("/x", crate::harness::Reply::ok(&crate::harness::Content::of(b"x")));
    service.fetch(&url).assert_ok(b"x");
    assert_eq!(up.requests("/x")[0].get("User-Agent"), Some("from-the-environment"));
}

/// Each wrong configuration with what its message must name.
#[test]
fn wrong_configuration_files_are_refused_with_file_line_and_key() {
    for (yaml, named) in [
        ("server:\n  host: 127.0.0.1\n  prot: 1\n", &[":3", "prot"][..]),
        ("serverr:\n  port: 1\n", &[":1", "serverr"]),
        ("server:\n  port: 70000\n", &[":2", "port"]),
        ("server:\n  port: many\n", &[":2", "port"]),
        ("upstream:\n  allow_private_networks: [10.0.0.0/99]\n", &["allow_private_networks", "10.0.0.0/99"]),
        ("storage:\n  max_artifact_bytes: 3 apples\n", &["max_artifact_bytes", "3 apples"]),
        ("logging:\n  level: loud\n", &["level", "loud"]),
        ("server: [\n", &["config.yaml"]),
        ("server:\n  port: 1\n  port: 2\n", &["port"]),
    ] {
        let service = Service::new().without("SERVER__PORT");
        std::fs::write(service.dir().join("config.yaml"), yaml).unwrap();
        let (code, stderr) = service.refused();
        assert_eq!(code, 1, "{yaml}");
        assert!(stderr.starts_with("error: ") && stderr.contains("config.yaml"), "{stderr}");
        for name in named {
            assert!(stderr.contains(name), "{name:?} is not in {stderr}");
        }
    }
}

#[test]
fn a_config_file_that_is_not_there_is_refused() {
    let (code, stderr) = Service::new().args(&["serve", "--config", "not-there.yaml"]).refused();
    assert_eq!(code, 1);
    assert!(stderr.starts_with("error: ") && stderr.contains("not-there.yaml"), "{stderr}");
}

#[test]
fn wrong_variables_are_refused_by_name() {
    for (key, value) in [
        ("SERVER__PROT", "1"),
        ("NONSENSE", "1"),
        ("SERVER__PORT", "x"),
        ("UPSTREAM__MAX_RETRIES", "-1"),
        ("UPSTREAM__ALLOW_PRIVATE_NETWORKS", "everything"),
        ("STORAGE__MIN_FREE_BYTES", "5 parsecs"),
        ("FETCH__STREAM_FRAMING", "smoke signals"),
        ("FETCH__STREAM_AFTER_SECONDS", "-1"),
    ] {
        let (code, stderr) = Service::new().env(key, value).refused();
        assert_eq!(code, 1, "{key}={value}");
        let lines = stderr.lines().count();
        assert!(
            stderr.starts_with("error: ") && stderr.contains(&format!("ARTIFACT_CACHE__{key}")),
            "{stderr}"
        );
        assert_eq!(lines, 1, "one line: {stderr}");
    }
}

#[test]
fn a_taken_port_is_refused_by_its_number() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let (code, stderr) = Service::new().env("SERVER__PORT", &port).refused();
    assert_eq!(code, 1);
    assert!(stderr.starts_with("error: ") && stderr.contains(&port), "{stderr}");
    let (code, stderr) = Service::new().env("SERVER__METRICS_PORT", &port).refused();
    assert_eq!(code, 1, "asked for by name, so it must be had");
    assert!(stderr.contains(&port), "{stderr}");
}

#[test]
fn a_ca_file_that_is_none_is_refused() {
    let service = Service::new();
    let file = service.dir().join("ca.pem").display().to_string();
    std::fs::write(&file, "no certificate\n").unwrap();
    let (code, stderr) = service.env("UPSTREAM__CA_FILE", &file).refused();
    assert_eq!(code, 1);
    assert!(stderr.starts_with("error: ") && stderr.contains(&file), "{stderr}");
}

#[test]
fn start_and_stop_leave_a_listening_line_and_nothing_on_stderr() {
    let mut service = Service::new().start();
    let line = service.wait_log("listening", |line| line["msg"] == "listening");
    assert_eq!(
        (&line["level"], line["api"].as_str()),
        (&"INFO".into(), Some(service.api.to_string().as_str()))
    );
    service.signal_term();
    let (status, stderr) = service.wait_exit();
    assert_eq!((status.code(), stderr.as_str()), (Some(0), ""));
}

#[test]
fn a_proxy_in_the_environment_is_ignored_and_that_is_said() {
    let service = Service::new().variable("HTTP_PROXY", "http://127.0.0.1:1").start();
    let up = crate::harness::Upstream::start();
    let url = up.serve("/x", crate::harness::Reply::ok(&crate::harness::Content::of(b"x")));
    service.fetch(&url).assert_ok(b"x");
    service.wait_log("the warning", |line| {
        line["level"] == "WARN" && line.to_string().to_lowercase().contains("http_proxy")
    });
}

#[test]
fn an_error_that_nobody_can_read_is_still_an_error() {
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    let status =
        Command::new(BINARY).args(["serve", "--config", "no/such/file.yaml"]).stderr(full).status().unwrap();
    assert_eq!(status.code(), Some(1), "101 would be a panic");
}
