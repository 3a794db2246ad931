//! Every metric of the service, with its name and help, in Prometheus' classic text format.
//!
//! Labels come from closed sets, never from a URL or a client, and every series exists from the start with value 0.

use std::{sync::Arc, sync::atomic::AtomicU64, time::Duration};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric, prometheus_text},
    metrics::{
        counter::{ConstCounter, Counter},
        family::Family,
        gauge::{ConstGauge, Gauge},
        histogram::Histogram,
    },
    registry::Registry,
};

/// Seconds; the document's p95 query needs 0.005 and 0.01, hits need finer, multi-GB misses coarser ones.
const DURATION_BUCKETS: [f64; 17] = [
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 30.0, 60.0, 300.0, 600.0,
];
/// Bytes, 1 KiB to 16 GiB by fours.
const SIZE_BUCKETS: std::ops::RangeInclusive<i32> = 0..=12;

/// Every value of the label `code`.
const ERROR_CODES: [&str; 15] = [
    "missing_parameter",
    "invalid_parameter",
    "forbidden_upstream",
    "not_found",
    "method_not_allowed",
    "checksum_mismatch",
    "precondition_failed",
    "range_not_satisfiable",
    "internal_error",
    "upstream_error",
    "artifact_too_large",
    "upstream_unavailable",
    "server_busy",
    "not_cached",
    "broken_body",
];

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct StatusLabel {
    status: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct CodeLabel {
    code: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct CheckLabel {
    check: &'static str,
}

/// How a `/fetch` request ended, the label `status`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Served from storage.
    Hit,
    /// Served from a download.
    Miss,
    /// 4xx, 5xx, or a body that broke off; the word is the label `code`.
    Error(&'static str),
}

/// What is sampled when somebody scrapes, rather than counted as it happens.
#[derive(Debug, Clone, Copy, Default)]
pub struct Sample {
    /// Artifacts known.
    pub items: u64,
    /// Bytes of stored blobs, each counted once.
    pub stored_bytes: u64,
    /// Bytes that the storage's file system has free.
    pub free_bytes: u64,
    /// Bytes of downloads that broke off and are kept to be continued.
    pub partial_bytes: u64,
}

/// The counters, gauges and histograms, and the registry that prints them.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    hits: Counter,
    misses: Counter,
    errors: Counter,
    error_codes: Family<CodeLabel, Counter>,
    duration: Histogram,
    bytes_served: Counter,
    /// Completed downloads.
    pub downloads: Counter,
    /// Bytes received from upstreams, of all attempts.
    pub bytes_downloaded: Counter,
    /// Sizes of completed downloads.
    pub download_size: Histogram,
    /// Downloads under way.
    pub inflight_downloads: Gauge,
    /// Requests that joined another's download.
    pub collapsed_requests: Counter,
    /// Attempts after the first, of all downloads.
    pub upstream_retries: Counter,
    /// Retries that continued where the last attempt broke off.
    pub upstream_resumes: Counter,
    /// Requests whose checksum was not the content's.
    pub checksum_mismatches: Counter,
    /// Stored files found missing, of another size or of another content.
    pub blobs_corrupt: Counter,
    /// Requests that panicked.
    pub panics: Counter,
    items: Gauge,
    size_bytes: Gauge,
    free_bytes: Gauge,
    checks: Family<CheckLabel, Gauge>,
    /// `storage.min_free_bytes`.
    pub min_free_bytes: Gauge,
    partial_bytes: Gauge,
    /// Files in the store that the catalogue does not know.
    pub orphan_blobs: Gauge,
    /// When the newest snapshot of the database was taken, in Unix time; 0 if there is none.
    pub snapshot_timestamp: Gauge,
}

impl Metrics {
    /// Registers everything. `log_dropped` counts the log lines that were dropped.
    pub fn new(log_dropped: impl Fn() -> u64 + Send + Sync + 'static) -> Arc<Metrics> {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(Process { log_dropped: Box::new(log_dropped) }));
        let requests = Family::<StatusLabel, Counter>::default();
        let error_codes = Family::<CodeLabel, Counter>::default();
        for code in ERROR_CODES {
            error_codes.get_or_create_owned(&CodeLabel { code });
        }
        let status = |status| requests.get_or_create_owned(&StatusLabel { status });
        let (hits, misses, errors) = (status("hit"), status("miss"), status("error"));
        let r = registry.sub_registry_with_prefix("artifact_cache");
        r.register("requests", "Requests to /fetch by outcome", requests.clone());
        r.register("errors", "Failed requests to /fetch by error code", error_codes.clone());
        let checks = Family::<CheckLabel, Gauge>::default();
        r.register("healthy", "1 if this check of /health holds, else 0", checks.clone());
        let duration = Histogram::new(DURATION_BUCKETS);
        r.register(
            "request_duration_seconds",
            "Time from a request to the end of its body",
            duration.clone(),
        );
        let sizes = SIZE_BUCKETS.map(|power| 1024.0 * 4f64.powi(power));
        let download_size = Histogram::new(sizes);
        r.register("download_size_bytes", "Size of completed downloads", download_size.clone());
        Arc::new(Metrics {
            hits,
            misses,
            errors,
            error_codes,
            checks,
            duration,
            download_size,
            bytes_served: counter(r, "bytes_served", "Artifact bytes served to clients"),
            downloads: counter(r, "downloads", "Completed downloads from upstreams"),
            bytes_downloaded: counter(r, "bytes_downloaded", "Bytes received from upstreams"),
            inflight_downloads: gauge(r, "inflight_downloads", "Downloads under way"),
            collapsed_requests: counter(r, "collapsed_requests", "Requests that joined another's download"),
            upstream_retries: counter(r, "upstream_retries", "Download attempts after the first"),
            upstream_resumes: counter(r, "upstream_resumes", "Attempts that continued a broken download"),
            checksum_mismatches: counter(r, "checksum_mismatches", "Requests whose sha256 did not match"),
            blobs_corrupt: counter(r, "blobs_corrupt", "Stored files found missing or damaged"),
            panics: counter(r, "panics", "Requests that ended in a panic"),
            items: gauge(r, "items_total", "Artifacts known"),
            size_bytes: gauge(r, "size_bytes", "Bytes stored on disk after deduplication"),
            free_bytes: gauge(r, "storage_free_bytes", "Bytes free on the storage's file system"),
            min_free_bytes: gauge(
                r,
                "storage_min_free_bytes",
                "Below so many free bytes nothing is downloaded",
            ),
            partial_bytes: gauge(r, "partial_bytes", "Bytes of broken-off downloads kept to be continued"),
            orphan_blobs: gauge(r, "orphan_blobs", "Stored files that the catalogue does not know"),
            snapshot_timestamp: gauge(
                r,
                "database_snapshot_timestamp_seconds",
                "When the newest snapshot of the database was taken, in Unix time",
            ),
            registry,
        })
    }

    /// Counts one request to `/fetch`, once, when its body has ended.
    pub fn request_ended(&self, outcome: Outcome, took: Duration, body_bytes: u64) {
        match outcome {
            Outcome::Hit => self.hits.inc(),
            Outcome::Miss => self.misses.inc(),
            Outcome::Error(code) => {
                self.error_codes.get_or_create(&CodeLabel { code }).inc();
                self.errors.inc()
            }
        };
        self.duration.observe(took.as_secs_f64());
        self.bytes_served.inc_by(body_bytes);
    }

    /// Hits as a share of all requests since the start, 0 when there were none.
    pub fn hit_ratio(&self) -> f64 {
        let hits = self.hits.get() as f64;
        let all = hits + self.misses.get() as f64 + self.errors.get() as f64;
        if all == 0.0 { 0.0 } else { hits / all }
    }

    /// Says whether a check of the service's health holds. All are said before each scrape.
    pub fn set_check(&self, check: &'static str, holds: bool) {
        self.checks.get_or_create(&CheckLabel { check }).set(holds.into());
    }

    /// Everything, in the text format of version 0.0.4.
    pub fn encode(&self, sample: Sample) -> String {
        self.items.set(sample.items as i64);
        self.size_bytes.set(sample.stored_bytes as i64);
        self.free_bytes.set(sample.free_bytes as i64);
        self.partial_bytes.set(sample.partial_bytes as i64);
        let mut text = String::with_capacity(16 * 1024);
        // Writing to a String can't fail.
        let _ = prometheus_text::encode(&mut text, &self.registry);
        text
    }
}

fn counter(registry: &mut Registry, name: &str, help: &str) -> Counter {
    let counter = Counter::<u64, AtomicU64>::default();
    registry.register(name, help, counter.clone());
    counter
}

fn gauge(registry: &mut Registry, name: &str, help: &str) -> Gauge {
    let gauge = Gauge::default();
    registry.register(name, help, gauge.clone());
    gauge
}

/// What Prometheus' client libraries customarily say of their process, read from `/proc/self` at each scrape, and the
/// log's dropped lines.
struct Process {
    log_dropped: Box<dyn Fn() -> u64 + Send + Sync>,
}

impl std::fmt::Debug for Process {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Process")
    }
}

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), std::fmt::Error> {
        let dropped = (self.log_dropped)();
        put(
            &mut encoder,
            "artifact_cache_log_lines_dropped",
            "Log lines dropped",
            &ConstCounter::new(dropped),
        )?;
        let Some(process) = ProcessFigures::read() else { return Ok(()) };
        let gauges = [
            ("process_resident_memory_bytes", "Resident memory", process.resident_bytes),
            ("process_virtual_memory_bytes", "Virtual memory", process.virtual_bytes),
            ("process_open_fds", "Open file descriptors", process.open_fds),
            ("process_max_fds", "Limit on open file descriptors", process.max_fds),
            ("process_threads", "Threads", process.threads),
        ];
        for (name, help, value) in gauges {
            put(&mut encoder, name, help, &ConstGauge::new(value as i64))?;
        }
        put(
            &mut encoder,
            "process_start_time_seconds",
            "Start, in Unix time",
            &ConstGauge::new(process.start),
        )?;
        put(
            &mut encoder,
            "process_cpu_seconds",
            "User and system time",
            &ConstCounter::new(process.cpu_seconds),
        )
    }
}

fn put(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    metric: &impl EncodeMetric,
) -> Result<(), std::fmt::Error> {
    metric.encode(encoder.encode_descriptor(name, help, None, metric.metric_type())?)
}

struct ProcessFigures {
    resident_bytes: u64,
    virtual_bytes: u64,
    open_fds: u64,
    max_fds: u64,
    threads: u64,
    start: f64,
    cpu_seconds: f64,
}

impl ProcessFigures {
    /// See proc(5) for the fields; the second one, the command, is skipped because it may hold spaces.
    fn read() -> Option<ProcessFigures> {
        let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
        let fields: Vec<u64> = stat
            .rsplit_once(')')?
            .1
            .split_whitespace()
            .skip(1)
            .map(|field| field.parse().unwrap_or(0))
            .collect();
        let field = |number: usize| fields.get(number - 4).copied();
        let ticks = rustix::param::clock_ticks_per_second() as f64;
        let boot = std::fs::read_to_string("/proc/stat").ok()?;
        let boot: f64 = boot.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()?;
        Some(ProcessFigures {
            resident_bytes: field(24)? * rustix::param::page_size() as u64,
            virtual_bytes: field(23)?,
            open_fds: std::fs::read_dir("/proc/self/fd").ok()?.count() as u64,
            max_fds: rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(0),
            threads: field(20)?,
            start: boot + field(22)? as f64 / ticks,
            cpu_seconds: (field(14)? + field(15)?) as f64 / ticks,
        })
    }
}
