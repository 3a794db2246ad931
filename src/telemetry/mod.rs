//! What the service says of itself: log lines (`log`) and metrics (`metrics`). Both are declared here and nowhere else.

pub mod log;
pub mod metrics;
mod panics;
mod sink;

pub use log::{LogGuard, init};
pub use metrics::Metrics;
pub use panics::watch_panics;
