//! The service itself: on its own ports, and as clients see it through what stands in front of it.

use std::{
    io,
    net::{IpAddr, SocketAddr, TcpListener},
    time::SystemTime,
};

use http::{HeaderMap, HeaderName, HeaderValue, header};

use super::Finding;
use crate::{
    cli::{
        client::{Client, Text, text},
        service_url,
    },
    config::Config,
};

static X_CLIENT_IP: HeaderName = HeaderName::from_static("x-client-ip");
/// Nobody's address (RFC 5737).
const STRANGER: &str = "192.0.2.77";
/// Clocks that differ by more confuse whoever compares logs.
const MAX_SKEW_SECONDS: i64 = 10;
const OUR_VERSION: &str = env!("CARGO_PKG_VERSION");

/// Both ports of the configuration, and what answers there.
pub(super) async fn local(config: &Config) -> Vec<Finding> {
    let server = &config.server;
    let mut findings = vec![port(server.host, server.port, "port").await];
    if server.metrics_port != 0 {
        findings.push(port(server.host, server.metrics_port, "metrics port").await);
    }
    if let Some(client) = client(server.host, server.port) {
        findings.extend(version(&client, "version").await);
    }
    findings
}

fn client(host: IpAddr, port: u16) -> Option<Client> {
    Client::new(service_url(host, port).ok()?, None).ok()
}

async fn port(host: IpAddr, port: u16, check: &'static str) -> Finding {
    if port == 0 {
        return Finding::warn(
            check,
            "0: the system chooses another at each start",
            "name one in server.port",
        );
    }
    let address = SocketAddr::new(host, port);
    if let Some(client) = client(host, port)
        && let Ok((_, health)) = client.json("/health").await
        && let Some(word) = health["status"].as_str()
    {
        return match word {
            "healthy" => Finding::ok(check, format!("{address} is the service's, which is healthy")),
            "degraded" => {
                let checks = &health["checks"];
                Finding::warn(
                    check,
                    format!("the service at {address} is degraded: {checks}"),
                    "see the other findings",
                )
            }
            word => Finding::fail(check, format!("the service at {address} is {word}"), "see its log"),
        };
    }
    match TcpListener::bind(address).map_err(|cause| (cause.kind(), cause)) {
        Ok(_) => Finding::ok(check, format!("{address} is free; no service runs there")),
        Err((io::ErrorKind::AddrInUse, _)) => Finding::fail(
            check,
            format!("{address} is taken by something else"),
            format!("ss -ltnp 'sport = :{port}' names it; stop it, or choose another port"),
        ),
        Err((io::ErrorKind::PermissionDenied, cause)) => Finding::fail(
            check,
            format!("{address}: {cause}"),
            "choose a port over 1023, and let a reverse proxy have 80 and 443",
        ),
        Err((_, cause)) => Finding::fail(check, format!("{address}: {cause}"), "correct server.host"),
    }
}

/// Nothing if no service answers, which another finding says.
async fn version(client: &Client, check: &'static str) -> Option<Finding> {
    let metrics = client.read("/metrics", HeaderMap::new()).await.ok()?;
    let line =
        metrics.text.lines().find_map(|line| line.strip_prefix("artifact_cache_build_info{version=\""));
    let running = line.and_then(|line| line.split('"').next());
    Some(match running {
        Some(OUR_VERSION) => Finding::ok(check, format!("{OUR_VERSION}, here and in the running service")),
        Some(other) => Finding::warn(
            check,
            format!("the running service is {other}, this program is {OUR_VERSION}"),
            "restart the service if it was upgraded; else use its own program",
        ),
        None => Finding::warn(
            check,
            format!("this program is {OUR_VERSION}; {} tells none", client.base()),
            "an older version runs, or a proxy keeps /metrics to itself",
        ),
    })
}

/// The service as clients see it, through whatever stands in front of it.
pub(super) async fn through(client: &Client, config: &Config) -> Vec<Finding> {
    let seen = match client.read("/health", HeaderMap::new()).await {
        Ok(seen) => seen,
        Err(error) => {
            return vec![Finding::fail("server", error.to_string(), "is it running, and the name right?")];
        }
    };
    let answers = Finding::ok("server", format!("{} answers {}", client.base(), seen.head.status));
    let mut findings = vec![answers, skew(&seen)];
    findings.extend(version(client, "server's version").await);
    let claim = HeaderMap::from_iter([(
        HeaderName::from_static("x-forwarded-for"),
        HeaderValue::from_static(STRANGER),
    )]);
    if let Ok(claimed) = client.read("/health", claim).await {
        findings.push(seen_address(&seen, &claimed, config));
    }
    findings
}

fn skew(seen: &Text) -> Finding {
    const CHECK: &str = "server's clock";
    let theirs = text(&seen.head, &header::DATE).and_then(|date| httpdate::parse_http_date(date).ok());
    let Some(theirs) = theirs else { return Finding::ok(CHECK, "not told") };
    let unix = |time: SystemTime| {
        time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs() as i64)
    };
    match unix(theirs) - unix(SystemTime::now()) {
        near if near.abs() <= MAX_SKEW_SECONDS => Finding::ok(CHECK, "as here"),
        far => Finding::warn(CHECK, format!("{far} s from this machine's"), "set both from one source (NTP)"),
    }
}

/// Does the service see who asks, and can who asks lie about it?
fn seen_address(seen: &Text, claimed: &Text, config: &Config) -> Finding {
    const CHECK: &str = "client addresses";
    let address = |answer: &Text| text(&answer.head, &X_CLIENT_IP)?.parse::<IpAddr>().ok();
    let ours = seen.ours.ip().to_canonical();
    let (Some(plain), Some(with_claim)) = (address(seen), address(claimed)) else {
        return Finding::warn(
            CHECK,
            "the service does not say whom it sees",
            "it is an older version, or a proxy removes X-Client-IP from the answer to /health",
        );
    };
    let is_trusted = config.server.trusted_proxies.iter().any(|network| network.contains(&ours));
    if with_claim.to_string() == STRANGER && is_trusted {
        return Finding::ok(
            CHECK,
            format!("{ours} is a trusted proxy itself; ask from another machine to judge more"),
        );
    }
    if with_claim.to_string() == STRANGER {
        return Finding::warn(
            CHECK,
            format!("{ours} claimed to be {STRANGER}, and the service believed it"),
            "have the proxy replace X-Forwarded-For, not pass it on, and list only proxies in server.trusted_proxies",
        );
    }
    if plain == ours {
        return Finding::ok(CHECK, format!("the service sees {ours}, as it is, whatever is claimed"));
    }
    Finding::warn(
        CHECK,
        format!("the service sees {plain} instead of {ours}"),
        format!("if {plain} is your proxy, add it to server.trusted_proxies; if it is a NAT, all is well"),
    )
}
