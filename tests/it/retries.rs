//! Upstreams that fail and come back: resumed where it is safe, begun anew where it is not, never mixed.

use crate::harness::{
    Content, End, Gate, Reply, Service, Upstream, eventually, fetch_sha_target, fetch_target,
};

const SIZE: u64 = 3 << 20;
const CUT: u64 = 2 << 20;

/// Serves `content` with these fields, cut after [`CUT`] bytes on the first attempt.
fn cut_once(up: &Upstream, path: &str, content: &Content, fields: &[(&str, &str)]) -> String {
    let reply = fields.iter().fold(Reply::ok(content), |reply, (name, value)| reply.field(name, value));
    let content = content.clone();
    up.on(path, move |x| match x.attempt {
        1 => {
            x.send(&reply.head(200, 0))?;
            x.body(&content, 0, CUT)
        }
        _ => x.reply(&reply),
    })
}

#[test]
fn a_passing_failure_is_retried() {
    let (up, service) = (Upstream::start(), Service::new().start());
    for status in [500, 502, 503, 504, 408, 429] {
        let path = format!("/flaky{status}");
        let url = up.on(&path, move |x| match x.attempt {
            1 => x.reply(&Reply::new(status, Content::of(b"later"))),
            _ => x.reply(&Reply::ok(&Content::of(b"now"))),
        });
        service.fetch(&url).assert_ok(b"now");
        assert_eq!(up.count(&path), 2, "{status}");
    }
    assert!(service.metric("artifact_cache_upstream_retries_total") >= 6.0);
}

#[test]
fn a_final_status_is_not_retried() {
    let (up, service) = (Upstream::start(), Service::new().start());
    for status in [400, 401, 403, 404, 405, 410, 416, 418, 451] {
        let path = format!("/final{status}");
        let url = up.serve(&path, Reply::new(status, Content::of(b"no")));
        let json = service.fetch(&url).assert_error(502, "upstream_error");
        assert_eq!((&json["status_code"], up.count(&path)), (&status.into(), 1));
    }
}

#[test]
fn attempts_are_counted_out() {
    let (up, service) = (Upstream::start(), Service::new().env("UPSTREAM__MAX_RETRIES", "2").start());
    let url = up.serve("/broken", Reply::new(500, Content::of(b"always")));
    let json = service.fetch(&url).assert_error(502, "upstream_error");
    assert_eq!(json["status_code"], 500);
    assert!((2..=3).contains(&up.count("/broken")), "{} attempts", up.count("/broken"));
    service.assert_nothing_stored();
}

#[test]
fn a_cut_is_resumed_with_a_strong_etag() {
    let (up, service, content) = (Upstream::start(), Service::new().start(), Content::new(50, SIZE));
    let url = cut_once(&up, "/cut", &content, &[("ETag", "\"v1\""), ("Accept-Ranges", "bytes")]);
    service.fetch(&url).assert_ok(&content.bytes());
    let second = &up.requests("/cut")[1];
    assert_eq!(second.get("If-Range"), Some("\"v1\""));
    let range = second.get("Range").expect("it resumes");
    let start: u64 = range.trim_start_matches("bytes=").trim_end_matches('-').parse().expect("an open range");
    assert!(start > 0 && start <= CUT, "{range}");
    assert_eq!(service.metric("artifact_cache_upstream_resumes_total"), 1.0);
}

#[test]
fn a_weak_etag_is_no_ground_to_resume() {
    let (up, service, content) = (Upstream::start(), Service::new().start(), Content::new(51, SIZE));
    let url = cut_once(&up, "/weak", &content, &[("ETag", "W/\"v1\"")]);
    service.fetch(&url).assert_ok(&content.bytes());
    assert_eq!(up.requests("/weak")[1].get("Range"), None);
}

#[test]
fn a_date_is_no_ground_to_resume() {
    let (up, service, content) = (Upstream::start(), Service::new().start(), Content::new(52, SIZE));
    let url = cut_once(&up, "/dated", &content, &[("Last-Modified", "Tue, 01 Oct 2024 10:00:00 GMT")]);
    service.fetch(&url).assert_ok(&content.bytes());
    assert_eq!(up.requests("/dated")[1].get("Range"), None);
}

#[test]
fn with_the_clients_digest_it_resumes_without_an_etag() {
    let (up, service, content) = (Upstream::start(), Service::new().start(), Content::new(53, SIZE));
    let url = cut_once(&up, "/trusted", &content, &[]);
    service.fetch_sha(&url, &content.sha256()).assert_ok(&content.bytes());
    assert!(up.requests("/trusted")[1].get("Range").is_some(), "the digest decides in the end");
}

#[test]
fn a_wrong_206_is_never_mixed_in() {
    let content = Content::new(54, SIZE);
    let other = Content::new(55, SIZE);
    type Wrong = fn(u64) -> (u64, u64, &'static str);
    let cases: [(&str, Wrong); 4] = [
        ("/start", |start| (start + 1, SIZE, "\"v1\"")),
        ("/early", |start| (start - 1, SIZE, "\"v1\"")),
        ("/total", |_| (CUT, SIZE + 1, "\"v1\"")),
        ("/etag", |start| (start, SIZE, "\"v2\"")),
    ];
    for (path, wrong) in cases {
        let (up, service) = (Upstream::start(), Service::new().start());
        let (good, evil) = (content.clone(), other.clone());
        let url = up.on(path, move |x| {
            let reply = Reply::ok(&good).field("ETag", "\"v1\"");
            match (x.attempt, x.range_start()) {
                (1, _) => {
                    x.send(&reply.head(200, 0))?;
                    x.body(&good, 0, CUT)
                }
                (_, Some(asked)) => {
                    let (start, total, etag) = wrong(asked);
                    let (last, length) = (total - 1, total - start);
                    x.send(&format!("HTTP/1.1 206 P\r\nContent-Range: bytes {start}-{last}/{total}\r\nContent-Length: {length}\r\nETag: {etag}\r\n\r\n"))?;
                    x.body(&evil, start, total)
                }
                _ => x.reply(&reply),
            }
        });
        let answer = service.fetch(&url);
        match answer.status {
            200 => drop(answer.assert_ok(&content.bytes()).clone()),
            502 => drop(answer.assert_error(502, "upstream_error")),
            status => panic!("{path}: {status}"),
        }
        let kept = service.count_rows("SELECT count(*) FROM artifacts");
        assert_eq!(kept, i64::from(answer.status == 200), "{path}: only the right content is kept");
    }
}

#[test]
fn a_200_with_the_same_prefix_carries_the_followers_on() {
    let up = Upstream::start();
    let service = Service::new().streaming().start();
    let (content, gate) = (Content::new(56, SIZE), Gate::new());
    let (door, served) = (gate.clone(), content.clone());
    let url = up.on("/again", move |x| {
        let reply = Reply::ok(&served).without_ranges();
        if x.attempt > 1 {
            return x.reply(&reply);
        }
        x.send(&reply.head(200, 0))?;
        x.body(&served, 0, CUT)?;
        door.wait();
        x.reset()
    });
    let mut client = service.connect();
    client.request("GET", &fetch_target(&url), &[]);
    let head = client.head();
    let first = client.take(1_000_000);
    gate.open();
    let rest = client.body(
        "GET",
        &crate::harness::client::Head {
            line: head.line.clone(),
            fields: vec![("Content-Length".into(), (SIZE - 1_000_000).to_string())],
        },
    );
    assert_eq!((head.status(), &rest.end), (200, &End::Complete));
    assert!([first, rest.body].concat() == content.bytes());
    assert!(up.count("/again") >= 2);
}

#[test]
fn a_200_with_other_content_resets_the_followers() {
    let up = Upstream::start();
    let service = Service::new().streaming().start();
    let (old, new, gate) = (Content::new(57, SIZE), Content::new(58, SIZE), Gate::new());
    let (door, before, after) = (gate.clone(), old.clone(), new.clone());
    let url = up.on("/changed", move |x| {
        if x.attempt > 1 {
            return x.reply(&Reply::ok(&after).field("ETag", "\"v2\""));
        }
        x.send(&Reply::ok(&before).field("ETag", "\"v1\"").head(200, 0))?;
        x.body(&before, 0, CUT)?;
        door.wait();
        x.reset()
    });
    let mut client = service.connect();
    client.request("GET", &fetch_target(&url), &[]);
    client.head();
    client.take(1_000_000);
    gate.open();
    assert_eq!(client.end(), End::Reset, "two contents are never mixed");
    eventually("the new content is kept whole", || (service.stats()["total_items"] == 1).then_some(()));
    service.fetch(&url).assert_ok(&new.bytes());
}

#[test]
fn progress_renews_the_attempts() {
    let (up, service) = (Upstream::start(), Service::new().env("UPSTREAM__MAX_RETRIES", "2").start());
    let content = Content::new(59, 8 << 20);
    let served = content.clone();
    let url = up.on("/steps", move |x| {
        let start = x.range_start().unwrap_or(0);
        let reply = Reply::ok(&served).field("ETag", "\"v1\"");
        x.send(&reply.head(if start > 0 { 206 } else { 200 }, start))?;
        x.body(&served, start, start + CUT)
    });
    service.fetch(&url).assert_ok(&content.bytes());
    assert!(up.count("/steps") >= 4);
}

#[test]
fn a_long_retry_after_is_passed_on() {
    let (up, service) = (Upstream::start(), Service::new().start());
    for status in [429, 503] {
        let path = format!("/busy{status}");
        let url = up.serve(&path, Reply::new(status, Content::of(b"busy")).field("Retry-After", "120"));
        let answer = service.fetch(&url);
        assert!(matches!(answer.status, 502 | 503), "{}", answer.status);
        assert_eq!(answer.header("Retry-After"), "120");
        assert_eq!(up.count(&path), 1, "it isn't slept on");
    }
}

#[test]
fn a_stall_is_dropped_and_resumed() {
    let (up, service) = (Upstream::start(), Service::new().env("UPSTREAM__STALL_SECONDS", "0.5").start());
    let content = Content::new(60, SIZE);
    let served = content.clone();
    let url = up.on("/stall", move |x| {
        let reply = Reply::ok(&served).field("ETag", "\"v1\"");
        if x.attempt > 1 {
            return x.reply(&reply);
        }
        x.send(&reply.head(200, 0))?;
        x.body(&served, 0, CUT)?;
        x.hang()
    });
    service.fetch(&url).assert_ok(&content.bytes());
    assert_eq!(up.count("/stall"), 2);
    assert!(up.requests("/stall")[1].get("Range").is_some());
}

#[test]
fn a_trickle_under_the_least_rate_is_a_stall() {
    let up = Upstream::start();
    let service = Service::new()
        .env("UPSTREAM__STALL_SECONDS", "1")
        .env("UPSTREAM__MIN_BYTES_PER_SECOND", "10000")
        .start();
    let content = Content::new(61, 100_000);
    let served = content.clone();
    let url = up.on("/trickle", move |x| {
        let reply = Reply::ok(&served);
        if x.attempt > 1 {
            return x.reply(&reply);
        }
        x.send(&reply.head(200, 0))?;
        for at in 0..2_000 {
            x.body(&served, at, at + 1)?;
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        Ok(())
    });
    service.fetch(&url).assert_ok(&content.bytes());
    assert_eq!(up.count("/trickle"), 2);
}

#[test]
fn silence_ends_with_the_timeout() {
    let up = Upstream::start();
    let service = Service::new()
        .env("UPSTREAM__TIMEOUT_SECONDS", "1")
        .env("UPSTREAM__STALL_SECONDS", "0.3")
        .env("UPSTREAM__MAX_RETRIES", "1")
        .start();
    let url = up.on("/silent", |x| x.hang());
    let answer = service.fetch(&url);
    let json = answer.assert_error(503, "upstream_unavailable");
    assert_eq!(json["source_url"], url);
    assert!(!answer.header("Retry-After").is_empty());
    service.assert_nothing_stored();
}

#[test]
fn a_changed_total_while_resuming_with_a_digest_is_judged_by_the_digest() {
    let (up, service, content) = (Upstream::start(), Service::new().start(), Content::new(62, SIZE));
    let other = Content::new(63, SIZE);
    let (first, second) = (other.clone(), content.clone());
    let url = up.on("/swap", move |x| {
        if x.attempt > 1 {
            return x.reply(&Reply::ok(&second));
        }
        x.send(&Reply::ok(&first).head(200, 0))?;
        x.body(&first, 0, CUT)
    });
    let mut client = service.connect();
    client.request("GET", &fetch_sha_target(&url, &content.sha256()), &[]);
    let answer = client.response("GET");
    // Half of one content and half of another must not pass, whatever the answer is.
    match answer.status {
        200 => drop(answer.assert_ok(&content.bytes()).clone()),
        status => assert!(matches!(status, 409 | 502), "{status}"),
    }
}

#[test]
fn a_200_of_another_length_resets_the_followers() {
    let (up, service) = (Upstream::start(), Service::new().streaming().start());
    let (short, long, gate) = (Content::new(64, SIZE), Content::new(64, SIZE + 1000), Gate::new());
    let (door, before, after) = (gate.clone(), short.clone(), long.clone());
    let url = up.on("/grown", move |x| {
        if x.attempt > 1 {
            return x.reply(&Reply::ok(&after).without_ranges());
        }
        x.send(&Reply::ok(&before).head(200, 0))?;
        x.body(&before, 0, CUT)?;
        door.wait();
        Ok(())
    });
    let mut client = service.connect();
    client.request("GET", &fetch_target(&url), &[]);
    assert_eq!(client.head().get("Content-Length"), Some(SIZE.to_string().as_str()));
    client.take(1_000_000);
    gate.open();
    assert_ne!(client.drain(SIZE - 1_000_000, |_| {}), End::Complete, "the announced length can't be kept");
    eventually("the longer one is kept", || (service.stats()["total_items"] == 1).then_some(()));
    service.fetch(&url).assert_ok(&long.bytes());
}

#[test]
fn a_mixture_that_was_streamed_never_becomes_whole() {
    let (up, service, gate) = (Upstream::start(), Service::new().streaming().start(), Gate::new());
    let (content, other) = (Content::new(64, SIZE), Content::new(65, SIZE));
    let (right, wrong, door) = (content.clone(), other, gate.clone());
    // Without a validator the second attempt continues one content with another, which only the digest can tell.
    let url = up.on("/mixture", move |x| match x.attempt {
        1 => {
            x.send(&Reply::ok(&right).head(200, 0))?;
            x.body(&right, 0, CUT)
        }
        2 => {
            let start = x.range_start().expect("it resumes");
            x.send(&Reply::ok(&wrong).head(206, start))?;
            x.body(&wrong, start, SIZE - 1)?;
            door.wait();
            x.body(&wrong, SIZE - 1, SIZE)
        }
        _ => x.reply(&Reply::ok(&right)),
    });
    let mut client = service.connect();
    client.request("GET", &fetch_sha_target(&url, &content.sha256()), &[]);
    assert_eq!(client.head().status(), 200);
    // The client has got bytes of both; then the right content comes, whole, with the digest it asked for.
    client.take((SIZE - (64 << 10)) as usize);
    gate.open();
    assert_ne!(client.end(), End::Complete, "half of one content and half of another passed for whole");
    eventually("the right content is stored", || (service.stats()["total_items"] == 1).then_some(()));
    service.fetch_sha(&url, &content.sha256()).assert_ok(&content.bytes());
}

/// Serves the first 300,000 bytes without saying how many there are, and 1,000 more to each of the `short` requests
/// that continue, though these name the whole length; then it is well again.
fn ever_shorter(up: &Upstream, path: &str, content: &Content, short: usize, chunked: bool) -> String {
    let content = content.clone();
    up.on(path, move |x| {
        let reply = Reply::ok(&content).field("ETag", "\"v1\"");
        let (size, start) = (content.len(), x.range_start());
        match start {
            None => {
                x.send("HTTP/1.1 200 OK\r\nETag: \"v1\"\r\nTransfer-Encoding: chunked\r\n\r\n")?;
                x.chunk(&content.piece(0, 300_000))
            }
            Some(start) if x.attempt <= short + 1 => {
                let last = size - 1;
                x.send(&format!(
                    "HTTP/1.1 206 P\r\nETag: \"v1\"\r\nContent-Range: bytes {start}-{last}/{size}\r\n"
                ))?;
                let piece = content.piece(start, start + 1_000);
                if chunked {
                    x.send("Transfer-Encoding: chunked\r\n\r\n")?;
                    x.chunk(&piece)?;
                    x.send("0\r\n\r\n")
                } else {
                    x.send("Content-Length: 1000\r\n\r\n")?;
                    x.raw(&piece)
                }
            }
            Some(_) => x.reply(&reply),
        }
    })
}

#[test]
fn a_206_that_ends_before_its_own_total_is_resumed() {
    let (up, service, content) = (Upstream::start(), Service::new().start(), Content::new(66, 600_000));
    for (path, chunked) in [("/length", false), ("/chunked", true)] {
        let url = ever_shorter(&up, path, &content, 1, chunked);
        service.fetch(&url).assert_ok(&content.bytes());
        let ranges: Vec<_> =
            up.requests(path).iter().map(|head| head.get("Range").map(String::from)).collect();
        let expected = [None, Some("bytes=300000-".to_owned()), Some("bytes=301000-".to_owned())];
        assert_eq!(ranges, expected, "{path}");
    }
}

#[test]
fn a_206_that_always_ends_before_its_own_total_is_never_taken_for_whole() {
    let up = Upstream::start();
    let service = Service::new().env("UPSTREAM__MAX_RETRIES", "2").start();
    for (path, chunked) in [("/length", false), ("/chunked", true)] {
        let url = ever_shorter(&up, path, &Content::new(67, 600_000), 100, chunked);
        service.fetch(&url).assert_error(502, "upstream_error");
    }
    service.assert_nothing_stored();
}

#[test]
fn a_206_without_the_etag_that_was_asked_for_is_never_mixed_in() {
    let (up, service) = (Upstream::start(), Service::new().start());
    let (old, new) = (Content::new(68, SIZE), Content::new(69, SIZE));
    let (before, after) = (old, new.clone());
    // It has never heard of If-Range, and the content has changed meanwhile.
    let url = up.on("/deaf", move |x| match (x.attempt, x.range_start()) {
        (1, _) => {
            x.send(&Reply::ok(&before).field("ETag", "\"v1\"").head(200, 0))?;
            x.body(&before, 0, CUT)
        }
        (_, Some(start)) => {
            x.send(&Reply::ok(&after).head(206, start))?;
            x.body(&after, start, SIZE)
        }
        _ => x.reply(&Reply::ok(&after)),
    });
    service.fetch(&url).assert_ok(&new.bytes());
    assert_eq!(up.requests("/deaf")[1].get("If-Range"), Some("\"v1\""));
}

#[test]
fn a_total_that_changes_between_two_206s_is_never_mixed_in() {
    let (up, service) = (Upstream::start(), Service::new().start());
    let (short, long) = (Content::new(70, 600_000), Content::new(71, 700_000));
    let (before, after) = (short, long.clone());
    let url = up.on("/swelling", move |x| {
        let head = "ETag: \"v1\"\r\nTransfer-Encoding: chunked\r\n";
        match (x.attempt, x.range_start()) {
            (1, _) => {
                x.send(&format!("HTTP/1.1 200 OK\r\n{head}\r\n"))?;
                x.chunk(&before.piece(0, 300_000))
            }
            (2, Some(start)) => {
                x.send(&format!(
                    "HTTP/1.1 206 P\r\nContent-Range: bytes {start}-599999/600000\r\n{head}\r\n"
                ))?;
                x.chunk(&before.piece(start, start + 1_000))
            }
            _ => x.reply(&Reply::ok(&after).field("ETag", "\"v1\"")),
        }
    });
    let answer = service.fetch(&url);
    match answer.status {
        200 => drop(answer.assert_ok(&long.bytes()).clone()),
        _ => drop(answer.assert_error(502, "upstream_error")),
    }
}
