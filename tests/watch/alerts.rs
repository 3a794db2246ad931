//! Alert and recording rules: checked and tried by promtool, judged by a real Prometheus, explained on their page.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;

use crate::harness::eventually;
use crate::metrics::{exported, names_in};
use crate::page::Page;
use crate::program::{need, run};
use crate::prometheus::{Prometheus, config_dir};
use crate::stage::Stage;

fn file(name: &str) -> String {
    fs::read_to_string(config_dir().join(name)).unwrap()
}

/// The alerts in their order: name and severity.
fn alerts() -> Vec<(String, String)> {
    let rules = file("artifact-cache.rules.yml");
    let alert = |rule: &str| {
        let name = rule.lines().next().unwrap().to_string();
        let severity = rule.split("severity: ").nth(1).unwrap().split(' ').next().unwrap();
        (name, severity.to_string())
    };
    rules.split("- alert: ").skip(1).map(alert).collect()
}

/// The alerts that the page explains: heading, and the word that the explanation begins with.
fn explained(page: &Page) -> Vec<(String, String)> {
    let sections = page.text().split("\n## ").skip(1);
    let section = |text: &str| {
        let (name, explanation) = text.split_once("\n\n").unwrap();
        (name.to_string(), explanation.split('*').nth(1).unwrap().trim_end_matches('.').to_string())
    };
    sections.map(section).collect()
}

#[test]
fn promtool_finds_the_rules_good_and_each_fires_when_it_should() {
    let Some(promtool) = need("promtool") else { return };
    for args in [
        &["check", "config", "prometheus.yml"][..],
        &["check", "rules", "--lint-fatal", "artifact-cache.rules.yml"],
        &["test", "rules", "artifact-cache.rules.test.yml"],
    ] {
        let mut command = Command::new(&promtool);
        command.args(args).current_dir(config_dir());
        run(command).assert_success();
    }
}

#[test]
fn each_alert_is_tried_and_explained() {
    let (tests, alerts) = (file("artifact-cache.rules.test.yml"), alerts());
    let tried: BTreeSet<_> = tests
        .lines()
        .filter_map(|line| line.trim().strip_prefix("alertname: "))
        .map(str::to_string)
        .collect();
    assert!(alerts.len() > 10, "{alerts:?}");
    assert_eq!(tried, alerts.iter().map(|(name, _)| name.clone()).collect());
    assert_eq!(explained(&Page::read("alerts.md")), alerts);
}

#[test]
fn the_rules_use_metrics_and_labels_that_exist() {
    let (stage, rules) = (Stage::new(), file("artifact-cache.rules.yml"));
    let exported = exported(&stage);
    let unknown: Vec<_> = names_in(&rules).into_iter().filter(|name| !exported.contains(name)).collect();
    assert_eq!(unknown, Vec::<String>::new());
    let scraped = String::from_utf8(stage.service.get("/metrics").body).unwrap();
    let mut labels = 0;
    for label in ["status", "code", "check"] {
        for values in rules.split(&format!("{label}=")).skip(1) {
            let values = values.trim_start_matches('~').split('"').nth(1).unwrap();
            for value in values.split('|') {
                labels += 1;
                assert!(scraped.contains(&format!("{label}=\"{value}\"")), "no {label} is {value}");
            }
        }
    }
    assert!(labels > 5, "{labels}");
}

#[test]
fn prometheus_judges_the_rules_and_finds_a_working_service_in_order() {
    let stage = Stage::new();
    let Some(prometheus) = Prometheus::watch(&stage) else { return };
    let did = stage.traffic();
    prometheus.catch_up(did.requests());
    let rules = eventually("all rules are judged", || {
        // Groups are first judged at a moment of their own within the interval.
        let rules = prometheus.rules();
        let are_judged = !rules.is_empty() && rules.iter().all(|rule| rule["health"] != "unknown");
        are_judged.then_some(rules)
    });
    for rule in &rules {
        assert_eq!(rule["health"], "ok", "{rule}");
        assert_ne!(rule["state"], "firing", "{rule}");
    }
    assert!(rules.iter().filter(|rule| rule["type"] == "alerting").count() == alerts().len());
    eventually("the recorded ratio is what happened", || {
        let ratios = prometheus.query("instance:artifact_cache_hit:ratio_rate5m");
        ratios.iter().any(|ratio| (ratio - 0.6).abs() < 1e-9).then_some(())
    });
}
