//! `artifact-cache doctor`: looks at a deployment and says what to do about what it finds.
//!
//! It changes nothing, makes nothing, and sends nothing beyond this machine and the service unless `--online` says so.

mod machine;
mod network;
mod service;
mod storage;

use std::process::ExitCode;

use clap::Args;
use serde::Serialize;
use serde_json::json;
use url::Url;

use super::{
    ConfigArgs, Outcome,
    client::{ServerArgs, block_on},
    print,
};
use crate::config::Config;

pub(super) const HELP: &str = "\
Run it on the machine and as the user of the service, with the service's configuration. The service may run or not.

Examples:
  sudo -u artifact-cache artifact-cache doctor --config /etc/artifact-cache/config.yaml
  docker-compose exec artifact-cache artifact-cache doctor
  artifact-cache doctor --server https://artifactcache.lan
      asks through the reverse proxy, too: which version answers, and whether it sees the clients' addresses
  artifact-cache doctor --online
      also asks https://example.com/ as the service would: DNS, TLS, upstream.proxy and the guard
  artifact-cache doctor --json | jq '.findings[] | select(.verdict == \"fail\")'

Exit codes:
  0  nothing failed; there may be warnings
  1  something failed: the service can't do its work, or not safely
  2  the command line is wrong";

/// Asked by `--online` without a URL.
const ONLINE_URL: &str = "https://example.com/";

#[derive(Debug, Args)]
pub(super) struct DoctorArgs {
    #[command(flatten)]
    server: ServerArgs,
    /// Also ask URL, as the service would for a miss
    #[arg(long, value_name = "URL", num_args = 0..=1, default_missing_value = ONLINE_URL)]
    online: Option<String>,
    /// Print all findings as one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Ok,
    Warn,
    Fail,
}

/// One thing that was looked at.
#[derive(Debug, Serialize)]
struct Finding {
    check: &'static str,
    verdict: Verdict,
    /// What is.
    found: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    cure: Option<String>,
}

impl Finding {
    fn ok(check: &'static str, found: impl Into<String>) -> Finding {
        Finding { check, verdict: Verdict::Ok, found: found.into(), cure: None }
    }

    fn warn(check: &'static str, found: impl Into<String>, cure: impl Into<String>) -> Finding {
        Finding { check, verdict: Verdict::Warn, found: found.into(), cure: Some(cure.into()) }
    }

    fn fail(check: &'static str, found: impl Into<String>, cure: impl Into<String>) -> Finding {
        Finding { check, verdict: Verdict::Fail, found: found.into(), cure: Some(cure.into()) }
    }
}

pub(super) fn doctor(args: &DoctorArgs, config: &ConfigArgs) -> Outcome {
    let findings = match config.load() {
        Ok((config, file)) => {
            let from = file.map_or("built-in defaults and environment".into(), |f| f.display().to_string());
            let mut findings = vec![Finding::ok("configuration", from)];
            findings.extend(look(args, &config)?);
            findings
        }
        Err(error) => vec![Finding::fail(
            "configuration",
            error.to_string(),
            "correct it; artifact-cache config default shows every key",
        )],
    };
    let worst = findings.iter().map(|finding| finding.verdict).max().unwrap_or(Verdict::Ok);
    print(&match args.json {
        true => format!("{}\n", json!({ "verdict": worst, "findings": findings })),
        false => text(&findings),
    })?;
    Ok(if worst == Verdict::Fail { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Everything, in the order in which one thing rests on the other.
fn look(args: &DoctorArgs, config: &Config) -> Result<Vec<Finding>, Box<dyn std::error::Error>> {
    let mut findings = machine::look(config);
    findings.extend(storage::look(config));
    findings.extend(network::look(config));
    let named = args.server.server.as_ref().map(|_| args.server.client(no_default)).transpose()?;
    block_on(async {
        findings.extend(service::local(config).await);
        if let Some(client) = &named {
            findings.extend(service::through(client, config).await);
        }
        if let Some(url) = &args.online {
            findings.push(network::online(config, url).await);
        }
    })?;
    Ok(findings)
}

fn no_default() -> Result<Url, String> {
    Err("no server was named".to_owned())
}

fn text(findings: &[Finding]) -> String {
    let mut text = String::new();
    for Finding { check, verdict, found, cure } in findings {
        let word = match verdict {
            Verdict::Ok => "ok  ",
            Verdict::Warn => "WARN",
            Verdict::Fail => "FAIL",
        };
        text += &format!("{word}  {check:<18}  {found}\n");
        if let Some(cure) = cure {
            text += &format!("{:26}→ {cure}\n", "");
        }
    }
    text
}
