//! `artifact-cache verify`: beside a running service and without one.

use std::fs;
use std::os::unix::fs::FileExt;

use serde_json::Value;

use crate::harness::{Content, Reply, Running, Service, Upstream};

const COUNT: usize = 24;

/// A service that holds some artifacts.
fn filled(up: &Upstream, service: Service) -> (Running, Vec<(String, Content)>) {
    filled_with(COUNT, up, service)
}

fn filled_with(count: usize, up: &Upstream, service: Service) -> (Running, Vec<(String, Content)>) {
    let service = service.start();
    let artifact = |n: usize| {
        let content = Content::new(75_000 + n as u64, 20_000);
        (up.serve(&format!("/a/{n}"), Reply::ok(&content)), content)
    };
    let artifacts: Vec<_> = (0..count).map(artifact).collect();
    for (url, content) in &artifacts {
        service.fetch(url).assert_ok(&content.bytes());
    }
    (service, artifacts)
}

/// Exit code and the report.
#[track_caller]
pub fn verify(service: &Running, options: &[&str]) -> (i32, Value) {
    let output = service.service().command(&[&["verify", "--json"], options].concat()).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    let report = serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {stderr}"));
    assert_eq!(stderr, "", "no terminal, no progress");
    (output.status.code().unwrap(), report)
}

/// Same size, one other byte.
fn flip(service: &Running, content: &Content) {
    let blob = fs::File::options().write(true).open(service.blob(&content.sha256())).unwrap();
    blob.write_all_at(&[content.piece(7_000, 7_001)[0] ^ 1], 7_000).unwrap();
}

fn outcomes(report: &Value) -> Vec<&str> {
    let damaged = report["damaged"].as_array().unwrap();
    damaged.iter().map(|damage| damage["outcome"].as_str().unwrap()).collect()
}

#[track_caller]
fn assert_all_hits(service: &Running, artifacts: &[(String, Content)]) {
    for (url, content) in artifacts {
        assert_eq!(service.fetch(url).assert_ok(&content.bytes()).cache_status(), "HIT");
    }
}

#[test]
fn it_finds_and_mends_what_a_stopped_service_left() {
    let up = Upstream::start();
    let (mut service, artifacts) = filled(&up, Service::new());
    service.term();
    assert_eq!(verify(&service, &[]).0, 0);
    flip(&service, &artifacts[3].1);
    fs::remove_file(service.blob(&artifacts[4].1.sha256())).unwrap();
    let (code, report) = verify(&service, &[]);
    assert_eq!((code, outcomes(&report)), (3, vec!["not_repaired"; 2]), "{report}");
    assert_eq!((&report["files"], &report["whole"]), (&COUNT.into(), &(COUNT - 2).into()));
    assert!(report.to_string().contains("/a/3") && report.to_string().contains(&artifacts[4].1.sha256()));
    let (code, report) = verify(&service, &["--repair"]);
    assert_eq!((code, outcomes(&report)), (0, vec!["fetched_again"; 2]), "{report}");
    let (code, report) = verify(&service, &[]);
    assert_eq!((code, &report["whole"]), (0, &COUNT.into()), "{report}");
    assert_all_hits(&service.again().start(), &artifacts);
    assert_eq!(up.total(), COUNT + 2);
}

#[test]
fn beside_a_running_service_it_finds_and_the_service_mends() {
    let up = Upstream::start();
    let (service, artifacts) = filled(&up, Service::new());
    flip(&service, &artifacts[5].1);
    flip(&service, &artifacts[6].1);
    let (code, report) = verify(&service, &[]);
    assert_eq!((code, outcomes(&report)), (3, vec!["not_repaired"; 2]), "{report}");
    assert_eq!(service.metric("artifact_cache_scrub_healed_total"), 0.0, "it was only told");
    let (code, report) = verify(&service, &["--repair"]);
    assert_eq!((code, outcomes(&report)), (4, vec!["handed_to_the_service"; 2]), "{report}");
    service.wait_metric("artifact_cache_scrub_healed_total", 2.0);
    assert_eq!(verify(&service, &[]).0, 0);
    assert_all_hits(&service, &artifacts);
}

#[test]
fn what_no_source_gives_any_more_is_still_damage() {
    let up = Upstream::start();
    let (mut service, artifacts) = filled(&up, Service::new());
    service.term();
    flip(&service, &artifacts[7].1);
    up.serve("/a/7", Reply::ok(&Content::new(76_000, 20_000)));
    for _ in 0..2 {
        let (code, report) = verify(&service, &["--repair"]);
        assert_eq!((code, outcomes(&report)), (3, vec!["not_to_be_had"]), "{report}");
    }
    assert_eq!(fs::read_dir(service.service().base_path().join(".quarantine")).unwrap().count(), 1);
}

/// Exit code, standard output, standard error.
fn repair(service: &Service) -> (i32, String, String) {
    let output = service.command(&["verify", "--json", "--repair"]).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().unwrap(), text(&output.stdout), text(&output.stderr))
}

#[test]
fn repairing_makes_and_migrates_no_database() {
    let service = Service::new();
    let (code, _, stderr) = repair(&service);
    assert!(code == 1 && stderr.contains("storage.database"), "{stderr}");
    assert!(!service.database().exists() && !service.base_path().exists(), "nothing was made");
    let mut service = service.start();
    service.term();
    // As the version before has left it.
    service.sqlite().execute_batch("DROP INDEX idx_blobs_missing; PRAGMA user_version = 4").unwrap();
    let (code, _, stderr) = repair(service.service());
    assert!(code == 1 && stderr.contains("metadata.db"), "{stderr}");
    assert_eq!(service.count_rows("PRAGMA user_version"), 4, "it is the service's to migrate");
}

#[test]
fn a_store_that_is_not_mounted_is_not_mended() {
    let up = Upstream::start();
    let (mut service, artifacts) = filled_with(33, &up, Service::new());
    service.term();
    let (base, away) = (service.service().base_path(), service.service().dir().join("away"));
    fs::rename(&base, &away).unwrap();
    let (code, stdout, stderr) = repair(service.service());
    assert!(code == 1 && stderr.contains("mount") && stdout.is_empty(), "{stdout} {stderr}");
    assert!(!base.exists(), "nothing was made");
    // The place it is mounted at.
    fs::create_dir(&base).unwrap();
    let (code, stdout, stderr) = repair(service.service());
    assert!(code == 1 && stderr.contains("mount"), "{stderr}");
    let report: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(outcomes(&report), vec!["not_repaired"; 33]);
    assert_eq!(up.total(), 33);
    assert_eq!(service.count_rows("SELECT count(*) FROM blobs WHERE state = 'missing'"), 0);
    fs::remove_dir_all(&base).unwrap();
    fs::rename(&away, &base).unwrap();
    assert_all_hits(&service.again().start(), &artifacts);
}

#[test]
fn what_can_not_be_mended_does_not_keep_the_others_from_it() {
    let up = Upstream::start();
    let (mut service, artifacts) = filled(&up, Service::new());
    service.term();
    flip(&service, &artifacts[3].1);
    fs::remove_file(service.blob(&artifacts[4].1.sha256())).unwrap();
    let refuse = format!(
        "CREATE TRIGGER refused BEFORE UPDATE OF state ON blobs WHEN new.content_hash = '{}'
         BEGIN SELECT raise(ABORT, 'refused'); END",
        artifacts[3].1.sha256()
    );
    service.sqlite().execute_batch(&refuse).unwrap();
    let (code, stdout, stderr) = repair(service.service());
    let report: Value = serde_json::from_str(&stdout).unwrap();
    let mut fates = outcomes(&report);
    fates.sort_unstable();
    assert_eq!((code, fates), (3, vec!["fetched_again", "not_repaired"]), "{stderr}");
    assert!(stderr.contains(&artifacts[3].1.sha256()), "{stderr}");
}

/// Between the look at a file and the note of it, a running service may have found it missing.
#[test]
fn only_what_was_missing_when_it_was_looked_at_is_noted_as_found() {
    let up = Upstream::start();
    let (mut service, artifacts) = filled(&up, Service::new());
    service.term();
    let [lost, found] = [3, 4].map(|n| artifacts[n].1.sha256());
    // As if the service's note came just behind the first of this process's.
    let lose = format!(
        "UPDATE blobs SET state = 'missing' WHERE content_hash = '{found}';
         CREATE TRIGGER lost AFTER UPDATE OF verified_at ON blobs
         WHEN new.content_hash = '{lost}' AND old.state = 'present' AND new.state = 'present'
         BEGIN UPDATE blobs SET state = 'missing' WHERE content_hash = '{lost}'; END"
    );
    service.sqlite().execute_batch(&lose).unwrap();
    assert_eq!(verify(&service, &[]).0, 0);
    let missing = |digest: &str| {
        let query =
            format!("SELECT count(*) FROM blobs WHERE state = 'missing' AND content_hash = '{digest}'");
        service.count_rows(&query)
    };
    assert_eq!((missing(&lost), missing(&found)), (1, 0));
}

#[test]
fn parts_samples_and_budgets() {
    let up = Upstream::start();
    let (mut service, artifacts) = filled(&up, Service::new());
    service.term();
    let files = |options: &[&str]| {
        let (code, report) = verify(&service, options);
        assert_eq!(code, 0, "{report}");
        (report["whole"].as_u64().unwrap() as usize, report["left"].as_u64().unwrap() as usize)
    };
    let parts: usize = ["1/3", "2/3", "3/3"].iter().map(|part| files(&["--part", part]).0).sum();
    assert_eq!(parts, COUNT);
    assert_eq!(files(&["--sample", "5"]), (5, 0));
    assert_eq!(files(&["--sample", "25%"]), (COUNT / 4, 0));
    // As if all had been verified long ago; each run then goes on where the one before has ended.
    let db = service.sqlite();
    db.execute("UPDATE blobs SET verified_at = datetime(verified_at, '-9 days')", []).unwrap();
    let old =
        || service.count_rows("SELECT count(*) FROM blobs WHERE verified_at < datetime('now', '-1 day')");
    assert_eq!(files(&["--max-bytes", "200kB"]), (10, COUNT - 10));
    assert_eq!(old(), COUNT as i64 - 10);
    assert_eq!(files(&["--max-bytes", "200kB"]), (10, COUNT - 10));
    assert_eq!(old(), COUNT as i64 - 20);
    drop(db);
    // A file of nobody is counted, and is no damage.
    let stray = Content::new(76_100, 10);
    let place = service.blob(&stray.sha256());
    fs::create_dir_all(place.parent().unwrap()).unwrap();
    fs::write(place, stray.bytes()).unwrap();
    let (code, report) = verify(&service, &["--sample", "1"]);
    assert_eq!((code, &report["orphans"]), (0, &1.into()));
    assert!(artifacts.len() == COUNT);
}

#[test]
fn a_damaged_database_is_told_and_left_alone() {
    let up = Upstream::start();
    let (mut service, _) = filled(&up, Service::new());
    service.term();
    // The pages of an index, so that the schema can still be read.
    let db = service.sqlite();
    let page: i64 = db
        .query_row("SELECT rootpage FROM sqlite_master WHERE name = 'idx_versions_content_hash'", [], |r| {
            r.get(0)
        })
        .unwrap();
    let size: i64 = db.query_row("PRAGMA page_size", [], |r| r.get(0)).unwrap();
    drop(db);
    let file = fs::File::options().write(true).open(service.service().database()).unwrap();
    file.write_all_at(&vec![0x55; size as usize], ((page - 1) * size) as u64).unwrap();
    drop(file);
    let (code, report) = verify(&service, &[]);
    assert_eq!(code, 3);
    assert!(!report["database_problems"].as_array().unwrap().is_empty(), "{report}");
    assert_eq!(report["whole"], COUNT, "what can be read is compared all the same: {report}");
}

#[test]
fn what_keeps_it_from_working_is_said() {
    let service = Service::new();
    let output = service.command(&["verify"]).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr.contains("metadata.db") && stderr.contains("storage.database"), "{stderr}");
    for options in [["--part", "4/3"], ["--sample", "0"], ["--max-bytes", "much"]] {
        let output = service.command(&[&["verify"], &options[..]].concat()).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{options:?}");
    }
}

#[test]
fn people_get_a_table() {
    let up = Upstream::start();
    let (mut service, artifacts) = filled(&up, Service::new());
    service.term();
    flip(&service, &artifacts[0].1);
    let output = service.service().command(&["verify"]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    for line in ["database  sound", "files     23 of 24 whole, ", "damaged   1", ": not repaired", "/a/0"] {
        assert!(text.contains(line), "no {line:?} in {text}");
    }
}
