//! The primitives of the few locks on whose order correctness rests: the flights, and publishing against sweeping.
//!
//! They are named in this one place so that `tests/schedules` can compile the files that use them against primitives
//! whose every interleaving is tried. All other locks are the standard library's own.

pub use std::sync::{Mutex, MutexGuard, atomic::AtomicU64};

pub use tokio::sync::watch;
