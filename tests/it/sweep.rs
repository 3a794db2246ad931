//! Deleting: the row at once, the file later, and never one that is wanted again.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use serde_json::Value;

use crate::harness::service::BINARY;
use crate::harness::{
    Content, End, PATIENCE, QUIET, Reply, Running, Service, Upstream, eventually, fetch_target,
};

const SWEPT: &str = "artifact_cache_swept_blobs_total";
/// As many as it takes to meet a publisher.
const SWEEPS: f64 = 4.0;

/// A service that sweeps what is deleted at its next turn, half a second later at most.
fn eager() -> Service {
    Service::new().env("JOBS__DELETE_GRACE_SECONDS", "0")
}

/// `artifact-cache delete` on the data of a service, whether it runs or not.
fn delete(service: &Service, args: &[&str]) -> Output {
    command(service, args).output().unwrap()
}

fn command(service: &Service, args: &[&str]) -> Command {
    let mut command = Command::new(BINARY);
    command.env_clear().current_dir(service.dir()).arg("delete").args(args);
    command.env("ARTIFACT_CACHE__STORAGE__BASE_PATH", service.base_path());
    command.env("ARTIFACT_CACHE__STORAGE__DATABASE", service.database());
    command
}

#[track_caller]
fn deleted(service: &Service, url: &str) -> Value {
    let output = delete(service, &[url, "--json"]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let mut answer: Value = serde_json::from_slice(&output.stdout).unwrap();
    answer[0].take()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn stored(service: &Running, up: &Upstream, path: &str, content: &Content) -> String {
    let url = up.serve(path, Reply::ok(content));
    service.fetch(&url).assert_ok(&content.bytes());
    url
}

/// Once the service sees the deletion the next request is a miss. (Within a second; until then it is a hit.)
#[track_caller]
fn wait_forgotten(service: &Running, url: &str) {
    let only_if_cached = [("Cache-Control", "only-if-cached")];
    eventually("the deletion counts", || {
        (service.fetch_with(url, &only_if_cached).status == 504).then_some(())
    });
}

/// Fetches until the answer is about a row that is there.
#[track_caller]
fn wait_held(service: &Running, url: &str, content: &Content) {
    eventually("the row is there", || {
        service.fetch(url).assert_ok(&content.bytes());
        let row =
            service.sqlite().query_row("SELECT 1 FROM artifacts WHERE source_url = ?1", [url], |_| Ok(()));
        row.ok()
    });
    assert!(service.blob(&content.sha256()).exists(), "no row without its file");
}

fn state(service: &Running, sha256: &str) -> (String, bool, bool) {
    let sql = "SELECT state, deleted_at IS NOT NULL, swept_at IS NOT NULL FROM blobs WHERE content_hash = ?1";
    service.sqlite().query_row(sql, [sha256], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?))).unwrap()
}

fn wait_gone(path: &Path) {
    eventually("the file is swept", || (!path.exists()).then_some(()));
}

#[test]
fn a_deleted_artifact_is_forgotten_swept_and_can_come_back() {
    let (up, service, content) = (Upstream::start(), eager().start(), Content::new(900, 70_000));
    let url = stored(&service, &up, "/a", &content);
    let blob = service.blob(&content.sha256());
    let told = deleted(service.service(), &url);
    assert_eq!((&told["deleted"], &told["blob_deleted"]), (&true.into(), &true.into()));
    assert_eq!((&told["sha256"], &told["file_size"]), (&content.sha256().into(), &70_000.into()));
    wait_gone(&blob);
    wait_forgotten(&service, &url);
    eventually("it is noted", || (state(&service, &content.sha256()).2).then_some(()));
    service.wait_metric(SWEPT, 1.0);
    assert_eq!(service.metric("artifact_cache_swept_bytes_total"), 70_000.0);
    assert_eq!(service.stats()["total_items"], 0);
    assert_eq!(service.count_rows("SELECT count(*) FROM versions"), 1, "what it had stays on record");

    assert_eq!(service.fetch(&url).assert_ok(&content.bytes()).cache_status(), "MISS");
    assert_eq!(state(&service, &content.sha256()), ("present".to_string(), false, false));
    assert_eq!(service.fetch(&url).assert_ok(&content.bytes()).cache_status(), "HIT");
    assert_eq!(up.count("/a"), 2);
    assert_eq!(service.metric("artifact_cache_blobs_corrupt_total"), 0.0, "nothing was damaged");
}

#[test]
fn a_content_that_another_url_has_stays() {
    let (up, service, content) = (Upstream::start(), eager().start(), Content::new(901, 9_000));
    let one = stored(&service, &up, "/one", &content);
    let two = stored(&service, &up, "/two", &content);
    let other = stored(&service, &up, "/other", &Content::new(902, 10));
    assert_eq!(deleted(service.service(), &one)["blob_deleted"], false);
    // The sweep has had its turn when this one is gone.
    assert_eq!(deleted(service.service(), &other)["blob_deleted"], true);
    service.wait_metric(SWEPT, 1.0);
    assert_eq!(service.fetch(&two).assert_ok(&content.bytes()).cache_status(), "HIT");
    assert_eq!(deleted(service.service(), &two)["blob_deleted"], true, "nobody has it any more");
    wait_gone(&service.blob(&content.sha256()));
}

#[test]
fn a_stopped_service_sweeps_when_it_runs_again() {
    let (up, mut service, content) = (Upstream::start(), eager().start(), Content::new(903, 5_000));
    let url = stored(&service, &up, "/a", &content);
    service.term();
    let again = service.again();
    deleted(&again, &url);
    assert!(service.blob(&content.sha256()).exists(), "the command itself removes no file");
    let service = again.start();
    wait_gone(&service.blob(&content.sha256()));
}

/// Durations are monotonic: neither a date in the database nor a file's makes the grace time pass.
#[test]
fn no_clock_makes_a_file_go_sooner() {
    let (up, mut service, content) = (Upstream::start(), Service::new().start(), Content::new(904, 5_000));
    let url = stored(&service, &up, "/a", &content);
    let blob = service.blob(&content.sha256());
    deleted(service.service(), &url);
    service.term();
    let long_ago = SystemTime::UNIX_EPOCH + Duration::from_secs(946_684_800);
    File::options().write(true).open(&blob).unwrap().set_modified(long_ago).unwrap();
    service.sqlite().execute("UPDATE blobs SET deleted_at = '2001-01-01 00:00:00'", []).unwrap();
    let mut service = service.again().start();
    service.wait_log("listening", |line| line["msg"] == "listening");
    std::thread::sleep(QUIET);
    assert!(blob.exists(), "an hour has to pass while this service runs");
    service.term();
    let _service = service.again().env("JOBS__DELETE_GRACE_SECONDS", "0.5").start();
    wait_gone(&blob);
}

/// What an old database calls deleted may have been published again since.
#[test]
fn a_file_newer_than_its_deletion_stays() {
    let (up, mut service, content) = (Upstream::start(), eager().start(), Content::new(905, 5_000));
    let url = stored(&service, &up, "/a", &content);
    service.term();
    deleted(service.service(), &url);
    service.sqlite().execute("UPDATE blobs SET deleted_at = '2001-01-01 00:00:00'", []).unwrap();
    let service = service.again().start();
    service.wait_log("the warning", |line| {
        line["level"] == "WARN"
            && line["msg"].as_str().is_some_and(|msg| msg.contains("newer than their deletion"))
    });
    assert!(service.blob(&content.sha256()).exists());
    assert_eq!(service.metric(SWEPT), 0.0);
}

/// What another store's database calls deleted may be an artifact here.
#[test]
fn a_database_of_another_store_deletes_nothing_here() {
    let up = Upstream::start();
    let (mut ours, mut theirs) = (eager().start(), Service::new().start());
    let (both, only_ours) = (Content::new(930, 5_000), Content::new(931, 5_000));
    let url = stored(&ours, &up, "/both", &both);
    stored(&ours, &up, "/ours", &only_ours);
    ours.term();
    stored(&theirs, &up, "/both", &both);
    deleted(theirs.service(), &url);
    theirs.term();
    let wrong = theirs.service().database();
    let service = ours.again().env("STORAGE__DATABASE", &wrong.display().to_string()).start();
    service.wait_log("that it waits", |line| {
        line["msg"].as_str().is_some_and(|msg| msg.contains("deleted files stay"))
    });
    assert!(service.blob(&both.sha256()).exists());
    assert_eq!(service.metric(SWEPT), 0.0);
}

#[test]
fn a_backup_holds_the_sweep_off() {
    let (up, service, content) = (Upstream::start(), eager().start(), Content::new(906, 5_000));
    let url = stored(&service, &up, "/a", &content);
    let lock = File::create(service.service().base_path().join(".sweep.lock")).unwrap();
    lock.lock_shared().unwrap();
    deleted(service.service(), &url);
    service.wait_log("that it waits", |line| line["msg"].as_str().is_some_and(|msg| msg.contains("backup")));
    assert!(service.blob(&content.sha256()).exists());
    drop(lock);
    wait_gone(&service.blob(&content.sha256()));
}

#[test]
fn who_reads_a_file_reads_it_to_its_end() {
    let (up, service, content) = (Upstream::start(), eager().start(), Content::new(907, 24 << 20));
    let url = stored(&service, &up, "/a", &content);
    let mut client = service.connect();
    client.request("GET", &fetch_target(&url), &[]);
    let head = client.try_head().unwrap();
    deleted(service.service(), &url);
    wait_gone(&service.blob(&content.sha256()));
    let answer = client.body("GET", &head);
    assert_eq!(answer.end, End::Complete);
    answer.assert_ok(&content.bytes());
}

/// Both in turn on one digest, under the eyes of clients: no error, and in the end row and file agree.
#[test]
fn deleting_and_fetching_at_once_never_fails_a_client() {
    let (up, service) = (Upstream::start(), eager().start());
    let content = Content::new(908, 30_000);
    let urls: Vec<String> = (0..3).map(|n| up.serve(&format!("/same/{n}"), Reply::ok(&content))).collect();
    let (is_over, is_quiet) = (AtomicBool::new(false), AtomicBool::new(false));
    std::thread::scope(|scope| {
        for url in &urls {
            let (service, content) = (&service, &content);
            let (is_over, is_quiet) = (&is_over, &is_quiet);
            scope.spawn(move || {
                while !is_over.load(Ordering::Relaxed) {
                    match is_quiet.load(Ordering::Relaxed) {
                        true => std::thread::sleep(Duration::from_millis(1)),
                        false => drop(service.fetch(url).assert_ok(&content.bytes())),
                    }
                }
            });
        }
        // About the time from one sweep to the next, so that clients come back before one, after it and in its midst.
        let mut rests = (0..).map(|n| Duration::from_millis(300 + n * 37 % 300));
        let deadline = Instant::now() + PATIENCE;
        while service.metric(SWEPT) < SWEEPS && Instant::now() < deadline {
            // Also all at once, or somebody would always have it and nothing were swept.
            let output = delete(service.service(), &urls.iter().map(String::as_str).collect::<Vec<_>>());
            assert!(matches!(output.status.code(), Some(0 | 3)), "{}", text(&output.stderr));
            // Otherwise the clients might always have it back before the sweep comes.
            is_quiet.store(true, Ordering::Relaxed);
            std::thread::sleep(rests.next().unwrap());
            is_quiet.store(false, Ordering::Relaxed);
        }
        is_over.store(true, Ordering::Relaxed);
    });
    assert!(service.metric(SWEPT) >= SWEEPS, "the sweep had its part in it");
    // For half a second what was deleted last may be served from memory.
    for url in &urls {
        wait_held(&service, url, &content);
    }
    assert_eq!(state(&service, &content.sha256()).0, "present");
    assert_eq!(service.count_rows("SELECT blobs FROM totals"), 1);
}

/// The command dies between its steps: it has happened or it hasn't.
#[test]
fn a_delete_that_dies_has_happened_or_not() {
    let (up, service, content) = (Upstream::start(), Service::new().start(), Content::new(909, 5_000));
    let url = stored(&service, &up, "/a", &content);
    let die_at = |point: &str| {
        let killed =
            command(service.service(), &[&url]).env("ARTIFACT_CACHE_KILL_POINT", point).output().unwrap();
        assert_eq!(killed.status.code(), None, "it was killed: {}", text(&killed.stdout));
    };
    die_at("delete.row_removed");
    assert_eq!(service.count_rows("SELECT count(*) FROM artifacts"), 1);
    assert_eq!(state(&service, &content.sha256()).0, "present");
    service.fetch(&url).assert_ok(&content.bytes());
    die_at("delete.committed");
    assert_eq!(service.count_rows("SELECT count(*) FROM artifacts"), 0);
    assert_eq!(state(&service, &content.sha256()).0, "deleted");
}

/// The sweep dies between its steps: the next one finishes, and what was fetched meanwhile is there.
#[test]
fn a_sweep_that_dies_is_finished_by_the_next() {
    if !cfg!(debug_assertions) {
        return crate::harness::skip(
            "a_sweep_that_dies_is_finished_by_the_next",
            "kill points need a debug build",
        );
    }
    let (up, content) = (Upstream::start(), Content::new(910, 5_000));
    let points =
        [("sweep.checked", false), ("sweep.unlinked", true), ("sweep.synced", true), ("sweep.marked", true)];
    for (point, is_gone) in points {
        let mut service = eager().start();
        let url = stored(&service, &up, "/a", &content);
        let blob = service.blob(&content.sha256());
        service.term();
        deleted(service.service(), &url);
        // It may die before its first line is out.
        let dying = service.again().variable("ARTIFACT_CACHE_KILL_POINT", point);
        assert_eq!(dying.refused(), (-1, String::new()), "it dies at {point}");
        assert_eq!(!blob.exists(), is_gone, "{point}");
        let service = service.again().start();
        eventually("it is swept and noted", || state(&service, &content.sha256()).2.then_some(()));
        assert!(!blob.exists());
        assert_eq!(service.fetch(&url).assert_ok(&content.bytes()).cache_status(), "MISS");
        assert!(blob.exists());
    }
}

/// What lies in the way of one deletion must not keep the others waiting.
#[test]
fn what_can_not_be_removed_is_said_and_keeps_nothing_else() {
    let (up, service) = (Upstream::start(), eager().start());
    let (stuck, other) = (Content::new(921, 5_000), Content::new(922, 6_000));
    let urls = [stored(&service, &up, "/stuck", &stuck), stored(&service, &up, "/other", &other)];
    let place = service.blob(&stuck.sha256());
    fs::remove_file(&place).unwrap();
    fs::create_dir(&place).unwrap();
    urls.iter().for_each(|url| drop(deleted(service.service(), url)));
    wait_gone(&service.blob(&other.sha256()));
    service.wait_log("the warning", |line| {
        line["level"] == "WARN" && line["msg"].as_str().is_some_and(|msg| msg.contains("can't be removed"))
    });
    fs::remove_dir(&place).unwrap();
    eventually("it is tried again", || state(&service, &stuck.sha256()).2.then_some(()));
}

#[test]
fn unknown_urls_are_told_and_the_others_deleted() {
    let (up, service, content) = (Upstream::start(), Service::new().start(), Content::new(911, 100));
    let url = stored(&service, &up, "/a", &content);
    let output = delete(service.service(), &["http://127.0.0.1:1/nothing", &url]);
    assert_eq!(output.status.code(), Some(3));
    let lines = text(&output.stdout);
    assert!(lines.contains("not in the cache: http://127.0.0.1:1/nothing"), "{lines}");
    assert!(lines.contains(&format!("deleted: {url} (sha256 {}, 100 bytes", content.sha256())), "{lines}");
    assert_eq!(service.count_rows("SELECT count(*) FROM artifacts"), 0);
}

/// All URLs are checked before the first is deleted.
#[test]
fn a_bad_url_deletes_nothing() {
    let (up, service) = (Upstream::start(), Service::new().start());
    let url = stored(&service, &up, "/a", &Content::new(912, 100));
    let output = delete(service.service(), &[&url, "ftp://h/x"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("\"ftp://h/x\""), "{}", text(&output.stderr));
    assert_eq!(service.count_rows("SELECT count(*) FROM artifacts"), 1);
}

#[test]
fn a_missing_or_older_database_is_refused_with_the_cure() {
    let service = Service::new();
    let output = delete(&service, &["http://h/"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("there is no database"), "{}", text(&output.stderr));
    assert!(!service.database().exists(), "none is made");
    let old = rusqlite::Connection::open(service.database()).unwrap();
    old.execute_batch("CREATE TABLE blobs (content_hash); PRAGMA user_version = 1").unwrap();
    let output = delete(&service, &["http://h/"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("start the service once"), "{}", text(&output.stderr));
}

#[test]
fn orphans_are_listed_and_deleted_only_when_told() {
    let (up, service) = (Upstream::start(), eager().start());
    let (known, orphan) = (Content::new(913, 100), Content::new(914, 300));
    let url = stored(&service, &up, "/known", &known);
    let path = service.blob(&orphan.sha256());
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(&path, orphan.bytes()).unwrap();

    let listed = delete(service.service(), &["--orphans"]);
    assert_eq!(text(&listed.stdout), format!("{} 300\n", orphan.sha256()));
    assert!(text(&listed.stderr).contains("nothing deleted"), "{}", text(&listed.stderr));
    let output = delete(service.service(), &["--orphans", "--yes", "--json"]);
    let told: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&told["deleted"], &told["known_blobs"]), (&1.into(), &1.into()));
    wait_gone(&path);
    assert_eq!(service.fetch(&url).assert_ok(&known.bytes()).cache_status(), "HIT");

    // More orphans than known files: probably it is the wrong database.
    for id in 915..917 {
        let content = Content::new(id, 10);
        let path = service.blob(&content.sha256());
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content.bytes()).unwrap();
    }
    let output = delete(service.service(), &["--orphans", "--yes"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("--force"), "{}", text(&output.stderr));
    assert_eq!(delete(service.service(), &["--orphans", "--yes", "--force"]).status.code(), Some(0));
    wait_gone(&service.blob(&Content::new(916, 10).sha256()));
    wait_gone(&service.blob(&Content::new(915, 10).sha256()));
}

/// A crash between a file's name and its row leaves the file, of whose blob the database says that it was swept.
#[test]
fn a_file_that_a_crash_left_of_a_swept_blob_is_an_orphan() {
    let (up, service, content) = (Upstream::start(), eager().start(), Content::new(920, 5_000));
    let url = stored(&service, &up, "/a", &content);
    let blob = service.blob(&content.sha256());
    deleted(service.service(), &url);
    eventually("it is swept and noted", || state(&service, &content.sha256()).2.then_some(()));
    fs::write(&blob, content.bytes()).unwrap();
    let listed = delete(service.service(), &["--orphans"]);
    assert_eq!(text(&listed.stdout), format!("{} 5000\n", content.sha256()));
    assert_eq!(delete(service.service(), &["--orphans", "--yes", "--force"]).status.code(), Some(0));
    wait_gone(&blob);
    eventually("that is noted too", || state(&service, &content.sha256()).2.then_some(()));
    assert_eq!(text(&delete(service.service(), &["--orphans"]).stdout), "");
}

/// An orphan that is published before the sweep comes to it is an artifact like any other.
#[test]
fn a_deleted_orphan_that_is_published_stays() {
    let (up, mut service) = (Upstream::start(), eager().start());
    let (orphan, other) = (Content::new(918, 300), Content::new(919, 5));
    stored(&service, &up, "/other", &other);
    let path = service.blob(&orphan.sha256());
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(&path, orphan.bytes()).unwrap();
    service.term();
    assert_eq!(delete(service.service(), &["--orphans", "--yes"]).status.code(), Some(0));
    let patient = service.again().env("JOBS__DELETE_GRACE_SECONDS", "3600");
    let mut service = patient.start();
    let url = stored(&service, &up, "/adopted", &orphan);
    service.term();
    let service = service.again().env("JOBS__DELETE_GRACE_SECONDS", "0").start();
    let other = up.serve("/other", Reply::ok(&other));
    deleted(service.service(), &other);
    service.wait_metric(SWEPT, 1.0);
    assert_eq!(service.fetch(&url).assert_ok(&orphan.bytes()).cache_status(), "HIT");
}
