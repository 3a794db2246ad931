//! Faults made to happen: crashes between any two steps and at random moments, power cuts, calls that fail, clients
//! and limits that hurt. After each the same audit asks what was promised (`audit.rs`).
//!
//! The test suite runs a few rounds of what is random; `./soak` runs many, by the variables in [`rounds`].
// Nothing outside sees a test binary, so `pub` here only means "for the other files".
#![allow(unreachable_pub)]

// Half of the harness is for tests that look closer at single answers.
#[allow(dead_code, unused_imports)]
#[path = "../it/harness/mod.rs"]
mod harness;

mod audit;
mod calls;
mod kill_points;
mod kills;
mod load;
mod memory;
mod power;
mod shim;
mod upkeep;
mod workload;

use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// Held by all tests, by one that measures time alone.
static TURN: RwLock<()> = RwLock::new(());

/// Waits until no test here measures time.
fn beside_others() -> RwLockReadGuard<'static, ()> {
    TURN.read().unwrap_or_else(PoisonError::into_inner)
}

/// Waits until no other test here runs, and keeps them waiting.
fn alone() -> RwLockWriteGuard<'static, ()> {
    TURN.write().unwrap_or_else(PoisonError::into_inner)
}

/// How many rounds of a random fault: what the variable says, else `usual`.
fn rounds(variable: &str, usual: u64) -> u64 {
    match std::env::var(variable) {
        Ok(text) => {
            text.parse().unwrap_or_else(|_| panic!("{variable} is {text:?}: give a number of rounds"))
        }
        Err(_) => usual,
    }
}

/// Says a figure that a reader of the run wants to see, also when the test passes.
fn report(line: std::fmt::Arguments<'_>) {
    use std::io::Write;
    // Not by `println!`, which the test runner keeps to itself.
    let _ = writeln!(std::io::stderr(), "{line}");
}
