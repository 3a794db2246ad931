//! Log lines: one flat JSON object (or a line of text) per event, written by a thread of its own.
//!
//! A slow or broken log sink must never fail or delay a request, so lines wait in a bounded queue and are dropped,
//! and counted, when it is full. A clean stop loses none: dropping the [`LogGuard`] writes what is queued.
//!
//! The layer is our own because a request line is on the hot path: it formats straight into a buffer that each
//! thread keeps, without building a tree of values first. Spans are not used.

use std::{cell::RefCell, fmt, fs::File, io::BufWriter, io::Write, os::fd::AsFd};

use tracing::{
    Event, Level, Subscriber,
    field::{Field, Visit},
};
use tracing_appender::non_blocking::{ErrorCounter, NonBlocking, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::{
    Layer, Registry,
    filter::LevelFilter,
    layer::{Context, SubscriberExt},
};

use crate::config::{LogFormat, Logging};

/// Lines that may wait for the sink; past that they are dropped and counted.
const QUEUE_LINES: usize = 65_536;

/// Keeps the log's thread alive; dropping it writes out all that is queued.
#[must_use]
pub struct LogGuard {
    _worker: WorkerGuard,
    dropped: ErrorCounter,
}

impl LogGuard {
    /// Counts the lines that found the queue full.
    pub fn dropped_lines(&self) -> impl Fn() -> u64 + Send + Sync + 'static {
        let counter = self.dropped.clone();
        move || counter.dropped_lines() as u64
    }
}

/// Sends every event of this process to standard output from now on.
///
/// # Errors
/// When standard output can't be duplicated, or a subscriber is already set.
pub fn init(config: &Logging) -> Result<LogGuard, Box<dyn std::error::Error>> {
    // Not std's `Stdout`: that writes each line by itself, this one a batch at a time.
    let sink = BufWriter::new(File::from(std::io::stdout().as_fd().try_clone_to_owned()?));
    let (queue, worker) = NonBlockingBuilder::default()
        .lossy(true)
        .buffered_lines_limit(QUEUE_LINES)
        .thread_name("log")
        .finish(sink);
    let dropped = queue.error_counter();
    let layer = FlatLayer { queue, format: config.format }.with_filter(LevelFilter::from_level(config.level));
    tracing::subscriber::set_global_default(Registry::default().with(layer))?;
    Ok(LogGuard { _worker: worker, dropped })
}

struct FlatLayer {
    queue: NonBlocking,
    format: LogFormat,
}

thread_local! {
    static LINE: RefCell<Line> = const { RefCell::new(Line { head: Vec::new(), fields: Vec::new(), format: LogFormat::Json }) };
}

impl<S: Subscriber> Layer<S> for FlatLayer {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        LINE.with_borrow_mut(|line| {
            line.begin(self.format, *event.metadata().level());
            event.record(line);
            // A full queue is counted by the queue itself.
            let _ = self.queue.clone().write(line.finish());
        });
    }
}

/// One line in the making: time, level and message in `head`, everything else in `fields`.
struct Line {
    head: Vec<u8>,
    fields: Vec<u8>,
    format: LogFormat,
}

impl Line {
    fn begin(&mut self, format: LogFormat, level: Level) {
        self.head.clear();
        self.fields.clear();
        self.format = format;
        let now = jiff::Timestamp::now();
        // Writing to a Vec can't fail.
        let _ = match format {
            LogFormat::Json => write!(self.head, r#"{{"time":"{now:.3}","level":"{level}""#),
            LogFormat::Text => write!(self.head, "{now:.3} {level:>5}"),
        };
    }

    fn finish(&mut self) -> &[u8] {
        self.head.extend_from_slice(&self.fields);
        self.head.extend_from_slice(if self.format == LogFormat::Json { b"}\n" } else { b"\n" });
        &self.head
    }

    fn put<T: serde::Serialize + ?Sized>(&mut self, field: &Field, value: &T) {
        let is_message = field.name() == "message";
        let name = if is_message { "msg" } else { field.name().trim_start_matches("r#") };
        let to = if is_message { &mut self.head } else { &mut self.fields };
        let _ = match self.format {
            LogFormat::Json => write!(to, r#","{name}":"#),
            LogFormat::Text if is_message => write!(to, " "),
            LogFormat::Text => write!(to, " {name}="),
        };
        // JSON's escapes keep hostile text on one line in both formats.
        let _ = serde_json::to_writer(to, value);
    }
}

impl Visit for Line {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, value);
    }
    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, &value);
    }
    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, &value);
    }
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.put(field, &value);
    }
    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, &value);
    }
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.put(field, &format!("{value:?}"));
    }
}
