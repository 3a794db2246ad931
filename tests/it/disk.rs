//! The disk below the store: full, promised away, read-only, or not the one it should be. Small file systems of the
//! tests' own, so they need root.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::harness::{Content, Gate, Reply, Running, Service, Upstream, eventually, fetch_target, skip};

const MIB: u64 = 1 << 20;

/// A mounted file system; unmounted when dropped.
struct Mount {
    at: PathBuf,
    _dir: tempfile::TempDir,
}

impl Mount {
    /// A tmpfs with these options; without the right to mount, the test called `name` is skipped.
    fn tmpfs(name: &str, options: &str) -> Option<Mount> {
        Mount::new(name, |at| Ok(mount(&["-t", "tmpfs", "-o", options, "tmpfs"], at)))
    }

    /// An ext4 of 64 MiB in a file, which becomes read-only at its first error.
    fn ext4(name: &str) -> Option<Mount> {
        Mount::new(name, |at| {
            let image = at.with_extension("img");
            File::create(&image).unwrap().set_len(64 * MIB).unwrap();
            run(Command::new("mkfs.ext4").arg("-q").arg(&image))?;
            Ok(mount(&["-o", "loop,errors=remount-ro", image.to_str().unwrap()], at))
        })
    }

    fn new(name: &str, make: impl FnOnce(&Path) -> Result<Command, String>) -> Option<Mount> {
        if !rustix::process::geteuid().is_root() {
            skip(name, "needs root");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().join("mount");
        fs::create_dir(&at).unwrap();
        match make(&at).and_then(|mut mount| run(&mut mount)) {
            Ok(()) => Some(Mount { at, _dir: dir }),
            Err(why) => {
                skip(name, &why);
                None
            }
        }
    }

    /// A service whose store is here, and whose database is not.
    fn service(&self) -> Service {
        Service::new()
            .env("STORAGE__BASE_PATH", &self.at.join("cache").display().to_string())
            .env("STORAGE__CHECKPOINT_BYTES", "1MiB")
            .env("UPSTREAM__MAX_RETRIES", "0")
    }

    /// Fills it to the last byte; removing the file that is returned makes it as it was.
    fn fill(&self) -> PathBuf {
        let path = self.at.join("ballast");
        let mut ballast = File::create(&path).unwrap();
        while ballast.write_all(&[0; 64 << 10]).is_ok() {}
        while ballast.write_all(&[0; 512]).is_ok() {}
        path
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // Lazily: after a failed test the service may still be there.
        let _ = run(Command::new("umount").arg("-l").arg(&self.at));
    }
}

fn mount(options: &[&str], at: &Path) -> Command {
    let mut command = Command::new("mount");
    command.args(options).arg(at);
    command
}

fn run(command: &mut Command) -> Result<(), String> {
    match command.output() {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(format!("{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim())),
        Err(e) => Err(format!("{command:?}: {e}")),
    }
}

/// A body whose length nobody announces.
fn serve_chunked(up: &Upstream, path: &str, content: &Content) -> String {
    let content = content.clone();
    up.on(path, move |x| {
        x.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")?;
        content.each(0, content.len(), |bytes| x.chunk(bytes))?;
        x.send("0\r\n\r\n")
    })
}

/// The fetch fails for want of room, and leaves nothing.
#[track_caller]
fn assert_disk_full(service: &Running, url: &str) {
    assert_eq!(service.fetch(url).assert_error(500, "internal_error")["details"], "disk full");
    assert!(service.spooled().is_empty(), "{:?}", service.spooled());
}

#[track_caller]
fn assert_hit(service: &Running, url: &str, content: &Content) {
    assert_eq!(service.fetch(url).assert_ok(&content.bytes()).cache_status(), "HIT");
}

/// Waits until `/health` has this status (its verdict stands for 5 s) and returns its checks.
#[track_caller]
fn wait_health(service: &Running, status: &str) -> Value {
    eventually(&format!("health is {status}"), || {
        let health = service.get("/health").json();
        (health["status"] == status).then(|| health["checks"].clone())
    })
}

#[test]
fn a_full_disk_refuses_misses_serves_hits_and_recovers() {
    let name = "disk::a_full_disk_refuses_misses_serves_hits_and_recovers";
    let Some(disk) = Mount::tmpfs(name, "size=24m") else { return };
    let (up, known, fresh) = (Upstream::start(), Content::new(600, 100_000), Content::new(601, 2 * MIB));
    let mut service = disk.service().start();
    let [known_url, fresh_url] =
        [("/known", &known), ("/fresh", &fresh)].map(|(p, c)| up.serve(p, Reply::ok(c)));
    service.fetch(&known_url).assert_ok(&known.bytes());
    let ballast = disk.fill();
    assert_disk_full(&service, &fresh_url);
    assert_eq!(up.count("/fresh"), 0, "nobody is asked for what can't be kept");
    assert_hit(&service, &known_url, &known);
    assert_ne!(wait_health(&service, "degraded")["disk"], "ok");
    // It also starts like this, because hits can be served.
    service.term();
    let service = service.again().start();
    assert_hit(&service, &known_url, &known);
    assert_disk_full(&service, &fresh_url);
    fs::remove_file(ballast).unwrap();
    service.fetch(&fresh_url).assert_ok(&fresh.bytes());
    assert_hit(&service, &fresh_url, &fresh);
    wait_health(&service, "healthy");
}

#[test]
fn a_disk_that_fills_in_mid_download_ends_it() {
    let name = "disk::a_disk_that_fills_in_mid_download_ends_it";
    let Some(disk) = Mount::tmpfs(name, "size=16m") else { return };
    let (up, known, small) = (Upstream::start(), Content::new(602, 100_000), Content::new(603, MIB));
    // Nothing is kept free: it is the file system that refuses, and then our own rule.
    for min_free in ["0", "2MiB"] {
        let service = disk.service().env("STORAGE__MIN_FREE_BYTES", min_free).start();
        let known_url = up.serve("/known", Reply::ok(&known));
        service.fetch(&known_url).assert_ok(&known.bytes());
        let url = serve_chunked(&up, "/endless", &Content::new(604, 32 * MIB));
        assert_disk_full(&service, &url);
        let announced = up.serve("/announced", Reply::ok(&Content::new(605, 32 * MIB)));
        assert_disk_full(&service, &announced);
        assert_hit(&service, &known_url, &known);
        assert_eq!(service.blobs_on_disk(), 1);
        // Its room is free again.
        let url = serve_chunked(&up, &format!("/small-{min_free}"), &small);
        service.fetch(&url).assert_ok(&small.bytes());
        wait_health(&service, "healthy");
        drop(service);
        fs::remove_dir_all(disk.at.join("cache")).unwrap();
    }
}

#[test]
fn no_room_for_a_directory_is_a_full_disk() {
    let name = "disk::no_room_for_a_directory_is_a_full_disk";
    let Some(disk) = Mount::tmpfs(name, "size=16m,nr_inodes=200") else { return };
    let (up, known, fresh) = (Upstream::start(), Content::new(606, 100_000), Content::new(607, 100_000));
    let service = disk.service().start();
    let [known_url, fresh_url] =
        [("/known", &known), ("/fresh", &fresh)].map(|(p, c)| up.serve(p, Reply::ok(c)));
    service.fetch(&known_url).assert_ok(&known.bytes());
    let ballast = disk.at.join("ballast");
    fs::create_dir(&ballast).unwrap();
    let mut files = 0;
    while File::create(ballast.join(files.to_string())).is_ok() {
        files += 1;
    }
    assert!(files > 1);
    // One for the spool, none for its directories.
    fs::remove_file(ballast.join("0")).unwrap();
    assert_disk_full(&service, &fresh_url);
    assert_eq!(up.count("/fresh"), 1, "it failed at the very end");
    assert_hit(&service, &known_url, &known);
    assert_ne!(wait_health(&service, "degraded")["disk"], "ok");
    assert_eq!(service.stats()["total_items"], 1);
    fs::remove_dir_all(ballast).unwrap();
    // Without anybody having to ask for something new.
    wait_health(&service, "healthy");
    service.fetch(&fresh_url).assert_ok(&fresh.bytes());
    assert_hit(&service, &fresh_url, &fresh);
}

#[test]
fn no_room_for_the_database_is_a_full_disk() {
    let name = "disk::no_room_for_the_database_is_a_full_disk";
    let Some(disk) = Mount::tmpfs(name, "size=4m") else { return };
    let (up, known) = (Upstream::start(), Content::new(608, 100_000));
    let database = disk.at.join("metadata.db").display().to_string();
    let service = Service::new().env("STORAGE__DATABASE", &database).start();
    let known_url = up.serve("/known", Reply::ok(&known));
    service.fetch(&known_url).assert_ok(&known.bytes());
    let ballast = disk.fill();
    // The log has some room left of its last use: the first records may still fit.
    let (n, answer) = (0..2_000)
        .map(|n| {
            let long = format!("/{n}/{}", "x".repeat(4_000));
            (n, service.fetch(&up.serve(&long, Reply::ok(&Content::of(b"small")))))
        })
        .find(|(_, answer)| answer.status != 200)
        .expect("it is full in the end");
    assert_eq!(answer.assert_error(500, "internal_error")["details"], "disk full");
    assert!(service.spooled().is_empty());
    assert_eq!(service.count_rows("SELECT count(*) FROM artifacts"), n + 1, "what was answered is recorded");
    assert_hit(&service, &known_url, &known);
    assert_ne!(wait_health(&service, "degraded")["database"], "ok");
    fs::remove_file(ballast).unwrap();
    let url = up.serve("/fresh", Reply::ok(&Content::of(b"fresh")));
    service.fetch(&url).assert_ok(b"fresh");
    wait_health(&service, "healthy");
    let check: String = service.sqlite().query_row("PRAGMA integrity_check", [], |row| row.get(0)).unwrap();
    assert_eq!(check, "ok");
}

#[test]
fn what_was_promised_to_one_download_is_not_given_to_another() {
    let name = "disk::what_was_promised_to_one_download_is_not_given_to_another";
    let Some(disk) = Mount::tmpfs(name, "size=64m") else { return };
    let (up, gate) = (Upstream::start(), Gate::new());
    let service = disk.service().env("STORAGE__MIN_FREE_BYTES", "16MiB").start();
    let (large, door) = (Content::new(609, 40 * MIB), gate.clone());
    let served = large.clone();
    let url = up.on("/large", move |x| {
        x.send(&Reply::ok(&served).head(200, 0))?;
        x.body(&served, 0, MIB)?;
        door.wait();
        x.body(&served, MIB, served.len())
    });
    let mut client = service.connect();
    client.request("GET", &fetch_target(&url), &[]);
    eventually("it has begun", || {
        (service.metric("artifact_cache_bytes_downloaded_total") >= MIB as f64).then_some(())
    });
    // 63 MiB are free; 16 stay so and 39 are promised.
    let (small, middling) = (Content::new(610, 2 * MIB), Content::new(611, 12 * MIB));
    let answer = service.fetch(&up.serve("/announced", Reply::ok(&middling)));
    assert_eq!(answer.assert_error(500, "internal_error")["details"], "disk full");
    let answer = service.fetch(&serve_chunked(&up, "/unannounced", &middling));
    assert_eq!(answer.assert_error(500, "internal_error")["details"], "disk full");
    service.fetch(&up.serve("/small", Reply::ok(&small))).assert_ok(&small.bytes());
    let spools = service.spooled().into_iter().filter(|path| path.extension().is_none());
    assert_eq!(spools.count(), 1, "only the large one is left: {:?}", service.spooled());
    gate.open();
    client.response("GET").assert_ok(&large.bytes());
}

#[test]
fn downloads_that_broke_off_give_way_the_oldest_first() {
    let name = "disk::downloads_that_broke_off_give_way_the_oldest_first";
    let Some(disk) = Mount::tmpfs(name, "size=32m") else { return };
    let (up, content) = (Upstream::start(), Content::new(612, 8 * MIB));
    let service = disk.service().env("STORAGE__MIN_FREE_BYTES", "8MiB").start();
    let urls = ["/old", "/new"].map(|path| {
        let (reply, content) = (Reply::ok(&content).field("ETag", "\"one\""), content.clone());
        let url = up.on(path, move |x| match x.attempt {
            1 => {
                x.send(&reply.head(200, 0))?;
                x.body(&content, 0, 6 * MIB)
            }
            _ => x.reply(&reply),
        });
        service.fetch(&url).assert_error(502, "upstream_error");
        url
    });
    assert_eq!(service.metric("artifact_cache_partial_bytes"), 12.0 * MIB as f64);
    // 20 MiB are free, of which 8 stay so.
    let fits = Content::new(613, 10 * MIB);
    service.fetch(&up.serve("/fits", Reply::ok(&fits))).assert_ok(&fits.bytes());
    assert_eq!(service.metric("artifact_cache_partial_bytes"), 12.0 * MIB as f64, "there was room");
    let needs = Content::new(614, 5 * MIB);
    service.fetch(&serve_chunked(&up, "/needs", &needs)).assert_ok(&needs.bytes());
    assert_eq!(service.metric("artifact_cache_partial_bytes"), 6.0 * MIB as f64, "one has given way");
    wait_health(&service, "healthy");
    let ballast = disk.at.join("ballast");
    fs::write(&ballast, vec![0; 5 * MIB as usize]).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(5_100));
    assert_eq!(service.get("/health").json()["status"], "healthy", "the other can give way too");
    fs::remove_file(ballast).unwrap();
    service.fetch(&urls[1]).assert_ok(&content.bytes());
    let range = up.requests("/new")[1].get("Range").map(str::to_string);
    assert_eq!(range.as_deref(), Some("bytes=6291456-"), "the newer one was kept");
}

#[test]
fn a_read_only_file_system_refuses_misses_and_serves_hits() {
    let name = "disk::a_read_only_file_system_refuses_misses_and_serves_hits";
    let Some(disk) = Mount::ext4(name) else { return };
    let (up, known) = (Upstream::start(), Content::new(615, 100_000));
    let database = disk.at.join("metadata.db").display().to_string();
    let mut service = disk.service().env("STORAGE__DATABASE", &database).start();
    let known_url = up.serve("/known", Reply::ok(&known));
    service.fetch(&known_url).assert_ok(&known.bytes());
    let fresh_url = up.serve("/fresh", Reply::ok(&Content::of(b"fresh")));
    // What the kernel does at an error, while files are open for writing.
    let mut source = Command::new("findmnt");
    let source = source.args(["-no", "SOURCE"]).arg(&disk.at).output().unwrap().stdout;
    let device = String::from_utf8(source).unwrap();
    let trigger = format!("/sys/fs/ext4/{}/trigger_fs_error", device.trim().trim_start_matches("/dev/"));
    if let Err(e) = fs::write(&trigger, "1") {
        return skip(name, &format!("{trigger}: {e}"));
    }
    for _ in 0..2 {
        let details = service.fetch(&fresh_url).assert_error(500, "internal_error")["details"].clone();
        assert_eq!(details, "read-only file system");
        assert_hit(&service, &known_url, &known);
    }
    assert_ne!(wait_health(&service, "degraded")["disk"], "ok");
    assert_eq!(service.get("/health").status, 200, "hits work");
    service.term();
    let (code, stderr) = service.again().refused();
    assert_eq!(code, 1);
    assert!(stderr.contains(disk.at.to_str().unwrap()) && stderr.contains("mount it writable"), "{stderr}");
}

#[test]
fn a_directory_that_takes_no_files_refuses_misses_and_serves_hits() {
    let name = "disk::a_directory_that_takes_no_files_refuses_misses_and_serves_hits";
    let Some(disk) = Mount::ext4(name) else { return };
    let (up, known) = (Upstream::start(), Content::new(616, 100_000));
    let service = disk.service().start();
    let [known_url, fresh_url] =
        [("/known", &known), ("/fresh", &Content::of(b"fresh"))].map(|(p, c)| up.serve(p, Reply::ok(c)));
    service.fetch(&known_url).assert_ok(&known.bytes());
    let spool = disk.at.join("cache/.spool");
    run(Command::new("chattr").arg("+i").arg(&spool)).unwrap();
    wait_health(&service, "degraded");
    let details = service.fetch(&fresh_url).assert_error(500, "internal_error")["details"].clone();
    assert_eq!(details, "permission denied");
    assert_hit(&service, &known_url, &known);
    run(Command::new("chattr").arg("-i").arg(&spool)).unwrap();
    wait_health(&service, "healthy");
    service.fetch(&fresh_url).assert_ok(b"fresh");
}

#[test]
fn a_spool_on_another_file_system_is_refused_by_its_path() {
    let name = "disk::a_spool_on_another_file_system_is_refused_by_its_path";
    let Some(other) = Mount::tmpfs(name, "size=4m") else { return };
    for kind in ["a link", "a mount", "a mount of the same file system"] {
        let service = Service::new();
        let spool = service.base_path().join(".spool");
        fs::create_dir_all(&spool).unwrap();
        let elsewhere = service.dir().join("elsewhere");
        fs::create_dir(&elsewhere).unwrap();
        match kind {
            "a link" => {
                fs::remove_dir(&spool).unwrap();
                std::os::unix::fs::symlink(&other.at, &spool).unwrap();
            }
            "a mount" => run(&mut mount(&["--bind", other.at.to_str().unwrap()], &spool)).unwrap(),
            _ => run(&mut mount(&["--bind", elsewhere.to_str().unwrap()], &spool)).unwrap(),
        }
        let (code, stderr) = service.refused();
        if kind != "a link" {
            run(Command::new("umount").arg(&spool)).unwrap();
        }
        assert_eq!(code, 1, "{kind}: {stderr}");
        let is_named = stderr.contains(spool.to_str().unwrap()) && stderr.contains("another file system");
        assert!(is_named, "{kind}: {stderr}");
        assert!(fs::read_dir(&other.at).unwrap().next().is_none(), "nothing is left there");
    }
}
