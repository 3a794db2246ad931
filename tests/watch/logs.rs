//! The log page: its questions, asked with the real jq of real lines.

use crate::harness::Running;
use crate::page::{Page, printed};
use crate::program::need;
use crate::stage::Stage;

/// The request that the page asks for by its id.
const ID: &str = "f3c26a12b0543632";

/// Writes the lines so far to the file that the page names.
fn save_log(service: &Running) {
    let lines: Vec<String> = service.logs().iter().map(|line| line.to_string()).collect();
    std::fs::write(service.service().dir().join("artifact-cache.log"), lines.join("\n") + "\n").unwrap();
}

#[test]
fn jq_answers_the_pages_questions() {
    let Some(_) = need("jq") else { return };
    let stage = Stage::new();
    let did = stage.traffic();
    let image = &did.sources[2];
    let answer = stage.service.fetch_with(image, &[("X-Request-Id", ID), ("X-Forwarded-For", "192.0.2.7")]);
    assert_eq!(answer.status, 200);
    stage.service.wait_log("the last request", |line| line["request_id"] == ID);
    save_log(&stage.service);

    let ran = Page::read("logs.md").run(&stage, &[]);
    // Seven hits by now.
    let ratio: f64 = printed(&ran, "Hit ratio").trim().parse().unwrap();
    assert!((ratio - 7.0 / 11.0).abs() < 1e-9, "{ratio}");
    let slowest: Vec<&str> = printed(&ran, "Slowest misses").lines().collect();
    assert_eq!(slowest.len(), 3, "{slowest:?}");
    assert!(slowest.iter().all(|line| did.sources.iter().any(|url| line.ends_with(url))), "{slowest:?}");
    let took = |line: &str| line.split(' ').next().unwrap().parse::<u64>().unwrap();
    assert!(took(slowest[0]) >= took(slowest[1]) && took(slowest[1]) >= took(slowest[2]), "{slowest:?}");
    let wanted: Vec<&str> = printed(&ran, "Most wanted URLs").lines().map(str::trim).collect();
    assert_eq!((wanted.len(), wanted[0]), (3, &*format!("4 {image}")));
    assert_eq!(printed(&ran, "Errors by code").trim(), "1 upstream_error");
    let failed = printed(&ran, "What fails, and why").trim();
    assert_eq!(failed, format!("1 {}  upstream returned status 404", did.gone));
    let by_client: Vec<&str> = printed(&ran, "Bytes by client").lines().collect();
    assert_eq!(by_client.len(), 2, "{by_client:?}");
    assert_eq!(by_client[1], "5000000  192.0.2.7");
    let direct = format!("{}  127.0.0.1", did.stored_bytes * 3 + 900_000);
    assert!(by_client[0].starts_with(&direct), "{by_client:?}, not {direct}");
    let one: serde_json::Value = serde_json::from_str(printed(&ran, "One request")).unwrap();
    assert_eq!((&one["msg"], &one["source_url"]), (&"cache HIT".into(), &image.as_str().into()));
}

#[test]
fn the_shippers_configurations_are_yaml() {
    let blocks = Page::read("logs.md").blocks("yaml");
    assert_eq!(blocks.len(), 2);
    for block in blocks {
        let parsed: Result<serde_json::Value, _> = serde_saphyr::from_str(&block.text);
        assert!(parsed.is_ok_and(|value| value.is_object()), "{}", block.text);
    }
}
