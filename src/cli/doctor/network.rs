//! Who may be asked and who is believed: the guard, the trusted proxies, and on request one upstream.

use std::{net::IpAddr, time::Duration};

use ipnet::IpNet;
use url::Url;

use super::Finding;
use crate::{
    artifact::SourceUrl,
    config::Config,
    upstream::{Guard, Upstream},
};

/// One address of each kind that nobody on the internet should reach through this service.
const INTERNAL: [&str; 10] = [
    "127.0.0.1",
    "[::1]",
    "10.0.0.1",
    "172.16.0.1",
    "192.168.0.1",
    "100.64.0.1",
    "169.254.169.254",
    "[fd00::1]",
    "[fe80::1]",
    "[::ffff:127.0.0.1]",
];

/// For the whole of `--online`.
const ONLINE_TIMEOUT: Duration = Duration::from_secs(30);

pub(super) fn look(config: &Config) -> Vec<Finding> {
    let mut findings = vec![guard(config)];
    if config.upstream.proxy.is_some() {
        findings.push(Finding::warn(
            "internal networks",
            "upstream.proxy resolves names itself, so only addresses and internal names are judged here",
            "have the proxy refuse internal networks, too",
        ));
    }
    findings.push(trusted_proxies(&config.server.trusted_proxies));
    findings
}

/// Asks the code that guards every download.
fn guard(config: &Config) -> Finding {
    const CHECK: &str = "internal networks";
    let guard = Guard::new(&config.upstream);
    let is_open = |host: &&str| {
        let url = Url::parse(&format!("http://{host}/"));
        url.is_ok_and(|url| guard.judge_host(&url).is_ok())
    };
    let open: Vec<&str> = INTERNAL.iter().copied().filter(is_open).collect();
    if open.is_empty() {
        return Finding::ok(CHECK, "refused");
    }
    Finding::warn(
        CHECK,
        format!("whoever reaches this service reaches {} through it", open.join(", ")),
        "make upstream.allow_private_networks as narrow as the servers that are meant",
    )
}

/// As a whole: what a proxy really sends is judged with `--server`.
fn trusted_proxies(networks: &[IpNet]) -> Finding {
    const CHECK: &str = "trusted proxies";
    let is_wide = |net: &&IpNet| match net.addr() {
        IpAddr::V4(_) => net.prefix_len() < 8,
        IpAddr::V6(_) => net.prefix_len() < 7,
    };
    match networks.iter().find(is_wide) {
        Some(wide) => Finding::warn(
            CHECK,
            format!("{wide} is nearly everyone, so clients can choose the address in the log themselves"),
            "list the addresses of your proxies in server.trusted_proxies, and nothing else",
        ),
        None => {
            let names: Vec<String> = networks.iter().map(ToString::to_string).collect();
            Finding::ok(CHECK, if names.is_empty() { "none".to_owned() } else { names.join(", ") })
        }
    }
}

/// Asks an upstream what it has, exactly as a miss would.
pub(super) async fn online(config: &Config, url: &str) -> Finding {
    const CHECK: &str = "upstream";
    let source = match SourceUrl::parse(url, &config.fetch.ignore_query) {
        Ok(source) => source,
        Err(error) => return Finding::fail(CHECK, format!("{url}: {error}"), "give another URL to --online"),
    };
    let upstream = match Upstream::new(&config.upstream) {
        Ok(upstream) => upstream,
        Err(error) => {
            return Finding::fail(CHECK, error.to_string(), "the service will not start; correct it");
        }
    };
    let cure = "compare with curl -I on this machine; then look at DNS, firewall and the section upstream";
    match tokio::time::timeout(ONLINE_TIMEOUT, upstream.head(&source)).await {
        Ok(Ok(_)) => Finding::ok(CHECK, format!("{} answers", source.masked())),
        Ok(Err(failure)) => Finding::fail(CHECK, format!("{}: {}", source.masked(), failure.error), cure),
        Err(_) => {
            Finding::fail(CHECK, format!("{}: no answer within {ONLINE_TIMEOUT:?}", source.masked()), cure)
        }
    }
}
