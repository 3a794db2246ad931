//! Bodies and heads that lie: none may become an artifact.

use crate::harness::{Content, Exchange, Service, Upstream};

/// Scripts that each break HTTP in one way; all must end in 502 `upstream_error`.
#[test]
fn answers_that_are_not_whole_or_not_http() {
    type Script = fn(&mut Exchange) -> std::io::Result<()>;
    let cases: Vec<(&str, Script)> = vec![
        ("short", |x| x.send("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n12345")),
        ("short with rst", |x| {
            x.send("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n12345")?;
            x.reset()
        }),
        ("no last chunk", |x| x.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n12345\r\n")),
        ("half a chunk", |x| x.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n12")),
        ("bad chunk size", |x| {
            x.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n12\r\n0\r\n\r\n")
        }),
        ("two lengths", |x| x.send("HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n12345")),
        ("length and chunked", |x| {
            x.send("HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n")
        }),
        ("negative length", |x| x.send("HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n12345")),
        ("huge length", |x| {
            x.send("HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999999\r\n\r\n12345")
        }),
        ("204", |x| x.send("HTTP/1.1 204 No Content\r\n\r\n")),
        ("206", |x| x.send("HTTP/1.1 206 P\r\nContent-Range: bytes 0-4/5\r\nContent-Length: 5\r\n\r\n12345")),
        ("304", |x| x.send("HTTP/1.1 304 Not Modified\r\n\r\n")),
        ("300 without location", |x| x.send("HTTP/1.1 300 Choices\r\nContent-Length: 0\r\n\r\n")),
        ("a flood of 1xx", |x| {
            for _ in 0..100_000 {
                x.send("HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n")?;
            }
            x.send("HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n1")
        }),
        ("300 KiB of headers", |x| {
            x.send("HTTP/1.1 200 OK\r\n")?;
            (0..300).try_for_each(|n| x.send(&format!("X-{n}: {}\r\n", "a".repeat(1024))))?;
            x.send("Content-Length: 1\r\n\r\n1")
        }),
        ("not http", |x| x.send("SSH-2.0-OpenSSH_9.2\r\n\r\n\r\n")),
        ("switching", |x| x.send("HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n")),
    ];
    let up = Upstream::start();
    let service = Service::new().env("UPSTREAM__MAX_RETRIES", "1").start();
    let mut wrong = Vec::new();
    for (n, (name, script)) in cases.into_iter().enumerate() {
        let answer = service.fetch(&up.on(&format!("/lie{n}"), script));
        if answer.status != 502 || answer.error() != "upstream_error" {
            wrong.push(format!("{name}: {} {}", answer.status, String::from_utf8_lossy(&answer.body)));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    service.assert_nothing_stored();
}

#[test]
fn silence_instead_of_an_answer_is_unavailable() {
    let up = Upstream::start();
    let service = Service::new().env("UPSTREAM__MAX_RETRIES", "1").start();
    for (path, reset) in [("/fin", false), ("/rst", true)] {
        let url = up.on(path, move |x| if reset { x.reset() } else { Ok(()) });
        let answer = service.fetch(&url);
        assert!(matches!(answer.status, 502 | 503), "{path}: {}", answer.status);
        assert_eq!(answer.json()["status_code"], serde_json::Value::Null, "it never answered");
    }
    service.assert_nothing_stored();
}

#[test]
fn a_body_longer_than_promised_is_cut_at_its_promise() {
    let (up, service) = (Upstream::start(), Service::new().start());
    let url =
        up.on("/longer", |x| x.send("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n12345678901234567890"));
    service.fetch(&url).assert_ok(b"12345");
    service.fetch(&url).assert_ok(b"12345");
}

#[test]
fn a_body_without_a_length_ends_with_its_connection() {
    let (up, service, content) = (Upstream::start(), Service::new().start(), Content::new(80, 500_000));
    let served = content.clone();
    let url = up.on("/close", move |x| {
        x.send("HTTP/1.1 200 OK\r\n\r\n")?;
        x.body(&served, 0, served.len())
    });
    let old = content.clone();
    let ancient = up.on("/http10", move |x| {
        x.send("HTTP/1.0 200 OK\r\n\r\n")?;
        x.body(&old, 0, old.len())
    });
    for url in [url, ancient] {
        service.fetch(&url).assert_ok(&content.bytes());
        service.fetch(&url).assert_ok(&content.bytes());
    }
}

#[test]
fn a_reset_does_not_end_a_body_without_a_length() {
    let up = Upstream::start();
    let service = Service::new().env("UPSTREAM__MAX_RETRIES", "1").start();
    let url = up.on("/torn", |x| {
        x.send("HTTP/1.1 200 OK\r\n\r\nhalf of it")?;
        std::thread::sleep(std::time::Duration::from_millis(100));
        x.reset()
    });
    service.fetch(&url).assert_error(502, "upstream_error");
    service.assert_nothing_stored();
}

#[test]
fn chunked_bodies_are_whole_with_their_last_chunk() {
    let (up, service, content) = (Upstream::start(), Service::new().start(), Content::new(81, 300_000));
    let served = content.clone();
    let url = up.on("/chunked", move |x| {
        x.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")?;
        for part in served.bytes().chunks(7_777) {
            x.chunk(part)?;
        }
        x.send("0\r\nX-Trailer: ignored\r\n\r\n")
    });
    let answer = service.fetch(&url);
    answer.assert_ok(&content.bytes());
    assert_eq!(answer.header("Content-Length"), "300000", "the length is known by now");
}

#[test]
fn a_few_interim_answers_are_fine() {
    let (up, service) = (Upstream::start(), Service::new().start());
    let url = up.on("/hints", |x| {
        x.send("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\n\r\n")?;
        x.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
    });
    service.fetch(&url).assert_ok(b"ok");
}

#[test]
fn a_head_sent_slowly_is_awaited() {
    let (up, service) = (Upstream::start(), Service::new().start());
    let url = up.on("/slow-head", |x| {
        for byte in "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok".chars() {
            x.send(&byte.to_string())?;
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        Ok(())
    });
    service.fetch(&url).assert_ok(b"ok");
}
