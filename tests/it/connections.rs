//! Clients that are slow, greedy or malformed, and how what is sent to them is paced.

use std::process::Command;
use std::time::Duration;

use crate::harness::client::End;
use crate::harness::{
    Client, Content, Reply, Service, Upstream, eventually, fetch_target, in_a_network_of_its_own, skip,
};

#[test]
fn a_head_dribbled_too_slowly_is_closed() {
    let service = Service::new().env("SERVER__HEADER_TIMEOUT_SECONDS", "0.5").start();
    let mut dribbler = service.connect();
    let mut alive = true;
    for byte in "GET /health HTTP/1.1\r\nHost: h\r\n".repeat(100).bytes() {
        alive = dribbler.send([byte]) && alive;
        if !alive {
            break;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(!alive, "it was closed long before 60 s");
}

#[test]
fn silence_after_connecting_is_closed() {
    let service = Service::new().env("SERVER__HEADER_TIMEOUT_SECONDS", "0.3").start();
    let mut silent = service.connect();
    assert_ne!(silent.end(), End::Complete);
    let mut half = service.connect();
    half.send("PRI * HT");
    assert_ne!(half.end(), End::Complete, "also while HTTP/2 is being detected");
}

#[test]
fn a_connection_is_kept_and_pipelined() {
    let (up, service) = (Upstream::start(), Service::new().start());
    let url = up.serve("/k", Reply::ok(&Content::of(b"kept")));
    let mut client = service.connect();
    for _ in 0..5 {
        client.request("GET", &fetch_target(&url), &[]);
        client.response("GET").assert_ok(b"kept");
    }
    let one = format!("GET {} HTTP/1.1\r\nHost: h\r\n\r\n", fetch_target(&url));
    client.send(one.repeat(5));
    for _ in 0..5 {
        client.response("GET").assert_ok(b"kept");
    }
    client.request("GET", "/fetch", &[]);
    client.response("GET").assert_error(400, "missing_parameter");
    client.request("GET", &fetch_target(&url), &[]);
    client.response("GET").assert_ok(b"kept");
}

#[test]
fn an_idle_connection_is_closed_in_time() {
    let service = Service::new().env("SERVER__KEEPALIVE_TIMEOUT_SECONDS", "0.3").start();
    let mut client = service.connect();
    client.request("GET", "/health", &[]);
    assert_eq!(client.response("GET").status, 200);
    assert_eq!(client.end(), End::Short, "closed, not reset");
}

#[test]
fn at_the_cap_the_longest_idle_connection_makes_room() {
    let service = Service::new().env("SERVER__MAX_CONNECTIONS", "4").start();
    let mut clients: Vec<Client> = (0..4).map(|_| service.connect()).collect();
    for client in &mut clients {
        client.request("GET", "/health", &[]);
        assert_eq!(client.response("GET").status, 200);
        std::thread::sleep(Duration::from_millis(30));
    }
    // The first is used again, so the second has idled longest.
    clients[0].request("GET", "/health", &[]);
    assert_eq!(clients[0].response("GET").status, 200);
    let mut fifth = service.connect();
    fifth.request("GET", "/health", &[]);
    assert_eq!(fifth.response("GET").status, 200);
    assert_eq!(clients[1].end(), End::Short);
    for n in [0, 2, 3] {
        clients[n].request("GET", "/health", &[]);
        assert_eq!(clients[n].response("GET").status, 200, "connection {n} was kept");
    }
}

#[test]
fn a_busy_connection_is_never_closed_for_a_new_one() {
    let (up, service) = (Upstream::start(), Service::new().env("SERVER__MAX_CONNECTIONS", "2").start());
    let content = Content::new(160, 32 << 20);
    let url = up.serve("/big", Reply::ok(&content));
    service.fetch_with(&url, &[("Range", "bytes=0-0")]);
    let mut busy = service.connect();
    busy.request("GET", &fetch_target(&url), &[]);
    let head = busy.head();
    for _ in 0..10 {
        let mut other = service.connect();
        other.request("GET", "/health", &[]);
        assert_eq!(other.response("GET").status, 200);
    }
    busy.body("GET", &head).assert_ok(&content.bytes());
}

#[test]
fn a_thousand_idle_connections_keep_nobody_out() {
    let service = Service::new().env("SERVER__MAX_CONNECTIONS", "64").start();
    let idle: Vec<Client> = (0..600).map(|_| service.connect()).collect();
    for _ in 0..5 {
        assert_eq!(service.get("/health").status, 200);
    }
    drop(idle);
}

#[test]
fn a_client_that_reads_nothing_is_dropped() {
    let (up, service) =
        (Upstream::start(), Service::new().env("SERVER__WRITE_IDLE_TIMEOUT_SECONDS", "0.5").start());
    let url = up.serve("/big", Reply::ok(&Content::new(161, 64 << 20)));
    service.fetch_with(&url, &[("Range", "bytes=0-0")]);
    let mut sleeper = service.connect();
    sleeper.request("GET", &fetch_target(&url), &[]);
    service.wait_metric("artifact_cache_requests_total{status=\"error\"}", 1.0);
    let got = sleeper.drain(64 << 20, |_| {});
    assert_ne!(got, End::Complete);
}

#[test]
fn too_long_a_request_line_is_414_and_too_many_headers_431() {
    let service = Service::new().start();
    for (head, expected) in [
        (format!("GET /fetch?url={} HTTP/1.1\r\nHost: h\r\n\r\n", "a".repeat(40_000)), 414),
        (format!("GET /health HTTP/1.1\r\nHost: h\r\nX: {}\r\n\r\n", "a".repeat(80_000)), 431),
        (format!("GET /health HTTP/1.1\r\nHost: h\r\n{}\r\n", "X: y\r\n".repeat(150)), 431),
    ] {
        let mut client = service.connect();
        client.send(&head);
        assert_eq!(client.head().status(), expected, "{:.40}", head);
        assert_ne!(client.end(), End::Complete);
    }
}

#[test]
fn a_request_line_of_32_kib_is_fine() {
    let service = Service::new().start();
    let answer = service.get(&format!("/fetch?url=http://127.0.0.1/{}", "a".repeat(30_000)));
    answer.assert_error(400, "invalid_parameter");
}

#[test]
fn malformed_requests_are_refused_and_closed() {
    let service = Service::new().start();
    let mut wrong = Vec::new();
    for (request, expected) in [
        ("GET /health HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", &[400][..]),
        (
            "GET /health HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            &[400],
        ),
        ("GET /health HTTP/1.1\r\nHost: h\r\nContent-Length: x\r\n\r\n", &[400]),
        ("GET /health HTTP/1.1\r\nHost : h\r\n\r\n", &[400]),
        ("GET /health HTTP/1.1\r\nHo\0st: h\r\n\r\n", &[400]),
        ("GET /health HTTP/3.7\r\nHost: h\r\n\r\n", &[400, 505]),
        ("GET  /health  HTTP/1.1\r\nHost: h\r\n\r\n", &[400]),
        ("NONSENSE\r\n\r\n", &[400]),
        ("\x16\x03\x01\x02\0\x01\0\x01\r\n\r\n", &[400]),
    ] {
        let mut client = service.connect();
        client.send(request);
        let status = client.try_head().map_or(0, |head| head.status());
        if !expected.contains(&status) {
            wrong.push(format!("{status} to {request:?}"));
        }
        assert_ne!(client.end(), End::Complete, "closed: {request:?}");
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert_eq!(service.get("/health").status, 200);
}

#[test]
fn a_request_with_a_body_is_answered_and_the_body_is_not_the_next_request() {
    let service = Service::new().start();
    let mut client = service.connect();
    let body = "GET /nothing HTTP/1.1\r\nHost: h\r\n\r\n";
    client.send(format!("GET /health HTTP/1.1\r\nHost: h\r\nContent-Length: {}\r\n\r\n{body}", body.len()));
    assert_eq!(client.response("GET").status, 200);
    client.request("GET", "/api/stats", &[]);
    if let Ok(head) = client.try_head() {
        assert_eq!(head.status(), 200, "the body was not taken for a request");
    }
}

#[test]
fn a_reset_client_harms_nobody() {
    let (up, service) = (Upstream::start(), Service::new().start());
    let content = Content::new(162, 4 << 20);
    let url = up.serve("/r", Reply::ok(&content));
    service.fetch_with(&url, &[("Range", "bytes=0-0")]);
    for _ in 0..20 {
        let mut client = service.connect();
        client.request("GET", &fetch_target(&url), &[]);
        client.take(100);
    }
    service.fetch(&url).assert_ok(&content.bytes());
    eventually("all are gone", || {
        (service.metric("artifact_cache_requests_total{status=\"error\"}") > 0.0).then_some(())
    });
}

#[test]
fn absolute_form_and_odd_hosts() {
    let service = Service::new().start();
    let mut client = service.connect();
    client.send("GET http://proxy.test/health HTTP/1.1\r\nHost: proxy.test\r\nConnection: close\r\n\r\n");
    assert_eq!(client.response("GET").status, 200);
}

#[test]
fn waiting_for_upstream_is_nobodys_idleness() {
    let up = Upstream::start();
    let service = Service::new()
        .streaming()
        .env("SERVER__WRITE_IDLE_TIMEOUT_SECONDS", "0.3")
        .env("SERVER__KEEPALIVE_TIMEOUT_SECONDS", "0.3")
        .env("SERVER__HEADER_TIMEOUT_SECONDS", "0.3")
        .start();
    let content = Content::new(163, 500_000);
    let served = content.clone();
    let url = up.on("/pauses", move |x| {
        let pause = || std::thread::sleep(Duration::from_secs(1));
        pause();
        x.send(&Reply::ok(&served).head(200, 0))?;
        x.body(&served, 0, 300_000)?;
        pause();
        x.body(&served, 300_000, 500_000)
    });
    let mut client = service.connect();
    client.request("GET", &fetch_target(&url), &[]);
    client.response("GET").assert_ok(&content.bytes());
}

#[test]
fn nothing_is_paced_within_this_machine() {
    const NAME: &str = "connections::nothing_is_paced_within_this_machine";
    in_a_network_of_its_own(NAME, || {
        if let Err(e) = std::fs::write("/proc/sys/net/ipv4/tcp_congestion_control", "bbr") {
            return skip(NAME, &format!("BBR is not for a namespace to choose here: {e}"));
        }
        for (host, algorithm) in [("127.0.0.1", "reno"), ("::1", "reno"), ("0.0.0.0", "bbr")] {
            let service = Service::new().env("SERVER__HOST", host).start();
            let mut client = service.connect();
            client.request("GET", "/health", &[]);
            assert_eq!(client.response("GET").status, 200);
            let from_service = format!("dport = :{}", client.local_addr().port());
            let sockets = Command::new("ss")
                .args(["-Htin", "state", "established"])
                .arg(from_service)
                .output()
                .expect("ss is there, of iproute2");
            let sockets = String::from_utf8(sockets.stdout).unwrap();
            assert!(sockets.split_whitespace().any(|word| word == algorithm), "{host}: {sockets}");
        }
    });
}
