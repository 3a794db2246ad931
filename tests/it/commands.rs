//! The small verbs: health, stats, config, completions, man.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

use crate::harness::service::BINARY;
use crate::harness::{Content, Reply, Running, Service, Upstream};

/// Runs the binary in a directory with these variables and no others.
fn run(dir: &Path, env: &[(&str, &str)], args: &[&str]) -> Output {
    let mut command = Command::new(BINARY);
    command.env_clear().envs(env.iter().copied()).current_dir(dir).args(args).stdin(Stdio::null());
    command.output().expect("the binary runs")
}

/// Runs it in a directory of its own; exit code, standard output and standard error.
fn verb(env: &[(&str, &str)], args: &[&str]) -> (Option<i32>, String, String) {
    let output = run(tempfile::tempdir().unwrap().path(), env, args);
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

/// Asks a running service by its address.
fn ask(service: &Running, args: &[&str]) -> (Option<i32>, String, String) {
    verb(&[("ARTIFACT_CACHE_SERVER", &format!("http://{}", service.api))], args)
}

#[test]
fn health_is_0_while_hits_are_served_and_1_otherwise() {
    let service = Service::new().start();
    assert_eq!(ask(&service, &["health"]), (Some(0), "healthy\n".into(), String::new()));
    let (code, json, _) = ask(&service, &["health", "--json"]);
    assert_eq!(
        (code, &serde_json::from_str::<Value>(&json).unwrap()["status"]),
        (Some(0), &"healthy".into())
    );

    let nearly_full = Service::new().env("STORAGE__MIN_FREE_BYTES", "1000TiB").start();
    let (code, text, _) = ask(&nearly_full, &["health"]);
    assert_eq!(code, Some(0), "a restart would not help, and hits work: {text}");
    assert!(text.starts_with("degraded\n  storage: ok\n  disk: less than"), "{text}");

    let broken = Service::new().start();
    fs::remove_dir_all(broken.service().base_path()).unwrap();
    let (code, text, _) = ask(&broken, &["health"]);
    assert!(code == Some(1) && text.starts_with("failing\n"), "{code:?} {text}");
    // What it must leave behind when it stops is there again.
    fs::create_dir_all(broken.service().base_path()).unwrap();

    let (code, _, stderr) = verb(&[("ARTIFACT_CACHE_SERVER", "http://127.0.0.1:1")], &["health"]);
    assert_eq!(code, Some(1));
    assert!(stderr.contains("http://127.0.0.1:1 can't be reached"), "{stderr}");
    let web = Upstream::start();
    web.serve("/health", Reply::ok(&Content::of(br#"{"status": "up"}"#)));
    assert_eq!(
        verb(&[], &["health", "--server", &web.url("")]).0,
        Some(1),
        "another program's health is no answer"
    );
}

#[test]
fn health_finds_the_service_of_the_configuration_also_when_it_listens_everywhere() {
    for (host, any) in [("0.0.0.0", "127.0.0.1"), ("::", "::1"), ("127.0.0.1", "127.0.0.1")] {
        if std::net::TcpListener::bind((any, 0)).is_err() {
            crate::harness::skip("health_finds_the_service_of_the_configuration", "no IPv6 here");
            continue;
        }
        let service = Service::new().env("SERVER__HOST", host).start();
        let port = service.api.port().to_string();
        let env = [("ARTIFACT_CACHE__SERVER__HOST", host), ("ARTIFACT_CACHE__SERVER__PORT", &port)];
        assert_eq!(verb(&env, &["health"]), (Some(0), "healthy\n".into(), String::new()), "{host}");
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("config.yaml"), format!("server: {{host: '{host}', port: {port}}}\n"))
            .unwrap();
        assert_eq!(run(dir.path(), &[], &["health"]).status.code(), Some(0), "{host}, from the file");
    }
    let (code, _, stderr) = verb(&[("ARTIFACT_CACHE__SERVER__PORT", "0")], &["health"]);
    assert_eq!(code, Some(1));
    assert!(stderr.contains("--server"), "{stderr}");
}

#[test]
fn stats_for_people_and_for_programs() {
    let (service, up) = (Service::new().start(), Upstream::start());
    let url = up.serve("/x", Reply::ok(&Content::new(400, 3 << 20)));
    service.fetch(&url);
    service.fetch(&url);
    service.wait_metric("artifact_cache_requests_total{status=\"hit\"}", 1.0);
    let (code, json, _) = ask(&service, &["stats", "--json"]);
    assert_eq!(code, Some(0));
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!((&json["total_items"], &json["hit_ratio"]), (&1.into(), &0.5.into()));
    let (code, table, _) = ask(&service, &["stats"]);
    assert_eq!(code, Some(0));
    let words: BTreeMap<&str, Vec<&str>> =
        table.lines().map(|line| (line[..37].trim(), line[37..].split_whitespace().collect())).collect();
    assert_eq!(words["artifacts"], ["1", "3.00", "MiB"], "{table}");
    assert_eq!(words["distinct contents on disk"], ["1", "3.00", "MiB"], "{table}");
    assert_eq!(words["hits of all requests since the start"], ["50.0", "%"], "{table}");
}

#[test]
fn config_check_names_what_is_wrong_and_starts_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("c.yaml");
    let check = |yaml: &str| {
        fs::write(&file, yaml).unwrap();
        let output = run(dir.path(), &[], &["config", "check", "--config", "c.yaml"]);
        (
            output.status.code(),
            String::from_utf8(output.stdout).unwrap(),
            String::from_utf8(output.stderr).unwrap(),
        )
    };
    assert_eq!(check("server:\n  port: 1234\n"), (Some(0), "c.yaml: ok\n".into(), String::new()));
    let (code, stdout, stderr) = check("server:\n  prot: 1234\n");
    assert_eq!((code, stdout.as_str()), (Some(1), ""));
    assert!(stderr.contains("c.yaml:2: unknown key \"prot\"") && stderr.contains("\"port\""), "{stderr}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no data directory was made");
    let (code, _, stderr) = verb(&[("ARTIFACT_CACHE__SERVER__PORT", "x")], &["config", "check"]);
    assert!(code == Some(1) && stderr.contains("ARTIFACT_CACHE__SERVER__PORT"), "{stderr}");
    assert_eq!(verb(&[], &["config", "check"]).1, "built-in defaults: ok\n");
}

#[test]
fn config_show_says_where_each_value_came_from() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.yaml"), "server:\n  port: 1234\nupstream:\n  user_agent: '1.10'\n")
        .unwrap();
    let env = [("ARTIFACT_CACHE__UPSTREAM__DENY_HOSTS", "a.test,*.b.test")];
    let output = run(dir.path(), &env, &["config", "show", "--json"]);
    let keys: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
    let of = |key: &str| keys.iter().find(|found| found["key"] == key).unwrap();
    let expected =
        |key: &str, value: Value, from: &str| serde_json::json!({"key": key, "value": value, "from": from});
    assert_eq!(of("server.port"), &expected("server.port", 1234.into(), "config.yaml:2"));
    assert_eq!(of("upstream.user_agent"), &expected("upstream.user_agent", "1.10".into(), "config.yaml:4"));
    assert_eq!(of("server.metrics_port"), &expected("server.metrics_port", 9090.into(), "default"));
    assert_eq!(
        of("upstream.deny_hosts"),
        &expected(
            "upstream.deny_hosts",
            serde_json::json!(["a.test", "*.b.test"]),
            "ARTIFACT_CACHE__UPSTREAM__DENY_HOSTS"
        )
    );
    let names: Vec<_> = keys.iter().map(|key| key["key"].as_str().unwrap().to_owned()).collect();
    assert_eq!(names, artifact_cache::config::Config::keys().collect::<Vec<_>>(), "every key is shown");
}

#[test]
fn what_config_show_and_default_print_is_a_configuration() {
    use artifact_cache::config::Config;
    let dir = tempfile::tempdir().unwrap();
    let env = [
        ("ARTIFACT_CACHE__SERVER__HOST", "::"),
        ("ARTIFACT_CACHE__STORAGE__BASE_PATH", "a \"quoted\" # place"),
        ("ARTIFACT_CACHE__UPSTREAM__ALLOW_HOSTS", "{a,b}.test,x.test"),
        ("ARTIFACT_CACHE__FETCH__STREAM_AFTER_SECONDS", "0.25"),
    ];
    let owned = env.map(|(name, value)| (name.to_owned(), value.to_owned()));
    let file = dir.path().join("printed");
    let mut in_force = Config::load(None, owned).unwrap();
    in_force.metrics_port_given = true;
    fs::write(&file, run(dir.path(), &env, &["config", "show"]).stdout).unwrap();
    assert_eq!(Config::load(Some(&file), []).unwrap(), in_force);
    let example = run(dir.path(), &[], &["config", "default"]).stdout;
    assert_eq!(example, fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("config.example.yaml")).unwrap());
    let wrong = run(dir.path(), &[("ARTIFACT_CACHE__SERVER__PORT", "x")], &["config", "show"]);
    assert_eq!(
        (wrong.status.code(), wrong.stdout.len()),
        (Some(1), 0),
        "what is wrong is not shown as in force"
    );
}

#[test]
fn a_reader_that_leaves_is_no_failure() {
    let mut command = Command::new(BINARY);
    command.env_clear().args(["config", "default"]).stdin(Stdio::null()).stderr(Stdio::piped());
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = command.stdout(writer).spawn().unwrap().wait_with_output().unwrap();
    assert_eq!((output.status.code(), output.stderr.len()), (Some(0), 0), "{output:?}");
}

#[test]
fn completions_for_every_shell() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let (code, script, _) = verb(&[], &["completions", shell]);
        assert_eq!(code, Some(0));
        for word in ["artifact-cache", "health", "sha256"] {
            assert!(script.contains(word), "{word} is not in the script for {shell}");
        }
    }
    assert_eq!(verb(&[], &["completions", "dos"]).0, Some(2));
    // Loads in the one shell that every machine has, and completes what was begun.
    let (_, script, _) = verb(&[], &["completions", "bash"]);
    let asked = format!(
        "{script}\nset -- $(complete -p artifact-cache); while [ \"$1\" != -F ]; do shift; done
        COMP_WORDS=(artifact-cache hea) COMP_CWORD=1
        \"$2\" artifact-cache hea artifact-cache; echo \"${{COMPREPLY[@]}}\""
    );
    let output = Command::new("bash").args(["--norc", "-c", &asked]).output().expect("there is a bash");
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "health", "{output:?}");
}

#[test]
fn manual_pages_of_all_commands() {
    let dir = tempfile::tempdir().unwrap();
    let output = run(dir.path(), &[], &["man", "--dir", "made/man1"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let made = dir.path().join("made/man1");
    let (_, main, _) = verb(&[], &["man"]);
    assert_eq!(fs::read_to_string(made.join("artifact-cache.1")).unwrap(), main);
    for (page, word) in
        [("get", "Exit codes"), ("config-check", "serve"), ("doctor", "deployment"), ("serve", "service")]
    {
        let text = fs::read_to_string(made.join(format!("artifact-cache-{page}.1"))).unwrap();
        assert!(text.starts_with(".ie") && text.contains(".TH") && text.contains(word), "{page}: {text}");
    }
    let (code, _, stderr) = verb(&[], &["man", "--dir", "/dev/null/x"]);
    assert!(code == Some(1) && stderr.contains("/dev/null/x"), "{stderr}");
}
