//! Log lines: one flat JSON object (or a line of text) per event, written by a thread of its own.
//!
//! The layer is our own because a request's line is on the hot path: it formats straight into a buffer that each
//! thread keeps, without building a tree of values first. Spans are not used.

use std::{cell::RefCell, fmt, fs::File, io::Write, os::fd::AsFd, time::SystemTime};

use tracing::{
    Event, Level, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::{
    Layer, Registry,
    filter::LevelFilter,
    layer::{Context, SubscriberExt},
};

use super::sink::{Sink, SinkGuard};
use crate::config::{LogFormat, Logging};

/// Keeps the log's thread alive; dropping it writes out all that is waiting.
#[must_use]
#[derive(Debug)]
pub struct LogGuard {
    sink: Sink,
    _thread: SinkGuard,
}

impl LogGuard {
    /// Counts the lines that found no room.
    pub fn dropped_lines(&self) -> impl Fn() -> u64 + Send + Sync + 'static {
        let sink = self.sink.clone();
        move || sink.dropped()
    }
}

/// Sends every event of this process to standard output from now on.
///
/// # Errors
/// When standard output can't be duplicated, or a subscriber is already set.
pub fn init(config: &Logging) -> Result<LogGuard, Box<dyn std::error::Error>> {
    let (sink, thread) = Sink::start(File::from(std::io::stdout().as_fd().try_clone_to_owned()?))?;
    let layer = FlatLayer { sink: sink.clone(), format: config.format };
    let layer = layer.with_filter(LevelFilter::from_level(config.level));
    tracing::subscriber::set_global_default(Registry::default().with(layer))?;
    Ok(LogGuard { sink, _thread: thread })
}

struct FlatLayer {
    sink: Sink,
    format: LogFormat,
}

thread_local! {
    static LINE: RefCell<Line> = RefCell::default();
}

impl<S: Subscriber> Layer<S> for FlatLayer {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        LINE.with_borrow_mut(|line| {
            line.begin(self.format, *event.metadata().level());
            event.record(line);
            self.sink.write(line.finish());
        });
    }
}

/// One line in the making: time, level and message in `head`, everything else in `fields`.
#[derive(Default)]
struct Line {
    head: Vec<u8>,
    fields: Vec<u8>,
    format: LogFormat,
    clock: Clock,
}

/// The time as text, made anew once a second.
#[derive(Default)]
struct Clock {
    second: u64,
    /// `YYYY-MM-DDTHH:MM:SS`
    text: String,
}

impl Clock {
    /// The time up to the second, and the milliseconds.
    fn now(&mut self) -> (&str, u32) {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        if now.as_secs() != self.second || self.text.is_empty() {
            self.second = now.as_secs();
            let whole = jiff::Timestamp::from_second(self.second as i64).unwrap_or_default();
            self.text = format!("{whole:.0}");
            // The Z comes after the milliseconds.
            self.text.pop();
        }
        (&self.text, now.subsec_millis())
    }
}

impl Line {
    fn begin(&mut self, format: LogFormat, level: Level) {
        self.head.clear();
        self.fields.clear();
        self.format = format;
        let (time, millis) = self.clock.now();
        // Writing to a Vec can't fail.
        let _ = match format {
            LogFormat::Json => write!(self.head, r#"{{"time":"{time}.{millis:03}Z","level":"{level}""#),
            LogFormat::Text => write!(self.head, "{time}.{millis:03}Z {level:>5}"),
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
        self.put(field, &Shown(value));
    }
}

/// A value as its debug form says it.
struct Shown<'a>(&'a dyn fmt::Debug);

impl serde::Serialize for Shown<'_> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{:?}", self.0))
    }
}
