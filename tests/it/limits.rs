//! Everything has a limit, and reaching one stores nothing.

use crate::harness::{
    Client, Content, Gate, Reply, Service, Upstream, eventually, fetch_target, raise_file_limit, skip,
};

#[test]
fn an_announced_size_over_the_limit_is_refused_unread() {
    let (up, service) =
        (Upstream::start(), Service::new().env("STORAGE__MAX_ARTIFACT_BYTES", "10KiB").start());
    let url = up.on("/announced", |x| {
        x.send("HTTP/1.1 200 OK\r\nContent-Length: 10241\r\n\r\n")?;
        x.hang()
    });
    service.fetch(&url).assert_error(502, "artifact_too_large");
    assert_eq!(up.count("/announced"), 1, "it isn't tried again");
    service.assert_nothing_stored();
}

#[test]
fn exactly_the_limit_is_fine() {
    let (up, service) =
        (Upstream::start(), Service::new().env("STORAGE__MAX_ARTIFACT_BYTES", "10KiB").start());
    let content = Content::new(90, 10_240);
    let url = up.serve("/exact", Reply::ok(&content));
    service.fetch(&url).assert_ok(&content.bytes());
    let served = content.clone();
    let unannounced = up.on("/exact-unannounced", move |x| {
        x.send("HTTP/1.1 200 OK\r\n\r\n")?;
        x.body(&served, 0, served.len())
    });
    service.fetch(&unannounced).assert_ok(&content.bytes());
}

#[test]
fn an_endless_body_ends_at_the_limit() {
    let (up, service) =
        (Upstream::start(), Service::new().env("STORAGE__MAX_ARTIFACT_BYTES", "1MiB").start());
    let url = up.on("/endless", |x| {
        x.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")?;
        loop {
            x.chunk(&[b'x'; 16 * 1024])?;
        }
    });
    service.fetch(&url).assert_error(502, "artifact_too_large");
    assert_eq!(up.count("/endless"), 1);
    service.assert_nothing_stored();
}

#[test]
fn a_nearly_full_disk_refuses_before_the_download() {
    let (up, service) = (Upstream::start(), Service::new().env("STORAGE__MIN_FREE_BYTES", "1000TiB").start());
    let url = up.serve("/x", Reply::ok(&Content::of(b"x")));
    let json = service.fetch(&url).assert_error(500, "internal_error");
    assert_eq!(json["details"], "disk full");
    service.assert_nothing_stored();
}

#[test]
fn a_length_beyond_the_free_space_is_refused_before_its_body() {
    let (up, service) =
        (Upstream::start(), Service::new().env("STORAGE__MAX_ARTIFACT_BYTES", "8000TiB").start());
    let url = up.on("/claim", |x| {
        x.send("HTTP/1.1 200 OK\r\nContent-Length: 4503599627370496\r\n\r\n")?;
        x.hang()
    });
    let json = service.fetch(&url).assert_error(500, "internal_error");
    assert_eq!(json["details"], "disk full");
    service.assert_nothing_stored();
}

#[test]
fn a_claimed_length_reserves_little() {
    let (up, mut service) = (Upstream::start(), Service::new().env("STORAGE__MIN_FREE_BYTES", "0").start());
    let url = up.on("/claim", |x| {
        x.send("HTTP/1.1 200 OK\r\nContent-Length: 1073741824\r\n\r\nsome bytes")?;
        x.hang()
    });
    let mut client = service.connect();
    client.request("GET", &fetch_target(&url), &[]);
    let spool = eventually("the spool file is there", || service.spooled().into_iter().next());
    std::thread::sleep(crate::harness::QUIET);
    let blocks = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(spool).unwrap());
    assert!(blocks * 512 <= 65 << 20, "{} bytes are reserved on a claim", blocks * 512);
    service.leave_unfinished();
}

#[test]
fn more_downloads_than_places_wait_for_one() {
    let (up, service) = (Upstream::start(), Service::new().env("UPSTREAM__MAX_DOWNLOADS", "2").start());
    let gate = Gate::new();
    let mut clients: Vec<Client> = Vec::new();
    for n in 0..6 {
        let door = gate.clone();
        let url = up.on(&format!("/queued{n}"), move |x| {
            door.wait();
            x.reply(&Reply::ok(&Content::of(b"served")))
        });
        let mut client = service.connect();
        client.request("GET", &fetch_target(&url), &[]);
        clients.push(client);
    }
    eventually("two are asked", || (up.total() == 2).then_some(()));
    std::thread::sleep(crate::harness::QUIET);
    assert_eq!(up.total(), 2, "the others wait");
    gate.open();
    clients.iter_mut().for_each(|client| drop(client.response("GET").assert_ok(b"served").clone()));
    assert_eq!(up.total(), 6);
}

#[test]
fn when_a_thousand_wait_the_next_is_told_that_the_server_is_busy() {
    if !raise_file_limit(8_000) {
        return skip(
            "limits::when_a_thousand_wait_the_next_is_told_that_the_server_is_busy",
            "needs 8,000 open files",
        );
    }
    let (up, service) = (Upstream::start(), Service::new().env("UPSTREAM__MAX_DOWNLOADS", "1").start());
    let gate = Gate::new();
    let mut clients: Vec<Client> = Vec::new();
    let mut ask = |n: usize| {
        let door = gate.clone();
        let url = up.on(&format!("/q{n}"), move |x| {
            door.wait();
            x.reply(&Reply::new(404, Content::of(b"")))
        });
        let mut client = service.connect();
        client.request("GET", &fetch_target(&url), &[]);
        clients.push(client);
    };
    // One runs and 1,000 wait; of 1,100 at least 99 must be turned away.
    (0..1_100).for_each(&mut ask);
    let busy = "artifact_cache_errors_total{code=\"server_busy\"}";
    eventually("99 are turned away", || (service.metric(busy) >= 99.0).then_some(()));
    gate.open();
    let mut refused = 0;
    for client in &mut clients {
        let answer = client.response("GET");
        if answer.status == 503 {
            answer.assert_error(503, "server_busy");
            refused += 1;
        } else {
            answer.assert_error(502, "upstream_error");
        }
    }
    assert_eq!(refused, 99);
}

#[test]
fn a_hit_needs_no_place() {
    let (up, service) = (Upstream::start(), Service::new().env("UPSTREAM__MAX_DOWNLOADS", "1").start());
    let known = up.serve("/known", Reply::ok(&Content::of(b"known")));
    service.fetch(&known).assert_ok(b"known");
    let gate = Gate::new();
    let door = gate.clone();
    let url = up.on("/blocking", move |x| {
        door.wait();
        x.reply(&Reply::ok(&Content::of(b"late")))
    });
    let mut client = service.connect();
    client.request("GET", &fetch_target(&url), &[]);
    eventually("the place is taken", || (service.inflight() == 1.0).then_some(()));
    assert_eq!(service.fetch(&known).assert_ok(b"known").cache_status(), "HIT");
    gate.open();
    client.response("GET").assert_ok(b"late");
}

#[test]
fn a_head_that_asks_upstream_takes_a_place() {
    let (up, service) = (Upstream::start(), Service::new().env("UPSTREAM__MAX_DOWNLOADS", "2").start());
    let gate = Gate::new();
    let mut clients: Vec<Client> = Vec::new();
    for n in 0..20 {
        let door = gate.clone();
        let url = up.on(&format!("/asked{n}"), move |x| {
            door.wait();
            x.reply(&Reply::ok(&Content::of(b"there")))
        });
        let mut client = service.connect();
        client.request("HEAD", &fetch_target(&url), &[]);
        clients.push(client);
    }
    eventually("two are asked", || (up.total() >= 2).then_some(()));
    std::thread::sleep(crate::harness::QUIET);
    assert_eq!(up.total(), 2, "the others wait");
    gate.open();
    for client in &mut clients {
        let answer = client.response("HEAD");
        assert_eq!((answer.status, answer.header("Content-Length")), (200, "5"));
    }
    assert_eq!(up.total(), 20);
}

#[test]
fn there_is_room_for_many_open_files_from_the_start() {
    use rustix::process::{Resource, getrlimit};
    let possible = getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX).min(16_384);
    // While it grows later, whoever opens a file waits.
    assert!(Service::new().start().proc_status("FDSize:") >= possible);
}
