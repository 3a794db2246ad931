//! Every key of the configuration: its name, what it takes, and where its value goes. The only list of them.

use super::{Config, HostGlobs, LogFormat, QueryGlobs, StreamFraming, value};
use tracing::Level;

/// A value that a key does not take: which of the given items (0 for a single value), and why not.
pub(super) type Refused = (usize, String);

type SetOne = fn(&mut Config, &str) -> Result<(), String>;
type SetOptional = fn(&mut Config, Option<&str>) -> Result<(), String>;
type SetList = fn(&mut Config, &[&str]) -> Result<(), Refused>;

pub(super) enum Set {
    One(SetOne),
    Optional(SetOptional),
    List(SetList),
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Kind {
    One,
    Optional,
    List,
}

pub(super) struct Key {
    pub(super) section: &'static str,
    pub(super) name: &'static str,
    /// Continues "write …": what would be right, with an example.
    pub(super) right: &'static str,
    pub(super) set: Set,
}

impl Key {
    pub(super) fn kind(&self) -> Kind {
        match self.set {
            Set::One(_) => Kind::One,
            Set::Optional(_) => Kind::Optional,
            Set::List(_) => Kind::List,
        }
    }
}

const fn one(section: &'static str, name: &'static str, right: &'static str, set: SetOne) -> Key {
    Key { section, name, right, set: Set::One(set) }
}

const fn optional(section: &'static str, name: &'static str, right: &'static str, set: SetOptional) -> Key {
    Key { section, name, right, set: Set::Optional(set) }
}

const fn list(section: &'static str, name: &'static str, right: &'static str, set: SetList) -> Key {
    Key { section, name, right, set: Set::List(set) }
}

const PORT: &str = "a port from 0 to 65535, such as 8080";
const SECONDS: &str = "seconds, such as 10 or 0.5";
const SOME_SECONDS: &str = "seconds, at least 0.001, such as 10 or 2.5";
const SIZE: &str = "a size, such as 64KiB, 10MB, 1.5GiB or plain bytes";
const SOME_SIZE: &str = "a size over 0, such as 64KiB, 10MB, 1.5GiB or plain bytes";
const NETWORKS: &str = "networks, such as [10.0.0.0/8, ::1/128]";
const HOSTS: &str = "host patterns, such as [example.com, \"*.example.com\"]";

#[rustfmt::skip] // One key, one entry: as a table it can be read down.
pub(super) static KEYS: &[Key] = &[
    one("server", "host", "an IP address, such as 127.0.0.1, 0.0.0.0 or ::",
        |c, v| put(&mut c.server.host, value::address(v))),
    one("server", "port", PORT,
        |c, v| put(&mut c.server.port, value::whole(v, 0..=65_535))),
    one("server", "metrics_port", "a port from 0 to 65535, such as 9090, or 0 for no second listener", |c, v| {
        c.metrics_port_given = true;
        put(&mut c.server.metrics_port, value::whole(v, 0..=65_535))
    }),
    list("server", "trusted_proxies", NETWORKS,
        |c, v| put(&mut c.server.trusted_proxies, each(v, value::network))),
    one("server", "max_connections", "a whole number from 1 to 1000000, such as 4096",
        |c, v| put(&mut c.server.max_connections, value::whole(v, 1..=1_000_000))),
    one("server", "header_timeout_seconds", SOME_SECONDS,
        |c, v| put(&mut c.server.header_timeout, value::some_seconds(v))),
    one("server", "keepalive_timeout_seconds", SOME_SECONDS,
        |c, v| put(&mut c.server.keepalive_timeout, value::some_seconds(v))),
    one("server", "write_idle_timeout_seconds", SOME_SECONDS,
        |c, v| put(&mut c.server.write_idle_timeout, value::some_seconds(v))),
    one("server", "shutdown_grace_seconds", SECONDS,
        |c, v| put(&mut c.server.shutdown_grace, value::seconds(v))),

    one("storage", "base_path", "a directory, such as ./data/cache",
        |c, v| put(&mut c.storage.base_path, value::path(v))),
    one("storage", "database", "a file, such as ./data/metadata.db",
        |c, v| put(&mut c.storage.database, value::path(v))),
    one("storage", "max_artifact_bytes", SOME_SIZE,
        |c, v| put(&mut c.storage.max_artifact_bytes, value::some_size(v))),
    one("storage", "min_free_bytes", SIZE,
        |c, v| put(&mut c.storage.min_free_bytes, value::size(v))),
    one("storage", "checkpoint_bytes", SOME_SIZE,
        |c, v| put(&mut c.storage.checkpoint_bytes, value::some_size(v))),
    one("storage", "partial_keep_hours", "hours from 0 to 8760, such as 24, or 0 to keep nothing",
        |c, v| put(&mut c.storage.partial_keep, value::hours(v))),
    one("storage", "partial_max_bytes", SIZE,
        |c, v| put(&mut c.storage.partial_max_bytes, value::size(v))),

    one("logging", "level", "error, warn, info, debug or trace", |c, v| {
        let levels = [("error", Level::ERROR), ("warn", Level::WARN), ("info", Level::INFO),
            ("debug", Level::DEBUG), ("trace", Level::TRACE)];
        put(&mut c.logging.level, value::word(v, &levels))
    }),
    one("logging", "format", "json or text",
        |c, v| put(&mut c.logging.format, value::word(v, &[("json", LogFormat::Json), ("text", LogFormat::Text)]))),

    one("upstream", "timeout_seconds", SOME_SECONDS,
        |c, v| put(&mut c.upstream.timeout, value::some_seconds(v))),
    one("upstream", "stall_seconds", SOME_SECONDS,
        |c, v| put(&mut c.upstream.stall, value::some_seconds(v))),
    one("upstream", "min_bytes_per_second", SIZE,
        |c, v| put(&mut c.upstream.min_bytes_per_second, value::size(v))),
    one("upstream", "connect_timeout_seconds", SOME_SECONDS,
        |c, v| put(&mut c.upstream.connect_timeout, value::some_seconds(v))),
    one("upstream", "max_retries", "a whole number from 0 to 100, such as 3",
        |c, v| put(&mut c.upstream.max_retries, value::whole(v, 0..=100))),
    one("upstream", "max_redirects", "a whole number from 0 to 100, such as 10",
        |c, v| put(&mut c.upstream.max_redirects, value::whole(v, 0..=100))),
    one("upstream", "max_downloads", "a whole number from 1 to 100000, such as 64",
        |c, v| put(&mut c.upstream.max_downloads, value::whole(v, 1..=100_000))),
    one("upstream", "user_agent", "printable ASCII on one line, such as \"HomeLabArtifactCache/1.0\"",
        |c, v| put(&mut c.upstream.user_agent, value::user_agent(v))),
    optional("upstream", "proxy", "null, or a proxy such as http://proxy.example.com:3128",
        |c, v| put(&mut c.upstream.proxy, v.map(value::proxy).transpose())),
    optional("upstream", "ca_file", "null, or a PEM file such as /etc/ssl/private-ca.pem",
        |c, v| put(&mut c.upstream.ca_file, v.map(value::path).transpose())),
    list("upstream", "allow_private_networks", NETWORKS,
        |c, v| put(&mut c.upstream.allow_private_networks, each(v, value::network))),
    list("upstream", "allow_hosts", HOSTS,
        |c, v| put(&mut c.upstream.allow_hosts, HostGlobs::new(v))),
    list("upstream", "deny_hosts", HOSTS,
        |c, v| put(&mut c.upstream.deny_hosts, HostGlobs::new(v))),

    one("fetch", "stream_after_seconds", SECONDS,
        |c, v| put(&mut c.fetch.stream_after, value::seconds(v))),
    one("fetch", "tail_hold_bytes", SOME_SIZE,
        |c, v| put(&mut c.fetch.tail_hold_bytes, value::some_size(v))),
    one("fetch", "stream_framing", "auto, content-length or chunked", |c, v| {
        let framings = [("auto", StreamFraming::Auto), ("content-length", StreamFraming::ContentLength),
            ("chunked", StreamFraming::Chunked)];
        put(&mut c.fetch.stream_framing, value::word(v, &framings))
    }),
    one("fetch", "mismatch_memory_seconds", SECONDS,
        |c, v| put(&mut c.fetch.mismatch_memory, value::seconds(v))),
    list("fetch", "ignore_query", "parameter patterns, such as [X-Amz-*, \"sv if sig\"]",
        |c, v| put(&mut c.fetch.ignore_query, QueryGlobs::new(v))),

    one("jobs", "snapshots_kept", "a whole number from 0 to 1000, such as 7, or 0 for none",
        |c, v| put(&mut c.jobs.snapshots_kept, value::whole(v, 0..=1_000))),
];

fn put<T, E>(place: &mut T, read: Result<T, E>) -> Result<(), E> {
    *place = read?;
    Ok(())
}

fn each<T>(items: &[&str], parse: fn(&str) -> Result<T, String>) -> Result<Vec<T>, Refused> {
    items.iter().enumerate().map(|(at, item)| parse(item).map_err(|why| (at, why))).collect()
}

/// Whether there is such a section; the error says which there are.
pub(super) fn check_section(section: &str) -> Result<(), String> {
    let mut sections: Vec<&str> = KEYS.iter().map(|k| k.section).collect();
    sections.dedup();
    match sections.contains(&section) {
        true => Ok(()),
        false => Err(format!("unknown section \"{section}\"; {}", suggestion(section, &sections))),
    }
}

/// The key of that name; the error says what would be right. Its section exists.
pub(super) fn find(section: &str, name: &str) -> Result<&'static Key, String> {
    KEYS.iter().find(|k| (k.section, k.name) == (section, name)).ok_or_else(|| {
        if let Some(elsewhere) = KEYS.iter().find(|k| k.name == name) {
            return format!("unknown key \"{name}\" in {section}; it belongs in {}", elsewhere.section);
        }
        let names: Vec<&str> = KEYS.iter().filter(|k| k.section == section).map(|k| k.name).collect();
        format!("unknown key \"{name}\" in {section}; {}", suggestion(name, &names))
    })
}

/// The name that was probably meant, or all of them.
fn suggestion(typed: &str, known: &[&str]) -> String {
    let nearest = known.iter().map(|name| (distance(typed, name), name)).min();
    match nearest {
        Some((steps, name)) if steps <= 1 + name.len() / 4 => format!("did you mean \"{name}\"?"),
        _ => format!("it takes {}", known.join(", ")),
    }
}

/// How many letters to insert, delete, change or swap with a neighbour (optimal string alignment).
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut steps = vec![vec![0; b.len() + 1]; a.len() + 1];
    for i in 0..=a.len() {
        for j in 0..=b.len() {
            steps[i][j] = match (i, j) {
                (0, _) => j,
                (_, 0) => i,
                _ => {
                    let change = steps[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
                    let step = change.min(steps[i - 1][j] + 1).min(steps[i][j - 1] + 1);
                    let swapped = i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1];
                    if swapped { step.min(steps[i - 2][j - 2] + 1) } else { step }
                }
            };
        }
    }
    steps[a.len()][b.len()]
}
