//! What is refused before anything is asked upstream, and how the refusal reads.

use serde_json::Value;

use crate::harness::{Content, Reply, Running, Service, Upstream, WRONG_SHA, encode};

/// Every bad request here, with the status, code and parameter that must come of it.
fn bad_requests(url: &str) -> Vec<(String, u16, &'static str, &'static str)> {
    let e = encode;
    let param = |target: String, name| (target, 400, "invalid_parameter", name);
    let long = format!("http://127.0.0.1/{}", "a".repeat(8200));
    let mut all = vec![
        ("/fetch".to_string(), 400, "missing_parameter", "url"),
        ("/fetch?".to_string(), 400, "missing_parameter", "url"),
        ("/fetch?url=".to_string(), 400, "missing_parameter", "url"),
        (format!("/fetch?sha256={WRONG_SHA}"), 400, "missing_parameter", "url"),
        param(format!("/fetch?url={}&sha256=abc", e(url)), "sha256"),
        param(format!("/fetch?url={}&sha256={}", e(url), "g".repeat(64)), "sha256"),
        param(format!("/fetch?url={}&sha256=md5:{WRONG_SHA}", e(url)), "sha256"),
        param(format!("/fetch?url={}&sha256={WRONG_SHA}0", e(url)), "sha256"),
        param(format!("/fetch?url={}&url={}", e(url), e(url)), "url"),
        param(format!("/fetch?url={}&sha256={WRONG_SHA}&sha256={WRONG_SHA}", e(url)), "sha256"),
        param(format!("/fetch?url={}&sha265={WRONG_SHA}", e(url)), "sha265"),
        param(format!("/fetch?url={url}?a=1&b=2"), "b"),
        param(format!("/fetch/sha256=abc/{url}"), "sha256"),
        param("/fetch/nonsense".to_string(), "url"),
        param("/fetch/ftp://127.0.0.1/x".to_string(), "url"),
        param(format!("/fetch?url={}", e(&long)), "url"),
        param("/fetch?url=%ff%fe".to_string(), "url"),
        param("/fetch?url=http://127.0.0.1/%zz".to_string(), "url"),
    ];
    let bad_urls = [
        "x",
        "/x",
        "//127.0.0.1/x",
        "http:",
        "http://",
        "http:x",
        "http:///",
        "ftp://127.0.0.1/x",
        "file:///etc/passwd",
        "data:text/plain,x",
        "javascript:1",
        "gopher://127.0.0.1/",
        "http://user@127.0.0.1/",
        "http://user:pass@127.0.0.1/",
        "http://:p@127.0.0.1/",
        "http://127.0.0.1:99999/",
        "http://127.0.0.1:0/",
        "http://127.0.0.1:x/",
        "http://[::1/",
        "http://a b/",
        "http://127.0.0.1/a b",
        " http://127.0.0.1/",
        "http://127.0.0.1/ ",
        "http://127.0.0.1/\n",
        "ht\ntp://127.0.0.1/",
        "http://127.0.0.1/\r\nX: y",
        "http://127.0.0.1/a\tb",
        "http://127.0.0.1/\0",
        "http://127.0.0.1/\x7f",
        "http://127.0.0.1\\@10.0.0.1/",
        "http:\\\\127.0.0.1/",
        "http://1.2.3.4.5.6/",
        "http://256.1.1.1/",
        "http://exa mple/",
        "http://a<b/",
    ];
    all.extend(bad_urls.map(|bad| param(format!("/fetch?url={}", e(bad)), "url")));
    all
}

#[test]
fn bad_requests_are_refused_and_reach_nobody() {
    let (up, service) = (Upstream::start(), Service::new().start());
    let url = up.serve("/never", Reply::ok(&Content::of(b"never")));
    let mut wrong = Vec::new();
    for (target, status, code, parameter) in bad_requests(&url) {
        let answer = service.get(&target);
        let json: Value = serde_json::from_slice(&answer.body).unwrap_or_default();
        let got = (answer.status, json["error"].clone(), json["parameter"].clone());
        if got != (status, code.into(), parameter.into()) || answer.header("Cache-Control") != "no-store" {
            wrong.push(format!("{target:.120}: expected {status} {code} {parameter}, got {got:?} {json}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert_eq!(up.total(), 0, "upstream was asked");
    service.assert_nothing_stored();
}

#[test]
fn an_unencoded_ampersand_is_refused_with_the_cure() {
    let (up, service) = (Upstream::start(), Service::new().start());
    let answer = service.get(&format!("/fetch?url={}?a=1&b=2", up.url("/p")));
    let json = answer.assert_error(400, "invalid_parameter");
    assert!(json["message"].as_str().unwrap().contains("percent-encode"), "{json}");
    assert_eq!(up.total(), 0);
}

#[test]
fn routes_and_methods_that_do_not_exist() {
    let service = Service::new().start();
    for path in
        ["/", "/nothing", "/fetchx", "/api", "/api/nothing", "/metrics/x", "/../etc/passwd", "/%2e%2e/x"]
    {
        service.get(path).assert_error(404, "not_found");
    }
    for method in ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW"] {
        for path in ["/fetch?url=http://127.0.0.1/", "/health", "/metrics", "/api/stats"] {
            let answer = service.request(method, path, &[]);
            answer.assert_error(405, "method_not_allowed");
            let allowed: Vec<&str> = answer.header("Allow").split(", ").collect();
            assert!(
                allowed.contains(&"GET") && allowed.contains(&"HEAD"),
                "{method} {path}: Allow: {allowed:?}"
            );
        }
    }
}

#[test]
fn hosts_outside_the_lists_are_forbidden() {
    let up = Upstream::start();
    let url = up.serve("/x", Reply::ok(&Content::of(b"x")));
    let denied = Service::new().env("UPSTREAM__DENY_HOSTS", "127.*,evil.test").start();
    denied.fetch(&url).assert_error(403, "forbidden_upstream");
    denied.fetch("http://EVIL.test./x").assert_error(403, "forbidden_upstream");
    let listed = Service::new().env("UPSTREAM__ALLOW_HOSTS", "*.example.com").start();
    listed.fetch(&url).assert_error(403, "forbidden_upstream");
    let allowed = Service::new().env("UPSTREAM__ALLOW_HOSTS", "127.0.0.1").start();
    allowed.fetch(&url).assert_ok(b"x");
    assert_eq!(up.total(), 1);
}

/// The members of an error, without those that vary from run to run.
fn shape(service: &Running, method: &str, target: &str) -> Value {
    service.request(method, target, &[]).json()
}

#[test]
fn how_refusals_read() {
    let service = Service::new().start();
    let missing = shape(&service, "GET", "/fetch");
    assert_eq!(missing["message"], "Missing required 'url' parameter", "as the document has it");
    let readable = |json: Value| {
        let members: Vec<&String> = json.as_object().unwrap().keys().collect();
        format!("{} {members:?}", json["error"])
    };
    let shapes: Vec<String> = [
        ("GET", "/fetch"),
        ("GET", "/fetch?url=x"),
        ("GET", "/nothing"),
        ("PUT", "/fetch"),
        ("GET", "/fetch?url=http://10.0.0.1/"),
    ]
    .map(|(method, target)| readable(shape(&service, method, target)))
    .to_vec();
    insta::assert_snapshot!(shapes.join("\n"), @r#"
    "missing_parameter" ["error", "parameter", "message"]
    "invalid_parameter" ["error", "parameter", "message"]
    "not_found" ["error", "message"]
    "method_not_allowed" ["error", "message"]
    "forbidden_upstream" ["error", "source_url", "message"]
    "#);
}

#[test]
fn problem_json_for_those_who_ask() {
    let service = Service::new().start();
    let answer = service.request("GET", "/fetch", &[("Accept", "application/problem+json")]);
    assert_eq!(answer.header("Content-Type"), "application/problem+json");
    let json = answer.json();
    assert_eq!(
        (&json["error"], &json["parameter"], &json["status"]),
        (&"missing_parameter".into(), &"url".into(), &400.into())
    );
    assert!(json["title"].is_string() && json["type"].is_string(), "{json}");
}
