//! Health: `healthy` means that all works, and no other state contains that word.

use crate::harness::{Content, Reply, Running, Service, Upstream, eventually};

#[test]
fn healthy() {
    let service = Service::new().start();
    for path in ["/health", "/health"] {
        let answer = service.get(path);
        assert_eq!((answer.status, answer.header("Content-Type")), (200, "application/json"));
        let json = answer.json();
        assert_eq!(json["status"], "healthy");
        let time = json["timestamp"].as_str().expect("a timestamp");
        assert!(time.ends_with('Z') && time.as_bytes()[10] == b'T', "{time}");
    }
    let head = service.request("HEAD", "/health", &[]);
    assert_eq!((head.status, head.body.len()), (200, 0));
    assert!(checks(&service).iter().all(|(_, holds)| *holds == 1.0), "{:?}", checks(&service));
}

/// The checks that the metrics show, and whether they hold.
fn checks(service: &Running) -> Vec<(String, f64)> {
    let check = |(name, value): (String, f64)| {
        let check = name.strip_prefix("artifact_cache_healthy{check=\"")?.strip_suffix("\"}")?;
        Some((check.to_string(), value))
    };
    service.series().into_iter().filter_map(check).collect()
}

#[test]
fn degraded_when_misses_cannot_work() {
    let service = Service::new().env("STORAGE__MIN_FREE_BYTES", "1000TiB").start();
    let answer = service.get("/health");
    assert_eq!(answer.status, 200, "hits still work");
    let json = answer.json();
    assert_eq!(json["status"], "degraded");
    assert!(json["checks"].is_object(), "{json}");
    let failing = checks(&service).into_iter().filter(|(_, holds)| *holds == 0.0);
    assert_eq!(failing.map(|(check, _)| check).collect::<Vec<_>>(), ["disk"]);
    assert_eq!(service.metric("artifact_cache_storage_min_free_bytes"), 1000.0 * (1u64 << 40) as f64);
    assert!(
        !String::from_utf8_lossy(&answer.body).contains("healthy"),
        "a keyword monitor must see it: {json}"
    );
}

#[test]
fn failing_when_the_store_is_gone() {
    let (up, service) = (Upstream::start(), Service::new().start());
    let url = up.serve("/x", Reply::ok(&Content::of(b"x")));
    service.fetch(&url).assert_ok(b"x");
    let aside = service.service().dir().join("aside");
    std::fs::rename(service.service().base_path(), &aside).unwrap();
    eventually("it fails", || (service.get("/health").status == 503).then_some(()));
    let answer = service.get("/health");
    assert_eq!(answer.json()["status"], "failing");
    assert_eq!(service.metric("artifact_cache_healthy{check=\"storage\"}"), 0.0);
    assert!(!String::from_utf8_lossy(&answer.body).contains("healthy"));
    std::fs::rename(&aside, service.service().base_path()).unwrap();
    eventually("it recovers", || (service.get("/health").json()["status"] == "healthy").then_some(()));
}
