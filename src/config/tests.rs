//! What is accepted, and the exact message for each way of being wrong.

use super::*;

fn from(yaml: impl AsRef<[u8]>, env: &[(&str, &str)]) -> Result<Config, String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.yaml");
    std::fs::write(&path, yaml).unwrap();
    let env = env.iter().map(|(k, v)| (k.to_string(), v.to_string()));
    let prefix = format!("{}/", dir.path().display());
    Config::load(Some(&path), env).map_err(|e| e.to_string().replace(&prefix, ""))
}

fn from_yaml(yaml: &str) -> Result<Config, String> {
    from(yaml, &[])
}

fn from_env(name: &str, value: &str) -> Result<Config, String> {
    let env = [(name.to_owned(), value.to_owned()), ("PATH".to_owned(), "/bin".to_owned())];
    Config::load(None, env).map_err(|e| e.to_string())
}

#[test]
fn nothing_given_is_the_defaults() {
    for yaml in [
        "",
        "\n",
        "# only\n# comments\n",
        "---\n",
        "logging:\n",
        "logging: {}\n",
        "server:\n  # none\nfetch:\n",
        "\u{feff}server:\n",
    ] {
        assert_eq!(from_yaml(yaml), Ok(Config::default()), "{yaml:?}");
    }
    assert_eq!(Config::load(None, []), Ok(Config::default()));
}

#[test]
fn values_reach_their_places() {
    let yaml = "\
server: { host: '::', port: 0, trusted_proxies: [10.0.0.1, fd00::/8] }
storage:
  max_artifact_bytes: 5 MB
  min_free_bytes: 0
upstream:
  user_agent: 1.10
  proxy: ~
  deny_hosts:
    - '*.example.com'
fetch:
  stream_after_seconds: 0.5
  stream_framing: Content-Length
";
    let config = from_yaml(yaml).unwrap();
    let mut expected = Config::default();
    expected.server.host = "::".parse().unwrap();
    expected.server.port = 0;
    expected.server.trusted_proxies = vec!["10.0.0.1/32".parse().unwrap(), "fd00::/8".parse().unwrap()];
    expected.storage.max_artifact_bytes = 5_000_000;
    expected.storage.min_free_bytes = 0;
    expected.upstream.user_agent = HeaderValue::from_static("1.10");
    expected.upstream.deny_hosts = HostGlobs::new(&["*.example.com"]).unwrap();
    expected.fetch.stream_after = Duration::from_millis(500);
    expected.fetch.stream_framing = StreamFraming::ContentLength;
    assert_eq!(config, expected);
}

#[test]
fn scalars_keep_their_text() {
    for (written, text) in [
        ("1.10", "1.10"),
        ("0x1F", "0x1F"),
        ("no", "no"),
        ("é 1", "é 1"),
        ("'8'", "8"),
        (".inf", ".inf"),
        ("1e3 # é", "1e3"),
    ] {
        let config = from_yaml(&format!("# é\nstorage: {{ database: {written}\n }}\n")).unwrap();
        assert_eq!(config.storage.database, Path::new(text), "{written}");
    }
    let alias = from_yaml("storage:\n  base_path: &x 1.10\n  database: *x\n").unwrap();
    assert_eq!(alias.storage.database, Path::new("1.10"));
}

#[test]
fn bad_files_are_named() {
    for (yaml, message) in [
        ("server:\n  prot: 1\n", r#"config.yaml:2: unknown key "prot" in server; did you mean "port"?"#),
        (
            "server:\n  level: info\n",
            r#"config.yaml:2: unknown key "level" in server; it belongs in logging"#,
        ),
        (
            "logging:\n\n  colour: 1\n",
            r#"config.yaml:3: unknown key "colour" in logging; it takes level, format"#,
        ),
        ("\nsevrer:\n", r#"config.yaml:2: unknown section "sevrer"; did you mean "server"?"#),
        (
            "cache: {}\n",
            r#"config.yaml:1: unknown section "cache"; it takes server, storage, logging, upstream, fetch, jobs"#,
        ),
        ("server: 8080\n", "config.yaml:1: server takes keys of its own, on indented lines below it"),
        ("- a\n", r#"config.yaml:1: the file is not a mapping of sections; begin with "server:""#),
        (
            "server:\n  port:\n",
            "config.yaml:2: server.port has no value; write a port from 0 to 65535, such as 8080",
        ),
        (
            "server:\n  port: [1]\n",
            "config.yaml:2: server.port takes one plain value; write a port from 0 to 65535, such as 8080",
        ),
        (
            "server:\n  trusted_proxies: 10.0.0.0/8\n",
            "config.yaml:2: server.trusted_proxies takes a list of plain values; write networks, such as [10.0.0.0/8, ::1/128]",
        ),
        (
            "upstream:\n  deny_hosts:\n",
            "config.yaml:2: upstream.deny_hosts has no value ([] is the empty list); write host patterns, such as [example.com, \"*.example.com\"]",
        ),
    ] {
        assert_eq!(from_yaml(yaml), Err(message.to_owned()), "{yaml}");
    }
}

#[test]
fn text_that_is_not_yaml_has_its_line() {
    for (yaml, message) in [
        ("server:\n  port: 1\n  port: 2\n", "config.yaml:3: \"port\" is set a second time; keep one of them"),
        ("server: {}\nserver: {}\n", "config.yaml:2: \"server\" is set a second time; keep one of them"),
        (
            "server: {}\n---\nserver: {}\n",
            "config.yaml:3: a second YAML document begins here; keep one of them",
        ),
        ("server:\n  host: \"x\n", "config.yaml:2: not valid YAML: unclosed quote at line 2, column 9"),
    ] {
        assert_eq!(from_yaml(yaml), Err(message.to_owned()), "{yaml}");
    }
}

#[test]
fn unreadable_files_are_named() {
    let missing = Config::load(Some(Path::new("/nowhere/config.yaml")), []).unwrap_err().to_string();
    assert_eq!(missing, "/nowhere/config.yaml: cannot be read: No such file or directory (os error 2)");
    assert_eq!(
        from(b"server:\n \xff", &[]),
        Err("config.yaml: is not UTF-8 text (byte 9); save it as UTF-8".into())
    );
}

#[test]
fn bad_values_say_what_is_right() {
    for (section, line, message) in [
        (
            "server",
            "host: localhost",
            r#"server.host: "localhost" is not an IP address; write an IP address, such as 127.0.0.1, 0.0.0.0 or ::"#,
        ),
        (
            "server",
            "port: 70000",
            r#"server.port: "70000" is not from 0 to 65535; write a port from 0 to 65535, such as 8080"#,
        ),
        (
            "server",
            "port: 80.5",
            r#"server.port: "80.5" is not a whole number; write a port from 0 to 65535, such as 8080"#,
        ),
        (
            "server",
            "max_connections: 0",
            r#"server.max_connections: "0" is not from 1 to 1000000; write a whole number from 1 to 1000000, such as 4096"#,
        ),
        (
            "server",
            "header_timeout_seconds: 0",
            r#"server.header_timeout_seconds: "0" is too short; write seconds, at least 0.001, such as 10 or 2.5"#,
        ),
        (
            "server",
            "shutdown_grace_seconds: -1",
            r#"server.shutdown_grace_seconds: "-1" is not between 0 and a year; write seconds, such as 10 or 0.5"#,
        ),
        (
            "fetch",
            "stream_after_seconds: 3s",
            r#"fetch.stream_after_seconds: "3s" is not a number of seconds; write seconds, such as 10 or 0.5"#,
        ),
        (
            "fetch",
            "stream_framing: length",
            r#"fetch.stream_framing: "length" is not one of the words known here; write auto, content-length or chunked"#,
        ),
        (
            "fetch",
            "tail_hold_bytes: 0",
            r#"fetch.tail_hold_bytes: "0" is nothing at all; write a size over 0, such as 64KiB, 10MB, 1.5GiB or plain bytes"#,
        ),
        (
            "fetch",
            "ignore_query: [a, b if]",
            r#"fetch.ignore_query: "b if" is neither a name nor "NAME if OTHER and OTHER"; write parameter patterns, such as [X-Amz-*, "sv if sig"]"#,
        ),
        (
            "storage",
            "min_free_bytes: 10 parsecs",
            r#"storage.min_free_bytes: "10 parsecs" has no unit known here; write a size, such as 64KiB, 10MB, 1.5GiB or plain bytes"#,
        ),
        (
            "storage",
            "base_path: ''",
            r#"storage.base_path: "" is empty; write a directory, such as ./data/cache"#,
        ),
        (
            "logging",
            "level: loud",
            r#"logging.level: "loud" is not one of the words known here; write error, warn, info, debug or trace"#,
        ),
        (
            "upstream",
            "user_agent: \"a\\nb\"",
            r#"upstream.user_agent: "a\nb" has characters that a header cannot carry; write printable ASCII on one line, such as "HomeLabArtifactCache/1.0""#,
        ),
        (
            "upstream",
            "proxy: socks5://h:1",
            r#"upstream.proxy: "socks5://h:1" is not an http:// URL; write null, or a proxy such as http://proxy.example.com:3128"#,
        ),
        (
            "upstream",
            "proxy: http://u:secret@h:1",
            r#"upstream.proxy: "http://…@h:1" has a user or password in it; write null, or a proxy such as http://proxy.example.com:3128"#,
        ),
        (
            "upstream",
            "allow_private_networks: [10.0.0.5/8]",
            r#"upstream.allow_private_networks: "10.0.0.5/8" has address bits after its prefix (the network is 10.0.0.0/8); write networks, such as [10.0.0.0/8, ::1/128]"#,
        ),
        (
            "upstream",
            "allow_hosts: ['https://a.org']",
            r#"upstream.allow_hosts: "https://a.org" is a URL or a path, not a host; write host patterns, such as [example.com, "*.example.com"]"#,
        ),
        (
            "server",
            "port: 81\n  metrics_port: 81",
            r#"server.metrics_port: "81" is also server.port; write another port, such as 9090, or 0, since /metrics is on server.port too"#,
        ),
    ] {
        let line_number = 2 + line.matches("\n ").count();
        let expected = format!("config.yaml:{line_number}: {message}");
        assert_eq!(from_yaml(&format!("{section}:\n  {line}\n")), Err(expected));
    }
}

#[test]
fn a_list_item_has_its_own_line() {
    let yaml = "upstream:\n  allow_private_networks:\n    - 10.0.0.0/8\n    - ten\n";
    let message = r#"config.yaml:4: upstream.allow_private_networks: "ten" is not a network; write networks, such as [10.0.0.0/8, ::1/128]"#;
    assert_eq!(from_yaml(yaml), Err(message.to_owned()));
}

#[test]
fn environment_overrides_the_file() {
    let yaml = "server: { port: 1, max_connections: 7 }\nupstream: { proxy: 'http://p:1' }\n";
    let env = [
        ("ARTIFACT_CACHE__SERVER__PORT", "8081"),
        ("ARTIFACT_CACHE__upstream__Proxy", ""),
        ("ARTIFACT_CACHE__UPSTREAM__USER_AGENT", "a: #b, c"),
        ("ARTIFACT_CACHE__FETCH__IGNORE_QUERY", "{a,b} if c, d"),
        ("OTHER__SERVER__PORT", "9"),
    ];
    let config = from(yaml, &env).unwrap();
    assert_eq!((config.server.port, config.server.max_connections), (8081, 7));
    assert_eq!(config.upstream.proxy, None);
    assert_eq!(config.upstream.user_agent, "a: #b, c");
    assert_eq!(config.fetch.ignore_query, QueryGlobs::new(&["{a,b} if c", "d"]).unwrap());
}

#[test]
fn environment_lists_come_in_both_spellings() {
    for text in ["10.0.0.0/8,::1", " 10.0.0.0/8 , ::1 ", "[10.0.0.0/8, '::1']"] {
        let config = from_env("ARTIFACT_CACHE__SERVER__TRUSTED_PROXIES", text).unwrap();
        assert_eq!(
            config.server.trusted_proxies,
            ["10.0.0.0/8".parse().unwrap(), "::1/128".parse().unwrap()],
            "{text}"
        );
    }
    for text in ["", " ", "[]"] {
        let config = from_env("ARTIFACT_CACHE__SERVER__TRUSTED_PROXIES", text).unwrap();
        assert_eq!(config.server.trusted_proxies, [], "{text:?}");
    }
}

#[test]
fn environment_texts_are_taken_as_they_are() {
    for (text, taken) in
        [("123", "123"), ("'quoted'", "quoted"), ("null", "null"), ("1.10", "1.10"), ("[x]", "[x]")]
    {
        let config = from_env("ARTIFACT_CACHE__UPSTREAM__USER_AGENT", text).unwrap();
        assert_eq!(config.upstream.user_agent, taken);
    }
}

#[test]
fn metrics_port_by_name() {
    assert!(!from_yaml("server: { port: 1 }").unwrap().metrics_port_given);
    assert!(from_yaml("server: { metrics_port: 9090 }").unwrap().metrics_port_given);
    assert!(from_env("ARTIFACT_CACHE__SERVER__METRICS_PORT", "9090").unwrap().metrics_port_given);
    // The default steps aside for an API port of the same number; see the server's start.
    assert!(from_yaml("server: { port: 9090 }").is_ok());
}

#[test]
fn bad_variables_are_named() {
    for (name, value, message) in [
        ("ARTIFACT_CACHE__SERVER__PROT", "1", r#"unknown key "prot" in server; did you mean "port"?"#),
        ("ARTIFACT_CACHE__SERVR__PORT", "1", r#"unknown section "servr"; did you mean "server"?"#),
        (
            "ARTIFACT_CACHE__PORT",
            "1",
            "names no key; write ARTIFACT_CACHE__SECTION__KEY, such as ARTIFACT_CACHE__SERVER__PORT",
        ),
        (
            "ARTIFACT_CACHE__SERVER__PORT",
            "",
            r#"server.port: "" is not a whole number; write a port from 0 to 65535, such as 8080"#,
        ),
        (
            "ARTIFACT_CACHE__SERVER__TRUSTED_PROXIES",
            "::1,ten",
            r#"server.trusted_proxies: "ten" is not a network; write networks, such as [10.0.0.0/8, ::1/128]"#,
        ),
    ] {
        assert_eq!(from_env(name, value), Err(format!("{name}: {message}")));
    }
    let open = from_env("ARTIFACT_CACHE__UPSTREAM__DENY_HOSTS", "[a, b").unwrap_err();
    assert!(open.starts_with("ARTIFACT_CACHE__UPSTREAM__DENY_HOSTS: not a YAML list: "), "{open}");
    assert!(open.ends_with("; write [a, b] or a,b"), "{open}");
}

#[test]
fn one_key_in_two_spellings_is_refused() {
    let env = [("ARTIFACT_CACHE__SERVER__PORT", "1"), ("ARTIFACT_CACHE__server__port", "2")];
    assert_eq!(
        from("", &env),
        Err("ARTIFACT_CACHE__server__port: sets the same key as ARTIFACT_CACHE__SERVER__PORT; keep one of them".into())
    );
}
