//! Stopping: what can end well does, everything is written, and the exit code is 0.

use std::time::{Duration, Instant};

use crate::harness::{
    Content, End, Gate, Reply, Service, Upstream, build_fsync_shim, eventually, fetch_target,
};

#[test]
fn sigterm_lets_a_running_body_end() {
    let (up, mut service) =
        (Upstream::start(), Service::new().env("SERVER__SHUTDOWN_GRACE_SECONDS", "25").start());
    let content = Content::new(150, 64 << 20);
    let url = up.serve("/big", Reply::ok(&content));
    service.fetch_with(&url, &[("Range", "bytes=0-0")]);
    let mut client = service.connect();
    client.request("GET", &fetch_target(&url), &[]);
    let head = client.head();
    let first = client.take(1000);
    service.signal_term();
    std::thread::sleep(Duration::from_millis(300));
    let mut rest = Vec::new();
    let end = client.drain(content.len() - 1000, |piece| rest.extend_from_slice(piece));
    assert_eq!((head.status(), end), (200, End::Complete));
    assert!([first, rest].concat() == content.bytes());
    let (status, stderr) = service.wait_exit();
    assert_eq!(status.code(), Some(0), "{stderr}");
}

#[test]
fn a_running_download_ends_in_the_grace_time_and_is_kept() {
    let (up, mut service) =
        (Upstream::start(), Service::new().env("SERVER__SHUTDOWN_GRACE_SECONDS", "25").start());
    let (content, gate) = (Content::new(151, 300_000), Gate::new());
    let (door, reply) = (gate.clone(), Reply::ok(&content));
    let url = up.on("/late", move |x| {
        door.wait();
        x.reply(&reply)
    });
    let mut client = service.connect();
    client.request("GET", &fetch_target(&url), &[]);
    eventually("it runs", || (service.inflight() == 1.0).then_some(()));
    service.signal_term();
    std::thread::sleep(Duration::from_millis(200));
    gate.open();
    client.response("GET").assert_ok(&content.bytes());
    assert_eq!(service.wait_exit().0.code(), Some(0));
    let again = service.again().start();
    assert_eq!(again.fetch(&url).assert_ok(&content.bytes()).cache_status(), "HIT");
}

#[test]
fn what_does_not_end_in_the_grace_time_is_broken_off() {
    let (up, mut service) =
        (Upstream::start(), Service::new().env("SERVER__SHUTDOWN_GRACE_SECONDS", "0.3").start());
    let url = up.on("/never", |x| x.hang());
    let mut client = service.connect();
    client.request("GET", &fetch_target(&url), &[]);
    eventually("it runs", || (service.inflight() == 1.0).then_some(()));
    service.term();
    match client.try_head() {
        Ok(head) => assert!(head.status() >= 500, "{head:?}"),
        Err(_) => assert_ne!(client.end(), End::Complete),
    }
    let again = service.again().start();
    assert_eq!(again.stats()["total_items"], 0);
}

#[test]
fn a_second_sigterm_ends_it_at_once() {
    let (up, mut service) =
        (Upstream::start(), Service::new().env("SERVER__SHUTDOWN_GRACE_SECONDS", "600").start());
    let url = up.on("/never", |x| x.hang());
    let mut client = service.connect();
    client.request("GET", &fetch_target(&url), &[]);
    eventually("it runs", || (service.inflight() == 1.0).then_some(()));
    service.signal_term();
    std::thread::sleep(Duration::from_millis(300));
    service.signal_term();
    // The grace time is far beyond the patience of `wait_exit`.
    let (status, stderr) = service.wait_exit();
    assert_eq!(status.code(), Some(0), "{stderr}");
}

#[test]
fn idle_connections_do_not_delay_the_end() {
    let mut service = Service::new().env("SERVER__SHUTDOWN_GRACE_SECONDS", "600").start();
    let mut idle = service.connect();
    idle.request("GET", "/health", &[]);
    assert_eq!(idle.response("GET").status, 200);
    let _silent = service.connect();
    service.term();
}

#[test]
fn nobody_is_accepted_while_it_stops() {
    let (up, mut service) =
        (Upstream::start(), Service::new().env("SERVER__SHUTDOWN_GRACE_SECONDS", "25").start());
    let gate = Gate::new();
    let door = gate.clone();
    let url = up.on("/hold", move |x| {
        door.wait();
        x.reply(&Reply::ok(&Content::of(b"x")))
    });
    let mut client = service.connect();
    client.request("GET", &fetch_target(&url), &[]);
    eventually("it runs", || (service.inflight() == 1.0).then_some(()));
    service.signal_term();
    eventually("connections are refused", || {
        std::net::TcpStream::connect(service.api).is_err().then_some(())
    });
    gate.open();
    client.response("GET").assert_ok(b"x");
    assert_eq!(service.wait_exit().0.code(), Some(0));
}

#[test]
fn a_plain_copy_of_a_stopped_database_is_whole() {
    let (up, mut service) = (Upstream::start(), Service::new().start());
    for n in 0..20 {
        let url = up.serve(&format!("/n{n}"), Reply::ok(&Content::new(n, 1000)));
        assert_eq!(service.fetch(&url).status, 200);
    }
    service.term();
    let database = service.service().database();
    let wal = std::fs::metadata(format!("{}-wal", database.display())).map_or(0, |meta| meta.len());
    assert_eq!(wal, 0, "the write-ahead log is gone or empty");
    let copy = service.service().dir().join("copy.db");
    std::fs::copy(&database, &copy).unwrap();
    let db = rusqlite::Connection::open(&copy).unwrap();
    let (check, rows): (String, i64) = db
        .query_row(
            "SELECT (SELECT integrity_check FROM pragma_integrity_check), count(*) FROM artifacts",
            [],
            |r| Ok((r.get(0)?, r.get(1)?)),
        )
        .unwrap();
    assert_eq!((check.as_str(), rows), ("ok", 20));
}

#[test]
fn the_log_is_checkpointed_soon_after_writes_end() {
    let (up, service) = (Upstream::start(), Service::new().start());
    let url = up.serve("/w", Reply::ok(&Content::new(152, 1000)));
    assert_eq!(service.fetch(&url).status, 200);
    let copy = service.service().dir().join("copy.db");
    eventually("a copy of the file alone has the row, while it runs", || {
        std::fs::copy(service.service().database(), &copy).unwrap();
        let db = rusqlite::Connection::open(&copy).unwrap();
        let rows: i64 = db.query_row("SELECT count(*) FROM artifacts", [], |r| r.get(0)).unwrap_or(0);
        (rows == 1).then_some(())
    });
}

#[test]
fn a_reader_of_the_database_does_not_delay_the_end() {
    let (up, mut service) = (Upstream::start(), Service::new().start());
    let url = up.serve("/r", Reply::ok(&Content::new(153, 1000)));
    assert_eq!(service.fetch(&url).status, 200);
    let reader = service.sqlite();
    reader.execute_batch("BEGIN").unwrap();
    reader.query_row("SELECT count(*) FROM artifacts", [], |row| row.get::<_, i64>(0)).unwrap();
    // Something that is still to be written, and a log that can't be emptied.
    let fresh = up.serve("/s", Reply::ok(&Content::new(154, 1000)));
    assert_eq!(service.fetch(&fresh).status, 200);
    let asked = Instant::now();
    service.term();
    // Nobody is connected, so there is nothing to wait for; after ten seconds a container's engine kills.
    assert!(asked.elapsed() < Duration::from_secs(10), "{:?} from SIGTERM to the end", asked.elapsed());
    drop(reader);
    let counted = "SELECT count(*) FROM artifacts WHERE access_count = 1";
    assert_eq!(service.count_rows(counted), 2, "and all was written");
}

/// While the file `TRIGGER` is there, no sync of a database ends.
const SHIM: &str = r#"
    while (strstr(path, "metadata.db") && !access(TRIGGER, F_OK))
        usleep(20000);
"#;

#[test]
fn a_disk_that_hangs_delays_neither_the_end_nor_a_second_sigterm() {
    let name = "shutdown::a_disk_that_hangs_delays_neither_the_end_nor_a_second_sigterm";
    for (grace, is_hurried) in [("1", false), ("600", true)] {
        let dir = tempfile::tempdir().unwrap();
        let trigger = dir.path().join("hang");
        let Some(shim) = build_fsync_shim(dir.path(), SHIM, &trigger, name) else { return };
        let mut service = Service::new().preload(&shim).env("SERVER__SHUTDOWN_GRACE_SECONDS", grace).start();
        let up = Upstream::start();
        let url = up.serve("/x", Reply::ok(&Content::of(b"x")));
        service.fetch(&url).assert_ok(b"x");
        std::fs::write(&trigger, "").unwrap();
        // A hit, of which the count is to be written.
        service.fetch(&url).assert_ok(b"x");
        let never = up.on("/never", |x| x.hang());
        let mut client = service.connect();
        client.request("GET", &fetch_target(&never), &[]);
        eventually("it runs", || (service.inflight() == 1.0).then_some(()));
        service.signal_term();
        if is_hurried {
            service.wait_log("it has heard", |line| line["msg"] == "stopping");
            service.signal_term();
        }
        // A sync that hangs is beyond the patience of `wait_exit`.
        let (status, stderr) = service.wait_exit();
        assert_eq!(status.code(), Some(0), "{stderr}");
        std::fs::remove_file(&trigger).unwrap();
        // Nothing that was acknowledged is lost.
        let answer = service.again().start().fetch(&url);
        assert_eq!(answer.assert_ok(b"x").cache_status(), "HIT");
    }
}
