//! The process's surroundings: user, open files, clock, resolver, certificate authorities.

use std::{fs, path::Path};

use rustix::process::{Resource, getrlimit, getuid};

use super::Finding;
use crate::{config::Config, upstream::Roots};

/// The beginning of 2025 in Unix time, before this program was written: a clock that shows less was never set.
const FIRST_SANE_SECOND: i64 = 1_735_689_600;
/// Descriptors beside those of connections and downloads: database, log, listeners, remembered artifacts.
const OTHER_DESCRIPTORS: u64 = 1_200;

pub(super) fn look(config: &Config) -> Vec<Finding> {
    vec![user(), open_files(config), clock(), resolver(config), authorities(config)]
}

fn user() -> Finding {
    let uid = getuid();
    if uid.is_root() {
        let cure =
            "run both as a user of their own: root may write everywhere, so rights are not judged here";
        return Finding::warn("user", "root", cure);
    }
    Finding::ok("user", format!("uid {}", uid.as_raw()))
}

/// The service raises its own soft limit to the hard one.
fn open_files(config: &Config) -> Finding {
    // A client and its artifact; an upstream and its spool.
    let connections = config.server.max_connections as u64;
    let needed = 2 * connections + 2 * config.upstream.max_downloads as u64 + OTHER_DESCRIPTORS;
    match getrlimit(Resource::Nofile).maximum {
        Some(limit) if limit < needed => Finding::warn(
            "open files",
            format!("at most {limit}, and {connections} connections may need {needed}"),
            format!(
                "raise it (systemd: LimitNOFILE={needed}; compose: ulimits.nofile) or lower server.max_connections"
            ),
        ),
        limit => {
            Finding::ok("open files", limit.map_or("unlimited".into(), |limit| format!("at most {limit}")))
        }
    }
}

fn clock() -> Finding {
    let now = jiff::Timestamp::now();
    if now.as_second() < FIRST_SANE_SECOND {
        let cure = "set it, such as with chrony or systemd-timesyncd: TLS certificates are judged by it";
        return Finding::fail("clock", format!("{now:.0}"), cure);
    }
    Finding::ok("clock", format!("{now:.0}"))
}

fn resolver(config: &Config) -> Finding {
    const FILE: &str = "/etc/resolv.conf";
    let text = fs::read_to_string(Path::new(FILE)).unwrap_or_default();
    let servers: Vec<&str> =
        text.lines().filter_map(|line| line.trim_start().strip_prefix("nameserver")).map(str::trim).collect();
    match (servers.is_empty(), &config.upstream.proxy) {
        (false, _) => Finding::ok("DNS", format!("{} (asked only with --online)", servers.join(", "))),
        (true, Some(proxy)) => {
            Finding::ok("DNS", format!("none here; {proxy} resolves the names of upstreams"))
        }
        (true, None) => Finding::warn(
            "DNS",
            format!("{FILE} names no server, so misses may find no upstream"),
            "name one there, or in the container's dns: setting; --online tries it",
        ),
    }
}

fn authorities(config: &Config) -> Finding {
    const CHECK: &str = "TLS authorities";
    let roots = match Roots::load(config.upstream.ca_file.as_deref()) {
        Ok(roots) => roots,
        Err(error) => {
            return Finding::fail(
                CHECK,
                format!("upstream.ca_file {error}"),
                "the service will not start; correct it",
            );
        }
    };
    let count = roots.count();
    match roots.problems().first() {
        _ if count == 0 => {
            Finding::fail(CHECK, "none, so every https upstream fails", "install the package ca-certificates")
        }
        Some(problem) => {
            Finding::warn(CHECK, format!("{count}, but {problem}"), "reinstall the package ca-certificates")
        }
        None => Finding::ok(CHECK, count.to_string()),
    }
}
