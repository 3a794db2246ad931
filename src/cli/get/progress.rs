//! The progress bar: on a terminal only.

use std::{io::IsTerminal, time::Duration};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

const BAR: &str =
    "{msg} [{wide_bar}] {binary_bytes} of {binary_total_bytes}, {binary_bytes_per_sec}, {eta} left";
const NO_LENGTH: &str = "{msg} {spinner} {binary_bytes}, {binary_bytes_per_sec}";

/// How far a transfer is, on standard error.
pub(super) struct Progress(ProgressBar);

impl Progress {
    /// Shows nothing yet, and nothing ever if `quiet` or standard error is no terminal.
    pub(super) fn new(label: &str, quiet: bool) -> Progress {
        let visible = !quiet && std::io::stderr().is_terminal();
        let target = if visible { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        Progress(ProgressBar::with_draw_target(None, target).with_message(label.to_owned()))
    }

    /// A body begins, `at` bytes into the artifact, whose length may be known.
    pub(super) fn begin(&self, at: u64, length: Option<u64>) {
        let template = if length.is_some() { BAR } else { NO_LENGTH };
        if let Some(length) = length {
            self.0.set_length(length);
        }
        let style = ProgressStyle::with_template(template).expect("both are constants that the tests draw");
        self.0.set_style(style.progress_chars("=> "));
        self.0.set_position(at);
        // What was there already must not count as speed.
        self.0.reset_eta();
        self.0.enable_steady_tick(Duration::from_millis(200));
    }

    /// So many more bytes came.
    pub(super) fn advance(&self, bytes: usize) {
        self.0.inc(bytes as u64);
    }

    /// Writes a line above the bar; nothing where there is no bar.
    pub(super) fn say(&self, line: &str) {
        self.0.println(line);
    }

    /// Takes the bar away.
    pub(super) fn end(&self) {
        self.0.finish_and_clear();
    }
}
