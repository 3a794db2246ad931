//! One request to `/fetch` from its head to the end of its body: counted once, logged once, where it ends.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Instant,
};

use http::{HeaderMap, HeaderName};
use ipnet::IpNet;

use super::{App, connection::Connection};
use crate::{
    artifact::{CacheStatus, RequestId, SourceUrl},
    cache::Broken,
    telemetry::metrics::Outcome,
};

pub(super) static X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
static X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

/// What is known of a request so far. Dropping it ends it: counts it and writes its line.
#[derive(Debug)]
pub(super) struct Exchange {
    app: Arc<App>,
    asked: Instant,
    connection: Arc<Connection>,
    /// The client's address, as a trusted proxy says.
    forwarded: Option<IpAddr>,
    request_id: RequestId,
    url: Option<SourceUrl>,
    ending: Ending,
    body_bytes: u64,
}

#[derive(Debug)]
enum Ending {
    /// Not answered yet; if it stays so, the client left.
    Unanswered,
    Answered {
        status: CacheStatus,
        collapsed: bool,
    },
    Failed {
        code: &'static str,
        message: String,
        is_ours: bool,
    },
}

impl Exchange {
    pub(super) fn begin(
        app: &Arc<App>,
        connection: &Arc<Connection>,
        headers: &HeaderMap,
        request_id: RequestId,
        asked: Instant,
    ) -> Exchange {
        Exchange {
            app: app.clone(),
            asked,
            connection: connection.clone(),
            forwarded: forwarded_for(connection.peer(), headers, &app.config.server.trusted_proxies),
            request_id,
            url: None,
            ending: Ending::Unanswered,
            body_bytes: 0,
        }
    }

    pub(super) fn request_id(&self) -> RequestId {
        self.request_id.clone()
    }

    pub(super) fn concerns(&mut self, url: SourceUrl) {
        self.url = Some(url);
    }

    pub(super) fn answered(&mut self, status: CacheStatus, collapsed: bool) {
        self.ending = Ending::Answered { status, collapsed };
    }

    /// `is_ours`: the client could not have avoided it.
    pub(super) fn failed(&mut self, code: &'static str, message: String, is_ours: bool) {
        self.ending = Ending::Failed { code, message, is_ours };
    }

    pub(super) fn broke(&mut self, broken: &Broken) {
        self.failed(broken.0.code(), broken.0.to_string(), true);
    }

    /// The client was gone before the last byte.
    pub(super) fn abandoned(&mut self) {
        self.failed("broken_body", "client closed the connection before the end".to_owned(), false);
    }

    pub(super) fn gave(&mut self, bytes: u64) {
        self.body_bytes += bytes;
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        if matches!(self.ending, Ending::Unanswered) {
            if std::thread::panicking() {
                self.failed("internal_error", "the request panicked".to_owned(), true);
            } else {
                self.abandoned();
            }
        }
        let took = self.asked.elapsed();
        let outcome = match self.ending {
            Ending::Answered { status: CacheStatus::Hit, .. } => Outcome::Hit,
            Ending::Answered { status: CacheStatus::Miss, .. } => Outcome::Miss,
            Ending::Failed { code, .. } => Outcome::Error(code),
            Ending::Unanswered => Outcome::Error("broken_body"),
        };
        self.app.metrics.request_ended(outcome, took, self.body_bytes);
        let source_url = self.url.as_ref().map(SourceUrl::masked);
        let source_url = source_url.as_deref();
        let duration_ms = took.as_millis() as u64;
        let size_bytes = self.body_bytes;
        let request_id = self.request_id.as_str();
        let forwarded = self.forwarded.map(|address| address.to_string());
        let client_ip = forwarded.as_deref().unwrap_or(self.connection.peer_text());
        match &self.ending {
            Ending::Answered { status: CacheStatus::Hit, .. } => {
                tracing::info!(source_url, size_bytes, duration_ms, client_ip, request_id, "cache HIT");
            }
            Ending::Answered { status: CacheStatus::Miss, collapsed } => {
                // Said only of those who joined another's download.
                let collapsed = collapsed.then_some(true);
                let message = "cache MISS - downloaded from upstream";
                tracing::info!(
                    source_url,
                    size_bytes,
                    duration_ms,
                    client_ip,
                    request_id,
                    collapsed,
                    "{message}"
                );
            }
            Ending::Failed { code, message: error, is_ours: true } => {
                tracing::error!(source_url, error, code, duration_ms, client_ip, request_id, "fetch failed");
            }
            Ending::Failed { code, message: error, is_ours: false } => {
                tracing::warn!(source_url, error, code, duration_ms, client_ip, request_id, "fetch failed");
            }
            Ending::Unanswered => {}
        }
    }
}

/// The client's address: the peer's, or what a trusted proxy says.
pub(super) fn client_ip(app: &App, peer: SocketAddr, headers: &HeaderMap) -> IpAddr {
    forwarded_for(peer, headers, &app.config.server.trusted_proxies).unwrap_or(peer.ip())
}

/// The client's address: the last one in `X-Forwarded-For` that was not put there by a trusted proxy, if the connection
/// itself comes from one.
fn forwarded_for(peer: SocketAddr, headers: &HeaderMap, trusted: &[IpNet]) -> Option<IpAddr> {
    let is_trusted =
        |address: IpAddr| trusted.iter().any(|network| network.contains(&address.to_canonical()));
    if !is_trusted(peer.ip()) {
        return None;
    }
    let mut last = None;
    let values = headers.get_all(&X_FORWARDED_FOR);
    for hop in values.iter().rev().filter_map(|value| value.to_str().ok()).flat_map(|value| value.rsplit(','))
    {
        // What is no address can't be trusted, and neither can anything before it.
        let Ok(address) = hop.trim().parse::<IpAddr>() else { break };
        last = Some(address);
        if !is_trusted(address) {
            break;
        }
    }
    last
}

/// The client's own, or a new one.
pub(super) fn request_id(headers: &HeaderMap) -> RequestId {
    headers.get(&X_REQUEST_ID).and_then(RequestId::accept).unwrap_or_else(RequestId::random)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_trusted_proxy_may_name_the_client() {
        let trusted: Vec<IpNet> = vec!["127.0.0.1/32".parse().unwrap(), "10.0.0.0/8".parse().unwrap()];
        let show = |peer: &str, forwarded: &str| {
            let headers = HeaderMap::from_iter([(X_FORWARDED_FOR.clone(), forwarded.parse().unwrap())]);
            let forwarded = forwarded_for(peer.parse().unwrap(), &headers, &trusted);
            forwarded.map_or(peer.to_owned(), |address| address.to_string())
        };
        assert_eq!(show("192.0.2.9:5", "198.51.100.1"), "192.0.2.9:5");
        assert_eq!(show("127.0.0.1:5", "198.51.100.1"), "198.51.100.1");
        assert_eq!(show("127.0.0.1:5", "6.6.6.6, 198.51.100.1, 10.1.2.3"), "198.51.100.1");
        assert_eq!(show("127.0.0.1:5", "6.6.6.6, nonsense, 10.1.2.3"), "10.1.2.3");
        assert_eq!(show("127.0.0.1:5", "nonsense"), "127.0.0.1:5");
        assert_eq!(show("[::ffff:127.0.0.1]:5", "198.51.100.1"), "198.51.100.1");
    }
}
