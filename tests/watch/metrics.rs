//! Metrics: promtool's opinion of them, the page that explains each, and what a monitor sees.

use std::collections::BTreeSet;
use std::fs::File;
use std::process::{Command, Stdio};

use crate::page::Page;
use crate::program::need;
use crate::stage::Stage;

/// The names of metrics in a text: whole words that begin like ours. Those with a colon are recorded by rules.
pub fn names_in(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !(c.is_ascii_alphanumeric() || matches!(c, '_' | ':')));
    let ours = |word: &&str| {
        (word.starts_with("artifact_cache_") || word.starts_with("process_")) && !word.contains(':')
    };
    words.filter(ours).map(str::to_string).collect()
}

/// The names of all that the service exports, as its `# TYPE` lines have them, with the types.
fn typed(stage: &Stage) -> BTreeSet<(String, String)> {
    let text = String::from_utf8(stage.service.get("/metrics").body).unwrap();
    let pair = |line: &str| {
        let (name, kind) = line.strip_prefix("# TYPE ")?.split_once(' ')?;
        Some((name.to_string(), kind.to_string()))
    };
    text.lines().filter_map(pair).collect()
}

/// The names that can stand in a query.
pub fn exported(stage: &Stage) -> BTreeSet<String> {
    let text = String::from_utf8(stage.service.get("/metrics").body).unwrap();
    text.lines().filter(|line| !line.starts_with('#')).flat_map(names_in).collect()
}

#[test]
fn promtool_complains_of_the_documents_gauge_only() {
    let Some(promtool) = need("promtool") else { return };
    let stage = Stage::new();
    stage.traffic();
    let file = stage.dir().join("metrics.txt");
    std::fs::write(&file, stage.service.get("/metrics").body).unwrap();
    let mut command = Command::new(promtool);
    command.args(["check", "metrics"]).stdin(Stdio::from(File::open(&file).unwrap()));
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    let complaints: Vec<&str> = said.lines().filter(|line| !line.is_empty()).collect();
    assert_eq!(complaints.len(), 1, "{said}");
    assert!(complaints[0].starts_with("artifact_cache_items_total "), "{said}");
}

#[test]
fn the_page_has_each_metric_with_its_type_and_no_other() {
    let page = Page::read("metrics.md");
    let mut explained = BTreeSet::new();
    for row in page.text().lines().filter(|line| line.starts_with("| `")) {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        assert!(!cells[3].is_empty(), "no meaning: {row}");
        explained.extend(names_in(cells[1]).into_iter().map(|name| (name, cells[2].to_string())));
    }
    let exported = typed(&Stage::new());
    let lacking: Vec<_> = exported.difference(&explained).collect();
    let invented: Vec<_> = explained.difference(&exported).collect();
    assert!(lacking.is_empty() && invented.is_empty(), "docs/metrics.md lacks {lacking:?}, has {invented:?}");
}

/// What Uptime Kuma's two monitors of the document look for.
#[test]
fn keyword_monitors_find_their_words() {
    let stage = Stage::new();
    let mut client = crate::harness::Client::connect(stage.service.metrics.unwrap());
    client.request("GET", "/metrics", &[]);
    let metrics = client.response("GET");
    for (answer, keyword) in
        [(stage.service.get("/health"), "healthy"), (metrics, "artifact_cache_requests_total")]
    {
        assert_eq!(answer.status, 200);
        assert!(String::from_utf8_lossy(&answer.body).contains(keyword), "{keyword}");
    }
}
