//! The locks on whose order correctness rests, under every interleaving that thousands of random schedules find.
//!
//! Two files of the product are compiled here once more, as they are: `cache/inflight.rs` and the module `blobs`. All that
//! differs is what `crate::sync` means to them, which here is shuttle's primitives: whoever takes a lock may be made to
//! wait for any of the others first. The kill points between the steps of publishing and sweeping do the same, so that no
//! step is taken for granted. Everything below that is real too: files, and SQLite.
//!
//! A schedule that breaks a promise fails the test and is printed; seeded mistakes prove that they are found.
// What is compiled twice is used only in part here.
#![allow(dead_code, unused_imports, unreachable_pub, missing_docs, unfulfilled_lint_expectations)]

#[path = "../../src/blobs/mod.rs"]
mod blobs;
#[path = "../../src/cache/inflight.rs"]
mod inflight;

mod flights;
mod store;
pub mod watch;

// What the two files import.
use artifact_cache::{artifact, config, error, upstream};

mod sync {
    //! Instead of the product's own module of this name.

    pub use super::watch;
    pub use shuttle::sync::{Mutex, MutexGuard, atomic::AtomicU64};
}

mod front {
    //! What a flight carries to its end, and looks into as little as this.

    #[derive(Debug)]
    pub struct Stored(pub crate::artifact::Digest);
}

mod kill_point {
    //! Where a process may be killed is where another thread may come first.

    thread_local! {
        /// This thread runs the schedules; the threads that write spools don't.
        pub static IS_SCHEDULED: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
    }

    pub fn pass(_name: &str) {
        if IS_SCHEDULED.get() {
            shuttle::thread::yield_now();
        }
    }

    pub fn pass_or_panic(name: &str) {
        pass(name);
    }
}

/// Runs `scenario` under so many random schedules, a tenth of them with few and sudden switches (PCT).
///
/// `ARTIFACT_CACHE_SCHEDULES` multiplies them.
fn schedules(number: usize, scenario: fn()) {
    use shuttle::scheduler::{PctScheduler, RandomScheduler};
    let times = std::env::var("ARTIFACT_CACHE_SCHEDULES").map_or(1, |times| times.parse().expect("a number"));
    let number = number * times;
    let mut config = shuttle::Config::new();
    // For SQLite.
    config.stack_size = 1 << 20;
    kill_point::IS_SCHEDULED.set(true);
    shuttle::Runner::new(RandomScheduler::new(number), config.clone()).run(scenario);
    shuttle::Runner::new(PctScheduler::new(3, number / 10 + 1), config).run(scenario);
    say_tried(number + number / 10 + 1);
}

fn say_tried(schedules: usize) {
    use std::io::Write;
    let name = std::thread::current().name().unwrap_or_default().to_owned();
    // Past the test runner, which keeps to itself what a test prints.
    let _ = writeln!(std::io::stderr(), "{name}: {schedules} schedules tried");
}

/// The same, and some schedule must break the promise whose assertion says `complaint`.
#[track_caller]
fn breaks(number: usize, complaint: &str, scenario: fn()) {
    let broken = std::panic::catch_unwind(|| schedules(number, scenario));
    let said = broken.expect_err("no schedule finds the seeded mistake");
    let said = said.downcast_ref::<String>().cloned().or(said.downcast_ref::<&str>().map(|s| s.to_string()));
    assert!(said.as_ref().is_some_and(|said| said.contains(complaint)), "it broke something else: {said:?}");
}
