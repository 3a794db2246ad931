//! `artifact-cache config`: is it right, what is in force and why, and what could be set.

use std::process::ExitCode;

use clap::Subcommand;

use super::{ConfigArgs, Outcome, environment, print};
use crate::config::{self, Effective};

pub(super) const HELP: &str = "\
Examples:
  artifact-cache config default > config.yaml
      a file to begin with; delete what you don't change
  artifact-cache config check --config /etc/artifact-cache.yaml
      before a restart; also looks at the variables of this shell
  artifact-cache config show
  artifact-cache config show --json | jq '.[] | select(.from != \"default\")'

Exit codes:
  0  it is right
  1  it is wrong; standard error names the file, the line, the key and what would be right
  2  the command line is wrong";

#[derive(Debug, Subcommand)]
pub(super) enum ConfigVerb {
    /// Check the file and the variables as `serve` would
    Check,
    /// Print every key with the value in force and where it came from; the output is itself a configuration
    Show {
        /// As JSON: a list of objects with key, value and from
        #[arg(long)]
        json: bool,
    },
    /// Print the example: every key with its default and what it means
    Default,
}

pub(super) fn run(verb: &ConfigVerb, args: &ConfigArgs) -> Outcome {
    match verb {
        ConfigVerb::Default => print(config::EXAMPLE)?,
        ConfigVerb::Check => {
            let (_, file) = args.load()?;
            print(&format!(
                "{}: ok\n",
                file.map_or("built-in defaults".into(), |file| file.display().to_string())
            ))?;
        }
        ConfigVerb::Show { json } => {
            // What is wrong must not be shown as in force.
            let (_, file) = args.load()?;
            let keys = config::effective(file.as_deref(), environment())?;
            match json {
                true => print(&(serde_json::to_string_pretty(&keys)? + "\n"))?,
                false => print(&yaml(&keys))?,
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn yaml(keys: &[Effective]) -> String {
    let mut text = String::new();
    let mut last = "";
    for Effective { section, name, value, from, .. } in keys {
        if *section != last {
            text += &format!("{section}:\n");
            last = section;
        }
        // JSON's values are YAML's too.
        text += &format!("  {name}: {value}  # {from}\n");
    }
    text
}
