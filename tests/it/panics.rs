//! A panic is a bug, and costs what it happened in, nothing else: locks and waiters are released, it is counted, and the
//! next request works.

use crate::harness::{Client, Content, End, Gate, Reply, Running, Service, Upstream, fetch_target};

fn service(point: &str) -> Running {
    Service::new().variable("ARTIFACT_CACHE_PANIC_POINT", point).start()
}

/// One panic was had, counted and said, and the service is as good as new.
#[track_caller]
fn assert_survived(service: &Running, client: &mut Client, url: &str, content: &Content) {
    assert_eq!(service.metric("artifact_cache_panics_total"), 1.0);
    let line = service.wait_log("the panic", |line| line["msg"] == "panic");
    assert!(line["location"].as_str().unwrap_or_default().starts_with("src/kill_point.rs"), "{line}");
    client.request("GET", &fetch_target(url), &[]);
    client.response("GET").assert_ok(&content.bytes());
    assert_eq!(service.fetch(url).assert_ok(&content.bytes()).cache_status(), "HIT");
    assert_eq!(service.get("/health").status, 200);
}

#[test]
fn a_request_that_panics_is_answered_500() {
    let points = [
        "fetch.parsed",
        "flight.locked",
        "flight.joined",
        "download.begun",
        "publish.locked",
        "record.begun",
    ];
    for (n, point) in points.into_iter().enumerate() {
        let (up, content) = (Upstream::start(), Content::new(74_000 + n as u64, 100_000));
        let url = up.serve("/x", Reply::ok(&content));
        let service = service(point);
        // One connection all along: it is not the connection's fault.
        let mut client = service.connect();
        client.request("GET", &fetch_target(&url), &[]);
        client.response("GET").assert_error(500, "internal_error");
        assert_survived(&service, &mut client, &url, &content);
        service.wait_metric("artifact_cache_errors_total{code=\"internal_error\"}", 1.0);
    }
}

#[test]
fn whoever_waits_for_a_download_that_panics_is_told() {
    let (up, content, gate) = (Upstream::start(), Content::new(74_100, 100_000), Gate::new());
    let (reply, closed) = (Reply::ok(&content), gate.clone());
    let url = up.on("/x", move |x| {
        closed.wait();
        x.reply(&reply)
    });
    let service = service("download.begun");
    let mut clients: Vec<Client> = (0..5).map(|_| service.connect()).collect();
    clients.iter_mut().for_each(|client| client.request("GET", &fetch_target(&url), &[]));
    service.wait_metric("artifact_cache_collapsed_requests_total", 4.0);
    gate.open();
    for client in &mut clients {
        client.response("GET").assert_error(500, "internal_error");
    }
    assert_survived(&service, &mut clients[0], &url, &content);
}

#[test]
fn a_body_that_panics_breaks_off() {
    let (up, content) = (Upstream::start(), Content::new(74_200, 3_000_000));
    let url = up.serve("/x", Reply::ok(&content));
    let service = service("body.polled:2");
    let broken = service.fetch(&url);
    assert_eq!((broken.status, broken.end == End::Complete), (200, false));
    assert!(broken.body.len() < 3_000_000);
    assert_survived(&service, &mut service.connect(), &url, &content);
}
