//! `artifact-cache health`: asks a running service how it is; what a container's health check runs.

use std::process::ExitCode;

use clap::Args;
use serde_json::Value;

use super::{ConfigArgs, Outcome, client::ServerArgs, print};

pub(super) const HELP: &str = "\
Examples:
  artifact-cache health
      asks the address of the configuration; 0.0.0.0 and :: mean this machine
  artifact-cache health --server https://artifactcache.lan
  HEALTHCHECK CMD [\"artifact-cache\", \"health\"]
      in a Dockerfile

Exit codes:
  0  healthy, or degraded: stored artifacts are served, new ones can't be had (so a restart would not help)
  1  failing, or no answer
  2  the command line is wrong";

#[derive(Debug, Args)]
pub(super) struct HealthArgs {
    #[command(flatten)]
    server: ServerArgs,
    /// Print the service's answer as it is
    #[arg(long)]
    json: bool,
}

pub(super) fn health(args: &HealthArgs, config: &ConfigArgs) -> Outcome {
    let client = args.server.client(|| config.service())?;
    let (head, answer) = super::client::block_on(client.json("/health"))??;
    let word = answer["status"].as_str().unwrap_or("no status, so it is no artifact-cache");
    print(&if args.json { format!("{answer}\n") } else { text(word, &answer) })?;
    let fine = head.status.is_success() && matches!(word, "healthy" | "degraded");
    Ok(if fine { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn text(word: &str, answer: &Value) -> String {
    let checks = answer["checks"].as_object().into_iter().flatten();
    let lines =
        checks.map(|(check, verdict)| format!("  {check}: {}\n", verdict.as_str().unwrap_or_default()));
    format!("{word}\n") + &lines.collect::<String>()
}
