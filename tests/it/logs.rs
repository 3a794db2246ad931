//! Logs: the document's keys, one object a line, and no secrets.

use serde_json::Value;

use crate::harness::{Content, Reply, Response, Running, Service, Upstream, fetch_target};

fn keys(line: &Value) -> Vec<&str> {
    line.as_object().unwrap().keys().map(String::as_str).collect()
}

/// Asserts that a line has these keys with the document's types.
#[track_caller]
fn assert_line(line: &Value, level: &str, url: &str) {
    assert_eq!((&line["level"], &line["source_url"]), (&level.into(), &url.into()), "{line}");
    let time = line["time"].as_str().expect("time");
    assert!(
        time.len() >= 20 && time.ends_with('Z') && time.as_bytes()[10] == b'T',
        "RFC 3339 in UTC: {time}"
    );
    assert!(line["client_ip"].is_string() && line["request_id"].is_string(), "{line}");
}

fn ask(service: &Running, url: &str, fields: &[(&str, &str)]) -> Response {
    service.fetch_with(url, fields)
}

#[test]
fn misses_hits_and_errors_read_as_in_the_document() {
    let (up, service) = (Upstream::start(), Service::new().start());
    let url = up.serve("/l", Reply::ok(&Content::new(140, 777)));
    service.fetch(&url);
    service.fetch(&url);
    let gone = up.serve("/gone.jar", Reply::new(404, Content::of(b"")));
    service.fetch(&gone);
    let miss = service.wait_log("the miss", |l| l["msg"] == "cache MISS - downloaded from upstream");
    let hit = service.wait_log("the hit", |l| l["msg"] == "cache HIT");
    for line in [&miss, &hit] {
        assert_line(line, "INFO", &url);
        assert_eq!(line["size_bytes"], 777);
        assert!(line["duration_ms"].is_number(), "{line}");
    }
    let error = service.wait_log("the error", |l| l["msg"] == "fetch failed");
    assert_line(&error, "ERROR", &gone);
    assert_eq!(error["error"], "upstream returned status 404");
    let order = ["time", "level", "msg", "source_url"];
    assert_eq!(keys(&hit)[..4], order);
}

#[test]
fn the_lines_of_a_miss_a_hit_and_an_error() {
    let (up, service) = (Upstream::start(), Service::new().start());
    let url = up.serve("/snap", Reply::ok(&Content::new(141, 777)));
    let gone = up.serve("/snap-gone", Reply::new(404, Content::of(b"")));
    for url in [&url, &url, &gone] {
        service.fetch(url);
    }
    service.wait_log("the error", |l| l["msg"] == "fetch failed");
    let lines = service.logs().into_iter().filter(|l| l["client_ip"].is_string()).map(|mut line| {
        for volatile in ["time", "duration_ms", "client_ip", "request_id"] {
            assert!(!line[volatile].is_null(), "{volatile} in {line}");
            line[volatile] = "*".into();
        }
        line.to_string().replace(&format!("{}", up.address()), "UPSTREAM")
    });
    insta::assert_snapshot!(lines.collect::<Vec<_>>().join("\n"), @r#"
    {"time":"*","level":"INFO","msg":"cache MISS - downloaded from upstream","source_url":"http://UPSTREAM/snap","size_bytes":777,"duration_ms":"*","client_ip":"*","request_id":"*"}
    {"time":"*","level":"INFO","msg":"cache HIT","source_url":"http://UPSTREAM/snap","size_bytes":777,"duration_ms":"*","client_ip":"*","request_id":"*"}
    {"time":"*","level":"ERROR","msg":"fetch failed","source_url":"http://UPSTREAM/snap-gone","error":"upstream returned status 404","code":"upstream_error","duration_ms":"*","client_ip":"*","request_id":"*"}
    "#);
}

#[test]
fn an_error_is_logged_once() {
    let (up, service) = (Upstream::start(), Service::new().env("UPSTREAM__MAX_RETRIES", "2").start());
    let url = up.serve("/always", Reply::new(500, Content::of(b"")));
    service.fetch(&url);
    service.wait_log("the error", |l| l["msg"] == "fetch failed");
    let errors = service.logs().iter().filter(|l| l["level"] == "ERROR").count();
    assert_eq!(errors, 1, "{:#?}", service.logs());
}

#[test]
fn request_ids_are_accepted_made_and_returned() {
    let (up, service) = (Upstream::start(), Service::new().start());
    let url = up.serve("/id", Reply::ok(&Content::of(b"i")));
    let given = ask(&service, &url, &[("X-Request-Id", "deploy-42.a_b")]);
    assert_eq!(given.header("X-Request-Id"), "deploy-42.a_b");
    service.wait_log("its line", |l| l["request_id"] == "deploy-42.a_b");
    let made = service.fetch(&url);
    let id = made.header("X-Request-Id").to_string();
    assert!(id.len() >= 8, "{id:?}");
    service.wait_log("its line", |l| l["request_id"] == id);
    assert_ne!(service.fetch(&url).header("X-Request-Id"), id);
    for hostile in ["a b", &"x".repeat(1000), "é"] {
        let answer = ask(&service, &url, &[("X-Request-Id", hostile)]);
        assert_ne!(answer.header("X-Request-Id"), hostile, "only plain ids are taken over");
        assert!(!answer.header("X-Request-Id").is_empty());
    }
    assert!(!service.get("/fetch").header("X-Request-Id").is_empty(), "errors have one, too");
}

#[test]
fn the_clients_address_is_its_own_or_what_a_trusted_proxy_says() {
    let (up, service) = (Upstream::start(), Service::new().start());
    let url = up.serve("/ip", Reply::ok(&Content::of(b"i")));
    let mut client = service.connect();
    let own = client.local_addr().to_string();
    client.request("GET", &fetch_target(&url), &[("X-Request-Id", "direct")]);
    client.response("GET");
    let line = service.wait_log("direct", |l| l["request_id"] == "direct");
    assert_eq!(line["client_ip"], own, "ip:port when direct");
    ask(&service, &url, &[("X-Request-Id", "proxied"), ("X-Forwarded-For", "203.0.113.9")]);
    let line = service.wait_log("proxied", |l| l["request_id"] == "proxied");
    assert_eq!(line["client_ip"], "203.0.113.9");
    ask(&service, &url, &[("X-Request-Id", "forged"), ("X-Forwarded-For", "198.51.100.1, 203.0.113.9")]);
    let line = service.wait_log("forged", |l| l["request_id"] == "forged");
    assert_eq!(line["client_ip"], "203.0.113.9", "the nearest address that is no trusted proxy");
    ask(&service, &url, &[("X-Request-Id", "odd"), ("X-Forwarded-For", "not an address")]);
    let line = service.wait_log("odd", |l| l["request_id"] == "odd");
    assert!(line["client_ip"].as_str().unwrap().starts_with("127.0.0.1"), "{line}");
}

#[test]
fn a_stranger_is_not_believed() {
    let (up, service) =
        (Upstream::start(), Service::new().env("SERVER__TRUSTED_PROXIES", "192.0.2.0/24").start());
    let url = up.serve("/ip", Reply::ok(&Content::of(b"i")));
    ask(&service, &url, &[("X-Request-Id", "lie"), ("X-Forwarded-For", "203.0.113.9")]);
    let line = service.wait_log("lie", |l| l["request_id"] == "lie");
    assert!(line["client_ip"].as_str().unwrap().starts_with("127.0.0.1:"), "{line}");
}

#[test]
fn secrets_are_masked() {
    let (up, service) = (Upstream::start(), Service::new().start());
    up.serve("/s", Reply::ok(&Content::of(b"s")));
    up.serve("/f", Reply::new(404, Content::of(b"")));
    let query = "?v=7&token=hunter2&api_key=hunter2&sig=hunter2&X-Amz-Credential=hunter2&password=hunter2&x-token=hunter2";
    for path in ["/s", "/s", "/f"] {
        service.fetch(&up.url(&format!("{path}{query}")));
    }
    service.get(&format!("/fetch?url=http://127.0.0.1/{}&b=hunter2", "?a=1"));
    service.get("/fetch?url=http://user:hunter2@127.0.0.1/");
    service
        .wait_log("the error", |l| l["msg"] == "fetch failed" && l["source_url"].to_string().contains("/f?"));
    let logged = service.logs();
    assert!(logged.iter().any(|l| l["source_url"].to_string().contains("v=7")), "harmless values are shown");
    for line in &logged {
        assert!(!line.to_string().contains("hunter2"), "{line}");
    }
}

#[test]
fn injected_line_ends_stay_in_one_line() {
    let (up, service) = (Upstream::start(), Service::new().start());
    let path = "/a%0d%0a%7b%22msg%22:%22forged%22%7d";
    let url = up.serve(path, Reply::ok(&Content::of(b"x")));
    service.fetch(&url).assert_ok(b"x");
    service.get("/fetch?url=%0d%0a%7b%22msg%22%3a%22forged%22%7d");
    service.get("/fetch?url=http://127.0.0.1/&%0a%7b%22msg%22%3a%22forged%22%7d=1");
    service.wait_log("the miss", |l| l["msg"] == "cache MISS - downloaded from upstream");
    assert!(service.logs().iter().all(|l| l.is_object() && l["msg"] != "forged"), "{:#?}", service.logs());
}

#[test]
fn the_level_is_obeyed() {
    let up = Upstream::start();
    let service = Service::new().env("LOGGING__LEVEL", "debug").start();
    let url = up.serve("/d", Reply::ok(&Content::of(b"d")));
    service.fetch(&url);
    service.wait_log("the miss", |l| l["msg"] == "cache MISS - downloaded from upstream");
    for line in service.logs() {
        assert!(keys(&line).starts_with(&["time", "level", "msg"]), "{line}");
    }
}

#[test]
fn many_concurrent_requests_log_whole_lines() {
    let (up, service) = (Upstream::start(), Service::new().start());
    let url = up.serve("/many", Reply::ok(&Content::of(b"m")));
    service.fetch(&url);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let mut client = service.connect();
                for _ in 0..50 {
                    client.request("GET", &fetch_target(&url), &[]);
                    client.response("GET").assert_ok(b"m");
                }
            });
        }
    });
    crate::harness::eventually("400 lines", || {
        (service.logs().iter().filter(|l| l["msg"] == "cache HIT").count() == 400).then_some(())
    });
}

#[test]
fn a_blocked_log_never_blocks_requests() {
    let (up, service) = (Upstream::start(), Service::new().start());
    let url = up.serve("/blocked", Reply::ok(&Content::of(b"b")));
    service.fetch(&url).assert_ok(b"b");
    service.block_log(true);
    let mut client = service.connect();
    // Far more than a pipe holds.
    for _ in 0..3_000 {
        client.request("GET", &fetch_target(&url), &[]);
        client.response("GET").assert_ok(b"b");
    }
    service.block_log(false);
}
