//! Panics are bugs: each is counted and has its line in the log, wherever it happens.

use std::{panic::PanicHookInfo, sync::Arc};

use super::Metrics;

/// Counts and logs every panic of this process from now on. With `RUST_BACKTRACE` set the usual report goes to standard
/// error as well.
pub fn watch_panics(metrics: Arc<Metrics>) {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        metrics.panics.inc();
        let location = panic.location().map(ToString::to_string);
        tracing::error!(error = message(panic), location, "panic");
        if std::env::var_os("RUST_BACKTRACE").is_some() {
            usual(panic);
        }
    }));
}

fn message<'a>(panic: &'a PanicHookInfo<'_>) -> &'a str {
    panic.payload_as_str().unwrap_or("no message")
}
