//! The shapes of errors, as the document has them.

use std::net::TcpListener;

use crate::harness::{Content, Reply, Service, Upstream, fetch_target};

#[test]
fn upstreams_404() {
    let (up, service) = (Upstream::start(), Service::new().start());
    let url = up.serve("/missing.jar", Reply::new(404, Content::of(b"<html>not here</html>")));
    let json = service.fetch(&url).assert_error(502, "upstream_error");
    let shown = json.to_string().replace(&url, "URL");
    insta::assert_snapshot!(shown, @r#"{"error":"upstream_error","status_code":404,"source_url":"URL","message":"Upstream server returned status 404"}"#);
}

#[test]
fn nobody_listens() {
    let service = Service::new().env("UPSTREAM__MAX_RETRIES", "1").start();
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let url = format!("http://127.0.0.1:{port}/x");
    let answer = service.fetch(&url);
    let json = answer.assert_error(503, "upstream_unavailable");
    assert_eq!(
        (json["source_url"].as_str(), &json["status_code"]),
        (Some(url.as_str()), &serde_json::Value::Null)
    );
    assert!(
        json["message"].as_str().unwrap().starts_with("Upstream server timeout or unreachable"),
        "{json}"
    );
    assert!(answer.header("Retry-After").parse::<u32>().is_ok(), "{:?}", answer.head);
    service.assert_nothing_stored();
}

#[test]
fn names_that_do_not_resolve() {
    let service = Service::new().env("UPSTREAM__MAX_RETRIES", "1").start();
    let answer = service.fetch("http://no-such-host.invalid/x");
    answer.assert_error(503, "upstream_unavailable");
    assert!(!answer.header("Retry-After").is_empty());
}

#[test]
fn problem_details_have_the_same_members() {
    let (up, service) = (Upstream::start(), Service::new().start());
    let url = up.serve("/missing", Reply::new(404, Content::of(b"")));
    let answer = service.fetch_with(&url, &[("Accept", "application/problem+json")]);
    assert_eq!((answer.status, answer.header("Content-Type")), (502, "application/problem+json"));
    let json = answer.json();
    assert_eq!((&json["status"], &json["status_code"]), (&502.into(), &404.into()), "{json}");
    assert_eq!((&json["error"], &json["source_url"]), (&"upstream_error".into(), &url.into()));
}

#[test]
fn what_is_echoed_cannot_break_out() {
    let service = Service::new().start();
    for evil in ["%22%7d%0d%0aSet-Cookie:%20a=b", "%3Cscript%3E", "%00", "%e2%80%a8"] {
        let answer = service.get(&format!("/fetch?url={evil}"));
        answer.assert_error(400, "invalid_parameter");
        assert_eq!(answer.head.get("Set-Cookie"), None);
        let named = service.get(&format!("/fetch?url=http://127.0.0.1/&{evil}=1"));
        named.assert_error(400, "invalid_parameter");
        assert_eq!(named.head.get("Set-Cookie"), None);
    }
}

#[test]
fn an_error_shows_no_path_of_the_server() {
    let (up, service) = (Upstream::start(), Service::new().start());
    let url = up.serve("/file", Reply::ok(&Content::of(b"x")));
    // A file in the way of the fan-out directory, which can't be moved aside, makes publishing fail.
    let (digest, base) = (Content::of(b"x").sha256(), service.service().base_path());
    std::fs::write(base.join(&digest[..2]), "in the way").unwrap();
    std::fs::remove_dir(base.join(".quarantine")).unwrap();
    std::fs::write(base.join(".quarantine"), "no directory").unwrap();
    let answer = service.fetch(&url);
    let json = answer.assert_error(500, "internal_error");
    let dir = service.service().dir().display().to_string();
    assert!(!json.to_string().contains(&dir), "{json}");
    assert_eq!(service.stats()["total_items"], 0);
}

#[test]
fn errors_answer_head_without_a_body() {
    let service = Service::new().start();
    for (target, status) in [("/fetch", 400), ("/nothing", 404), ("/fetch?url=http://10.0.0.1/", 403)] {
        let answer = service.request("HEAD", target, &[]);
        assert_eq!((answer.status, answer.body.len()), (status, 0), "{target}");
    }
    let target = fetch_target("http://127.0.0.1:1/x");
    assert_eq!(service.request("HEAD", &target, &[]).status, 503);
}
