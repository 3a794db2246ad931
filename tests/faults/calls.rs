//! System calls that fail: every N-th of each kind, until none is left to fail.
//!
//! Two sweeps. One aims at a running service, where a call fails once or from then on, and asks that hits go on, that a
//! client gets the right bytes or an error as documented, and that all works when the disk does again. The other begins
//! with an empty directory and ends with SIGTERM, so that it meets the calls of migrations, checkpoints and the end
//! too; there a call fails or the process dies before it.

use std::os::unix::process::ExitStatusExt;

use libc::{EIO, EMFILE, ENOSPC};

use crate::audit::Audit;
use crate::harness::{Running, Service, Upstream};
use crate::shim::{Action, Call, Shim, Which};
use crate::workload::{Acknowledged, LARGE, content, fetch, upstream, url};
use crate::{beside_others, report};

/// Far more calls of one kind than a sweep can meet, so that one which never ends is noticed.
const MOST: i64 = 1_000;

/// A call, what it fails with, and whether a hit may need it.
struct Case {
    call: Call,
    error: i32,
    hits_need_it: bool,
}

const fn case(call: Call, error: i32) -> Case {
    Case { call, error, hits_need_it: false }
}

const CASES: [Case; 11] = [
    case(Call::Fsync, EIO),
    case(Call::Fdatasync, EIO),
    case(Call::Rename, EIO),
    Case { call: Call::Openat, error: EMFILE, hits_need_it: true },
    case(Call::Mkdir, ENOSPC),
    case(Call::Pwrite64, ENOSPC),
    case(Call::Write, EIO),
    // The database is read for a hit whose file is not open yet.
    Case { call: Call::Pread64, error: EIO, hits_need_it: true },
    case(Call::Ftruncate, EIO),
    case(Call::Unlink, EIO),
    case(Call::Writev, ENOSPC),
];

/// A service, and what is asked of it while calls fail.
struct Sweep<'a> {
    shim: &'a Shim,
    up: Upstream,
    acknowledged: Acknowledged,
    service: Running,
    next: u64,
    /// Failures so far, each of which may leave an orphan.
    failures: usize,
}

impl<'a> Sweep<'a> {
    fn start(shim: &'a Shim) -> Sweep<'a> {
        let (up, acknowledged) = (upstream(), Acknowledged::default());
        let service = shim.before(Service::new()).start();
        assert!(fetch(service.api, &up, 0, &acknowledged), "all works before anything fails");
        Sweep { shim, up, acknowledged, service, next: 2, failures: 0 }
    }

    /// Whether the call was met at all.
    fn try_one(&mut self, case: &Case, which: Which) -> bool {
        let what = format!("{:?} {which:?}", case.call);
        let (fresh, large) = (self.fresh(), LARGE + self.next);
        self.shim.aim(case.call, which, Action::Fail(case.error));
        let is_hit = self.fetch(0);
        assert!(is_hit || case.hits_need_it, "{what}: hits go on");
        self.fetch(fresh);
        // The same content again, known by now or not.
        self.fetch(fresh + 1);
        if matches!(case.call, Call::Fdatasync | Call::Ftruncate) {
            self.fetch(large);
        }
        self.fetch(0);
        self.shim.rest();
        let injected = self.shim.injected();
        self.failures += injected as usize;
        if injected > 0 {
            self.recover(case, &what, fresh);
        }
        injected > 0
    }

    /// The next item of a content that was never published, so that its directories are new too.
    fn fresh(&mut self) -> u64 {
        let fresh = (self.next..).step_by(2).find(|n| content(*n).len() > 1).expect("most items have more");
        self.next = fresh + 2;
        fresh
    }

    fn fetch(&self, n: u64) -> bool {
        fetch(self.service.api, &self.up, n, &self.acknowledged)
    }

    /// The disk is well again, and so is the service: at once, or after a new start when it could not read its database
    /// (SQLite calls a page that it can't read a damaged one).
    fn recover(&mut self, case: &Case, what: &str, fresh: u64) {
        assert!(self.fetch(0), "{what}: hits go on afterwards");
        let fresher = self.fresh();
        if !self.fetch(fresher) {
            let answer = self.service.fetch(&url(&self.up, fresher));
            assert_eq!(answer.assert_error(500, "internal_error")["details"], "database corrupt", "{what}");
            assert_eq!(case.call, Call::Pread64, "{what}: only what can't be read looks damaged");
            self.restart();
            assert!(self.fetch(fresher), "{what}: a new start puts it right");
        }
        assert!(self.fetch(fresh), "{what}: what failed is fetched again");
        assert_eq!(self.service.fetch(&url(&self.up, fresh)).cache_status(), "HIT", "{what}");
    }

    fn restart(&mut self) {
        self.service.term();
        self.service = self.service.again().start();
    }

    /// No promise was broken by all of it.
    fn end(mut self) {
        self.restart();
        assert_eq!(
            self.shim.resynced(),
            0,
            "a spool whose sync has failed is neither synced again nor published"
        );
        let audit = Audit::of(&self.service, &self.acknowledged);
        audit.assert_clean("after the sweep", self.failures);
    }
}

#[test]
fn every_call_of_a_running_service_may_fail() {
    let Some(shim) = Shim::build("calls::every_call_of_a_running_service_may_fail") else { return };
    let _turn = beside_others();
    let mut counts = Vec::new();
    for case in &CASES {
        let mut sweep = Sweep::start(&shim);
        let once = (1..MOST).find(|n| !sweep.try_one(case, Which::Only(*n))).expect("it ends") - 1;
        let lasting = (1..MOST).find(|n| !sweep.try_one(case, Which::From(*n))).expect("it ends") - 1;
        sweep.end();
        counts.push(format!("{:?} {once}+{lasting}", case.call));
    }
    report(format_args!("running service, failing once + from then on, 0 violations: {}", counts.join(", ")));
}

/// Calls of a whole life, and what each fails with. (A life without output would not say where it listens.)
const LIFE: [(Call, i32); 9] = [
    (Call::Fsync, EIO),
    (Call::Rename, EIO),
    (Call::Openat, EMFILE),
    (Call::Mkdir, ENOSPC),
    (Call::Pwrite64, ENOSPC),
    (Call::Pread64, EIO),
    (Call::Ftruncate, EIO),
    (Call::Unlink, EIO),
    (Call::Writev, ENOSPC),
];

/// One life from an empty directory to SIGTERM, and then the next one, undisturbed. Says whether the call was met.
fn live(shim: &Shim, call: Call, number: i64, action: Action) -> bool {
    let what = format!("{call:?} {number} {action:?}");
    let (up, acknowledged) = (upstream(), Acknowledged::default());
    let service = shim.before(Service::new());
    shim.aim(call, Which::Only(number), action);
    let ended = match service.clone().try_start() {
        Err(ended) => ended,
        Ok(mut running) => {
            for n in [0, 1, 0, 4] {
                fetch(running.api, &up, n, &acknowledged);
            }
            running.signal_term();
            running.wait_exit()
        }
    };
    match (ended.0.code(), ended.0.signal()) {
        (Some(0), _) => {}
        (Some(1), _) => assert!(ended.1.starts_with("error: "), "{what}: {}", ended.1),
        (_, Some(9)) if action == Action::Kill => {}
        _ => panic!("{what}: {} {}", ended.0, ended.1),
    }
    let is_met = shim.injected() > 0;
    shim.rest();
    let service = service.start();
    // One for each content whose bytes were published and whose row could not be written.
    Audit::of(&service, &acknowledged).assert_clean(&what, 2);
    is_met
}

/// Lives through every N-th of each call.
fn sweep_lives(name: &str, action: impl Fn(i32) -> Action) {
    let _turn = beside_others();
    let counts: Vec<String> = std::thread::scope(|scope| {
        // Most of a life is waiting for the disk.
        let sweeps = LIFE.map(|(call, error)| {
            let action = action(error);
            scope.spawn(move || {
                let shim = Shim::build(name)?;
                let met = (1..MOST).find(|n| !live(&shim, call, *n, action)).expect("it ends") - 1;
                assert!(met > 0, "{call:?} is never made");
                Some(format!("{call:?} {met}"))
            })
        });
        sweeps.into_iter().filter_map(|sweep| sweep.join().expect("the sweep of one call")).collect()
    });
    report(format_args!("{name}, 0 violations: {}", counts.join(", ")));
}

#[test]
fn every_call_of_a_life_may_fail() {
    sweep_lives("calls::every_call_of_a_life_may_fail", Action::Fail);
}

#[test]
fn the_process_may_die_before_every_call_of_a_life() {
    sweep_lives("calls::the_process_may_die_before_every_call_of_a_life", |_| Action::Kill);
}
