//! The archive outlives its database: lost, wrong, old, damaged or on a failing disk, it costs no artifact, and is said.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::harness::{Content, Reply, Running, Service, Upstream, build_fsync_shim, eventually};

fn add(up: &Upstream, service: &Running, seed: u64) -> (String, Content) {
    let content = Content::new(seed, 3_000);
    let url = up.serve(&format!("/{seed}"), Reply::ok(&content));
    service.fetch(&url).assert_ok(&content.bytes());
    (url, content)
}

#[track_caller]
fn assert_hit(service: &Running, (url, content): &(String, Content)) {
    assert_eq!(service.fetch(url).assert_ok(&content.bytes()).cache_status(), "HIT", "{url}");
}

/// What `/health` says of one check; verdicts stand for some seconds.
#[track_caller]
fn wait_degraded(service: &Running, check: &str, word: &str) {
    eventually(&format!("{check} is degraded: {word}"), || {
        let answer = service.get("/health");
        let json = answer.json();
        assert_eq!(answer.status, 200, "hits work: {json}");
        (json["status"] == "degraded" && json["checks"][check].as_str()?.contains(word)).then_some(())
    });
    assert_eq!(service.metric(&format!("artifact_cache_healthy{{check=\"{check}\"}}")), 0.0);
}

#[track_caller]
fn wait_healthy(service: &Running) {
    eventually("healthy", || (service.get("/health").json()["status"] == "healthy").then_some(()));
}

fn snapshots(service: &Service) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = fs::read_dir(service.dir())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.display().to_string().contains("metadata.db.snapshot"))
        .collect();
    found.sort();
    found
}

fn restore(service: &Service, args: &[&str]) -> (Option<i32>, String) {
    let output = service.command(&[&["restore"], args].concat()).output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8_lossy(&said).into_owned())
}

/// A stopped service with some artifacts and one snapshot of its database, taken at its second start.
fn with_snapshot(up: &Upstream, count: u64) -> (Running, Vec<(String, Content)>) {
    let mut service = Service::new().env("UPSTREAM__MAX_DOWNLOADS", "2").start();
    let kept = (0..count).map(|n| add(up, &service, 5_000 + n)).collect();
    service.term();
    let mut service = service.again().start();
    service.wait_log("a snapshot", |line| line["msg"] == "snapshot of the database taken");
    service.term();
    (service, kept)
}

#[test]
fn a_snapshot_a_day_whatever_the_restarts() {
    let up = Upstream::start();
    let mut service = Service::new().env("JOBS__SNAPSHOTS_KEPT", "3").start();
    assert_eq!(service.metric("artifact_cache_database_snapshot_timestamp_seconds"), 0.0);
    add(&up, &service, 5_100);
    service.term();
    // Nothing is worth a snapshot before something is known; older ones, and what an interrupted one left, are there.
    assert_eq!(snapshots(service.service()), Vec::<PathBuf>::new());
    let name =
        |time: &str| PathBuf::from(format!("{}.snapshot{time}", service.service().database().display()));
    for time in ["-20200101T000000Z", "-20200102T000000Z", "-20200103T000000Z", "-20200104T000000Z", ".new"] {
        fs::write(name(time), "old").unwrap();
    }
    fs::write(name("-notes.txt"), "somebody's").unwrap();
    // Of a clock that was ahead once: it must not be taken for today's, nor cost one of the others.
    fs::write(name("-29990101T000000Z"), "ahead").unwrap();
    let mut service = service.again().start();
    service.wait_log("a snapshot", |line| line["msg"] == "snapshot of the database taken");
    let found = snapshots(service.service());
    let kept = ["-20200103T000000Z", "-20200104T000000Z", "-29990101T000000Z", "-notes.txt"].map(name);
    assert_eq!(found.len(), 5, "{found:?}");
    assert!(kept.iter().all(|path| found.contains(path)), "{found:?}");
    let taken = found.iter().find(|path| !kept.contains(path)).unwrap().clone();
    let copy = rusqlite::Connection::open(&taken).unwrap();
    assert_eq!(copy.query_row("SELECT items FROM totals", [], |row| row.get::<_, i64>(0)).unwrap(), 1);
    drop(copy);
    let time = service.metric("artifact_cache_database_snapshot_timestamp_seconds");
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs_f64();
    assert!((now - time).abs() < 3_600.0, "{time}");
    service.term();
    let service = service.again().start();
    // The job has looked when the metric is there.
    service.wait_metric("artifact_cache_database_snapshot_timestamp_seconds", time);
    assert_eq!(snapshots(service.service()), found, "the next is due tomorrow");
}

#[test]
fn a_snapshot_under_way_does_not_delay_the_end() {
    let mut service = Service::new().start();
    add(&Upstream::start(), &service, 5_150);
    service.term();
    let db = rusqlite::Connection::open(service.service().database()).unwrap();
    db.execute_batch(
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 300000)
         INSERT INTO versions (source_url, content_hash, file_size) SELECT 'http://made.up/' || i, i, 1 FROM n",
    )
    .unwrap();
    drop(db);
    let mut service = service.again().start();
    let unfinished = PathBuf::from(format!("{}.snapshot.new", service.service().database().display()));
    eventually("a snapshot is begun", || unfinished.exists().then_some(()));
    service.term();
    assert_eq!(snapshots(service.service()), Vec::<PathBuf>::new(), "neither a part nor a whole one");
    // The copying reads the log; while it does, the log can't be emptied.
    let log = format!("{}-wal", service.service().database().display());
    assert!(fs::metadata(log).map_or(true, |log| log.len() == 0), "a plain copy is whole");
    let mut service = service.again().start();
    service.wait_log("a snapshot", |line| line["msg"] == "snapshot of the database taken");
    assert_eq!(snapshots(service.service()).len(), 1);
    service.term();
}

#[test]
fn a_damaged_database_is_refused_with_the_cure_and_the_cure_works() {
    let up = Upstream::start();
    let (mut service, kept) = with_snapshot(&up, 3);
    let database = service.service().database();
    let whole = fs::read(&database).unwrap();
    let newest = snapshots(service.service()).pop().unwrap();
    for (damaged, what) in [
        (b"garbage".repeat(2_000), "garbage"),
        (whole[..whole.len() / 2].to_vec(), "cut in half"),
        (whole[..5_000].to_vec(), "cut short"),
    ] {
        fs::write(&database, &damaged).unwrap();
        let (code, said) = service.again().refused();
        assert_eq!(code, 1, "{what}");
        for word in
            [&database.display().to_string(), "damaged", "restore --snapshot", &newest.display().to_string()]
        {
            assert!(said.contains(word), "{what}: no {word:?} in {said}");
        }
        assert!(fs::read(&database).unwrap() == damaged, "{what}: it is left alone");
        let (code, said) = restore(service.service(), &["--snapshot"]);
        assert_eq!(code, Some(0), "{what}: {said}");
        let aside =
            said.lines().find_map(|line| line.strip_prefix("the database that was there is kept as "));
        assert!(fs::read(aside.unwrap()).unwrap() == damaged, "{what}: the damaged one is kept");
        let mut again = service.again().start();
        kept.iter().for_each(|one| assert_hit(&again, one));
        wait_healthy(&again);
        again.term();
        service = again;
    }
}

#[test]
fn the_newest_good_snapshot_is_taken_and_what_came_later_is_adopted() {
    let up = Upstream::start();
    let (service, kept) = with_snapshot(&up, 2);
    let mut service = service.again().start();
    let later = add(&up, &service, 5_200);
    service.term();
    let database = service.service().database();
    let named = |time: &str| format!("{}.snapshot-{time}", database.display());
    let good = snapshots(service.service()).pop().unwrap();
    // From when a clock was ahead: what it lacks nobody knows.
    fs::copy(&good, named("20990101T000000Z")).unwrap();
    let ahead = rusqlite::Connection::open(named("20990101T000000Z")).unwrap();
    ahead.execute("DELETE FROM artifacts", []).unwrap();
    drop(ahead);
    fs::rename(&good, named("20200101T000000Z")).unwrap();
    fs::write(named("20210101T000000Z"), "torn").unwrap();
    fs::remove_file(&database).unwrap();
    let (code, said) = restore(service.service(), &["--snapshot"]);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("warning") && said.contains("20210101T000000Z is damaged"), "{said}");
    let service = service.again().start();
    kept.iter().for_each(|one| assert_hit(&service, one));
    service.wait_metric("artifact_cache_orphan_blobs", 1.0);
    wait_healthy(&service);
    assert!(service.blob(&later.1.sha256()).is_file(), "no file is deleted");
    assert_eq!(service.fetch(&later.0).assert_ok(&later.1.bytes()).cache_status(), "MISS");
    service.wait_metric("artifact_cache_orphan_blobs", 0.0);
}

#[test]
fn what_was_deleted_before_the_snapshot_and_is_there_again_is_not_deleted_later() {
    let up = Upstream::start();
    let (service, kept) = with_snapshot(&up, 2);
    let snapshot = snapshots(service.service()).pop().unwrap();
    let db = rusqlite::Connection::open(&snapshot).unwrap();
    db.execute("DELETE FROM artifacts WHERE source_url = ?1", [&kept[0].0]).unwrap();
    let deleted =
        "UPDATE blobs SET state = 'deleted', deleted_at = CURRENT_TIMESTAMP WHERE content_hash = ?1";
    db.execute(deleted, [kept[0].1.sha256()]).unwrap();
    drop(db);
    let (code, said) = restore(service.service(), &["--snapshot", &snapshot.display().to_string()]);
    assert_eq!(code, Some(0), "{said}");
    let service = service.again().start();
    assert_eq!(service.count_rows("SELECT count(*) FROM blobs WHERE state = 'deleted'"), 0);
    service.wait_metric("artifact_cache_orphan_blobs", 1.0);
}

#[test]
fn without_a_snapshot_the_error_says_what_else_there_is() {
    let service = Service::new();
    let (code, said) = restore(&service, &["--snapshot"]);
    assert_eq!(code, Some(1));
    assert!(said.contains("no good snapshot") && said.contains("artifact-cache restore DIR"), "{said}");
    let (code, said) = restore(&service, &["--snapshot", "not-there.db"]);
    assert_eq!(code, Some(1));
    assert!(said.contains("not-there.db"), "{said}");
    assert_eq!(restore(&service, &[]).0, Some(2));
    assert_eq!(restore(&service, &["DIR", "--snapshot"]).0, Some(2));
    assert!(!service.database().exists(), "a failed restore makes no database");
}

#[test]
fn a_wrong_database_is_said_at_once_and_put_right_by_pointing_to_the_right_one() {
    let up = Upstream::start();
    let (service, kept) = with_snapshot(&up, 4);
    let right = service.service().database();
    let wrong = service.service().dir().join("wrong.db");
    let with = |database: &Path| service.again().env("STORAGE__DATABASE", &database.display().to_string());
    // An empty one, the same again, and one that has recorded another store.
    for (round, word) in [(1, "a new one"), (2, "not the one that recorded")] {
        let mut other = with(&wrong).start();
        let line = other.wait_log("it is said", |line| {
            line["level"] == "ERROR"
                && line["msg"].as_str().is_some_and(|msg| msg.contains("not the one that last"))
        });
        assert!(line.to_string().contains("restore"), "{line}");
        wait_degraded(&other, "archive", word);
        other.wait_metric("artifact_cache_orphan_blobs", if round == 1 { 4.0 } else { 3.0 });
        if round == 1 {
            // What is fetched again is adopted, which does not make it the right one yet.
            assert_eq!(other.fetch(&kept[0].0).cache_status(), "MISS");
        }
        assert_eq!(other.blobs_on_disk(), 4, "nothing is deleted");
        other.term();
    }
    let mut again = with(&right).start();
    kept.iter().for_each(|one| assert_hit(&again, one));
    wait_healthy(&again);
    again.term();
    // Once it knows every file it is the right one, whatever it was.
    let mut other = with(&wrong).start();
    wait_degraded(&other, "archive", "not the one that recorded");
    kept[1..].iter().for_each(|(url, _)| assert_eq!(other.fetch(url).cache_status(), "MISS"));
    wait_healthy(&other);
    other.term();
    wait_degraded(&with(&right).start(), "archive", "not the one that recorded");
}

#[test]
fn an_old_database_is_said_at_once() {
    let up = Upstream::start();
    let (service, kept) = with_snapshot(&up, 2);
    let database = service.service().database();
    let old = fs::read(&database).unwrap();
    let mut service = service.again().start();
    let later: Vec<_> = (0..3).map(|n| add(&up, &service, 5_300 + n)).collect();
    service.term();
    // A plain copy of an earlier day, put back by hand.
    fs::write(&database, &old).unwrap();
    let mut service = service.again().start();
    wait_degraded(&service, "archive", "an older copy");
    // However often it is started, it is not taken for the right one.
    for _ in 0..2 {
        service.term();
        service = service.again().start();
    }
    wait_degraded(&service, "archive", "an older copy");
    service.wait_metric("artifact_cache_orphan_blobs", 3.0);
    kept.iter().for_each(|one| assert_hit(&service, one));
    for (url, content) in &later {
        assert_eq!(service.fetch(url).assert_ok(&content.bytes()).cache_status(), "MISS");
    }
    wait_healthy(&service);
    service.term();
    service = service.again().start();
    wait_healthy(&service);
}

#[test]
fn what_a_crash_leaves_behind_is_no_reason_to_worry() {
    let up = Upstream::start();
    let (service, _) = with_snapshot(&up, 1);
    let orphan = |n: u64| {
        let content = Content::new(5_400 + n, 100);
        let blob = service.blob(&content.sha256());
        fs::create_dir_all(blob.parent().unwrap()).unwrap();
        fs::write(blob, content.bytes()).unwrap();
    };
    orphan(1);
    orphan(2);
    let mut few = service.again().start();
    few.wait_metric("artifact_cache_orphan_blobs", 2.0);
    assert_eq!(few.get("/health").json()["status"], "healthy");
    few.term();
    orphan(3);
    let many = service.again().start();
    many.wait_metric("artifact_cache_orphan_blobs", 3.0);
    wait_degraded(&many, "archive", "many files");
}

#[test]
fn another_programs_database_is_left_alone() {
    let service = Service::new();
    let db = rusqlite::Connection::open(service.database()).unwrap();
    db.execute_batch("CREATE TABLE notes (text TEXT); INSERT INTO notes VALUES ('mine')").unwrap();
    drop(db);
    let before = fs::read(service.database()).unwrap();
    let (code, said) = service.refused();
    assert_eq!(code, 1);
    assert!(said.contains("another program's database") && said.contains("metadata.db"), "{said}");
    assert!(fs::read(service.database()).unwrap() == before);
}

#[test]
fn a_database_that_breaks_while_it_is_used_is_not_written_to_any_more() {
    let up = Upstream::start();
    let service = Service::new().start();
    let kept: Vec<_> = (0..40).map(|n| add(&up, &service, 5_500 + n)).collect();
    let database = service.service().database();
    let log = format!("{}-wal", database.display());
    eventually("all is in the database", || (fs::metadata(&log).unwrap().len() == 0).then_some(()));
    // The root of the table that only records need.
    let page = service.count_rows("SELECT rootpage FROM sqlite_schema WHERE name = 'blobs'") as u64;
    let size = service.count_rows("PRAGMA page_size") as u64;
    let file = File::options().write(true).open(&database).unwrap();
    file.write_all_at(&vec![0xa5; size as usize], (page - 1) * size).unwrap();
    // Another's write makes the service look at the file again.
    service.sqlite().execute("INSERT INTO jobs (name) VALUES ('another')", []).unwrap();
    for n in 0..2 {
        let url = up.serve(&format!("/new{n}"), Reply::ok(&Content::of(b"new")));
        let answer = service.fetch(&url);
        assert_eq!(answer.assert_error(500, "internal_error")["details"], "database corrupt");
    }
    let line = service.wait_log("it is said", |line| {
        line["level"] == "ERROR" && line["msg"].as_str().is_some_and(|msg| msg.contains("is damaged"))
    });
    assert!(line["msg"].as_str().unwrap().contains("restore --snapshot"), "{line}");
    wait_degraded(&service, "database", "can't be written");
    kept.iter().for_each(|one| assert_hit(&service, one));
    let counted = "SELECT sum(access_count) FROM artifacts";
    let before = service.count_rows(counted);
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(service.count_rows(counted), before, "nothing is written, not even counts");
    assert_eq!(service.get("/health").json()["status"], "degraded", "until it is started again");
}

/// While the file `TRIGGER` is there, no sync of a log of SQLite succeeds.
const SHIM: &str = r#"
    if (strstr(path, ".db-wal") && !access(TRIGGER, F_OK)) {
        errno = EIO;
        return -1;
    }
"#;

#[test]
fn a_log_that_can_not_be_synced_is_built_on_only_after_it_was_written_anew() {
    let dir = tempfile::tempdir().unwrap();
    let trigger = dir.path().join("fail");
    let name = "archive::a_log_that_can_not_be_synced_is_built_on_only_after_it_was_written_anew";
    let Some(shim) = build_fsync_shim(dir.path(), SHIM, &trigger, name) else { return };
    let up = Upstream::start();
    let mut service = Service::new().preload(&shim).start();
    let before = add(&up, &service, 5_700);
    let log = format!("{}-wal", service.service().database().display());
    eventually("all is in the database", || (fs::metadata(&log).unwrap().len() == 0).then_some(()));
    fs::write(&trigger, "").unwrap();
    let failing = up.serve("/failing", Reply::ok(&Content::new(5_701, 3_000)));
    let assert_refused = |details: &str| {
        let answer = service.fetch(&failing);
        assert_eq!(answer.assert_error(500, "internal_error")["details"], details);
    };
    assert_refused("database I/O error");
    assert_refused("database I/O error");
    wait_degraded(&service, "database", "can't be written");
    // Longer than it takes to try again, with nobody asking and no count to be written.
    std::thread::sleep(Duration::from_secs(7));
    assert_eq!(service.get("/health").json()["status"], "degraded", "it does not take itself for well");
    assert_hit(&service, &before);
    fs::remove_file(&trigger).unwrap();
    service.wait_log("it is said", |line| line["msg"] == "the database can be written again");
    wait_healthy(&service);
    // Now with a log that has something in it, and a reader who keeps it from being begun anew: nothing is acknowledged
    // although syncing would succeed again.
    let between = add(&up, &service, 5_703);
    let reader = service.sqlite();
    reader.execute_batch("BEGIN").unwrap();
    reader.query_row("SELECT count(*) FROM artifacts", [], |row| row.get::<_, i64>(0)).unwrap();
    fs::write(&trigger, "").unwrap();
    assert_refused("database I/O error");
    fs::remove_file(&trigger).unwrap();
    assert_refused("database busy");
    drop(reader);
    assert_hit(&service, &between);
    let after = add(&up, &service, 5_702);
    service.kill();
    let service = service.again().start();
    assert_hit(&service, &before);
    assert_hit(&service, &between);
    assert_hit(&service, &after);
    assert_eq!(service.fetch(&failing).cache_status(), "MISS", "what failed was never recorded");
}
