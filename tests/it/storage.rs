//! The store and the catalogue, with an operator's hands in them.

use std::fs;
use std::time::{Duration, Instant};

use crate::harness::{Content, Reply, Running, Service, Upstream, WRONG_SHA, build_fsync_shim, eventually};

/// A service with one artifact, whose upstream would serve the same again.
fn stored(up: &Upstream, content: &Content) -> (Running, String) {
    let service = Service::new().start();
    let url = up.serve("/kept", Reply::ok(content));
    service.fetch(&url).assert_ok(&content.bytes());
    (service, url)
}

/// Heals by a MISS, and is a HIT from then on.
#[track_caller]
fn assert_heals(service: &Running, url: &str, content: &Content) {
    assert_eq!(service.fetch(url).assert_ok(&content.bytes()).cache_status(), "MISS");
    assert_eq!(service.fetch(url).assert_ok(&content.bytes()).cache_status(), "HIT");
    let blob = service.blob(&content.sha256());
    assert!(fs::symlink_metadata(&blob).unwrap().is_file());
    assert!(fs::read(&blob).unwrap() == content.bytes());
    assert_eq!(service.count_rows("SELECT count(*) FROM artifacts"), 1);
    assert_eq!(service.stats()["total_items"], 1);
}

#[test]
fn a_removed_blob_heals() {
    let (up, content) = (Upstream::start(), Content::new(110, 50_000));
    let (service, url) = stored(&up, &content);
    fs::remove_file(service.blob(&content.sha256())).unwrap();
    assert_heals(&service, &url, &content);
    assert_eq!(up.count("/kept"), 2);
}

#[test]
fn a_cut_or_extended_blob_heals() {
    let (up, content) = (Upstream::start(), Content::new(111, 50_000));
    let (service, url) = stored(&up, &content);
    for length in [49_999, 0, 50_001] {
        let blob = fs::File::options().write(true).open(service.blob(&content.sha256())).unwrap();
        blob.set_len(length).unwrap();
        assert_heals(&service, &url, &content);
    }
    assert!(service.metric("artifact_cache_blobs_corrupt_total") >= 3.0);
}

#[test]
fn a_symlink_or_directory_in_its_place_heals() {
    let (up, content) = (Upstream::start(), Content::new(112, 50_000));
    let (service, url) = stored(&up, &content);
    let blob = service.blob(&content.sha256());
    let elsewhere = service.service().dir().join("elsewhere");
    fs::write(&elsewhere, Content::new(999, 50_000).bytes()).unwrap();
    fs::remove_file(&blob).unwrap();
    std::os::unix::fs::symlink(&elsewhere, &blob).unwrap();
    assert_heals(&service, &url, &content);
    fs::remove_file(&blob).unwrap();
    fs::create_dir(&blob).unwrap();
    assert_heals(&service, &url, &content);
    assert!(elsewhere.is_file(), "what the link pointed to is left alone");
}

#[test]
fn other_content_while_healing_is_a_new_version() {
    let (up, old) = (Upstream::start(), Content::new(113, 50_000));
    let (service, url) = stored(&up, &old);
    let new = Content::new(114, 40_000);
    up.serve("/kept", Reply::ok(&new));
    fs::remove_file(service.blob(&old.sha256())).unwrap();
    let answer = service.fetch(&url);
    assert_eq!(answer.assert_ok(&new.bytes()).cache_status(), "MISS");
    assert_eq!(answer.header("X-Content-SHA256"), new.sha256());
    assert_eq!(service.count_rows("SELECT count(*) FROM versions"), 2);
    let stored: String =
        service.sqlite().query_row("SELECT content_hash FROM artifacts", [], |r| r.get(0)).unwrap();
    assert_eq!(stored, new.sha256());
    assert_eq!(service.stats()["total_size_bytes"], 40_000);
}

#[test]
fn other_content_while_healing_is_409_for_who_knows_the_digest() {
    let (up, old) = (Upstream::start(), Content::new(115, 50_000));
    let (service, url) = stored(&up, &old);
    up.serve("/kept", Reply::ok(&Content::new(116, 40_000)));
    fs::remove_file(service.blob(&old.sha256())).unwrap();
    service.fetch_sha(&url, &old.sha256()).assert_error(409, "checksum_mismatch");
}

#[test]
fn healing_with_upstream_gone_is_an_error_and_keeps_the_row() {
    let (up, content) = (Upstream::start(), Content::new(117, 50_000));
    let (service, url) = stored(&up, &content);
    let blob = service.blob(&content.sha256());
    let aside = service.service().dir().join("aside");
    fs::copy(&blob, &aside).unwrap();
    fs::remove_file(&blob).unwrap();
    up.serve("/kept", Reply::new(404, Content::of(b"")));
    service.fetch(&url).assert_error(502, "upstream_error");
    assert_eq!(service.count_rows("SELECT count(*) FROM artifacts"), 1);
    fs::rename(&aside, &blob).unwrap();
    assert_eq!(
        service.fetch(&url).assert_ok(&content.bytes()).cache_status(),
        "HIT",
        "put back, it counts at once"
    );
}

#[test]
fn a_row_deleted_by_sqlite_counts() {
    let (up, content) = (Upstream::start(), Content::new(118, 50_000));
    let (service, url) = stored(&up, &content);
    service.sqlite().execute("DELETE FROM artifacts WHERE source_url = ?1", [&url]).unwrap();
    eventually("it is a miss again", || (service.fetch(&url).cache_status() == "MISS").then_some(()));
    assert_eq!(up.count("/kept"), 2);
    assert_eq!(service.fetch(&url).assert_ok(&content.bytes()).cache_status(), "HIT");
    assert_eq!(service.stats()["total_items"], 1, "the totals follow");
}

#[test]
fn the_artifacts_table_has_the_documents_columns() {
    let (up, content) = (Upstream::start(), Content::new(119, 1_000));
    let (service, url) = stored(&up, &content);
    let db = service.sqlite();
    let mut columns =
        db.prepare("SELECT name, type FROM pragma_table_xinfo('artifacts') ORDER BY cid").unwrap();
    let columns: Vec<String> = columns
        .query_map([], |row| Ok(format!("{} {}", row.get::<_, String>(0)?, row.get::<_, String>(1)?)))
        .unwrap()
        .map(|column| column.unwrap().replace(" GENERATED ALWAYS", ""))
        .collect();
    let expected = [
        "id INTEGER",
        "source_url TEXT",
        "content_hash TEXT",
        "storage_path TEXT",
        "file_size INTEGER",
        "content_type TEXT",
        "first_cached_at TIMESTAMP",
        "last_accessed_at TIMESTAMP",
        "access_count INTEGER",
    ];
    for column in expected {
        assert!(columns.iter().any(|c| c == column), "no {column:?} in {columns:?}");
    }
    let row = "SELECT source_url, content_hash, storage_path, file_size FROM artifacts";
    let (source, hash, path, size): (String, String, String, i64) =
        db.query_row(row, [], |r| Ok((r.get(0)?, r.get(1)?, r.get(2)?, r.get(3)?))).unwrap();
    let digest = content.sha256();
    assert_eq!((source, hash.clone(), size), (url, digest.clone(), 1_000));
    assert_eq!(path, format!("{}/{}/{digest}", &digest[..2], &digest[2..4]));
    for time in ["first_cached_at", "last_accessed_at"] {
        let close = format!("SELECT abs(julianday({time}) - julianday('now')) < 1 FROM artifacts");
        assert_eq!(service.count_rows(&close), 1, "{time} is UTC as SQLite writes it");
    }
    for table in ["versions", "blobs", "totals"] {
        let sql = format!("SELECT count(*) FROM sqlite_master WHERE type = 'table' AND name = '{table}'");
        assert_eq!(service.count_rows(&sql), 1, "table {table}");
    }
    for index in ["content_hash", "last_accessed_at"] {
        let sql =
            format!("SELECT count(*) FROM sqlite_master WHERE type = 'index' AND sql LIKE '%({index}%'");
        assert!(service.count_rows(&sql) >= 1, "an index on {index}");
    }
    assert!(db.execute("UPDATE artifacts SET storage_path = 'x'", []).is_err(), "storage_path is generated");
}

#[test]
fn bodies_served_are_counted() {
    let (up, content) = (Upstream::start(), Content::new(120, 1_000));
    let (mut service, url) = stored(&up, &content);
    service.fetch(&url).assert_ok(&content.bytes());
    assert_eq!(service.fetch_with(&url, &[("Range", "bytes=0-1")]).status, 206);
    let etag = format!("\"{}\"", content.sha256());
    assert_eq!(service.fetch_with(&url, &[("If-None-Match", &etag)]).status, 304);
    service.request("HEAD", &crate::harness::fetch_target(&url), &[]);
    service.fetch_sha(&url, WRONG_SHA).assert_error(409, "checksum_mismatch");
    // A miss, a hit and a range are three bodies; 304, HEAD and 409 are none.
    eventually("three are counted", || (service.stats()["total_accesses"] == 3).then_some(()));
    eventually("and written", || {
        (service.count_rows("SELECT access_count FROM artifacts") == 3).then_some(())
    });
    service.fetch(&url).assert_ok(&content.bytes());
    service.term();
    assert_eq!(
        service.count_rows("SELECT access_count FROM artifacts"),
        4,
        "what was pending is written at the end"
    );
}

#[test]
fn a_newer_schema_is_refused() {
    let (up, content) = (Upstream::start(), Content::new(121, 1_000));
    let (mut service, _) = stored(&up, &content);
    service.term();
    let db = service.sqlite();
    let version: i64 = db.query_row("PRAGMA user_version", [], |r| r.get(0)).unwrap();
    db.pragma_update(None, "user_version", version + 1).unwrap();
    drop(db);
    let (code, stderr) = service.again().refused();
    assert_eq!(code, 1);
    assert!(stderr.starts_with("error: ") && stderr.contains("newer"), "{stderr}");
    assert!(service.blob(&content.sha256()).is_file(), "no blob is touched");
}

#[test]
fn a_file_that_is_no_database_is_refused_and_left_alone() {
    let service = Service::new();
    fs::write(service.database(), "this is no database, but somebody's notes\n".repeat(100)).unwrap();
    let before = fs::read(service.database()).unwrap();
    let (code, stderr) = service.refused();
    assert_eq!(code, 1);
    assert!(stderr.starts_with("error: ") && stderr.contains("metadata.db"), "{stderr}");
    assert_eq!(fs::read(service.database()).unwrap(), before);
}

#[test]
fn two_processes_never_share_a_directory() {
    let service = Service::new().start();
    let (code, stderr) = service.again().refused();
    assert_eq!(code, 1);
    assert!(stderr.starts_with("error: "), "{stderr}");
    let other = Service::new();
    let base = service.service().base_path().display().to_string();
    let (code, stderr) = other.env("STORAGE__BASE_PATH", &base).refused();
    assert_eq!(code, 1, "the same store with another database: {stderr}");
    let other = Service::new();
    let database = service.service().database().display().to_string();
    let (code, stderr) = other.env("STORAGE__DATABASE", &database).refused();
    assert_eq!(code, 1, "the same database with another store: {stderr}");
    assert_eq!(service.get("/health").status, 200);
}

#[test]
fn an_impossible_directory_is_refused_by_its_path() {
    let service = Service::new();
    let file = service.dir().join("a-file");
    fs::write(&file, "").unwrap();
    let below = file.join("cache").display().to_string();
    let service = service.env("STORAGE__BASE_PATH", &below);
    let (code, stderr) = service.refused();
    assert_eq!(code, 1);
    assert!(stderr.starts_with("error: ") && stderr.contains(&below), "{stderr}");
    let service = Service::new();
    let database = service.dir().join("a-file/metadata.db").display().to_string();
    fs::write(service.dir().join("a-file"), "").unwrap();
    let (code, stderr) = service.env("STORAGE__DATABASE", &database).refused();
    assert_eq!(code, 1);
    assert!(stderr.starts_with("error: ") && stderr.contains("a-file"), "{stderr}");
}

#[test]
fn an_empty_database_beside_a_full_store_deletes_nothing() {
    let (up, content) = (Upstream::start(), Content::new(122, 1_000));
    let (mut service, url) = stored(&up, &content);
    service.term();
    for suffix in ["", "-wal", "-shm"] {
        let _ = fs::remove_file(format!("{}{suffix}", service.service().database().display()));
    }
    let again = service.again().start();
    assert!(again.blob(&content.sha256()).is_file());
    eventually("the orphan is counted", || {
        (again.metric("artifact_cache_orphan_blobs") == 1.0).then_some(())
    });
    assert_eq!(again.fetch(&url).assert_ok(&content.bytes()).cache_status(), "MISS");
    eventually("it is adopted", || (again.metric("artifact_cache_orphan_blobs") == 0.0).then_some(()));
    assert_eq!(again.blobs_on_disk(), 1);
}

#[test]
fn spool_leftovers_of_a_killed_process_go() {
    let (up, content) = (Upstream::start(), Content::new(123, 1_000));
    let (mut service, url) = stored(&up, &content);
    let halfway = up.on("/halfway", |x| {
        x.send("HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nsome bytes")?;
        x.hang()
    });
    let mut client = service.connect();
    client.request("GET", &crate::harness::fetch_target(&halfway), &[]);
    eventually("it spools", || (!service.spooled().is_empty()).then_some(()));
    service.kill();
    let again = service.again().start();
    eventually("the leftover is swept", || again.spooled().is_empty().then_some(()));
    assert_eq!(again.fetch(&url).assert_ok(&content.bytes()).cache_status(), "HIT");
    assert_eq!(again.stats()["total_items"], 1);
}

#[test]
fn a_busy_database_fails_misses_in_time_and_no_hits() {
    let (up, content) = (Upstream::start(), Content::new(124, 1_000));
    let (service, url) = stored(&up, &content);
    let fresh = up.serve("/fresh", Reply::ok(&Content::of(b"fresh")));
    let lock = service.sqlite();
    lock.execute_batch("BEGIN IMMEDIATE").unwrap();
    assert_eq!(service.fetch(&url).assert_ok(&content.bytes()).cache_status(), "HIT");
    let answer = service.fetch(&fresh);
    let json = answer.assert_error(500, "internal_error");
    assert_eq!(json["details"], "database busy");
    assert!(!answer.header("Retry-After").is_empty());
    assert_eq!(service.fetch(&url).assert_ok(&content.bytes()).cache_status(), "HIT");
    lock.execute_batch("ROLLBACK").unwrap();
    assert_eq!(service.fetch(&fresh).assert_ok(b"fresh").cache_status(), "MISS");
}

#[test]
fn a_date_never_stands_for_other_content() {
    let (up, old) = (Upstream::start(), Content::new(125, 50_000));
    let (service, url) = stored(&up, &old);
    let mut dates = vec![service.fetch(&url).header("Last-Modified").to_string()];
    // An upstream without dates: ours must move with the content, there and back again.
    for (n, content) in [Content::new(126, 50_000), old].iter().enumerate() {
        // Dates are whole seconds.
        std::thread::sleep(Duration::from_millis(1_100));
        let known = service.fetch(&url).header("X-Content-SHA256").to_string();
        up.serve("/kept", Reply::ok(content));
        fs::remove_file(service.blob(&known)).unwrap();
        service.fetch(&url).assert_ok(&content.bytes());
        for date in &dates {
            let whole = service.fetch_with(&url, &[("If-Modified-Since", date)]);
            whole.assert_ok(&content.bytes());
            let fields = [("Range", "bytes=40000-"), ("If-Range", date)];
            service.fetch_with(&url, &fields).assert_ok(&content.bytes());
        }
        let now = service.fetch(&url).header("Last-Modified").to_string();
        assert_eq!(service.fetch_with(&url, &[("If-Modified-Since", &now)]).status, 304, "change {n}");
        dates.push(now);
    }
}

#[test]
fn a_lost_blob_is_not_counted_as_stored() {
    let (up, old) = (Upstream::start(), Content::new(127, 50_000));
    let (service, url) = stored(&up, &old);
    let new = Content::new(128, 40_000);
    for (lost, content) in [(&old, &new), (&new, &old), (&old, &old)] {
        up.serve("/kept", Reply::ok(content));
        fs::remove_file(service.blob(&lost.sha256())).unwrap();
        service.fetch(&url).assert_ok(&content.bytes());
        let stats = service.stats();
        let sums = (&stats["total_items"], &stats["unique_blobs"], &stats["stored_bytes"]);
        assert_eq!(sums, (&1.into(), &1.into(), &content.len().into()), "{stats}");
        assert_eq!(service.metric("artifact_cache_size_bytes"), content.len() as f64);
    }
}

#[test]
fn a_removed_blob_heals_although_a_backup_shares_its_file() {
    let (up, content) = (Upstream::start(), Content::new(129, 50_000));
    let (service, url) = stored(&up, &content);
    let blob = service.blob(&content.sha256());
    fs::hard_link(&blob, service.service().dir().join("backup")).unwrap();
    assert_eq!(service.fetch(&url).assert_ok(&content.bytes()).cache_status(), "HIT");
    fs::remove_file(&blob).unwrap();
    assert_heals(&service, &url, &content);
    assert_eq!(up.count("/kept"), 2);
}

/// A transaction that has read something and is not closed, as of a backup that takes its time.
fn reader(service: &Running) -> rusqlite::Connection {
    let reader = service.sqlite();
    reader.execute_batch("BEGIN").unwrap();
    reader.query_row("SELECT count(*) FROM artifacts", [], |row| row.get::<_, i64>(0)).unwrap();
    reader
}

#[test]
fn a_reader_of_the_database_does_not_slow_misses() {
    let (up, content) = (Upstream::start(), Content::new(130, 1_000));
    let (service, _) = stored(&up, &content);
    let reader = reader(&service);
    // Each comes when the log of the write before it is due to be emptied, which the reader does not allow. The one
    // that was fastest is looked at, so that a busy machine is no failure.
    let took = (0..3).map(|n| {
        let url = up.serve(&format!("/while-read{n}"), Reply::ok(&Content::of(b"fresh")));
        std::thread::sleep(Duration::from_millis(1_700));
        let asked = Instant::now();
        service.fetch(&url).assert_ok(b"fresh");
        asked.elapsed()
    });
    let fastest = took.min().unwrap();
    assert!(fastest < Duration::from_secs(3), "every miss waited for the reader: {fastest:?} and more");
    drop(reader);
}

#[test]
fn the_log_is_emptied_once_its_last_reader_is_gone() {
    let (up, content) = (Upstream::start(), Content::new(131, 1_000));
    let (service, _) = stored(&up, &content);
    let reader = reader(&service);
    let url = up.serve("/while-read", Reply::ok(&Content::of(b"fresh")));
    service.fetch(&url).assert_ok(b"fresh");
    let log = format!("{}-wal", service.service().database().display());
    let length = || fs::metadata(&log).unwrap().len();
    // Longer than anything waits for a lock, so that the reader is in the way of a whole attempt.
    std::thread::sleep(Duration::from_secs(8));
    assert!(length() > 0, "the reader needs it");
    drop(reader);
    eventually("it is empty, without another write", || (length() == 0).then_some(()));
}

/// Writes what is synced into the file `TRIGGER`, a path a line.
const SHIM: &str = r#"
    FILE *log = fopen(TRIGGER, "a");
    if (log) {
        fprintf(log, "%s\n", path);
        fclose(log);
    }
"#;

#[test]
fn what_is_set_aside_survives_a_power_cut() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("synced");
    let name = "storage::what_is_set_aside_survives_a_power_cut";
    let Some(shim) = build_fsync_shim(dir.path(), SHIM, &log, name) else { return };
    let (up, service) = (Upstream::start(), Service::new().preload(&shim).start());
    let content = Content::new(21_900, 5_000);
    let url = up.serve("/x", Reply::ok(&content));
    service.fetch(&url).assert_ok(&content.bytes());
    std::fs::write(service.blob(&content.sha256()), "damaged").unwrap();
    std::fs::write(&log, "").unwrap();
    assert_eq!(service.fetch(&url).assert_ok(&content.bytes()).cache_status(), "MISS");
    let synced = std::fs::read_to_string(&log).unwrap();
    assert!(synced.lines().any(|path| path.ends_with("/.quarantine")), "{synced}");
}
