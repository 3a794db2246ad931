//! Power cuts: a file system of its own on a loop device is shut down without flushing its log, so that whatever was
//! not synced is lost, as far as the file system is concerned; then the process is killed and the file system is
//! mounted again, which replays the log as after a real cut.
//!
//! The flag matters: `NOLOGFLUSH` loses what is unsynced, while the default (0) freezes, and so syncs, everything
//! first. XFS and ext4 share the request's number. What this does not try is a disk that lies about its own cache.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::audit::Audit;
use crate::harness::{Content, Reply, Running, Service, Upstream, eventually, fetch_target, skip};
use crate::shim::{Action, Call, Shim, Which};
use crate::workload::{Acknowledged, CLIENTS, Load, upstream};
use crate::{beside_others, report, rounds};

/// `_IOR('X', 125, __u32)`.
const SHUTDOWN: libc::c_ulong = 0x8004_587d;
const NOLOGFLUSH: u32 = 2;
/// Cuts on one file system before it is made anew, so that it doesn't fill up.
const CUTS_A_DISK: u64 = 10;
/// Cuts while one large file is fetched.
const CUTS_A_DOWNLOAD: usize = 3;

/// A file system in an image file, mounted on a loop device.
struct Disk {
    image: PathBuf,
    mount: PathBuf,
    _dir: tempfile::TempDir,
}

impl Disk {
    /// Makes and mounts one, or says why that can't be done here.
    fn make(kind: &str) -> Result<Disk, String> {
        if !rustix::process::geteuid().is_root() {
            return Err("needs root, for mount".to_owned());
        }
        let dir = tempfile::tempdir().unwrap();
        let (image, mount) = (dir.path().join("image"), dir.path().join("disk"));
        std::fs::create_dir(&mount).unwrap();
        // The least that mkfs.xfs accepts; the file is sparse.
        File::create(&image).unwrap().set_len(320 << 20).unwrap();
        let force = if kind == "xfs" { "-f" } else { "-F" };
        run(Command::new(format!("mkfs.{kind}")).args(["-q", force]).arg(&image))?;
        let disk = Disk { image, mount, _dir: dir };
        disk.mount()?;
        Ok(disk)
    }

    fn mount(&self) -> Result<(), String> {
        run(Command::new("mount").args(["-o", "loop"]).arg(&self.image).arg(&self.mount))
    }

    /// From now on nothing reaches the disk, and what was not synced never will.
    fn cut(&self) {
        let root = File::open(&self.mount).unwrap();
        // SAFETY: the request reads one u32, which lives until it returns.
        let done = unsafe { libc::ioctl(root.as_raw_fd(), SHUTDOWN, &NOLOGFLUSH) };
        assert_eq!(done, 0, "shutdown: {}", std::io::Error::last_os_error());
    }

    /// Power is back.
    fn revive(&self) {
        run(Command::new("umount").arg(&self.mount)).unwrap();
        self.mount().unwrap();
    }

    /// A service whose data is on this disk, in directories that are not there yet.
    fn service(&self) -> Service {
        let at = |path: &str| self.mount.join(path).display().to_string();
        Service::new()
            .env("STORAGE__BASE_PATH", &at("store/cache"))
            .env("STORAGE__DATABASE", &at("database/metadata.db"))
            .env("FETCH__STREAM_AFTER_SECONDS", "0")
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Lazily, because a test that fails may have left a process there.
        let _ = run(Command::new("umount").arg("--lazy").arg(&self.mount));
    }
}

fn run(command: &mut Command) -> Result<(), String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(|error| format!("{program}: {error}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    if output.status.success() { Ok(()) } else { Err(format!("{program}: {}", said.trim())) }
}

/// One service on one disk, cut again and again.
struct Cutting {
    /// Before the disk, so that it ends while that is still there.
    service: Option<Running>,
    disk: Disk,
    acknowledged: Acknowledged,
    next: AtomicU64,
    orphans: usize,
    /// Answers that came after the power was gone, and how many of them were lost.
    late: (usize, usize),
}

impl Cutting {
    /// `dress` may put something between the service and its disk.
    fn start(disk: Disk, dress: impl FnOnce(Service, &Path) -> Service) -> Cutting {
        let service = Some(dress(disk.service(), &disk.mount).start());
        let (acknowledged, next) = (Acknowledged::default(), AtomicU64::new(0));
        Cutting { disk, service, acknowledged, next, orphans: 0, late: (0, 0) }
    }

    /// Cuts the power `moment` after a load has begun, and audits what is there when it is back.
    fn cut(&mut self, moment: Duration) -> Result<Audit, String> {
        let up = upstream();
        let mut service = self.service.take().expect("it runs between two cuts");
        let load = Load { up: &up, next: &self.next, acknowledged: &self.acknowledged };
        load.run(&mut service, |service| {
            std::thread::sleep(moment);
            // A process that has lost its power answers nobody any more; this one does, for a moment, and a sync that
            // is under way when the file system shuts down may be told that it was done.
            self.acknowledged.suspend(true);
            self.disk.cut();
            service.kill();
        });
        self.acknowledged.suspend(false);
        self.disk.revive();
        // It may be in no state to start, after cuts with a seeded bug; the audit of that is its refusal.
        let service = service.again().try_start().map_err(|(_, stderr)| stderr)?;
        let audit = Audit::of(&service, &self.acknowledged);
        for (url, _) in self.acknowledged.take_late() {
            let known =
                service.count_rows(&format!("SELECT count(*) FROM artifacts WHERE source_url = '{url}'"));
            self.late = (self.late.0 + 1, self.late.1 + usize::from(known == 0));
        }
        self.service = Some(service);
        Ok(audit)
    }
}

fn moment() -> Duration {
    Duration::from_millis(fastrand::u64(30..250))
}

fn cuts(kind: &str, name: &str) {
    let _turn = beside_others();
    let wanted = rounds("ARTIFACT_CACHE_TEST_CUTS", 10);
    let (mut done, mut kept, mut orphans, mut late) = (0, 0, 0, (0, 0));
    while done < wanted {
        let disk = match Disk::make(kind) {
            Ok(disk) => disk,
            Err(why) => return skip(name, &why),
        };
        let mut cutting = Cutting::start(disk, |service, _| service);
        for _ in 0..CUTS_A_DISK.min(wanted - done) {
            let moment = moment();
            let audit = cutting.cut(moment).expect("it starts after a power cut");
            let what = format!("{kind}: cut {done} after {moment:?}");
            audit.assert_clean(&what, cutting.orphans + CLIENTS as usize);
            orphans += audit.orphans.saturating_sub(cutting.orphans);
            cutting.orphans = audit.orphans;
            done += 1;
        }
        kept += cutting.acknowledged.count();
        late = (late.0 + cutting.late.0, late.1 + cutting.late.1);
    }
    assert!(kept > 0, "the cuts came too early to show anything");
    report(format_args!(
        "{kind}: {done} power cuts: {kept} acknowledged, 0 lost, {orphans} orphans; of {} answers after a cut {} lost",
        late.0, late.1
    ));
}

#[test]
fn nothing_acknowledged_is_lost_by_power_cuts_on_ext4() {
    cuts("ext4", "power::nothing_acknowledged_is_lost_by_power_cuts_on_ext4");
}

#[test]
fn nothing_acknowledged_is_lost_by_power_cuts_on_xfs() {
    cuts("xfs", "power::nothing_acknowledged_is_lost_by_power_cuts_on_xfs");
}

/// Cuts in the middle of one download, which goes on from a checkpoint, or begins anew; says how many did the former.
fn cut_download(disk: &Disk, kind: &str) -> usize {
    const SIZE: u64 = 48 << 20;
    const PIECE: u64 = 1 << 20;
    let (up, content) = (Upstream::start(), Content::new(700, SIZE));
    let reply = Reply::ok(&content).field("ETag", "\"one\"");
    let (url, sent) = up.serve_in_pieces("/large", reply.clone(), PIECE);
    let service = disk.service().env("STORAGE__CHECKPOINT_BYTES", "1MiB");
    let mut service = service.env("FETCH__STREAM_AFTER_SECONDS", "600").start();
    let mut went_on = 0;
    for cut in 0..CUTS_A_DOWNLOAD {
        let (before, asked) = (sent.load(Ordering::SeqCst), up.count("/large"));
        let mut client = service.connect();
        client.request("GET", &fetch_target(&url), &[]);
        // Some checkpoints later, at no step in particular.
        let wanted = before + 2 * PIECE + fastrand::u64(0..PIECE);
        eventually("the download comes on", || (sent.load(Ordering::SeqCst) >= wanted).then_some(()));
        std::thread::sleep(Duration::from_millis(fastrand::u64(0..30)));
        disk.cut();
        service.kill();
        // The process outlives its disk for a moment, and may say so with a 500.
        let told = client.try_head().is_ok_and(|head| head.status() == 200);
        assert!(!told, "{kind}: nobody was told that it is whole");
        disk.revive();
        service = service.again().start();
        went_on += usize::from(cut > 0 && up.requests("/large")[asked].get("Range").is_some());
        let (rows, blobs) = (service.count_rows("SELECT count(*) FROM artifacts"), service.blobs_on_disk());
        assert_eq!((rows, blobs), (0, 0), "{kind}: cut {cut}: nothing of a part is visible");
    }
    // The line is well again, which saves time.
    let asked = up.count("/large");
    up.serve("/large", reply);
    let answer = service.fetch(&url);
    assert_eq!(answer.assert_ok(&content.bytes()).cache_status(), "MISS");
    assert_eq!(answer.header("X-Content-SHA256"), content.sha256());
    went_on += usize::from(up.requests("/large")[asked].get("Range").is_some());
    assert_eq!(service.fetch(&url).assert_ok(&content.bytes()).cache_status(), "HIT");
    Audit::of(&service, &Acknowledged::default()).assert_clean(kind, 0);
    went_on
}

fn cuts_in_a_download(kind: &str, name: &str) {
    let _turn = beside_others();
    let disk = match Disk::make(kind) {
        Ok(disk) => disk,
        Err(why) => return skip(name, &why),
    };
    let went_on = cut_download(&disk, kind);
    assert!(went_on > 0, "{kind}: no checkpoint has survived any cut");
    report(format_args!(
        "{kind}: {CUTS_A_DOWNLOAD} power cuts in one download: it went on from a checkpoint {went_on} times, and was right"
    ));
}

#[test]
fn a_download_gets_through_power_cuts_on_ext4() {
    cuts_in_a_download("ext4", "power::a_download_gets_through_power_cuts_on_ext4");
}

#[test]
fn a_download_gets_through_power_cuts_on_xfs() {
    cuts_in_a_download("xfs", "power::a_download_gets_through_power_cuts_on_xfs");
}

/// Proves that these cuts can lose something, and that the audit sees it: with a sync that does nothing they do.
#[test]
fn a_sync_that_lies_is_found_out() {
    let name = "power::a_sync_that_lies_is_found_out";
    let _turn = beside_others();
    let Some(shim) = Shim::build(name) else { return };
    for kind in ["ext4", "xfs"] {
        let disk = match Disk::make(kind) {
            Ok(disk) => disk,
            Err(why) => return skip(name, &why),
        };
        let mut cutting = Cutting::start(disk, |service, root| shim.below(service, root));
        shim.aim(Call::Fsync, Which::From(1), Action::Lie);
        let found = (0..5).find_map(|_| match cutting.cut(moment()) {
            Ok(audit) => audit.violations.first().cloned(),
            Err(refusal) => Some(refusal),
        });
        assert!(shim.injected() > 0, "{kind}: nothing was synced at all");
        let found = found.unwrap_or_else(|| panic!("{kind}: 5 cuts without a sync have lost nothing"));
        report(format_args!("{kind}: a sync that lies is found out: {}", found.trim()));
        shim.rest();
    }
}
