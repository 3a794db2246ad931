//! Named places between the steps of what must survive a crash, where a test can end the process as SIGKILL would.
//!
//! Debug builds only: a release build has neither the hook nor its environment variable.

/// The variable: `NAME` ends the process the first time it comes by there, `NAME:3` the third time.
#[cfg(debug_assertions)]
const VARIABLE: &str = "ARTIFACT_CACHE_KILL_POINT";

/// Ends the process with SIGKILL if a test asked for it here; otherwise, and in release builds always, does nothing.
///
/// Names are `verb.step`, the step being what has just been done: `publish.renamed`.
#[cfg(debug_assertions)]
pub fn pass(name: &str) {
    use std::sync::{
        LazyLock,
        atomic::{AtomicU64, Ordering},
    };
    static WANTED: LazyLock<Option<(String, AtomicU64)>> = LazyLock::new(|| {
        let value = std::env::var(VARIABLE).ok()?;
        let (name, count) = value.split_once(':').unwrap_or((&value, "1"));
        Some((name.to_owned(), AtomicU64::new(count.parse().ok()?)))
    });
    if let Some((wanted, left)) = &*WANTED
        && wanted == name
        && left.fetch_sub(1, Ordering::Relaxed) == 1
    {
        // Nothing is flushed and no destructor runs, exactly as when the kernel or an operator does it.
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    }
}

/// Does nothing in a release build.
#[cfg(not(debug_assertions))]
#[inline(always)]
pub fn pass(_name: &str) {}
