//! HTTPS upstreams: only certificates that are right in every way.

use crate::harness::tls::{Authority, Flaw};
use crate::harness::{Content, Reply, Service, Upstream};

#[test]
fn an_own_authority_is_trusted_when_configured() {
    let authority = Authority::new();
    let up = Upstream::start_tls(authority.server(Flaw::None));
    let content = Content::new(100, 200_000);
    let url = up.serve("/secure", Reply::ok(&content));
    let service = Service::new().env("UPSTREAM__CA_FILE", &authority.file().display().to_string()).start();
    service.fetch(&url).assert_ok(&content.bytes());
    let named = url.replace("127.0.0.1", "localhost");
    service.fetch(&named).assert_ok(&content.bytes());
}

#[test]
fn wrong_certificates_are_upstream_errors() {
    let authority = Authority::new();
    let ca = authority.file().display().to_string();
    let service = Service::new().env("UPSTREAM__CA_FILE", &ca).env("UPSTREAM__MAX_RETRIES", "1").start();
    for flaw in [Flaw::WrongHost, Flaw::Expired, Flaw::SelfSigned] {
        let up = Upstream::start_tls(authority.server(flaw));
        let url = up.serve("/x", Reply::ok(&Content::of(b"x")));
        let answer = service.fetch(&url);
        assert_eq!((answer.status, answer.error().as_str()), (502, "upstream_error"), "{flaw:?}");
        assert_eq!(answer.json()["status_code"], serde_json::Value::Null, "{flaw:?}: it never answered");
        assert_eq!(up.total(), 0, "{flaw:?}: not a byte of the request was sent");
    }
    service.assert_nothing_stored();
}

#[test]
fn an_unknown_authority_is_not_trusted() {
    let up = Upstream::start_tls(Authority::new().server(Flaw::None));
    let url = up.serve("/x", Reply::ok(&Content::of(b"x")));
    let service = Service::new().env("UPSTREAM__MAX_RETRIES", "1").start();
    service.fetch(&url).assert_error(502, "upstream_error");
}

#[test]
fn plain_http_on_a_tls_port_and_the_reverse() {
    let authority = Authority::new();
    let service = Service::new().env("UPSTREAM__MAX_RETRIES", "1").start();
    let plain = Upstream::start();
    let url = plain.serve("/x", Reply::ok(&Content::of(b"x"))).replace("http:", "https:");
    assert!(matches!(service.fetch(&url).status, 502 | 503));
    let secure = Upstream::start_tls(authority.server(Flaw::None));
    let url = secure.serve("/x", Reply::ok(&Content::of(b"x"))).replace("https:", "http:");
    assert!(matches!(service.fetch(&url).status, 502 | 503));
    service.assert_nothing_stored();
}

#[test]
fn a_tls_stream_cut_without_close_notify_is_not_whole() {
    let authority = Authority::new();
    let up = Upstream::start_tls(authority.server(Flaw::None));
    let ca = authority.file().display().to_string();
    let service = Service::new().env("UPSTREAM__CA_FILE", &ca).env("UPSTREAM__MAX_RETRIES", "1").start();
    // Close-delimited, and the TLS session isn't closed: anyone on the way could have cut it.
    let url = up.on("/cut", |x| x.send("HTTP/1.1 200 OK\r\n\r\nhalf of a body"));
    service.fetch(&url).assert_error(502, "upstream_error");
    service.assert_nothing_stored();
}
