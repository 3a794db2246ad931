//! Holds the configuration files of the repository against the code: the example shows every key with its default.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use artifact_cache::config::Config;

fn in_repository(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

fn no_env() -> [(String, String); 0] {
    []
}

fn load(name: &str) -> Config {
    Config::load(Some(&in_repository(name)), no_env()).unwrap_or_else(|e| panic!("{e}"))
}

/// The keys that a file of our plain layout sets, as `section.key`.
fn keys_in(text: &str) -> Vec<String> {
    let mut section = "";
    let mut keys = Vec::new();
    for line in text.lines() {
        let name = line.trim_start().split(':').next().unwrap_or_default();
        match line.len() - line.trim_start().len() {
            0 if line.contains(':') && !line.starts_with('#') => section = name,
            2 if !name.starts_with('#') => keys.push(format!("{section}.{name}")),
            _ => {}
        }
    }
    keys
}

#[test]
fn example_has_every_key_in_order() {
    let text = std::fs::read_to_string(in_repository("config.example.yaml")).unwrap();
    assert_eq!(keys_in(&text), Config::keys().collect::<Vec<_>>());
}

#[test]
fn example_shows_the_defaults() {
    let mut example = load("config.example.yaml");
    assert!(example.metrics_port_given, "the example names the port");
    example.metrics_port_given = false;
    assert_eq!(example, Config::default());
}

/// Guards the test above: were a key read into the wrong place or not at all, defaults would hide it.
#[test]
fn every_key_changes_what_it_names() {
    let mut seen = BTreeSet::new();
    let default = format!("{:?}", Config::default());
    for key in Config::keys() {
        let value = match key.as_str() {
            "server.host" => "::",
            "storage.base_path" | "storage.database" | "upstream.ca_file" => "elsewhere",
            "storage.verify_on_read" => "true",
            "logging.level" => "trace",
            "logging.format" => "text",
            "upstream.proxy" => "http://proxy.example.com:3128",
            "fetch.stream_framing" => "chunked",
            "server.trusted_proxies" | "upstream.allow_private_networks" => "10.1.0.0/16",
            _ => "77",
        };
        let variable = format!("ARTIFACT_CACHE__{}", key.replace('.', "__").to_uppercase());
        let config = Config::load(None, [(variable, value.to_owned())]).unwrap_or_else(|e| panic!("{e}"));
        let debug = format!("{config:?}");
        assert_ne!(debug, default, "{key} has no effect");
        assert!(seen.insert(debug), "{key} changes what another key changes");
    }
}

#[test]
fn container_differs_only_where_it_must() {
    let container = load("deploy/config.yaml");
    let mut expected = Config::default();
    expected.server.host = "0.0.0.0".parse().unwrap();
    expected.server.trusted_proxies.push("172.16.0.0/12".parse().unwrap());
    expected.storage.base_path = "/data/cache".into();
    expected.storage.database = "/data/metadata.db".into();
    assert_eq!(container, expected);
}
