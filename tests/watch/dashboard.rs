//! The Grafana dashboard: every panel's query is run by a real Prometheus, and the design document's give right numbers.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::prometheus::Prometheus;
use crate::stage::Stage;

fn dashboard() -> Value {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/grafana/artifact-cache.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// Title and query of everything that a panel shows.
fn queries() -> Vec<(String, String)> {
    let dashboard = dashboard();
    let panels = dashboard["panels"].as_array().unwrap();
    let of_panel = |panel: &Value| {
        let title = panel["title"].as_str().unwrap().to_string();
        let targets = panel["targets"].as_array().cloned().unwrap_or_default();
        targets.into_iter().map(move |target| (title.clone(), target["expr"].as_str().unwrap().to_string()))
    };
    panels.iter().flat_map(of_panel).collect()
}

#[test]
fn every_query_gives_numbers() {
    let stage = Stage::new();
    let Some(prometheus) = Prometheus::watch(&stage) else { return };
    let did = stage.traffic();
    prometheus.catch_up(did.requests());
    let queries = queries();
    assert!(queries.len() > 30, "{}", queries.len());
    for (title, query) in queries {
        // What Grafana puts in for its variables.
        let query = query.replace("$instance", ".*").replace("$__rate_interval", "1m");
        assert!(!query.contains('$'), "{title}: an unknown variable in {query}");
        let values = prometheus.query(&query);
        assert!(!values.is_empty(), "{title}: nothing comes of {query}");
        assert!(values.iter().all(|value| value.is_finite()), "{title}: {values:?} come of {query}");
    }
    let metrics = stage.service.metrics.unwrap().to_string();
    assert_eq!(prometheus.label_values("artifact_cache_items_total", "instance"), [metrics]);
}

/// Grafana refuses less than this; it can't be had here, so the frame of what it reads is checked by hand.
#[test]
fn it_has_the_form_that_grafana_imports() {
    let dashboard = dashboard();
    assert!(dashboard["schemaVersion"].as_u64() >= Some(36) && dashboard["title"] == "artifact-cache");
    assert!(dashboard.get("id").is_none(), "an id belongs to one Grafana");
    let mut ids = BTreeSet::new();
    let mut taken = BTreeSet::new();
    for panel in dashboard["panels"].as_array().unwrap() {
        assert!(ids.insert(panel["id"].as_u64().unwrap()), "an id twice: {}", panel["title"]);
        let place = |key: &str| panel["gridPos"][key].as_u64().unwrap();
        assert!(place("x") + place("w") <= 24, "{}", panel["title"]);
        for cell in (place("x")..place("x") + place("w"))
            .flat_map(|x| (place("y")..place("y") + place("h")).map(move |y| (x, y)))
        {
            assert!(taken.insert(cell), "panels overlap at {cell:?}: {}", panel["title"]);
        }
        for target in panel["targets"].as_array().into_iter().flatten() {
            assert_eq!(target["datasource"]["uid"], "${datasource}", "any Prometheus can be chosen");
        }
    }
}

/// The document's queries, as they stand there.
const HIT_RATE: &str = r#"sum(rate(artifact_cache_requests_total{status="hit"}[5m])) 
/ 
sum(rate(artifact_cache_requests_total[5m])) * 100"#;
const TOTAL_SIZE: &str = "artifact_cache_size_bytes / 1024 / 1024 / 1024";
const P95: &str = "histogram_quantile(0.95, 
  rate(artifact_cache_request_duration_seconds_bucket[5m])
)";

#[test]
fn the_documents_queries_give_right_numbers() {
    let stage = Stage::new();
    let Some(prometheus) = Prometheus::watch(&stage) else { return };
    let began = std::time::Instant::now();
    let did = stage.traffic();
    let took = began.elapsed().as_secs_f64();
    prometheus.catch_up(did.requests());
    let hit_rate = did.hits as f64 / did.requests() as f64 * 100.0;
    assert!((prometheus.value(HIT_RATE) - hit_rate).abs() < 1e-9, "{hit_rate} %");
    let size = did.stored_bytes as f64 / (1u64 << 30) as f64;
    assert!((prometheus.value(TOTAL_SIZE) - size).abs() < 1e-12, "{size} GiB");
    let p95 = prometheus.value(P95);
    let expected = quantile(0.95, &buckets(&stage));
    assert!((p95 - expected).abs() < 1e-6, "{p95} s instead of {expected} s");
    // Three of ten requests had to wait for the upstream, and none took longer than all together.
    let longest = buckets(&stage).iter().map(|(le, _)| *le).find(|le| *le >= took).unwrap();
    assert!((0.1..=longest).contains(&p95), "{p95} s of {took} s");
}

/// The upper bounds of the duration histogram, and how many requests were at most as long.
fn buckets(stage: &Stage) -> Vec<(f64, f64)> {
    let bucket = |(name, count): (String, f64)| {
        let bound = name.strip_prefix("artifact_cache_request_duration_seconds_bucket{le=\"")?;
        Some((bound.strip_suffix("\"}")?.parse().ok()?, count))
    };
    let mut buckets: Vec<(f64, f64)> = stage.service.series().into_iter().filter_map(bucket).collect();
    buckets.sort_by(|a, b| a.0.total_cmp(&b.0));
    buckets
}

/// The quantile as Prometheus documents it: linear within the bucket in which it lies.
fn quantile(share: f64, buckets: &[(f64, f64)]) -> f64 {
    let rank = share * buckets.last().unwrap().1;
    let at = buckets.iter().position(|(_, count)| *count >= rank).unwrap();
    let (below, before) = if at == 0 { (0.0, 0.0) } else { buckets[at - 1] };
    let (above, until) = buckets[at];
    below + (above - below) * (rank - before) / (until - before)
}
