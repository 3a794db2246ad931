//! `artifact-cache stats`: the numbers of `/api/stats`, for people or as JSON.

use std::process::ExitCode;

use clap::Args;
use indicatif::{BinaryBytes, HumanCount};
use serde_json::Value;

use super::{ConfigArgs, Outcome, client::ServerArgs, print};

pub(super) const HELP: &str = "\
Examples:
  artifact-cache stats
  artifact-cache stats --server https://artifactcache.lan
  artifact-cache stats --json | jq .hit_ratio

Exit codes:
  0  printed
  1  no answer
  2  the command line is wrong";

#[derive(Debug, Args)]
pub(super) struct StatsArgs {
    #[command(flatten)]
    server: ServerArgs,
    /// Print the service's answer as it is
    #[arg(long)]
    json: bool,
}

pub(super) fn stats(args: &StatsArgs, config: &ConfigArgs) -> Outcome {
    let client = args.server.client(|| config.service())?;
    let (head, answer) = super::client::block_on(client.json("/api/stats"))??;
    if !head.status.is_success() {
        return Err(answer["message"].as_str().unwrap_or("the service gave no numbers").into());
    }
    print(&if args.json { format!("{answer}\n") } else { table(&answer) })?;
    Ok(ExitCode::SUCCESS)
}

fn table(stats: &Value) -> String {
    let number = |key: &str| stats[key].as_u64().unwrap_or_default();
    let count = |key| HumanCount(number(key)).to_string();
    let bytes = |key| BinaryBytes(number(key)).to_string();
    let rows = [
        ("artifacts", count("total_items"), bytes("total_size_bytes")),
        ("distinct contents on disk", count("unique_blobs"), bytes("stored_bytes")),
        ("free on that disk", String::new(), bytes("free_bytes")),
        ("bodies served", count("total_accesses"), String::new()),
        (
            "hits of all requests since the start",
            format!("{:.1} %", stats["hit_ratio"].as_f64().unwrap_or_default() * 100.0),
            String::new(),
        ),
    ];
    rows.map(|(what, count, bytes)| format!("{what:<37}{count:>12}{bytes:>14}").trim_end().to_owned() + "\n")
        .concat()
}
