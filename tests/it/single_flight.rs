//! All who ask for one URL share one download, and it belongs to nobody.

use crate::harness::{Client, Content, Gate, Reply, Service, Upstream, eventually, fetch_target};

#[test]
fn two_hundred_clients_one_upstream_request() {
    let (up, service) = (Upstream::start(), Service::new().start());
    let content = Content::new(20, 200_000);
    let (gate, reply) = (Gate::new(), Reply::ok(&content));
    let door = gate.clone();
    let url = up.on("/cold", move |x| {
        door.wait();
        x.reply(&reply)
    });
    let mut clients: Vec<Client> = (0..200).map(|_| service.connect()).collect();
    clients.iter_mut().for_each(|client| client.request("GET", &fetch_target(&url), &[]));
    service.wait_metric("artifact_cache_collapsed_requests_total", 199.0);
    gate.open();
    let body = content.bytes();
    let mut collapsed = 0;
    for client in &mut clients {
        let answer = client.response("GET");
        assert_eq!(answer.assert_ok(&body).cache_status(), "MISS");
        collapsed += usize::from(answer.header("Cache-Status").contains("collapsed"));
    }
    assert_eq!((up.count("/cold"), collapsed), (1, 199));
    service.wait_metric("artifact_cache_requests_total{status=\"miss\"}", 200.0);
    assert_eq!(service.metric("artifact_cache_downloads_total"), 1.0);
    assert_eq!(service.metric("artifact_cache_bytes_served_total"), 200.0 * 200_000.0);
}

#[test]
fn a_client_that_leaves_does_not_stop_the_download() {
    let (up, service) = (Upstream::start(), Service::new().start());
    let content = Content::new(21, 300_000);
    let (gate, served) = (Gate::new(), content.clone());
    let door = gate.clone();
    let url = up.on("/left", move |x| {
        x.send(&Reply::ok(&served).head(200, 0))?;
        x.body(&served, 0, 1000)?;
        door.wait();
        x.body(&served, 1000, served.len())
    });
    let mut client = service.connect();
    client.request("GET", &fetch_target(&url), &[]);
    eventually("the download runs", || (service.inflight() == 1.0).then_some(()));
    drop(client);
    gate.open();
    eventually("it is kept", || (service.stats()["total_items"] == 1).then_some(()));
    assert_eq!(service.fetch(&url).assert_ok(&content.bytes()).cache_status(), "HIT");
    assert_eq!(up.count("/left"), 1);
}

#[test]
fn a_retry_joins_the_running_download() {
    let (up, service) = (Upstream::start(), Service::new().start());
    let content = Content::new(22, 300_000);
    let (gate, reply) = (Gate::new(), Reply::ok(&content));
    let door = gate.clone();
    let url = up.on("/join", move |x| {
        door.wait();
        x.reply(&reply)
    });
    let mut impatient = service.connect();
    impatient.request("GET", &fetch_target(&url), &[]);
    eventually("the download runs", || (service.inflight() == 1.0).then_some(()));
    drop(impatient);
    let mut patient = service.connect();
    patient.request("GET", &fetch_target(&url), &[]);
    service.wait_metric("artifact_cache_collapsed_requests_total", 1.0);
    gate.open();
    patient.response("GET").assert_ok(&content.bytes());
    assert_eq!(up.count("/join"), 1);
}

#[test]
fn when_the_download_fails_all_who_wait_are_told_at_once() {
    let up = Upstream::start();
    let service = Service::new().start();
    let gate = Gate::new();
    let door = gate.clone();
    let url = up.on("/gone", move |x| {
        door.wait();
        x.reply(&Reply::new(410, Content::of(b"gone")))
    });
    let mut clients: Vec<Client> = (0..20).map(|_| service.connect()).collect();
    clients.iter_mut().for_each(|client| client.request("GET", &fetch_target(&url), &[]));
    service.wait_metric("artifact_cache_collapsed_requests_total", 19.0);
    gate.open();
    for client in &mut clients {
        assert_eq!(client.response("GET").assert_error(502, "upstream_error")["status_code"], 410);
    }
    assert_eq!(up.count("/gone"), 1, "no queue of retries");
    service.assert_nothing_stored();
}

#[test]
fn different_urls_download_side_by_side() {
    let (up, service) = (Upstream::start(), Service::new().start());
    let gate = Gate::new();
    let door = gate.clone();
    let slow = up.on("/slow", move |x| {
        door.wait();
        x.reply(&Reply::ok(&Content::of(b"slow")))
    });
    let quick = up.serve("/quick", Reply::ok(&Content::of(b"quick")));
    let mut client = service.connect();
    client.request("GET", &fetch_target(&slow), &[]);
    eventually("the slow one runs", || (service.inflight() == 1.0).then_some(()));
    service.fetch(&quick).assert_ok(b"quick");
    gate.open();
    client.response("GET").assert_ok(b"slow");
}

#[test]
fn concurrent_publishers_of_one_content_agree() {
    let (up, service) = (Upstream::start(), Service::new().start());
    let content = Content::new(23, 100_000);
    let gate = Gate::new();
    let mut clients = Vec::new();
    for n in 0..8 {
        let (door, reply) = (gate.clone(), Reply::ok(&content));
        let url = up.on(&format!("/same{n}"), move |x| {
            door.wait();
            x.reply(&reply)
        });
        let mut client = service.connect();
        client.request("GET", &fetch_target(&url), &[]);
        clients.push(client);
    }
    eventually("all run", || (service.inflight() == 8.0).then_some(()));
    gate.open();
    clients.iter_mut().for_each(|client| drop(client.response("GET").assert_ok(&content.bytes()).clone()));
    let stats = service.stats();
    assert_eq!((&stats["total_items"], &stats["unique_blobs"]), (&8.into(), &1.into()), "{stats}");
    assert_eq!(service.blobs_on_disk(), 1);
}

#[test]
fn a_head_during_a_download_neither_waits_nor_disturbs() {
    let (up, service) = (Upstream::start(), Service::new().start());
    let (content, gate) = (Content::new(24, 100_000), Gate::new());
    let (door, reply) = (gate.clone(), Reply::ok(&content));
    let url = up.on("/both", move |x| {
        if x.method() == "GET" {
            door.wait();
        }
        x.reply(&reply)
    });
    let mut client = service.connect();
    client.request("GET", &fetch_target(&url), &[]);
    eventually("the download runs", || (service.inflight() == 1.0).then_some(()));
    let head = service.request("HEAD", &fetch_target(&url), &[]);
    assert_eq!((head.status, head.cache_status(), head.header("Content-Length")), (200, "MISS", "100000"));
    gate.open();
    client.response("GET").assert_ok(&content.bytes());
}
