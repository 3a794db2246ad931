//! Rot: a disk that changes what it was given. Found by the scrub, by `verify` and while serving; never served as the
//! artifact where it can be told, set aside and never deleted, and fetched again with the recorded digest.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};

use crate::harness::{
    Content, End, Gate, Reply, Running, Service, Upstream, build_shim, eventually, fetch_target,
};

/// A way in which a stored file is damaged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rot {
    Flip,
    Cut,
    Extend,
    Remove,
    Swap,
    Link,
    Directory,
    Pipe,
}

const ROTS: [Rot; 8] =
    [Rot::Flip, Rot::Cut, Rot::Extend, Rot::Remove, Rot::Swap, Rot::Link, Rot::Directory, Rot::Pipe];

/// Damages the file at `blob`, keeping what it was under `aside` where it is moved.
fn plant(rot: Rot, blob: &Path, other: &Path) {
    let open = || fs::File::options().read(true).write(true).open(blob).unwrap();
    let length = || fs::metadata(blob).unwrap().len();
    match rot {
        Rot::Flip => {
            let (file, at) = (open(), length() / 2);
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
        }
        Rot::Cut => open().set_len(length() - 1).unwrap(),
        Rot::Extend => open().set_len(length() + 1).unwrap(),
        Rot::Remove => fs::remove_file(blob).unwrap(),
        // Another artifact's bytes, whole and of the same length.
        Rot::Swap => drop(fs::copy(other, blob).unwrap()),
        Rot::Link => {
            fs::remove_file(blob).unwrap();
            symlink(other, blob).unwrap();
        }
        Rot::Directory => {
            fs::remove_file(blob).unwrap();
            fs::create_dir(blob).unwrap();
        }
        Rot::Pipe => {
            fs::remove_file(blob).unwrap();
            rustix::fs::mknodat(
                rustix::fs::CWD,
                blob,
                rustix::fs::FileType::Fifo,
                rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
                0,
            )
            .unwrap();
        }
    }
}

/// So many artifacts; two sizes, one in the memory front and one over a page of the disk.
fn artifacts(up: &Upstream, count: u64) -> Vec<(String, Content)> {
    let artifact = |n: u64| {
        let content = Content::new(70_000 + n, if n.is_multiple_of(2) { 3_000 } else { 90_001 });
        (up.serve(&format!("/rot/{n}"), Reply::ok(&content)), content)
    };
    (0..count).map(artifact).collect()
}

fn store(service: &Running, artifacts: &[(String, Content)]) {
    for (url, content) in artifacts {
        service.fetch(url).assert_ok(&content.bytes());
    }
}

/// Another artifact of the same size as the one at `at`.
fn other(service: &Running, artifacts: &[(String, Content)], at: usize) -> std::path::PathBuf {
    service.blob(&artifacts[(at + 2) % artifacts.len()].1.sha256())
}

/// Makes every blob due, as if a month had gone by.
fn a_month_later(service: &Running) {
    let age = "UPDATE blobs SET verified_at = datetime(verified_at, '-31 days')";
    service.sqlite().execute(age, []).unwrap();
}

fn quarantined(service: &Running) -> usize {
    fs::read_dir(service.service().base_path().join(".quarantine")).unwrap().count()
}

/// Of a run; shown with `--nocapture`.
fn figures(way: &str, planted: usize, found: f64, wrong: usize, healed: f64) {
    println!("{way}: planted {planted}, found {found}, served wrongly {wrong}, healed {healed}");
}

const SCRUBBED: &str = "artifact_cache_scrubbed_blobs_total";
const CORRUPT: &str = "artifact_cache_blobs_corrupt_total";
const HEALED: &str = "artifact_cache_scrub_healed_total";
const MISSING: &str = "artifact_cache_missing_blobs";

#[test]
fn the_scrub_finds_and_heals_whatever_was_planted() {
    let up = Upstream::start();
    let service = Service::new().env("JOBS__SCRUB_MAX_BYTES_PER_SECOND", "1GiB").start();
    let artifacts = artifacts(&up, 96);
    store(&service, &artifacts);
    // Every third, so that each is damaged in its own way and what it is swapped with is whole.
    let planted: Vec<(usize, Rot)> = (0..artifacts.len()).step_by(3).zip(ROTS.into_iter().cycle()).collect();
    for &(at, rot) in &planted {
        plant(rot, &service.blob(&artifacts[at].1.sha256()), &other(&service, &artifacts, at));
    }
    a_month_later(&service);
    service.wait_metric(HEALED, planted.len() as f64);
    service.wait_metric(SCRUBBED, artifacts.len() as f64);
    assert_eq!(service.metric(CORRUPT), planted.len() as f64, "found");
    assert_eq!(service.metric(MISSING), 0.0);
    let removed = planted.iter().filter(|(_, rot)| *rot == Rot::Remove).count();
    assert_eq!(quarantined(&service), planted.len() - removed, "nothing is deleted");
    let asked = up.total();
    let wrong = artifacts.iter().filter(|(url, content)| {
        let answer = service.fetch(url);
        answer.cache_status() != "HIT" || answer.body != content.bytes()
    });
    let wrong = wrong.count();
    assert_eq!((wrong, up.total()), (0, asked), "served wrongly, or fetched once more");
    figures("scrub", planted.len(), service.metric(CORRUPT), wrong, service.metric(HEALED));
    let line = service.wait_log("the loss", |line| line["msg"] == "stored file lost, will be fetched again");
    assert!(line["source_urls"].as_str().unwrap().contains("/rot/"), "{line}");
    // All are young again, and counted as stored.
    let due =
        "SELECT count(*) FROM blobs WHERE verified_at IS NULL OR verified_at < datetime('now', '-1 day')";
    eventually("everything is noted", || (service.count_rows(due) == 0).then_some(()));
    assert_eq!(service.stats()["unique_blobs"], artifacts.len());
    let oldest = service.metric("artifact_cache_scrub_oldest_verified_timestamp_seconds");
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs_f64();
    assert!((now - oldest).abs() < 3600.0, "{oldest}");
}

#[test]
fn nothing_rotten_is_served_as_whole_when_reads_are_verified() {
    let up = Upstream::start();
    let service = Service::new().env("STORAGE__VERIFY_ON_READ", "true").start();
    let artifacts = artifacts(&up, 96);
    store(&service, &artifacts);
    let planted: Vec<(usize, Rot)> = (0..artifacts.len()).step_by(3).zip(ROTS.into_iter().cycle()).collect();
    for &(at, rot) in &planted {
        plant(rot, &service.blob(&artifacts[at].1.sha256()), &other(&service, &artifacts, at));
    }
    let mut wrong = 0;
    for (url, content) in &artifacts {
        // As a client that tries again when it is cut off.
        eventually("the right bytes", || {
            let mut client = service.connect();
            client.request("GET", &fetch_target(url), &[]);
            let answer = client.try_head().map(|head| client.body("GET", &head)).ok()?;
            let is_right = answer.body == content.bytes();
            wrong += usize::from(answer.end == End::Complete && !is_right);
            (answer.status == 200 && is_right).then_some(())
        });
    }
    assert_eq!((wrong, up.total()), (0, artifacts.len() + planted.len()));
    service.wait_metric(CORRUPT, planted.len() as f64);
    let quiet = planted.iter().filter(|(_, rot)| matches!(rot, Rot::Flip | Rot::Swap)).count();
    service.wait_metric(HEALED, quiet as f64);
    figures("verified reads", planted.len(), service.metric(CORRUPT), wrong, planted.len() as f64);
}

#[test]
fn a_pipe_or_socket_in_a_blobs_place_heals_and_hangs_nobody() {
    let up = Upstream::start();
    let service = Service::new().start();
    let content = Content::new(70_900, 50_000);
    let url = up.serve("/x", Reply::ok(&content));
    service.fetch(&url).assert_ok(&content.bytes());
    let blob = service.blob(&content.sha256());
    for round in 0..2 {
        match round {
            0 => plant(Rot::Pipe, &blob, Path::new("")),
            _ => {
                fs::remove_file(&blob).unwrap();
                // A socket's path must be short.
                let here = service.service().dir().join("socket");
                drop(std::os::unix::net::UnixListener::bind(&here).unwrap());
                fs::rename(here, &blob).unwrap();
            }
        }
        assert_eq!(service.fetch(&url).assert_ok(&content.bytes()).cache_status(), "MISS");
        assert_eq!(service.fetch(&url).assert_ok(&content.bytes()).cache_status(), "HIT");
    }
    assert_eq!((service.metric(CORRUPT), quarantined(&service)), (2.0, 2));
}

#[test]
fn another_content_never_takes_a_lost_ones_place() {
    let up = Upstream::start();
    let service = Service::new().start();
    let content = Content::new(71_000, 50_000);
    let gone = up.serve("/gone", Reply::ok(&content));
    let changed = up.serve("/changed", Reply::ok(&content));
    for url in [&gone, &changed] {
        service.fetch(url).assert_ok(&content.bytes());
    }
    up.serve("/gone", Reply::new(404, Content::of(b"")));
    up.serve("/changed", Reply::ok(&Content::new(71_001, 50_000)));
    plant(Rot::Flip, &service.blob(&content.sha256()), Path::new(""));
    a_month_later(&service);
    service.wait_log("that it is lost", |line| {
        line["level"] == "ERROR"
            && line["msg"].as_str().is_some_and(|msg| msg.starts_with("lost file can't be fetched again"))
    });
    assert_eq!((up.count("/gone"), up.count("/changed")), (2, 2), "every URL was asked");
    assert_eq!(service.metric(MISSING), 1.0);
    assert_eq!((service.metric(CORRUPT), service.metric(HEALED)), (1.0, 0.0));
    let named = format!("SELECT count(*) FROM artifacts WHERE content_hash = '{}'", content.sha256());
    assert_eq!(service.count_rows(&named), 2, "both URLs still have what was recorded");
    assert_eq!(service.count_rows("SELECT count(*) FROM versions"), 2, "and nothing else");
    assert_eq!((service.blobs_on_disk(), quarantined(&service)), (0, 1));
    service.fetch_sha(&gone, &content.sha256()).assert_error(502, "upstream_error");
    assert_eq!(service.metric(CORRUPT), 1.0, "known to be missing, it is not found again");
    // An operator puts it back, from a backup.
    fs::write(service.blob(&content.sha256()), content.bytes()).unwrap();
    assert_eq!(service.fetch(&gone).assert_ok(&content.bytes()).cache_status(), "HIT");
    service.sqlite().execute("UPDATE blobs SET verified_at = datetime(verified_at, '-2 days')", []).unwrap();
    service.wait_metric(MISSING, 0.0);
    assert_eq!(service.stats()["unique_blobs"], 1);
}

#[test]
fn a_scrub_goes_on_where_it_was_stopped() {
    let up = Upstream::start();
    // A rate at which it takes minutes.
    let mut service = Service::new().env("JOBS__SCRUB_MAX_BYTES_PER_SECOND", "300KiB").start();
    let artifacts = artifacts(&up, 64);
    store(&service, &artifacts);
    a_month_later(&service);
    eventually("some are done", || (service.metric(SCRUBBED) >= 3.0).then_some(()));
    service.term();
    let left = "SELECT count(*) FROM blobs WHERE verified_at < datetime('now', '-1 day')";
    let left = service.count_rows(left);
    assert!((1..=61).contains(&left), "it was stopped in between: {left} left");
    let again = service.again().env("JOBS__SCRUB_MAX_BYTES_PER_SECOND", "1GiB").start();
    again.wait_metric(SCRUBBED, left as f64);
}

#[test]
fn without_a_period_nothing_is_read_unless_it_is_asked_for() {
    let up = Upstream::start();
    let service = Service::new().env("JOBS__SCRUB_PERIOD_DAYS", "0").start();
    let artifacts = artifacts(&up, 3);
    store(&service, &artifacts);
    a_month_later(&service);
    let asked =
        format!("UPDATE blobs SET verified_at = NULL WHERE content_hash = '{}'", artifacts[1].1.sha256());
    service.sqlite().execute(&asked, []).unwrap();
    let noted = "SELECT count(*) FROM blobs WHERE verified_at > datetime('now', '-1 day')";
    eventually("it is read", || (service.count_rows(noted) == 1).then_some(()));
    assert_eq!(service.metric(SCRUBBED), 1.0);
}

#[test]
fn what_an_operator_removed_with_its_row_is_no_rot() {
    let up = Upstream::start();
    let service = Service::new().start();
    let artifacts = artifacts(&up, 2);
    store(&service, &artifacts);
    service.sqlite().execute("DELETE FROM artifacts WHERE source_url = ?1", [&artifacts[0].0]).unwrap();
    fs::remove_file(service.blob(&artifacts[0].1.sha256())).unwrap();
    a_month_later(&service);
    service.wait_metric(SCRUBBED, 2.0);
    eventually("it is noted", || (service.stats()["unique_blobs"] == 1).then_some(()));
    assert_eq!((service.metric(CORRUPT), service.metric(MISSING)), (0.0, 0.0));
    let (code, report) = crate::verify::verify(&service, &[]);
    assert_eq!((code, &report["lost_versions"]), (0, &1.into()), "{report}");
}

#[test]
fn an_unmounted_disk_is_no_rot() {
    let up = Upstream::start();
    let service = Service::new().env("JOBS__SCRUB_MAX_BYTES_PER_SECOND", "1GiB").start();
    let artifacts = artifacts(&up, 80);
    store(&service, &artifacts);
    let aside = service.service().dir().join("unmounted");
    fs::create_dir(&aside).unwrap();
    for entry in fs::read_dir(service.service().base_path()).unwrap().flatten() {
        if entry.file_name().len() == 2 {
            fs::rename(entry.path(), aside.join(entry.file_name())).unwrap();
        }
    }
    a_month_later(&service);
    service.wait_log("the pause", |line| {
        line["msg"].as_str().is_some_and(|msg| msg.contains("is the disk of storage.base_path all there?"))
    });
    assert_eq!(service.metric(CORRUPT), 32.0, "it stops before it has fetched everything again");
}

#[test]
fn a_file_where_a_directory_should_be_is_set_aside() {
    let up = Upstream::start();
    let service = Service::new().start();
    let content = Content::new(72_000, 5_000);
    let (url, sha256) = (up.serve("/x", Reply::ok(&content)), content.sha256());
    let outer = service.service().base_path().join(&sha256[..2]);
    let inner = outer.join(&sha256[2..4]);
    // Of what was never stored, and of what is stored already; a link to nowhere is no directory either.
    for (round, place) in [&outer, &inner, &outer, &inner].into_iter().enumerate() {
        let _ = fs::remove_dir_all(place);
        if place == &inner {
            fs::create_dir_all(&outer).unwrap();
        }
        if round < 2 {
            fs::write(place, "a note").unwrap()
        } else {
            symlink("nowhere", place).unwrap()
        }
        let answer = service.fetch(&url);
        assert_eq!(answer.assert_ok(&content.bytes()).cache_status(), "MISS", "round {round}");
        assert_eq!(service.fetch(&url).assert_ok(&content.bytes()).cache_status(), "HIT");
        assert_eq!(quarantined(&service), round + 1);
    }
    // A directory in the place of a blob that nobody knows.
    let new = Content::new(72_001, 5_000);
    fs::create_dir_all(service.blob(&new.sha256())).unwrap();
    service.fetch(&up.serve("/new", Reply::ok(&new))).assert_ok(&new.bytes());
    assert_eq!(quarantined(&service), 5);
}

#[test]
fn verified_reading_breaks_off_before_the_end_and_heals() {
    let up = Upstream::start();
    let service = Service::new().env("STORAGE__VERIFY_ON_READ", "true").start();
    for (n, size) in [1, 3_000, 70_000, 2_000_000].into_iter().enumerate() {
        let content = Content::new(73_000 + n as u64, size);
        let url = up.serve(&format!("/v{n}"), Reply::ok(&content));
        service.fetch(&url).assert_ok(&content.bytes());
        assert_eq!(service.fetch(&url).assert_ok(&content.bytes()).cache_status(), "HIT");
        plant(Rot::Flip, &service.blob(&content.sha256()), Path::new(""));
        let mut client = service.connect();
        client.request("GET", &fetch_target(&url), &[]);
        // Of what is no longer than the tail not even a head need come.
        if let Ok(head) = client.try_head() {
            let answer = client.body("GET", &head);
            assert_eq!((answer.status, answer.end), (200, End::Reset), "{size} bytes");
            assert!(answer.body.len() as u64 <= size.saturating_sub(65_536), "the tail is held back");
        }
        eventually("it is healed", || (service.metric(HEALED) == n as f64 + 1.0).then_some(()));
        assert_eq!(service.fetch(&url).assert_ok(&content.bytes()).cache_status(), "HIT");
        assert_eq!((service.metric(CORRUPT), quarantined(&service)), (n as f64 + 1.0, n + 1));
    }
    service.wait_metric("artifact_cache_errors_total{code=\"internal_error\"}", 4.0);
}

#[test]
fn what_is_put_back_while_it_is_fetched_again_is_not_known_as_missing() {
    let up = Upstream::start();
    let service = Service::new().start();
    let content = Content::new(73_000, 50_000);
    let urls = ["/a", "/b"].map(|path| up.serve(path, Reply::ok(&content)));
    for url in &urls {
        service.fetch(url).assert_ok(&content.bytes());
    }
    let gate = Gate::new();
    for path in ["/a", "/b"] {
        let door = gate.clone();
        up.on(path, move |x| {
            door.wait();
            x.reply(&Reply::new(404, Content::of(b"")))
        });
    }
    let blob = service.blob(&content.sha256());
    plant(Rot::Flip, &blob, Path::new(""));
    a_month_later(&service);
    eventually("a source is asked", || (up.total() == 3).then_some(()));
    fs::write(&blob, content.bytes()).unwrap();
    gate.open();
    service.wait_metric(HEALED, 1.0);
    service.wait_metric(MISSING, 0.0);
}

#[test]
fn what_is_put_back_before_it_is_fetched_again_is_not_noted_as_missing() {
    let up = Upstream::start();
    let service = Service::new().env("UPSTREAM__MAX_DOWNLOADS", "1").start();
    let content = Content::new(73_100, 50_000);
    let url = up.serve("/x", Reply::ok(&content));
    service.fetch(&url).assert_ok(&content.bytes());
    let blob = service.blob(&content.sha256());
    fs::remove_file(&blob).unwrap();
    // Takes the only place, so that whoever comes next waits.
    let gate = Gate::new();
    let door = gate.clone();
    let slow = up.on("/slow", move |x| {
        door.wait();
        x.reply(&Reply::new(404, Content::of(b"")))
    });
    up.serve("/x", Reply::new(404, Content::of(b"")));
    let [mut first, mut second] = [service.connect(), service.connect()];
    first.request("GET", &fetch_target(&slow), &[]);
    eventually("the place is taken", || (up.count("/slow") == 1).then_some(()));
    second.request("GET", &fetch_target(&url), &[]);
    service.wait_log("the loss", |line| line["msg"] == "stored file lost, will be fetched again");
    fs::write(&blob, content.bytes()).unwrap();
    gate.open();
    first.response("GET").assert_error(502, "upstream_error");
    second.response("GET");
    assert_eq!(service.fetch(&url).assert_ok(&content.bytes()).cache_status(), "HIT");
    assert_eq!((service.metric(CORRUPT), service.metric(MISSING)), (0.0, 0.0));
}

/// A disk that fails for one file: the file `TRIGGER` says in which call, for which inode, how (an errno, or 0 for wrong
/// bytes), and how often.
const SHIM: &str = r#"
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static int (*real_open)(const char *, int, ...);
static ssize_t (*real_pread)(int, void *, size_t, off64_t);
static int failed;

__attribute__((constructor)) static void find(void) {
    real_open = (int (*)(const char *, int, ...))dlsym(RTLD_NEXT, "open64");
    real_pread = (ssize_t(*)(int, void *, size_t, off64_t))dlsym(RTLD_NEXT, "pread64");
}

/* -1: this call is left alone. */
static int failure(const char *call, const struct stat *file) {
    char text[128] = "", wanted[16];
    unsigned long inode;
    int error, times, fd = real_open(TRIGGER, O_RDONLY);
    if (fd < 0)
        return -1;
    ssize_t length = read(fd, text, sizeof text - 1);
    close(fd);
    if (length <= 0 || sscanf(text, "%15s %lu %d %d", wanted, &inode, &error, &times) != 4)
        return -1;
    if (strcmp(wanted, call) || inode != file->st_ino || failed >= times)
        return -1;
    failed++;
    return error;
}

int open64(const char *path, int flags, ...) {
    va_list more;
    va_start(more, flags);
    int mode = flags & O_CREAT ? va_arg(more, int) : 0, error;
    va_end(more);
    struct stat file;
    if (!stat(path, &file) && (error = failure("open", &file)) > 0) {
        errno = error;
        return -1;
    }
    return real_open(path, flags, mode);
}

ssize_t pread64(int fd, void *buffer, size_t size, off64_t offset) {
    struct stat file;
    int error = fstat(fd, &file) ? -1 : failure("read", &file);
    if (error > 0) {
        errno = error;
        return -1;
    }
    ssize_t length = real_pread(fd, buffer, size, offset);
    if (error == 0 && length > 0)
        ((char *)buffer)[0] ^= 1;
    return length;
}
"#;

const EIO: i32 = 5;
const ENOMEM: i32 = 12;
const EACCES: i32 = 13;
const ALWAYS: usize = 1_000_000;

/// A service whose disk can be made to fail.
struct IllDisk {
    service: Running,
    trigger: PathBuf,
    _dir: tempfile::TempDir,
}

impl IllDisk {
    /// `None` without a compiler: the test called `name` is skipped then.
    fn start(name: &str) -> Option<IllDisk> {
        let dir = tempfile::tempdir().unwrap();
        let trigger = dir.path().join("fail");
        let shim = build_shim(dir.path(), SHIM, &trigger, &format!("rot::{name}"))?;
        let service = Service::new().preload(&shim).start();
        Some(IllDisk { service, trigger, _dir: dir })
    }

    /// From now on so many calls fail for the file that is at `blob`.
    fn fail(&self, call: &str, blob: &Path, errno: i32, times: usize) {
        let new = self.trigger.with_extension("new");
        fs::write(&new, format!("{call} {} {errno} {times}", fs::metadata(blob).unwrap().ino())).unwrap();
        fs::rename(new, &self.trigger).unwrap();
    }
}

/// Makes this blob the first that is due, and all others due after it.
fn due_first(service: &Running, content: &Content) {
    let sql = format!(
        "UPDATE blobs SET verified_at = datetime(verified_at, '-31 days', iif(content_hash = '{}', '-1 day', '0 days'))",
        content.sha256()
    );
    service.sqlite().execute(&sql, []).unwrap();
}

const NOTED: &str = "SELECT count(*) FROM blobs WHERE verified_at > datetime('now', '-1 day')";

#[test]
fn one_file_that_can_not_be_opened_or_read_hides_no_other_and_is_no_rot() {
    for (call, errno) in [("open", EACCES), ("read", ENOMEM)] {
        let name = "one_file_that_can_not_be_opened_or_read_hides_no_other_and_is_no_rot";
        let Some(ill) = IllDisk::start(name) else { return };
        let (up, service) = (Upstream::start(), &ill.service);
        let artifacts = artifacts(&up, 4);
        store(service, &artifacts);
        ill.fail(call, &service.blob(&artifacts[0].1.sha256()), errno, ALWAYS);
        due_first(service, &artifacts[0].1);
        eventually("the others are read", || (service.count_rows(NOTED) == 3).then_some(()));
        let line =
            service.wait_log("it is said", |line| line["msg"] == "a stored file could not be looked at");
        assert_eq!(line["sha256"], artifacts[0].1.sha256());
        assert_eq!((service.metric(CORRUPT), quarantined(service), up.total()), (0.0, 0, 4));
        let (code, report) = crate::verify::verify(service, &[]);
        assert_eq!((code, &report["whole"]), (3, &3.into()), "{report}");
        assert_eq!(report["damaged"].as_array().unwrap().len(), 1, "{report}");
    }
}

#[test]
fn a_file_that_the_disk_has_lost_is_set_aside_and_fetched_again() {
    for call in ["open", "read"] {
        let name = "a_file_that_the_disk_has_lost_is_set_aside_and_fetched_again";
        let Some(ill) = IllDisk::start(name) else { return };
        let (up, service) = (Upstream::start(), &ill.service);
        let artifacts = artifacts(&up, 4);
        store(service, &artifacts);
        ill.fail(call, &service.blob(&artifacts[0].1.sha256()), EIO, ALWAYS);
        due_first(service, &artifacts[0].1);
        service.wait_metric(HEALED, 1.0);
        eventually("all are whole", || (service.count_rows(NOTED) == 4).then_some(()));
        assert_eq!((service.metric(CORRUPT), service.metric(MISSING), quarantined(service)), (1.0, 0.0, 1));
    }
}

#[test]
fn a_request_for_a_file_that_the_disk_has_lost_heals_it() {
    let Some(ill) = IllDisk::start("a_request_for_a_file_that_the_disk_has_lost_heals_it") else { return };
    let (up, content) = (Upstream::start(), Content::new(73_200, 50_000));
    let url = up.serve("/x", Reply::ok(&content));
    let mut service = ill.service;
    service.fetch(&url).assert_ok(&content.bytes());
    // What is open is not opened again.
    service.term();
    let blob = service.blob(&content.sha256());
    fs::write(&ill.trigger, format!("open {} {EIO} {ALWAYS}", fs::metadata(blob).unwrap().ino())).unwrap();
    let service = service.again().start();
    assert_eq!(service.fetch(&url).assert_ok(&content.bytes()).cache_status(), "MISS");
    assert_eq!(service.fetch(&url).assert_ok(&content.bytes()).cache_status(), "HIT");
    assert_eq!(quarantined(&service), 1);
}

#[test]
fn what_is_read_wrongly_once_is_read_again_before_it_counts_as_lost() {
    let name = "what_is_read_wrongly_once_is_read_again_before_it_counts_as_lost";
    let Some(ill) = IllDisk::start(name) else { return };
    let (up, service) = (Upstream::start(), &ill.service);
    let artifacts = artifacts(&up, 2);
    store(service, &artifacts);
    ill.fail("read", &service.blob(&artifacts[0].1.sha256()), 0, 1);
    a_month_later(service);
    eventually("all are whole", || (service.count_rows(NOTED) == 2).then_some(()));
    assert_eq!((service.metric(CORRUPT), quarantined(service), up.total()), (0.0, 0, 2));
}
