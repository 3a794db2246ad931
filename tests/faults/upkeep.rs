//! System calls that fail while the data is backed up and while what was deleted is swept: every N-th of each kind,
//! until none is left to fail. (`calls.rs` does the same to downloads and hits.)

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use libc::{EIO, EMFILE, ENOSPC};

use crate::audit::Audit;
use crate::harness::{Running, Service, Upstream, eventually};
use crate::shim::{Action, Call, Shim, Which};
use crate::workload::{Acknowledged, content, fetch, upstream, url};
use crate::{beside_others, report};

/// Far more calls of one kind than a backup or a sweep makes, so that one which never ends is noticed.
const MOST: i64 = 1_000;

/// The calls, and what each fails with.
const CALLS: [(Call, i32); 7] = [
    (Call::Fsync, EIO),
    (Call::Rename, EIO),
    (Call::Openat, EMFILE),
    (Call::Mkdir, ENOSPC),
    (Call::Pwrite64, ENOSPC),
    (Call::Write, EIO),
    (Call::Unlink, EIO),
];

/// Calls `count` twice for each call, with lane 0 and lane 1, all on threads of their own, and tells how often each call
/// was met in which lane.
fn for_each_call(name: &str, count: impl Fn(&Shim, Call, i32, i64) -> i64 + Sync) {
    // Here, so that it is skipped once.
    if Shim::build(name).is_none() {
        return;
    }
    let _turn = beside_others();
    let count = |call, error, lane| count(&Shim::build(name).expect("as it was before"), call, error, lane);
    let count = &count;
    let counts = std::thread::scope(|scope| {
        // Most of the time is waiting for the disk, or for the sweep's turn.
        let threads = CALLS
            .map(|(call, error)| (call, [0, 1].map(|lane| scope.spawn(move || count(call, error, lane)))));
        threads.map(|(call, lanes)| {
            let [one, two] = lanes.map(|lane| lane.join().expect("the sweep of one call"));
            format!("{call:?} {one}+{two}")
        })
    });
    report(format_args!("{name}, 0 violations: {}", counts.join(", ")));
}

/// How many of the `numbers` belong to calls that are made, by a question that says whether the N-th one was met.
fn count_met(mut numbers: impl Iterator<Item = i64>, mut is_met: impl FnMut(i64) -> bool) -> i64 {
    numbers.position(|n| !is_met(n)).expect("it ends") as i64
}

#[track_caller]
fn assert_exits(what: &str, output: &Output, codes: &[i32]) -> i32 {
    let said = String::from_utf8_lossy(&output.stderr);
    let code = output.status.code().unwrap_or_else(|| panic!("{what}: {} {said}", output.status));
    assert!(codes.contains(&code), "{what}: exit code {code}: {said}");
    assert_eq!(code == 1, said.starts_with("error: "), "{what}: exit code {code}: {said}");
    code
}

/// A backup made before the ones that fail.
struct Earlier<'a> {
    dir: &'a Path,
    acknowledged: Acknowledged,
}

/// A store that is backed up while calls fail.
struct Original<'a> {
    shim: &'a Shim,
    call: Call,
    error: i32,
    service: Service,
    acknowledged: Acknowledged,
}

impl Original<'_> {
    /// Backs up with these arguments into `dir`, over an earlier backup or over nothing, until no call is left to fail.
    fn sweep(&self, args: &[&str], dir: &Path, earlier: Option<&Earlier<'_>>) -> i64 {
        let met = count_met(1..MOST, |n| {
            if let Some(earlier) = earlier {
                copy(earlier.dir, dir);
            }
            let is_met = self.back_up(n, args, dir, earlier);
            if !is_met {
                let service = restore("the last one", dir, &self.acknowledged).start();
                Audit::of(&service, &self.acknowledged).assert_clean("the last one", 0);
            }
            fs::remove_dir_all(dir).unwrap();
            is_met
        });
        assert!(met > 0, "{:?} is never made", self.call);
        met
    }

    /// The N-th call fails in a backup with these arguments into `dir`. Says whether it was met at all.
    ///
    /// What the directory then has must be whole, or not there if `earlier` says that nothing was before; and the next
    /// backup is what it should be.
    fn back_up(&self, number: i64, args: &[&str], dir: &Path, earlier: Option<&Earlier<'_>>) -> bool {
        let what = format!("backup {args:?}, {:?} {number}", self.call);
        self.shim.aim(self.call, Which::Only(number), Action::Fail(self.error));
        let failing = self.shim.before(self.service.clone());
        let code = assert_exits(&what, &run(&failing, args, dir), &[0, 1]);
        let is_met = self.shim.injected() > 0;
        self.shim.rest();
        if code == 0 {
            restore(&what, dir, &self.acknowledged);
        } else if let Some(earlier) = earlier {
            assert!(is_met, "{what}: it fails by itself");
            restore(&what, dir, &earlier.acknowledged);
        } else if dir.join("metadata.db").exists() {
            // What fails after the last step that matters leaves the new backup, which is whole.
            restore(&what, dir, &self.acknowledged);
        }
        if is_met {
            assert_exits(&what, &run(&self.service, args, dir), &[0]);
            restore(&what, dir, &self.acknowledged);
        }
        Audit::of_files(&self.service, &self.acknowledged).assert_clean(&what, 0);
        is_met
    }
}

fn run(service: &Service, args: &[&str], dir: &Path) -> Output {
    service.command(args).arg(dir).output().expect("the binary runs")
}

/// Restores into an empty directory what must be whole.
#[track_caller]
fn restore(what: &str, dir: &Path, acknowledged: &Acknowledged) -> Service {
    let elsewhere = Service::new();
    assert_exits(what, &run(&elsewhere, &["restore", "--verify"], dir), &[0]);
    Audit::of_files(&elsewhere, acknowledged).assert_clean(what, 0);
    elsewhere
}

/// Makes `to` what `from` is.
fn copy(from: &Path, to: &Path) {
    let done = Command::new("cp").args(["-r", "-T"]).arg(from).arg(to).status().unwrap();
    assert!(done.success());
}

fn delete(service: &Service, urls: &[String]) {
    let output = service.command(&["delete"]).args(urls).output().expect("the binary runs");
    assert_exits("delete", &output, &[0]);
}

/// Both a first backup, of a running service, and one over an earlier one, of a stopped service.
#[test]
fn every_call_of_a_backup_may_fail() {
    for_each_call("upkeep::every_call_of_a_backup_may_fail", |shim, call, error, lane| {
        let (up, acknowledged) = (upstream(), Acknowledged::default());
        let mut running = Service::new().start();
        let api = running.api;
        for n in [0, 1, 4] {
            assert!(fetch(api, &up, n, &acknowledged));
        }
        let service = running.service().clone();
        let dirs = [service.dir().join("backup"), service.dir().join("earlier")];
        let original = Original { shim, call, error, service, acknowledged };
        if lane == 0 {
            return original.sweep(&["backup"], &dirs[0], None);
        }
        // The earlier backup has something that the later ones lack, and the other way round.
        assert!(fetch(api, &up, 8, &Acknowledged::default()));
        assert_exits("backup", &run(&original.service, &["backup"], &dirs[1]), &[0]);
        delete(&original.service, &[url(&up, 8)]);
        let earlier = Earlier { dir: &dirs[1], acknowledged: Acknowledged::default() };
        original.acknowledged.all().into_iter().for_each(|(url, n)| earlier.acknowledged.add(url, n));
        assert!(fetch(api, &up, 14, &original.acknowledged));
        running.term();
        original.sweep(&["backup", "--verify", "--prune"], &dirs[0], Some(&earlier))
    });
}

/// Artifacts fetched at a time, to be deleted later, two by two.
const STOCK: usize = 24;

/// A service that sweeps at its next turn, and what it keeps.
struct Sweeping<'a> {
    shim: &'a Shim,
    up: Upstream,
    service: Running,
    /// The same without the shim, for commands.
    plain: Service,
    kept: Acknowledged,
    next: u64,
    /// Items that are to be deleted, each with a content of its own.
    stock: Vec<u64>,
}

impl<'a> Sweeping<'a> {
    fn start(shim: &'a Shim) -> Sweeping<'a> {
        let (up, kept) = (upstream(), Acknowledged::default());
        let plain = Service::new().env("JOBS__DELETE_GRACE_SECONDS", "0");
        let service = shim.before(plain.clone()).start();
        assert!(fetch(service.api, &up, 0, &kept));
        Sweeping { shim, up, service, plain, kept, next: 2, stock: Vec::new() }
    }

    /// Two artifacts are deleted, and the N-th call from then on fails. Both must be swept all the same. Says whether
    /// the call was met before the database's log was empty again.
    fn try_one(&mut self, call: Call, number: i64, error: i32) -> bool {
        let what = format!("sweep, {call:?} {number}");
        let items = self.take_two();
        self.shim.aim(call, Which::Only(number), Action::Fail(error));
        delete(&self.plain, &items.map(|n| url(&self.up, n)));
        eventually(&format!("{what}: both are noted as swept"), || {
            let waiting = "SELECT count(*) FROM blobs WHERE state = 'deleted' AND swept_at IS NULL";
            (self.service.count_rows(waiting) == 0).then_some(())
        });
        eventually(&format!("{what}: a call fails, or all is done"), || {
            (self.shim.injected() > 0 || self.is_written_out()).then_some(())
        });
        let is_met = self.shim.injected() > 0;
        self.shim.rest();
        for n in items {
            assert!(!self.service.blob(&content(n).sha256()).exists(), "{what}: a file is left");
        }
        if is_met {
            let fresh = self.fresh();
            assert!(fetch(self.service.api, &self.up, fresh, &self.kept), "{what}: all is well afterwards");
            self.wait_written_out();
        }
        Audit::of_files(&self.plain, &self.kept).assert_clean(&what, 0);
        is_met
    }

    fn take_two(&mut self) -> [u64; 2] {
        if self.stock.is_empty() {
            let passing = Acknowledged::default();
            while self.stock.len() < STOCK {
                let fresh = self.fresh();
                assert!(fetch(self.service.api, &self.up, fresh, &passing), "all is well before");
                self.stock.push(fresh);
            }
            self.wait_written_out();
        }
        [0; 2].map(|_| self.stock.pop().expect("there is an even number of them"))
    }

    /// The next item of a content that no other has. (What is shorter may be the same by chance.)
    fn fresh(&mut self) -> u64 {
        let fresh = (self.next..).step_by(2).find(|n| content(*n).len() > 1).expect("most items have more");
        self.next = fresh + 2;
        fresh
    }

    /// Waits until the service has nothing more to write, so that every call that is met later is the sweep's.
    fn wait_written_out(&self) {
        eventually("the log is empty", || self.is_written_out().then_some(()));
    }

    fn is_written_out(&self) -> bool {
        let log = PathBuf::from(format!("{}-wal", self.plain.database().display()));
        fs::metadata(&log).is_ok_and(|log| log.len() == 0)
    }
}

#[test]
fn every_call_of_a_sweep_may_fail() {
    // Much of it is waiting, so odd and even numbers have a service each.
    for_each_call("upkeep::every_call_of_a_sweep_may_fail", |shim, call, error, lane| {
        let mut sweeping = Sweeping::start(shim);
        let numbers = (1 + lane..MOST).step_by(2);
        let met = count_met(numbers, |n| sweeping.try_one(call, n, error));
        let is_made = lane == 1 || met > 0 || matches!(call, Call::Rename | Call::Mkdir);
        assert!(is_made, "{call:?} is never made");
        sweeping.service.term();
        let service = sweeping.plain.clone().start();
        Audit::of(&service, &sweeping.kept).assert_clean("after the sweep", 0);
        met
    });
}
