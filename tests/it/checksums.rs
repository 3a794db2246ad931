//! Checksums: who is told what, and what is kept.

use crate::harness::{
    Content, Gate, Reply, Service, Upstream, WRONG_SHA, eventually, fetch_sha_target, fetch_target,
};

#[test]
fn the_right_digest_in_any_spelling() {
    let (up, service) = (Upstream::start(), Service::new().start());
    let content = Content::new(10, 2_000);
    let url = up.serve("/c", Reply::ok(&content));
    let digest = content.sha256();
    for spelling in [digest.clone(), digest.to_uppercase(), format!("sha256:{digest}"), String::new()] {
        service.fetch_sha(&url, &spelling).assert_ok(&content.bytes());
    }
    assert_eq!(up.count("/c"), 1);
}

#[test]
fn a_mismatch_on_a_miss_stores_nothing() {
    let (up, service) = (Upstream::start(), Service::new().start());
    let content = Content::new(11, 2_000);
    let url = up.serve("/c", Reply::ok(&content));
    let json = service.fetch_sha(&url, WRONG_SHA).assert_error(409, "checksum_mismatch");
    assert_eq!(json["expected"], WRONG_SHA);
    assert_eq!(json["actual"], content.sha256());
    assert_eq!(json["source_url"], url);
    assert_eq!(json["message"], "Artifact checksum does not match expected value");
    service.assert_nothing_stored();
    assert_eq!(service.metric("artifact_cache_checksum_mismatches_total"), 1.0);
}

#[test]
fn a_mismatch_on_a_hit_names_the_stored_digest() {
    let (up, service) = (Upstream::start(), Service::new().start());
    let content = Content::new(12, 2_000);
    let url = up.serve("/c", Reply::ok(&content));
    service.fetch(&url).assert_ok(&content.bytes());
    let json = service.fetch_sha(&url, WRONG_SHA).assert_error(409, "checksum_mismatch");
    assert_eq!(json["actual"], content.sha256());
    assert_eq!(up.count("/c"), 1, "a hit never contacts upstream");
    service.fetch(&url).assert_ok(&content.bytes());
}

#[test]
fn a_mismatch_is_remembered_for_its_url_and_digest_only() {
    let (up, service) = (Upstream::start(), Service::new().start());
    let content = Content::new(13, 2_000);
    let url = up.serve("/c", Reply::ok(&content));
    for _ in 0..3 {
        let json = service.fetch_sha(&url, WRONG_SHA).assert_error(409, "checksum_mismatch");
        assert_eq!(json["actual"], content.sha256());
    }
    assert_eq!(up.count("/c"), 1, "the retry is answered from memory");
    let other = format!("1{}", &WRONG_SHA[1..]);
    service.fetch_sha(&url, &other).assert_error(409, "checksum_mismatch");
    assert_eq!(up.count("/c"), 2, "another expectation is another question");
    service.fetch_sha(&url, &content.sha256()).assert_ok(&content.bytes());
    assert_eq!(up.count("/c"), 3);
}

#[test]
fn no_cache_passes_a_remembered_mismatch_by() {
    let (up, service) = (Upstream::start(), Service::new().start());
    let fresh = Content::new(14, 2_000);
    let served = fresh.clone();
    let url = up.on("/c", move |x| match x.attempt {
        1 => x.reply(&Reply::ok(&Content::of(b"stale"))),
        _ => x.reply(&Reply::ok(&served)),
    });
    let digest = fresh.sha256();
    service.fetch_sha(&url, &digest).assert_error(409, "checksum_mismatch");
    service.fetch_sha(&url, &digest).assert_error(409, "checksum_mismatch");
    let fields = [("Cache-Control", "no-cache")];
    service.request("GET", &fetch_sha_target(&url, &digest), &fields).assert_ok(&fresh.bytes());
    service.fetch_sha(&url, &digest).assert_ok(&fresh.bytes());
    assert_eq!(up.count("/c"), 2);
}

#[test]
fn a_remembered_mismatch_is_forgotten_in_time() {
    let up = Upstream::start();
    let service = Service::new().env("FETCH__MISMATCH_MEMORY_SECONDS", "0.2").start();
    let url = up.serve("/c", Reply::ok(&Content::of(b"x")));
    service.fetch_sha(&url, WRONG_SHA).assert_error(409, "checksum_mismatch");
    eventually("it is asked again", || {
        service.fetch_sha(&url, WRONG_SHA).assert_error(409, "checksum_mismatch");
        (up.count("/c") >= 2).then_some(())
    });
}

#[test]
fn each_waiter_is_judged_by_its_own_digest() {
    let (up, service) = (Upstream::start(), Service::new().start());
    let content = Content::new(15, 50_000);
    let (gate, served) = (Gate::new(), content.clone());
    let (door, reply) = (gate.clone(), Reply::ok(&served));
    let url = up.on("/c", move |x| {
        door.wait();
        x.reply(&reply)
    });
    let targets =
        [fetch_sha_target(&url, WRONG_SHA), fetch_sha_target(&url, &content.sha256()), fetch_target(&url)];
    let mut clients: Vec<_> = targets
        .iter()
        .map(|target| {
            let mut client = service.connect();
            client.request("GET", target, &[]);
            client
        })
        .collect();
    service.wait_metric("artifact_cache_collapsed_requests_total", 2.0);
    gate.open();
    clients[0].response("GET").assert_error(409, "checksum_mismatch");
    clients[1].response("GET").assert_ok(&content.bytes());
    clients[2].response("GET").assert_ok(&content.bytes());
    assert_eq!(up.count("/c"), 1);
    assert_eq!(service.stats()["total_items"], 1, "one was content, so it is kept");
}

#[test]
fn when_all_digests_are_wrong_nothing_is_stored() {
    let (up, service) = (Upstream::start(), Service::new().start());
    let gate = Gate::new();
    let door = gate.clone();
    let url = up.on("/c", move |x| {
        door.wait();
        x.reply(&Reply::ok(&Content::of(b"not what they want")))
    });
    let mut clients = [service.connect(), service.connect()];
    for (client, digit) in clients.iter_mut().zip(["1", "2"]) {
        client.request("GET", &fetch_sha_target(&url, &digit.repeat(64)), &[]);
    }
    service.wait_metric("artifact_cache_collapsed_requests_total", 1.0);
    gate.open();
    clients.iter_mut().for_each(|client| drop(client.response("GET").assert_error(409, "checksum_mismatch")));
    service.assert_nothing_stored();
}

#[test]
fn one_who_gave_no_digest_and_left_counts_as_content() {
    let (up, service) = (Upstream::start(), Service::new().start());
    let content = Content::new(16, 50_000);
    let (gate, reply) = (Gate::new(), Reply::ok(&content));
    let door = gate.clone();
    let url = up.on("/c", move |x| {
        door.wait();
        x.reply(&reply)
    });
    let mut leaver = service.connect();
    leaver.request("GET", &fetch_target(&url), &[]);
    eventually("the download runs", || (service.inflight() == 1.0).then_some(()));
    let mut stayer = service.connect();
    stayer.request("GET", &fetch_sha_target(&url, WRONG_SHA), &[]);
    service.wait_metric("artifact_cache_collapsed_requests_total", 1.0);
    drop(leaver);
    gate.open();
    stayer.response("GET").assert_error(409, "checksum_mismatch");
    assert_eq!(service.fetch(&url).assert_ok(&content.bytes()).cache_status(), "HIT");
    assert_eq!(up.count("/c"), 1);
}
