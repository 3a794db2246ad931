//! Redirects: followed as far as allowed, and never from safe to unsafe.

use crate::harness::tls::{Authority, Flaw};
use crate::harness::{Content, Reply, Service, Upstream};

#[test]
fn a_chain_ends_in_the_artifact_under_the_first_url() {
    let (up, service) = (Upstream::start(), Service::new().start());
    let content = Content::new(70, 1000);
    let last = up.serve("/last", Reply::ok(&content));
    up.redirect("/third", 307, &last);
    up.redirect("/second", 302, "/third");
    let first = up.redirect("/dir/first", 301, "../second#fragment");
    assert_eq!(service.fetch(&first).assert_ok(&content.bytes()).cache_status(), "MISS");
    assert_eq!(service.fetch(&first).assert_ok(&content.bytes()).cache_status(), "HIT");
    let stored: String =
        service.sqlite().query_row("SELECT source_url FROM artifacts", [], |r| r.get(0)).unwrap();
    assert_eq!(stored, first);
    assert_eq!(
        service.fetch(&last).assert_ok(&content.bytes()).cache_status(),
        "MISS",
        "the target is no key"
    );
}

#[test]
fn every_redirect_status_is_followed() {
    let (up, service) = (Upstream::start(), Service::new().start());
    up.serve("/there", Reply::ok(&Content::of(b"there")));
    for status in [301, 302, 303, 307, 308] {
        let url = up.redirect(&format!("/from{status}"), status, "/there");
        service.fetch(&url).assert_ok(b"there");
    }
}

#[test]
fn too_many_redirects() {
    let (up, service) = (Upstream::start(), Service::new().env("UPSTREAM__MAX_REDIRECTS", "3").start());
    up.serve("/r0", Reply::ok(&Content::of(b"end")));
    for n in 1..6 {
        up.redirect(&format!("/r{n}"), 302, &format!("/r{}", n - 1));
    }
    service.fetch(&up.url("/r3")).assert_ok(b"end");
    let json = service.fetch(&up.url("/r5")).assert_error(502, "upstream_error");
    assert!(json["message"].as_str().unwrap().contains("redirect"), "{json}");
    assert_eq!(up.count("/r1"), 1, "the fourth hop was not made");
}

#[test]
fn a_circle_ends() {
    let (up, service) = (Upstream::start(), Service::new().start());
    up.redirect("/b", 302, "/a");
    let url = up.redirect("/a", 302, "/b");
    service.fetch(&url).assert_error(502, "upstream_error");
    assert!(up.total() <= 12, "{} requests", up.total());
    service.assert_nothing_stored();
}

#[test]
fn a_redirect_inside_is_forbidden_and_sends_nothing() {
    let (up, service) = (Upstream::start(), Service::new().start());
    for (n, target) in [
        "http://10.0.0.1/x",
        "http://169.254.169.254/latest/meta-data/",
        "http://[fe80::1]/",
        "//192.168.1.1/x",
    ]
    .iter()
    .enumerate()
    {
        let url = up.redirect(&format!("/in{n}"), 302, target);
        service.fetch(&url).assert_error(403, "forbidden_upstream");
    }
    let denied = Service::new().env("UPSTREAM__DENY_HOSTS", "localhost").start();
    let port = up.address().port();
    let url = up.redirect("/denied", 302, &format!("http://localhost:{port}/target"));
    denied.fetch(&url).assert_error(403, "forbidden_upstream");
    assert_eq!(up.count("/target"), 0);
}

#[test]
fn a_redirect_to_nonsense_is_an_upstream_error() {
    let (up, service) = (Upstream::start(), Service::new().start());
    for (n, target) in
        ["ftp://127.0.0.1/x", "http://", "javascript:alert(1)", "http://127.0.0.1:99999/"].iter().enumerate()
    {
        let url = up.redirect(&format!("/odd{n}"), 302, target);
        service.fetch(&url).assert_error(502, "upstream_error");
    }
    let url = up.on("/nowhere", |x| x.send("HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n"));
    service.fetch(&url).assert_error(502, "upstream_error");
}

#[test]
fn from_https_to_http_is_refused_and_the_other_way_is_fine() {
    let authority = Authority::new();
    let (plain, secure) = (Upstream::start(), Upstream::start_tls(authority.server(Flaw::None)));
    let service = Service::new().env("UPSTREAM__CA_FILE", &authority.file().display().to_string()).start();
    let target = plain.serve("/x", Reply::ok(&Content::of(b"plain")));
    let down = secure.redirect("/down", 302, &target);
    service.fetch(&down).assert_error(502, "upstream_error");
    assert_eq!(plain.count("/x"), 0, "nothing was asked in the clear");
    let safe = secure.serve("/y", Reply::ok(&Content::of(b"secure")));
    service.fetch(&plain.redirect("/up", 302, &safe)).assert_ok(b"secure");
}

#[test]
fn a_resume_starts_from_the_original_url() {
    let (up, service, content) = (Upstream::start(), Service::new().start(), Content::new(71, 3 << 20));
    let served = content.clone();
    let target = up.on("/signed", move |x| {
        let reply = Reply::ok(&served).field("ETag", "\"v\"");
        if x.attempt > 1 {
            return x.reply(&reply);
        }
        x.send(&reply.head(200, 0))?;
        x.body(&served, 0, 2 << 20)
    });
    let url = up.redirect("/origin", 302, &target);
    service.fetch(&url).assert_ok(&content.bytes());
    assert_eq!((up.count("/origin"), up.count("/signed")), (2, 2), "a signed target may have run out");
}

#[test]
fn the_query_of_a_redirect_is_not_logged_with_its_secrets() {
    let (up, service) = (Upstream::start(), Service::new().start());
    up.serve("/t", Reply::new(404, Content::of(b"")));
    let url = up.redirect("/s", 302, "/t?token=hunter2&X-Amz-Signature=swordfish");
    let json = service.fetch(&url).assert_error(502, "upstream_error");
    let said = format!("{json}{:?}", service.logs());
    assert!(!said.contains("hunter2") && !said.contains("swordfish"), "{said}");
}

#[test]
fn a_redirects_user_and_password_go_nowhere() {
    let (up, service) = (Upstream::start(), Service::new().start());
    let target = up.serve("/target", Reply::new(404, Content::of(b"")));
    let url = up.redirect("/login", 302, &target.replace("http://", "http://user:swordfish@"));
    let json = service.fetch(&url).assert_error(502, "upstream_error");
    assert!(!format!("{json}{:?}", service.logs()).contains("swordfish"), "{json}");
    assert!(up.requests("/target").iter().all(|head| head.get("Authorization").is_none()));
}

#[test]
fn a_location_with_raw_utf_8_is_followed() {
    let (up, service) = (Upstream::start(), Service::new().start());
    let content = Content::of(b"found");
    up.serve("/gr%C3%B6%C3%9Fe/%E6%96%87%E4%BB%B6.txt", Reply::ok(&content));
    let url = up.redirect("/umlaut", 302, "/größe/文件.txt");
    service.fetch(&url).assert_ok(b"found");
}
