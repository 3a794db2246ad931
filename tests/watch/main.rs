//! What an operator sees and types: metrics in a real Prometheus, alert rules, the dashboard's queries, and the commands of
//! the pages in `docs/`, which are run as they stand there.
//!
//! `install` gets the programs; one that is missing is skipped by name.
// Nothing outside sees a test binary, so `pub` here only means "for the other files".
#![allow(unreachable_pub)]

// Half of the harness is for tests that speak HTTP themselves.
#[allow(dead_code, unused_imports)]
#[path = "../it/harness/mod.rs"]
mod harness;
#[path = "../clients/program.rs"]
mod program;

mod page;
mod prometheus;
mod stage;

mod alerts;
mod dashboard;
mod logs;
mod maintenance;
mod metrics;
mod usage;
