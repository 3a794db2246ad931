//! Named places between the steps of what must survive a crash, where a test can end the process as SIGKILL would, and
//! of what must survive a panic, where a test can have one.
//!
//! Debug builds only: a release build has neither the hooks nor their environment variables.

/// Ends the process with SIGKILL if a test asked for it here; otherwise, and in release builds always, does nothing.
///
/// Names are `verb.step`, the step being what has just been done: `publish.renamed`. The variable
/// `ARTIFACT_CACHE_KILL_POINT` is a name, or `NAME:3` for the third time that it comes by there.
#[cfg(debug_assertions)]
pub fn pass(name: &str) {
    static WANTED: hook::Wanted = hook::Wanted::new(|| hook::read("ARTIFACT_CACHE_KILL_POINT"));
    if hook::is_reached(&WANTED, name) {
        // Nothing is flushed and no destructor runs, exactly as when the kernel or an operator does it.
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    }
}

/// Panics if a test asked for it here with `ARTIFACT_CACHE_PANIC_POINT`, which is like the other variable.
#[cfg(debug_assertions)]
pub fn pass_or_panic(name: &str) {
    static WANTED: hook::Wanted = hook::Wanted::new(|| hook::read("ARTIFACT_CACHE_PANIC_POINT"));
    if hook::is_reached(&WANTED, name) {
        panic!("a test wanted a panic at {name}");
    }
}

#[cfg(debug_assertions)]
mod hook {
    use std::sync::{
        LazyLock,
        atomic::{AtomicU64, Ordering},
    };

    /// A place, and how many times are left to come by there.
    pub(super) type Wanted = LazyLock<Option<(String, AtomicU64)>>;

    pub(super) fn read(variable: &str) -> Option<(String, AtomicU64)> {
        let value = std::env::var(variable).ok()?;
        let (name, count) = value.split_once(':').unwrap_or((&value, "1"));
        Some((name.to_owned(), AtomicU64::new(count.parse().ok()?)))
    }

    pub(super) fn is_reached(wanted: &Wanted, name: &str) -> bool {
        wanted
            .as_ref()
            .is_some_and(|(wanted, left)| wanted == name && left.fetch_sub(1, Ordering::Relaxed) == 1)
    }
}

/// Does nothing in a release build.
#[cfg(not(debug_assertions))]
#[inline(always)]
pub fn pass(_name: &str) {}

/// Does nothing in a release build.
#[cfg(not(debug_assertions))]
#[inline(always)]
pub fn pass_or_panic(_name: &str) {}
