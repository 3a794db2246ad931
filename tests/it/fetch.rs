//! The plain case: a miss, then hits for ever.

use crate::harness::content::sha256;
use crate::harness::{Content, End, Reply, Service, Upstream, encode, eventually, fetch_target};

#[test]
fn a_miss_downloads_and_a_hit_does_not() {
    let (up, service) = (Upstream::start(), Service::new().start());
    let content = Content::new(1, 300_000);
    let url = up.serve("/tool.tar.gz", Reply::ok(&content).field("Content-Type", "application/gzip"));
    for expected in ["MISS", "HIT", "HIT"] {
        let answer = service.fetch(&url);
        answer.assert_ok(&content.bytes());
        assert_eq!(answer.cache_status(), expected);
        assert_eq!(answer.header("X-Content-SHA256"), content.sha256());
        assert_eq!(answer.header("Content-Length"), "300000");
        assert_eq!(answer.header("Content-Type"), "application/gzip");
    }
    assert_eq!(up.count("/tool.tar.gz"), 1);
}

#[test]
fn every_answer_carries_the_headers_of_the_contract() {
    let (up, service) = (Upstream::start(), Service::new().start());
    let content = Content::of(b"x");
    let url = up.serve("/dir/tool%20box.bin", Reply::ok(&content));
    let miss = service.fetch(&url);
    let hit = service.fetch_sha(&url, &content.sha256());
    let digest = content.sha256();
    for answer in [&miss, &hit] {
        answer.assert_ok(b"x");
        assert_eq!(answer.header("ETag"), format!("\"{digest}\""));
        assert_eq!(answer.header("Accept-Ranges"), "bytes");
        assert!(answer.header("Repr-Digest").starts_with("sha-256=:"), "{:?}", answer.head);
        assert!(answer.header("Repr-Digest").ends_with(":"), "{:?}", answer.head);
        assert!(answer.header("Content-Disposition").starts_with("attachment"), "{:?}", answer.head);
        assert!(answer.header("Content-Disposition").contains("tool box.bin"), "{:?}", answer.head);
        assert_eq!(answer.header("X-Content-Type-Options"), "nosniff");
        assert_eq!(answer.header("Content-Security-Policy"), "sandbox; default-src 'none'");
        assert!(!answer.header("Last-Modified").is_empty());
        assert_eq!(answer.head.get("Age"), None);
    }
    assert_eq!(miss.header("Cache-Status"), "artifact-cache; fwd=uri-miss; stored");
    assert_eq!(hit.header("Cache-Status"), "artifact-cache; hit");
    assert_eq!(miss.header("Cache-Control"), "no-cache");
    assert_eq!(hit.header("Cache-Control"), "public, max-age=31536000, immutable");
}

#[test]
fn a_hit_outlives_its_upstream_and_a_restart() {
    let (up, mut service) = (Upstream::start(), Service::new().start());
    let content = Content::new(2, 10_000);
    let url = up.serve("/gone.bin", Reply::ok(&content));
    service.fetch(&url).assert_ok(&content.bytes());
    up.stop();
    assert_eq!(service.fetch(&url).assert_ok(&content.bytes()).cache_status(), "HIT");
    service.term();
    let again = service.again().start();
    assert_eq!(again.fetch(&url).assert_ok(&content.bytes()).cache_status(), "HIT");
}

#[test]
fn what_was_answered_outlives_sigkill() {
    let (up, mut service) = (Upstream::start(), Service::new().start());
    let content = Content::new(3, 70_000);
    let url = up.serve("/kept.bin", Reply::ok(&content));
    service.fetch(&url).assert_ok(&content.bytes());
    service.kill();
    let again = service.again().start();
    assert_eq!(again.fetch(&url).assert_ok(&content.bytes()).cache_status(), "HIT");
    assert_eq!(up.count("/kept.bin"), 1);
}

#[test]
fn the_path_form_is_the_same_artifact() {
    let (up, service) = (Upstream::start(), Service::new().start());
    let content = Content::new(4, 5_000);
    let url = up.serve("/p/a.jar", Reply::ok(&content).field("Content-Type", "application/java-archive"));
    let folded = url.replacen("://", ":/", 1);
    let digest = content.sha256();
    let mut status = "MISS";
    for target in [
        format!("/fetch/{url}?a=1&b=2"),
        format!("/fetch/{folded}?a=1&b=2"),
        format!("/fetch/sha256={digest}/{url}?a=1&b=2"),
        format!("/fetch/sha256={digest}/{folded}?a=1&b=2"),
        fetch_target(&format!("{url}?a=1&b=2")),
    ] {
        let answer = service.get(&target);
        assert_eq!(answer.assert_ok(&content.bytes()).cache_status(), status, "{target}");
        status = "HIT";
    }
    let wrong = service.get(&format!("/fetch/sha256={}/{url}?a=1&b=2", crate::harness::WRONG_SHA));
    wrong.assert_error(409, "checksum_mismatch");
    assert!(
        up.requests("/p/a.jar")[0].line.contains("/p/a.jar?a=1&b=2 "),
        "the query goes upstream as it is"
    );
    assert_eq!(up.total(), 1);
}

#[test]
fn the_path_form_is_never_decoded() {
    let (up, service) = (Upstream::start(), Service::new().start());
    let content = Content::of(b"raw");
    let url = up.serve("/a%2Fb/c%20d+e", Reply::ok(&content));
    service.get(&format!("/fetch/{url}?q=%26+x")).assert_ok(b"raw");
    assert!(up.requests("/a%2Fb/c%20d+e")[0].line.contains("/a%2Fb/c%20d+e?q=%26+x "));
}

#[test]
fn a_plus_stays_a_plus() {
    let (up, service) = (Upstream::start(), Service::new().start());
    let content = Content::of(b"jdk");
    let url = up.serve("/jdk-21+35.zip", Reply::ok(&content));
    service.get(&format!("/fetch?url={url}")).assert_ok(b"jdk");
    service.get(&fetch_target(&url)).assert_ok(b"jdk");
    assert_eq!(up.count("/jdk-21+35.zip"), 1);
}

#[test]
fn spellings_of_one_url_are_one_artifact() {
    let (up, service) = (Upstream::start(), Service::new().start());
    let content = Content::of(b"one");
    up.serve("/one", Reply::ok(&content));
    let port = up.address().port();
    for (host, tail) in [("localhost", ""), ("LOCALHOST", ""), ("localhost.", ""), ("LocalHost", "#part")] {
        service.fetch(&format!("http://{host}:{port}/one{tail}")).assert_ok(b"one");
    }
    assert_eq!(up.count("/one"), 1);
    assert_eq!(service.stats()["total_items"], 1);
}

#[test]
fn one_content_under_two_urls_is_stored_once() {
    let (up, service) = (Upstream::start(), Service::new().start());
    let content = Content::new(5, 40_000);
    let first = up.serve("/a", Reply::ok(&content));
    let second = up.serve("/b", Reply::ok(&content));
    assert_eq!(service.fetch(&first).assert_ok(&content.bytes()).cache_status(), "MISS");
    assert_eq!(service.fetch(&second).assert_ok(&content.bytes()).cache_status(), "MISS");
    let stats = service.stats();
    assert_eq!((&stats["total_items"], &stats["unique_blobs"]), (&2.into(), &1.into()), "{stats}");
    assert_eq!(
        (&stats["total_size_bytes"], &stats["stored_bytes"]),
        (&80_000.into(), &40_000.into()),
        "{stats}"
    );
    assert_eq!(service.blobs_on_disk(), 1);
    assert_eq!(std::fs::read(service.blob(&content.sha256())).unwrap(), content.bytes());
}

#[test]
fn an_empty_file_is_an_artifact() {
    let (up, service) = (Upstream::start(), Service::new().start());
    let url = up.serve("/empty", Reply::ok(&Content::of(b"")));
    for expected in ["MISS", "HIT"] {
        let answer = service.fetch_sha(&url, &sha256(b""));
        assert_eq!(answer.assert_ok(b"").cache_status(), expected);
        assert_eq!(answer.header("Content-Length"), "0");
        assert_eq!(answer.header("X-Content-SHA256"), sha256(b""));
    }
}

#[test]
fn a_missing_content_type_is_detected() {
    let (up, service) = (Upstream::start(), Service::new().start());
    let png = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x01\0\0\0\x01\x08\x06\0\0\0";
    let gzip = b"\x1f\x8b\x08\0\0\0\0\0\0\x03\x03\0\0\0\0\0\0\0\0\0";
    for (path, bytes, kind) in [
        ("/unnamed", &png[..], "image/png"),
        ("/blob", &gzip[..], "application/gzip"),
        ("/data.json", &b"{\"a\": 1}"[..], "application/json"),
        ("/mystery", &b"\x01\x02\x03"[..], "application/octet-stream"),
    ] {
        let url = up.serve(path, Reply::ok(&Content::of(bytes)));
        assert_eq!(service.fetch(&url).assert_ok(bytes).header("Content-Type"), kind, "{path}");
        assert_eq!(service.fetch(&url).assert_ok(bytes).header("Content-Type"), kind, "{path}, as a hit");
    }
}

#[test]
fn hostile_headers_of_upstream_do_not_survive() {
    let (up, service) = (Upstream::start(), Service::new().start());
    let long = format!("text/plain; x={}", "a".repeat(400));
    let reply = Reply::ok(&Content::of(b"evil"))
        .field("Content-Type", &long)
        .field("Content-Disposition", "inline; filename=\"../../etc/\\\"pass\twd\"")
        .field("Set-Cookie", "session=1")
        .field("X-Powered-By", "malice")
        .field("X-Content-SHA256", crate::harness::WRONG_SHA)
        .field("Strict-Transport-Security", "max-age=1");
    let url = up.serve("/evil", reply);
    for answer in [service.fetch(&url), service.fetch(&url)] {
        answer.assert_ok(b"evil");
        assert!(answer.header("Content-Type").len() <= 255);
        let disposition = answer.header("Content-Disposition");
        assert!(disposition.starts_with("attachment"), "{disposition}");
        assert!(!disposition.contains("..") && !disposition.contains('\t'), "{disposition}");
        assert_eq!(answer.head.all("X-Content-SHA256"), [sha256(b"evil")]);
        for name in ["Set-Cookie", "X-Powered-By", "Strict-Transport-Security"] {
            assert_eq!(answer.head.get(name), None);
        }
    }
}

#[test]
fn an_encoding_upstream_insists_on_is_kept_with_the_bytes() {
    let (up, service) = (Upstream::start(), Service::new().start());
    let content = Content::of(b"\x1f\x8b\x08 not really gzip, and never unpacked");
    let url = up.serve("/page", Reply::ok(&content).field("Content-Encoding", "gzip"));
    for answer in [service.fetch(&url), service.fetch(&url)] {
        assert_eq!(answer.assert_ok(&content.bytes()).header("Content-Encoding"), "gzip");
    }
    assert_eq!(up.requests("/page")[0].get("Accept-Encoding"), Some("identity"));
}

#[test]
fn nothing_of_the_client_goes_upstream() {
    let (up, service) = (Upstream::start(), Service::new().start());
    let url = up.serve("/private", Reply::ok(&Content::of(b"x")));
    let fields = [
        ("Cookie", "c=1"),
        ("Authorization", "Bearer t"),
        ("X-Forwarded-For", "192.0.2.1"),
        ("Via", "1.1 p"),
        ("Referer", "http://r/"),
        ("Accept-Language", "de"),
        ("User-Agent", "curl"),
        ("X-Request-Id", "abc"),
    ];
    service.fetch_with(&url, &fields).assert_ok(b"x");
    let head = &up.requests("/private")[0];
    for name in
        ["Cookie", "Authorization", "X-Forwarded-For", "Via", "Referer", "Accept-Language", "X-Request-Id"]
    {
        assert_eq!(head.get(name), None, "{name}");
    }
    assert_eq!(head.get("User-Agent"), Some("HomeLabArtifactCache/1.0"));
}

#[test]
fn signature_parameters_go_upstream_but_are_not_part_of_the_key() {
    let (up, service) = (Upstream::start(), Service::new().start());
    up.serve("/signed", Reply::ok(&Content::of(b"s")));
    for signature in ["aaa", "bbb"] {
        let url = up.url(&format!("/signed?v=1&X-Amz-Signature={signature}&X-Amz-Date=20260101T000000Z"));
        service.fetch(&url).assert_ok(b"s");
    }
    assert_eq!(up.count("/signed"), 1);
    assert!(up.requests("/signed")[0].line.contains("X-Amz-Signature=aaa"));
    let stored: String =
        service.sqlite().query_row("SELECT source_url FROM artifacts", [], |r| r.get(0)).unwrap();
    assert_eq!(stored, up.url("/signed?v=1"));
    let logged = service.logs().iter().map(|line| line.to_string()).collect::<String>();
    assert!(!logged.contains("aaa") && !logged.contains("bbb"), "signatures are not logged");
}

#[test]
fn head_of_a_hit_is_get_without_a_body() {
    let (up, service) = (Upstream::start(), Service::new().start());
    let content = Content::new(6, 1234);
    let url = up.serve("/h", Reply::ok(&content));
    service.fetch(&url).assert_ok(&content.bytes());
    let answer = service.request("HEAD", &fetch_target(&url), &[]);
    assert_eq!((answer.status, answer.cache_status()), (200, "HIT"));
    assert_eq!(answer.header("Content-Length"), "1234");
    assert_eq!(answer.header("X-Content-SHA256"), content.sha256());
    assert_eq!(up.count("/h"), 1);
}

#[test]
fn head_of_a_miss_stores_nothing() {
    let (up, service) = (Upstream::start(), Service::new().start());
    let content = Content::new(7, 4321);
    let url = up.serve("/h", Reply::ok(&content).field("Content-Type", "application/zip"));
    let answer = service.request("HEAD", &fetch_target(&url), &[]);
    assert_eq!((answer.status, answer.cache_status()), (200, "MISS"));
    assert_eq!((answer.header("Content-Length"), answer.header("Content-Type")), ("4321", "application/zip"));
    assert!(up.requests("/h")[0].line.starts_with("HEAD "));
    service.assert_nothing_stored();
}

#[test]
fn head_is_asked_with_a_short_get_where_upstream_refuses_it() {
    let (up, service) = (Upstream::start(), Service::new().start());
    for status in [403, 405, 501] {
        let content = Content::new(8, 9_999);
        let url = up.on(&format!("/h{status}"), move |x| match x.method() {
            "HEAD" => x.reply(&Reply::new(status, Content::of(b""))),
            _ => x.reply(&Reply::ok(&content).without_ranges()),
        });
        let answer = service.request("HEAD", &fetch_target(&url), &[]);
        assert_eq!((answer.status, answer.header("Content-Length")), (200, "9999"), "after {status}");
        let second = &up.requests(&format!("/h{status}"))[1];
        assert_eq!(second.get("Range"), Some("bytes=0-0"));
    }
    service.assert_nothing_stored();
}

#[test]
fn only_if_cached_never_downloads() {
    let (up, service) = (Upstream::start(), Service::new().start());
    let url = up.serve("/o", Reply::ok(&Content::of(b"o")));
    let fields = [("Cache-Control", "only-if-cached")];
    service.fetch_with(&url, &fields).assert_error(504, "not_cached");
    assert_eq!(up.total(), 0);
    service.fetch(&url).assert_ok(b"o");
    assert_eq!(service.fetch_with(&url, &fields).assert_ok(b"o").cache_status(), "HIT");
}

#[test]
fn a_large_artifact_arrives_whole() {
    let (up, service) = (Upstream::start(), Service::new().start());
    let content = Content::new(9, 20 << 20);
    let url = up.serve("/large.iso", Reply::ok(&content));
    for expected in ["MISS", "HIT"] {
        let answer = service.fetch(&url);
        assert_eq!((answer.cache_status(), &answer.end), (expected, &End::Complete));
        assert_eq!(sha256(&answer.body), content.sha256());
    }
    eventually("access counts are written", || {
        (service.count_rows("SELECT access_count FROM artifacts") == 2).then_some(())
    });
}

#[test]
fn the_url_in_the_query_may_be_encoded_in_any_way() {
    let (up, service) = (Upstream::start(), Service::new().start());
    let url = up.serve("/enc", Reply::ok(&Content::of(b"e")));
    let every_byte = url.bytes().map(|b| format!("%{b:02x}")).collect::<String>();
    for spelling in [url.clone(), encode(&url), every_byte] {
        service.get(&format!("/fetch?url={spelling}")).assert_ok(b"e");
        service.get(&format!("/fetch?sha256=&url={spelling}")).assert_ok(b"e");
    }
    assert_eq!(up.count("/enc"), 1);
}

#[test]
fn a_hit_never_contacts_upstream_whatever_the_client_says() {
    let (up, service) = (Upstream::start(), Service::new().start());
    let url = up.serve("/stays", Reply::ok(&Content::of(b"stays")));
    service.fetch(&url).assert_ok(b"stays");
    for control in ["no-cache", "no-store", "max-age=0", "must-revalidate"] {
        let answer = service.fetch_with(&url, &[("Cache-Control", control), ("Pragma", "no-cache")]);
        assert_eq!(answer.assert_ok(b"stays").cache_status(), "HIT", "{control}");
    }
    assert_eq!(up.total(), 1);
}

#[test]
fn head_of_an_empty_file_where_upstream_refuses_head() {
    let (up, service) = (Upstream::start(), Service::new().start());
    let url = up.on("/hollow", |x| match x.method() {
        "HEAD" => x.reply(&Reply::new(405, Content::of(b""))),
        // RFC 9110, section 14.2: no range of nothing can be satisfied.
        _ => x.reply(&Reply::new(416, Content::of(b"")).field("Content-Range", "bytes */0")),
    });
    let answer = service.request("HEAD", &fetch_target(&url), &[]);
    assert_eq!((answer.status, answer.header("Content-Length")), (200, "0"));
    service.assert_nothing_stored();
}
