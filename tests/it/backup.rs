//! Backup and restore: whole or nothing, while it serves and while it does not, and by the design document's own recipe.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use crate::harness::{Content, QUIET, Reply, Running, Service, Upstream, eventually, fetch_target, skip};

/// Some artifacts of different sizes, and their URLs.
struct Shelf {
    up: Upstream,
    kept: Vec<(String, Content)>,
}

impl Shelf {
    fn new() -> Shelf {
        Shelf { up: Upstream::start(), kept: Vec::new() }
    }

    /// One more, fetched.
    fn add(&mut self, service: &Running, seed: u64, size: u64) -> Content {
        let content = Content::new(seed, size);
        let url = self.up.serve(&format!("/{seed}"), Reply::ok(&content));
        service.fetch(&url).assert_ok(&content.bytes());
        self.kept.push((url, content.clone()));
        content
    }

    /// All of them are hits with the right bytes.
    #[track_caller]
    fn assert_held(&self, service: &Running) {
        for (url, content) in &self.kept {
            let answer = service.fetch(url);
            assert_eq!(answer.assert_ok(&content.bytes()).cache_status(), "HIT", "{url}");
        }
    }
}

/// A service with three artifacts, one of them empty.
fn stocked() -> (Shelf, Running) {
    let (mut shelf, service) = (Shelf::new(), Service::new().start());
    for (seed, size) in [(1, 70_000), (2, 0), (3, 3_000_000)] {
        shelf.add(&service, 1_000 + seed, size);
    }
    (shelf, service)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Runs a verb on the service's configuration.
fn run(service: &Service, args: &[&str]) -> Output {
    service.command(args).output().expect("the binary runs")
}

#[track_caller]
fn run_ok(service: &Service, args: &[&str]) -> String {
    let output = run(service, args);
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), String::new()), "{args:?}");
    text(&output.stdout)
}

#[track_caller]
fn run_failing(service: &Service, args: &[&str], code: i32) -> String {
    let output = run(service, args);
    assert_eq!(output.status.code(), Some(code), "{args:?}: {}", text(&output.stderr));
    text(&output.stderr)
}

fn backup_dir(service: &Running) -> (PathBuf, String) {
    let dir = service.service().dir().join("backup");
    let name = dir.display().to_string();
    (dir, name)
}

/// Where a blob is in a backup.
fn copy_of(dir: &Path, content: &Content) -> PathBuf {
    let digest = content.sha256();
    dir.join("cache").join(&digest[..2]).join(&digest[2..4]).join(digest)
}

/// A directory of its own, with the backup restored into it, and the service started there.
fn restored_elsewhere(dir: &str) -> Running {
    let elsewhere = Service::new();
    run_ok(&elsewhere, &["restore", "--verify", dir]);
    elsewhere.start()
}

#[test]
fn a_backup_of_a_running_service_is_restored_into_an_empty_directory() {
    let (shelf, service) = stocked();
    let (dir, name) = backup_dir(&service);
    let said = run_ok(service.service(), &["backup", "--verify", &name]);
    assert!(said.contains("3 artifacts in 3 files of 3070000 bytes: 3 copied"), "{said}");
    let manifest: serde_json::Value =
        serde_json::from_slice(&fs::read(dir.join("manifest.json")).unwrap()).unwrap();
    assert_eq!((&manifest["artifacts"], &manifest["lacking"]), (&3.into(), &serde_json::json!([])));
    shelf.up.stop();
    let elsewhere = restored_elsewhere(&name);
    shelf.assert_held(&elsewhere);
    let stats = elsewhere.stats();
    assert_eq!((&stats["total_items"], &stats["stored_bytes"]), (&3.into(), &3_070_000.into()));
    assert_eq!(elsewhere.get("/health").json()["status"], "healthy");
}

#[test]
fn a_backup_under_load_names_nothing_that_it_lacks() {
    let (mut shelf, service) = stocked();
    let (_, name) = backup_dir(&service);
    let mut backup = service.service().command(&["backup", &name]).stdout(Stdio::null()).spawn().unwrap();
    let mut seed = 2_000;
    while backup.try_wait().unwrap().is_none() {
        shelf.add(&service, seed, 20_000);
        seed += 1;
    }
    assert!(backup.wait().unwrap().success());
    let elsewhere = restored_elsewhere(&name);
    let items = elsewhere.stats()["total_items"].as_u64().unwrap();
    assert!(items >= 3, "{items}");
    for (url, content) in &shelf.kept[..items as usize] {
        assert_eq!(elsewhere.fetch(url).assert_ok(&content.bytes()).cache_status(), "HIT");
    }
}

#[test]
fn the_next_backup_copies_only_what_is_new_and_prunes_on_request() {
    let (mut shelf, mut service) = stocked();
    let (dir, name) = backup_dir(&service);
    run_ok(service.service(), &["backup", &name]);
    let gone = shelf.kept.remove(0);
    let before = fs::metadata(copy_of(&dir, &shelf.kept[0].1)).unwrap().ino();
    let new = shelf.add(&service, 1_004, 5_000);
    let db = service.sqlite();
    db.execute("DELETE FROM artifacts WHERE source_url = ?1", [&gone.0]).unwrap();
    db.execute(
        "UPDATE blobs SET state = 'deleted', deleted_at = CURRENT_TIMESTAMP WHERE content_hash = ?1",
        [gone.1.sha256()],
    )
    .unwrap();
    drop(db);
    // Stopped this time.
    service.term();
    let said = run_ok(service.service(), &["backup", &name]);
    assert!(said.contains("1 copied, 2 already there, 0 old ones removed"), "{said}");
    assert_eq!(fs::metadata(copy_of(&dir, &shelf.kept[0].1)).unwrap().ino(), before);
    assert!(copy_of(&dir, &new).is_file() && copy_of(&dir, &gone.1).is_file(), "old ones stay unless asked");
    let said = run_ok(service.service(), &["backup", "--prune", &name]);
    assert!(said.contains("0 copied, 3 already there, 1 old ones removed"), "{said}");
    assert!(!copy_of(&dir, &gone.1).exists() && copy_of(&dir, &new).is_file());
    assert!(
        !service.service().database().with_extension("db-wal").exists(),
        "the stopped database is as it was"
    );
    shelf.assert_held(&restored_elsewhere(&name));
}

#[test]
fn hard_links_share_the_file_and_verifying_names_its_damage() {
    let (shelf, service) = stocked();
    let (dir, name) = backup_dir(&service);
    let said = run_ok(service.service(), &["backup", "--hard-link", "--verify", &name]);
    assert!(said.contains("3 linked"), "{said}");
    let content = &shelf.kept[0].1;
    let blob = service.blob(&content.sha256());
    assert_eq!(fs::metadata(&blob).unwrap().ino(), fs::metadata(copy_of(&dir, content)).unwrap().ino());
    fs::write(&blob, Content::new(9, content.len()).bytes()).unwrap();
    let said = run_failing(service.service(), &["backup", "--hard-link", "--verify", &name], 3);
    assert!(said.contains(&content.sha256()), "it is named: {said}");
    assert!(copy_of(&dir, content).is_file(), "it is not the backup's to remove");
}

/// Whatever keeps a copy from being read says nothing of the copy. The store knows that it has lost its own, so that
/// this one is the last.
#[test]
fn verifying_never_removes_the_last_copy() {
    let (shelf, service) = stocked();
    let (dir, name) = backup_dir(&service);
    run_ok(service.service(), &["backup", &name]);
    let (_, content) = &shelf.kept[2];
    fs::remove_file(service.blob(&content.sha256())).unwrap();
    let copy = copy_of(&dir, content);
    let bytes = Content::new(9, content.len()).bytes();
    fs::write(&copy, &bytes).unwrap();
    service
        .sqlite()
        .execute("UPDATE blobs SET state = 'missing' WHERE content_hash = ?1", [content.sha256()])
        .unwrap();
    let said = run_failing(service.service(), &["backup", "--verify", &name], 3);
    assert!(said.contains(&content.sha256()) && said.contains("its source is missing"), "{said}");
    assert!(fs::read(&copy).unwrap() == bytes, "it stays for its owner to judge");
}

#[test]
fn what_is_damaged_is_named_and_a_good_copy_of_it_stays() {
    let (shelf, service) = stocked();
    let (dir, name) = backup_dir(&service);
    run_ok(service.service(), &["backup", &name]);
    let [(_, first), _, (_, third)] = &shelf.kept[..] else { unreachable!() };
    fs::write(service.blob(&first.sha256()), Content::new(9, first.len()).bytes()).unwrap();
    fs::remove_file(service.blob(&third.sha256())).unwrap();
    run_ok(service.service(), &["backup", "--verify", &name]);
    assert!(fs::read(copy_of(&dir, first)).unwrap() == first.bytes());
    let fresh = service.service().dir().join("fresh").display().to_string();
    let said = run_failing(service.service(), &["backup", &fresh], 3);
    assert!(said.contains(&format!("{} has the SHA-256", first.sha256())), "{said}");
    assert!(said.contains(&format!("{} is missing", third.sha256())), "{said}");
    assert!(!copy_of(Path::new(&fresh), first).exists(), "damage is not backed up");
    // A rotten copy is replaced when it is looked at.
    let (again, copy) = (copy_of(&dir, &shelf.kept[1].1), copy_of(&dir, third));
    assert!(again.is_file());
    fs::copy(&copy, service.blob(&third.sha256())).unwrap();
    fs::write(&copy, Content::new(9, third.len()).bytes()).unwrap();
    run_ok(service.service(), &["backup", "--verify", &name]);
    assert!(fs::read(&copy).unwrap() == third.bytes());
}

#[test]
fn an_interrupted_backup_leaves_the_one_before_or_none() {
    let (mut shelf, service) = stocked();
    let (dir, name) = backup_dir(&service);
    let killed = |point: &str| {
        let mut backup = service.service().command(&["backup", &name]);
        let status = backup.env("ARTIFACT_CACHE_KILL_POINT", point).stdout(Stdio::null()).status().unwrap();
        assert_eq!(status.code(), None, "killed at {point}");
    };
    for point in ["backup.snapshotted", "backup.blob:2", "backup.copied"] {
        killed(point);
        let said = run_failing(&Service::new(), &["restore", &name], 1);
        assert!(said.contains("interrupted") && said.contains(&name), "{point}: {said}");
    }
    assert!(run_ok(service.service(), &["backup", &name]).contains("0 copied, 3 already there"));
    shelf.add(&service, 1_010, 5_000);
    for (point, items) in
        [("backup.snapshotted", 3), ("backup.blob:4", 3), ("backup.copied", 3), ("backup.installed", 4)]
    {
        killed(point);
        assert_eq!(restored_elsewhere(&name).stats()["total_items"], items, "{point}");
    }
    run_ok(service.service(), &["backup", "--verify", &name]);
    assert!(dir.join("manifest.json").is_file());
    shelf.assert_held(&restored_elsewhere(&name));
}

#[test]
fn a_backup_waits_for_a_sweep_and_keeps_others_away() {
    let (_shelf, service) = stocked();
    let (_, name) = backup_dir(&service);
    let lock = |name: &str| {
        File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(service.service().dir().join(name))
            .unwrap()
    };
    let sweep = lock("cache/.sweep.lock");
    sweep.lock().unwrap();
    let mut backup = service.service().command(&["backup", &name]).stdout(Stdio::null()).spawn().unwrap();
    std::thread::sleep(QUIET);
    assert!(backup.try_wait().unwrap().is_none(), "it waits");
    sweep.unlock().unwrap();
    assert!(backup.wait().unwrap().success());
    let other = lock("backup/.lock");
    other.lock().unwrap();
    let said = run_failing(service.service(), &["backup", &name], 1);
    assert!(said.contains("another backup") && said.contains(&name), "{said}");
}

#[test]
fn the_services_own_directories_are_no_backup() {
    let (shelf, service) = stocked();
    let data = service.service().dir().display().to_string();
    for dir in [data.clone(), format!("{data}/cache"), format!("{data}/cache/deep/down")] {
        for verb in ["backup", "restore"] {
            let said = run_failing(service.service(), &[verb, &dir], 1);
            assert!(said.contains(&dir) && said.contains("own data"), "{said}");
        }
    }
    shelf.assert_held(&service);
}

#[test]
fn a_running_service_is_not_restored_into() {
    let (shelf, mut service) = stocked();
    let (_, name) = backup_dir(&service);
    run_ok(service.service(), &["backup", &name]);
    let said = run_failing(service.service(), &["restore", &name], 1);
    assert!(said.contains("stop that one first"), "{said}");
    shelf.assert_held(&service);
    service.term();
    let backing_up = File::open(service.service().base_path().join(".sweep.lock")).unwrap();
    backing_up.lock_shared().unwrap();
    let said = run_failing(service.service(), &["restore", &name], 1);
    assert!(said.contains("a backup of this store is running"), "{said}");
}

#[test]
fn restoring_beside_files_keeps_good_ones_and_replaces_the_others() {
    let (shelf, mut service) = stocked();
    let (_, name) = backup_dir(&service);
    run_ok(service.service(), &["backup", &name]);
    let [(_, good), (_, cut), (_, rotten)] = &shelf.kept[..] else { unreachable!() };
    let inode = fs::metadata(service.blob(&good.sha256())).unwrap().ino();
    fs::write(service.blob(&cut.sha256()), "too long").unwrap();
    fs::write(service.blob(&rotten.sha256()), Content::new(9, rotten.len()).bytes()).unwrap();
    service.term();
    let said = run_ok(service.service(), &["restore", "--verify", &name]);
    assert!(said.contains("2 copied, 1 already there, 0 lacking"), "{said}");
    assert_eq!(
        fs::metadata(service.blob(&good.sha256())).unwrap().ino(),
        inode,
        "the good one is left alone"
    );
    let aside = fs::read_dir(service.service().base_path().join(".quarantine")).unwrap().count();
    assert_eq!(aside, 2, "the others are kept aside");
    shelf.assert_held(&service.again().start());
}

#[test]
fn an_old_log_is_never_replayed_over_a_restored_database() {
    let (mut shelf, mut service) = stocked();
    let (_, name) = backup_dir(&service);
    run_ok(service.service(), &["backup", &name]);
    let (url, _) = {
        shelf.add(&service, 1_020, 5_000);
        shelf.kept.pop().unwrap()
    };
    service.kill();
    let log = PathBuf::from(format!("{}-wal", service.service().database().display()));
    assert!(fs::metadata(&log).unwrap().len() > 0, "the killed service leaves its log");
    let said = run_ok(service.service(), &["restore", &name]);
    assert!(!log.exists(), "{said}");
    let kept =
        said.lines().find_map(|line| line.strip_prefix("the database that was there is kept as ")).unwrap();
    let old = rusqlite::Connection::open(kept).unwrap();
    let known = "SELECT count(*) FROM artifacts WHERE source_url = ?1";
    assert_eq!(old.query_row(known, [&url], |row| row.get::<_, i64>(0)).unwrap(), 1, "with what its log had");
    let service = service.again().start();
    shelf.assert_held(&service);
    assert_eq!(service.stats()["total_items"], 3);
    assert_eq!(service.fetch(&url).cache_status(), "MISS");
    assert_eq!(service.count_rows("SELECT count(*) FROM blobs"), 4, "the file that was there is adopted");
}

#[test]
fn an_interrupted_restore_is_run_again() {
    let (shelf, service) = stocked();
    let (_, name) = backup_dir(&service);
    run_ok(service.service(), &["backup", &name]);
    let elsewhere = Service::new();
    for point in ["restore.copied", "restore.set_aside", "restore.set_aside:2", "restore.installed"] {
        let mut restore = elsewhere.command(&["restore", &name]);
        let status = restore.env("ARTIFACT_CACHE_KILL_POINT", point).stdout(Stdio::null()).status().unwrap();
        assert_eq!(status.code(), None, "killed at {point}");
    }
    run_ok(&elsewhere, &["restore", "--verify", &name]);
    shelf.assert_held(&elsewhere.start());
}

#[test]
fn an_interrupted_restore_leaves_a_database() {
    let (mut shelf, mut service) = stocked();
    let (_, name) = backup_dir(&service);
    run_ok(service.service(), &["backup", &name]);
    shelf.add(&service, 1_030, 5_000);
    service.term();
    for point in ["restore.copied", "restore.set_aside", "restore.set_aside:2"] {
        let mut restore = service.service().command(&["restore", &name]);
        let status = restore.env("ARTIFACT_CACHE_KILL_POINT", point).stdout(Stdio::null()).status().unwrap();
        assert_eq!(status.code(), None, "killed at {point}");
        service = service.again().start();
        shelf.assert_held(&service);
        service.term();
    }
    run_ok(service.service(), &["restore", &name]);
    assert_eq!(service.again().start().stats()["total_items"], 3);
}

#[test]
fn what_is_in_neither_place_is_named_and_heals_later() {
    let (shelf, service) = stocked();
    let (dir, name) = backup_dir(&service);
    run_ok(service.service(), &["backup", &name]);
    let (url, content) = &shelf.kept[0];
    fs::remove_file(copy_of(&dir, content)).unwrap();
    let elsewhere = Service::new();
    let said = run_failing(&elsewhere, &["restore", &name], 3);
    assert!(said.contains(&format!("{} is missing", content.sha256())), "{said}");
    let elsewhere = elsewhere.start();
    assert_eq!(elsewhere.stats()["unique_blobs"], 2, "it is not counted as stored");
    assert_eq!(elsewhere.fetch(url).assert_ok(&content.bytes()).cache_status(), "MISS");
    shelf.assert_held(&elsewhere);
}

/// That the service has noticed the loss makes the backup no more complete.
#[test]
fn what_the_store_knows_to_be_missing_is_lacking_unless_nobody_has_it() {
    let (shelf, service) = stocked();
    let (_, name) = backup_dir(&service);
    let [(_, named), _, (url, unnamed)] = &shelf.kept[..] else { unreachable!() };
    for content in [named, unnamed] {
        fs::remove_file(service.blob(&content.sha256())).unwrap();
        let lose = "UPDATE blobs SET state = 'missing' WHERE content_hash = ?1";
        service.sqlite().execute(lose, [content.sha256()]).unwrap();
    }
    service.sqlite().execute("DELETE FROM artifacts WHERE source_url = ?1", [url]).unwrap();
    let said = run_failing(service.service(), &["backup", &name], 3);
    assert!(said.contains(&format!("{} is missing", named.sha256())), "{said}");
    assert!(!said.contains(&unnamed.sha256()), "{said}");
    assert_eq!(run_failing(&Service::new(), &["restore", &name], 3), said);
}

#[test]
fn what_was_missing_and_is_restored_is_missing_no_more() {
    let (shelf, mut service) = stocked();
    let (_, name) = backup_dir(&service);
    run_ok(service.service(), &["backup", &name]);
    service.sqlite().execute("UPDATE blobs SET state = 'missing'", []).unwrap();
    // Its files are there already; now the database says that the store had lost them.
    run_ok(service.service(), &["backup", &name]);
    fs::remove_file(service.blob(&shelf.kept[0].1.sha256())).unwrap();
    service.term();
    let said = run_ok(service.service(), &["restore", &name]);
    assert!(said.contains("1 copied, 2 already there, 0 lacking"), "{said}");
    assert_eq!(service.count_rows("SELECT count(*) FROM blobs WHERE state <> 'present'"), 0);
    let service = service.again().start();
    assert_eq!(service.stats()["unique_blobs"], 3);
    shelf.assert_held(&service);
}

#[test]
fn what_can_not_be_used_replaces_nothing() {
    let (shelf, mut service) = stocked();
    let (dir, name) = backup_dir(&service);
    service.term();
    let database = service.service().database();
    let before = fs::read(&database).unwrap();
    fs::create_dir_all(&dir).unwrap();
    let foreign = rusqlite::Connection::open(dir.join("foreign.db")).unwrap();
    foreign.execute_batch("CREATE TABLE notes (x); PRAGMA user_version = 1").unwrap();
    drop(foreign);
    let foreign = fs::read(dir.join("foreign.db")).unwrap();
    let torn = [&before[..4096], &vec![0xa5; before.len() - 4096]].concat();
    for (bad, word) in
        [(&b"notes\n".repeat(500), "damaged"), (&torn, "damaged"), (&foreign, "another program")]
    {
        fs::write(dir.join("metadata.db"), bad).unwrap();
        let said = run_failing(service.service(), &["restore", &name], 1);
        assert!(said.contains(word) && said.contains(&name), "{said}");
        assert!(fs::read(&database).unwrap() == before);
    }
    shelf.assert_held(&service.again().start());
}

/// The recipe of the design document, word for word but for its paths and the command that stops the service.
const RECIPE: &str = r#"
set -eu
BACKUP_DIR="$BACKUPS/20241117"
mkdir -p "$BACKUP_DIR"
cp $DATA/metadata.db "$BACKUP_DIR/"
rsync -av --delete $DATA/cache/ "$BACKUP_DIR/cache/"
cp config.yaml "$BACKUP_DIR/"
tar -czf "$BACKUP_DIR.tar.gz" -C $BACKUPS 20241117
rm -rf "$BACKUP_DIR"
"#;

const RECOVERY: &str = r#"
set -eu
tar -xzf $BACKUPS/20241117.tar.gz -C $TEMPORARY/
cp $TEMPORARY/20241117/metadata.db $DATA/
rsync -av $TEMPORARY/20241117/cache/ $DATA/cache/
"#;

fn shell(script: &str, data: &Path, backups: &Path) {
    let temporary = backups.join("unpacked");
    fs::create_dir_all(&temporary).unwrap();
    let mut bash = Command::new("bash");
    bash.args(["-c", script]).current_dir(data);
    bash.env("DATA", data).env("BACKUPS", backups).env("TEMPORARY", &temporary);
    let output = bash.output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
}

#[test]
fn the_documents_own_recipe_works() {
    if Command::new("rsync").arg("--version").output().is_err() {
        return skip("backup::the_documents_own_recipe_works", "rsync is not installed");
    }
    let (shelf, mut service) = stocked();
    let data = service.service().dir().to_owned();
    fs::write(data.join("config.yaml"), "logging:\n  level: info\n").unwrap();
    let backups = tempfile::tempdir().unwrap();
    service.term();
    shell(RECIPE, &data, backups.path());
    let service = service.again().start();
    shelf.assert_held(&service);
    // Another machine, with nothing on it.
    let elsewhere = Service::new();
    shell(RECOVERY, elsewhere.dir(), backups.path());
    let check = rusqlite::Connection::open(elsewhere.database()).unwrap();
    let said: String = check.query_row("PRAGMA integrity_check", [], |row| row.get(0)).unwrap();
    assert_eq!(said, "ok");
    drop(check);
    let elsewhere = elsewhere.start();
    shelf.assert_held(&elsewhere);
    assert_eq!(elsewhere.get("/health").json()["status"], "healthy");
    // What the recipe unpacked is as good as what `backup` makes.
    let unpacked = backups.path().join("unpacked/20241117").display().to_string();
    let third = restored_elsewhere(&unpacked);
    shelf.assert_held(&third);
}

#[test]
fn a_backup_and_its_service_do_not_disturb_each_other() {
    let (shelf, service) = stocked();
    let (_, name) = backup_dir(&service);
    let asked = shelf.up.total();
    let mut client = service.connect();
    for _ in 0..3 {
        let mut backup = service.service().command(&["backup", &name]).stdout(Stdio::null()).spawn().unwrap();
        let mut hits = 0;
        while backup.try_wait().unwrap().is_none() {
            let (url, content) = &shelf.kept[0];
            client.request("GET", &fetch_target(url), &[]);
            client.response("GET").assert_ok(&content.bytes());
            hits += 1;
        }
        assert!(hits > 0 && backup.wait().unwrap().success());
    }
    assert_eq!(shelf.up.total(), asked);
    eventually("the counts arrive", || {
        let counted = service.count_rows("SELECT sum(access_count) FROM artifacts");
        (counted == service.stats()["total_accesses"].as_i64().unwrap()).then_some(())
    });
}

#[test]
fn a_summary_that_nobody_can_read_is_no_failure() {
    let (shelf, mut service) = stocked();
    let (_, name) = backup_dir(&service);
    let full = || File::options().write(true).open("/dev/full").unwrap();
    let unread = |args: &[&str]| {
        service.service().command(args).stdout(full()).stderr(full()).status().unwrap().code()
    };
    assert_eq!(unread(&["backup", &name]), Some(0));
    fs::remove_file(service.blob(&shelf.kept[0].1.sha256())).unwrap();
    let fresh = service.service().dir().join("fresh").display().to_string();
    assert_eq!(unread(&["backup", &fresh]), Some(3));
    service.signal_term();
    service.wait_exit();
    let unread = |args: &[&str]| {
        service.service().command(args).stdout(full()).stderr(full()).status().unwrap().code()
    };
    assert_eq!(unread(&["restore", &name]), Some(0));
    shelf.assert_held(&service.again().start());
}

/// Of the store's files none can be opened, for want of descriptors.
const SHIM: &str = r#"
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

int open64(const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    int mode = va_arg(rest, int);
    va_end(rest);
    if (strstr(path, "/cache/") && strlen(strrchr(path, '/')) == 65 && !strstr(path, "/backup/")) {
        errno = EMFILE;
        return -1;
    }
    return syscall(SYS_openat, AT_FDCWD, path, flags, mode);
}
"#;

#[test]
fn too_few_descriptors_are_not_taken_for_damage() {
    let (shelf, service) = stocked();
    let (dir, name) = backup_dir(&service);
    let (source, shim) = (service.service().dir().join("shim.c"), service.service().dir().join("shim.so"));
    fs::write(&source, SHIM).unwrap();
    let mut cc = Command::new("cc");
    let Ok(built) = cc.args(["-shared", "-fPIC", "-o"]).arg(&shim).arg(&source).output() else {
        return skip("backup::too_few_descriptors_are_not_taken_for_damage", "cc is not installed");
    };
    assert!(built.status.success(), "{}", text(&built.stderr));
    let output = service.service().command(&["backup", &name]).env("LD_PRELOAD", &shim).output().unwrap();
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("Too many open files") && said.contains("/cache/"), "{said}");
    assert!(!dir.join("metadata.db").exists(), "nothing that looks complete");
    run_ok(service.service(), &["backup", &name]);
    shelf.assert_held(&restored_elsewhere(&name));
}
