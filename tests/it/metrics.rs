//! Metrics and statistics: the document's names, and honest numbers.

use crate::harness::{Client, Content, Gate, Reply, Service, Upstream, WRONG_SHA, eventually, fetch_target};

const HIT: &str = "artifact_cache_requests_total{status=\"hit\"}";
const MISS: &str = "artifact_cache_requests_total{status=\"miss\"}";
const ERROR: &str = "artifact_cache_requests_total{status=\"error\"}";

#[test]
fn every_series_is_there_from_the_start() {
    let service = Service::new().start();
    let series = service.series();
    for name in [
        HIT,
        MISS,
        ERROR,
        "artifact_cache_downloads_total",
        "artifact_cache_bytes_downloaded_total",
        "artifact_cache_bytes_served_total",
        "artifact_cache_items_total",
        "artifact_cache_size_bytes",
        "artifact_cache_request_duration_seconds_sum",
        "artifact_cache_request_duration_seconds_count",
        "artifact_cache_request_duration_seconds_bucket{le=\"0.0005\"}",
        "artifact_cache_request_duration_seconds_bucket{le=\"0.005\"}",
        "artifact_cache_request_duration_seconds_bucket{le=\"0.01\"}",
        "artifact_cache_request_duration_seconds_bucket{le=\"+Inf\"}",
        "artifact_cache_download_size_bytes_sum",
        "artifact_cache_download_size_bytes_count",
        "artifact_cache_inflight_downloads",
        "artifact_cache_collapsed_requests_total",
        "artifact_cache_upstream_retries_total",
        "artifact_cache_upstream_resumes_total",
        "artifact_cache_checksum_mismatches_total",
        "artifact_cache_orphan_blobs",
        "artifact_cache_blobs_corrupt_total",
    ] {
        assert_eq!(series.get(name), Some(&0.0), "{name}");
    }
    assert!(series["artifact_cache_storage_free_bytes"] > 0.0);
    let bucket = |le: &str| format!("artifact_cache_request_duration_seconds_bucket{{le=\"{le}\"}}");
    assert!(["600", "600.0"].iter().any(|le| series.contains_key(&bucket(le))), "the last bucket is 600 s");
    for code in CODES {
        let name = format!("artifact_cache_errors_total{{code=\"{code}\"}}");
        assert_eq!(series.get(&name), Some(&0.0), "{name}");
    }
    assert!(series.keys().any(|name| name.starts_with("process_")), "process metrics");
}

/// Every error code of `/fetch`.
const CODES: [&str; 13] = [
    "missing_parameter",
    "invalid_parameter",
    "forbidden_upstream",
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
];

#[test]
fn the_text_format_is_the_classic_one() {
    let service = Service::new().start();
    let answer = service.get("/metrics");
    assert!(answer.header("Content-Type").starts_with("text/plain; version=0.0.4"), "{:?}", answer.head);
    let text = String::from_utf8(answer.body).unwrap();
    for line in [
        "# TYPE artifact_cache_requests_total counter",
        "# TYPE artifact_cache_downloads_total counter",
        "# TYPE artifact_cache_items_total gauge",
        "# TYPE artifact_cache_size_bytes gauge",
        "# TYPE artifact_cache_request_duration_seconds histogram",
        "# TYPE artifact_cache_download_size_bytes histogram",
    ] {
        assert!(text.lines().any(|l| l == line), "no {line:?} in\n{text}");
    }
    assert!(!text.contains("# EOF"), "that is OpenMetrics");
    assert!(!text.contains("_total_total"));
}

#[test]
fn names_and_types() {
    let service = Service::new().start();
    let text = String::from_utf8(service.get("/metrics").body).unwrap();
    let mut types: Vec<&str> =
        text.lines().filter_map(|line| line.strip_prefix("# TYPE artifact_cache_")).collect();
    types.sort_unstable();
    insta::assert_snapshot!("metric_names_and_types", types.join("\n"));
}

#[test]
fn requests_are_counted_once_by_their_outcome() {
    let (up, service) = (Upstream::start(), Service::new().start());
    let content = Content::new(130, 1_000);
    let url = up.serve("/m", Reply::ok(&content));
    service.fetch(&url).assert_ok(&content.bytes());
    service.wait_metric(MISS, 1.0);
    service.fetch(&url).assert_ok(&content.bytes());
    service.fetch_with(&url, &[("Range", "bytes=0-99")]);
    service.fetch_with(&url, &[("If-None-Match", "*")]);
    service.request("HEAD", &fetch_target(&url), &[]);
    service.wait_metric(HIT, 4.0);
    service.get("/fetch");
    service.fetch_sha(&url, WRONG_SHA);
    service.fetch("http://10.0.0.1/");
    service.request("POST", "/fetch", &[]);
    service.wait_metric(ERROR, 4.0);
    let series = service.series();
    assert_eq!((series[HIT], series[MISS], series[ERROR]), (4.0, 1.0, 4.0));
    assert_eq!(series["artifact_cache_request_duration_seconds_count"], 9.0);
    assert_eq!(series["artifact_cache_downloads_total"], 1.0);
    assert_eq!(series["artifact_cache_bytes_downloaded_total"], 1000.0);
    assert_eq!(series["artifact_cache_bytes_served_total"], 2100.0);
    assert_eq!((series["artifact_cache_items_total"], series["artifact_cache_size_bytes"]), (1.0, 1000.0));
    assert_eq!(series["artifact_cache_download_size_bytes_count"], 1.0);
    for code in ["missing_parameter", "checksum_mismatch", "forbidden_upstream", "method_not_allowed"] {
        assert_eq!(series[&format!("artifact_cache_errors_total{{code=\"{code}\"}}")], 1.0, "{code}");
    }
}

#[test]
fn other_routes_are_not_counted() {
    let service = Service::new().start();
    for target in ["/health", "/metrics", "/api/stats", "/nothing", "/health"] {
        service.get(target);
    }
    let series = service.series();
    assert_eq!((series[HIT], series[MISS], series[ERROR]), (0.0, 0.0, 0.0));
    assert_eq!(series["artifact_cache_request_duration_seconds_count"], 0.0);
}

#[test]
fn a_body_its_client_did_not_take_is_an_error() {
    let (up, service) = (Upstream::start(), Service::new().start());
    let content = Content::new(131, 64 << 20);
    let url = up.serve("/left", Reply::ok(&content));
    service.request("GET", &fetch_target(&url), &[("Range", "bytes=0-0")]);
    service.wait_metric(MISS, 1.0);
    let mut client = service.connect();
    client.request("GET", &fetch_target(&url), &[]);
    assert_eq!(client.head().status(), 200);
    drop(client);
    service.wait_metric(ERROR, 1.0);
    assert_eq!(service.metric(HIT), 0.0);
}

#[test]
fn both_ports_serve_metrics() {
    let service = Service::new().without("SERVER__METRICS_PORT");
    // A free port of one's own: 0 would switch it off.
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let service = service.env("SERVER__METRICS_PORT", &free.to_string()).start();
    let metrics = service.metrics.expect("the start line names the second listener");
    assert_eq!(metrics.port(), free);
    let mut client = Client::connect(metrics);
    client.request("GET", "/metrics", &[]);
    let answer = client.response("GET");
    let names = |text: &[u8]| {
        crate::harness::service::parse_metrics(&String::from_utf8_lossy(text)).into_keys().collect::<Vec<_>>()
    };
    assert_eq!(names(&answer.body), names(&service.get("/metrics").body));
    client.request("GET", "/fetch?url=http://127.0.0.1/", &[]);
    assert_eq!(client.response("GET").status, 404, "nothing but metrics there");
}

#[test]
fn the_second_listener_can_be_off() {
    let service = Service::new().start();
    assert_eq!(service.metrics, None);
}

#[test]
fn the_number_of_series_never_depends_on_requests() {
    let (up, service) = (Upstream::start(), Service::new().start());
    let before: Vec<String> = service.series().into_keys().collect();
    let mut client = service.connect();
    for n in 0..300 {
        let url =
            up.serve(&format!("/u{n}"), Reply::new(if n % 2 == 0 { 404 } else { 200 }, Content::of(b"u")));
        client.request("GET", &fetch_target(&url), &[("User-Agent", &format!("agent {n}"))]);
        client.response("GET");
        client.request("GET", &format!("/fetch?x{n}=1"), &[]);
        client.response("GET");
    }
    let after: Vec<String> = service.series().into_keys().collect();
    assert_eq!(before, after);
}

#[test]
fn running_downloads_are_shown() {
    let (up, service) = (Upstream::start(), Service::new().start());
    let gate = Gate::new();
    let door = gate.clone();
    let url = up.on("/run", move |x| {
        door.wait();
        x.reply(&Reply::ok(&Content::of(b"r")))
    });
    let mut client = service.connect();
    client.request("GET", &fetch_target(&url), &[]);
    service.wait_metric("artifact_cache_inflight_downloads", 1.0);
    gate.open();
    client.response("GET").assert_ok(b"r");
    service.wait_metric("artifact_cache_inflight_downloads", 0.0);
}

#[test]
fn statistics() {
    let (up, service) = (Upstream::start(), Service::new().start());
    let empty = service.stats();
    assert_eq!(
        (&empty["total_items"], &empty["total_size_bytes"], &empty["total_accesses"]),
        (&0.into(), &0.into(), &0.into())
    );
    let url = up.serve("/s", Reply::ok(&Content::new(132, 500)));
    service.fetch(&url);
    service.fetch(&url);
    let stats =
        eventually("two accesses", || Some(service.stats()).filter(|stats| stats["total_accesses"] == 2));
    assert_eq!((&stats["total_items"], &stats["total_size_bytes"]), (&1.into(), &500.into()));
    assert_eq!((&stats["unique_blobs"], &stats["stored_bytes"]), (&1.into(), &500.into()));
    assert_eq!(stats["hit_ratio"], 0.5);
    assert!(stats["free_bytes"].as_u64().unwrap() > 0);
}

#[test]
fn totals_outlive_a_restart() {
    let (up, mut service) = (Upstream::start(), Service::new().start());
    let url = up.serve("/s", Reply::ok(&Content::new(133, 500)));
    service.fetch(&url);
    service.term();
    let again = service.again().start();
    let series = again.series();
    assert_eq!((series["artifact_cache_items_total"], series["artifact_cache_size_bytes"]), (1.0, 500.0));
    assert_eq!(again.stats()["total_accesses"], 1);
}
