//! Health: `healthy` means that all works, and no other state contains that word.

use crate::harness::{Content, Reply, Running, Service, Upstream, build_shim, eventually};

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

#[test]
fn it_says_whom_it_sees() {
    let service = Service::new().start();
    assert_eq!(service.get("/health").header("X-Client-IP"), "127.0.0.1");
    let forwarded = service.request("GET", "/health", &[("X-Forwarded-For", "192.0.2.9")]);
    assert_eq!(forwarded.header("X-Client-IP"), "192.0.2.9", "as the log would, from a trusted proxy");
    let strict = Service::new().env("SERVER__TRUSTED_PROXIES", "").start();
    let forwarded = strict.request("GET", "/health", &[("X-Forwarded-For", "192.0.2.9")]);
    assert_eq!(forwarded.header("X-Client-IP"), "127.0.0.1");
}

/// While the file `TRIGGER` is there, no look into the directory of the store ends.
const HANGING: &str = r#"
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <string.h>
#include <unistd.h>

DIR *opendir(const char *path) {
    DIR *(*real)(const char *) = (DIR * (*)(const char *))dlsym(RTLD_NEXT, "opendir");
    size_t length = strlen(path);
    while (length >= 6 && !strcmp(path + length - 6, "/cache") && !access(TRIGGER, F_OK)) usleep(20000);
    return real(path);
}
"#;

#[test]
fn a_disk_that_hangs_costs_one_thread_however_many_ask() {
    let dir = tempfile::tempdir().unwrap();
    let trigger = dir.path().join("hang");
    let name = "health::a_disk_that_hangs_costs_one_thread_however_many_ask";
    let Some(shim) = build_shim(dir.path(), HANGING, &trigger, name) else { return };
    let (up, content) = (Upstream::start(), Content::new(156, 1000));
    let service = Service::new().preload(&shim).env("UPSTREAM__MAX_DOWNLOADS", "2").start();
    std::fs::write(&trigger, "").unwrap();
    // More than there are threads that may wait for a disk.
    let mut asking: Vec<_> = (0..300).map(|_| service.connect()).collect();
    asking.iter_mut().for_each(|client| client.request("GET", "/health", &[]));
    let url = up.serve("/a", Reply::ok(&content));
    assert_eq!(service.fetch(&url).assert_ok(&content.bytes()).cache_status(), "MISS");
    std::fs::remove_file(&trigger).unwrap();
    for client in &mut asking {
        assert_eq!(client.response("GET").status, 200);
    }
}
