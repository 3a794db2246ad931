//! The command line, and the only place where the parts are put together.

mod backup;
mod restore;
mod serve;

use std::{
    error::Error,
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{Args, Parser, Subcommand};

use crate::config::{self, Config};

/// Read when it is there and no other file is named.
const DEFAULT_CONFIG: &str = "config.yaml";

/// What a verb comes to: the exit code it documents, or an error, which is printed and ends with 1.
type Outcome = Result<ExitCode, Box<dyn Error>>;

/// Fetch a public HTTP(S) artifact once, keep it for ever, and never lie about its content.
///
/// Machines ask `http://HOST:8080/fetch?url=…` instead of the internet. The first request downloads the artifact and
/// stores it under its SHA-256; from then on it is served from disk, whether or not its source still exists.
#[derive(Debug, Parser)]
#[command(name = "artifact-cache", version, after_help = EXAMPLES)]
pub struct Cli {
    #[command(subcommand)]
    verb: Option<Verb>,
    #[command(flatten)]
    config: ConfigArgs,
}

const EXAMPLES: &str = "\
Examples:
  artifact-cache serve
      with built-in defaults: 127.0.0.1:8080, data in ./data
  artifact-cache serve --config /etc/artifact-cache.yaml
  ARTIFACT_CACHE__SERVER__PORT=8081 artifact-cache serve
      the environment overrides every key of the configuration
  curl -fOJ 'http://127.0.0.1:8080/fetch?url=https://example.com/file.tar.gz'";

#[derive(Debug, Subcommand)]
enum Verb {
    /// Run the service (also when no command is given)
    Serve,
    /// Copy the database and all artifacts to a directory, while the service runs or not
    #[command(after_help = backup::AFTER_HELP)]
    Backup(backup::BackupArgs),
    /// Put back a backup, or a daily snapshot of the database
    #[command(after_help = restore::AFTER_HELP)]
    Restore(restore::RestoreArgs),
}

/// Which configuration; the same for every verb that needs one.
#[derive(Debug, Clone, Args)]
struct ConfigArgs {
    /// Configuration file [default: config.yaml in the working directory, if there is one; else built-in defaults]
    #[arg(long, value_name = "FILE", global = true)]
    config: Option<PathBuf>,
}

impl ConfigArgs {
    /// Reads the configuration, and says from which file it came.
    fn load(&self) -> Result<(Config, Option<PathBuf>), config::ConfigError> {
        let default = Path::new(DEFAULT_CONFIG);
        let file = self.config.clone().or_else(|| default.exists().then(|| default.to_owned()));
        // Variables that are not UTF-8 can't be ours.
        let env = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
        Ok((Config::load(file.as_deref(), env)?, file))
    }
}

/// Runs what the command line says. 0: done; 1: it failed, and standard error says why; 2: the command line is wrong;
/// other codes are in the verb's own help.
pub fn run() -> ExitCode {
    let Cli { verb, config } = Cli::parse();
    let done = match verb {
        None | Some(Verb::Serve) => serve::serve(&config),
        Some(Verb::Backup(args)) => load(&config).and_then(|config| backup::backup(&config, &args)),
        Some(Verb::Restore(args)) => load(&config).and_then(|config| restore::restore(&config, &args)),
    };
    done.unwrap_or_else(|error| {
        eprintln!("error: {}", chain(&*error));
        ExitCode::FAILURE
    })
}

fn load(args: &ConfigArgs) -> Result<Config, Box<dyn Error>> {
    Ok(args.load()?.0)
}

/// An error and its causes in one line.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        // Some errors repeat their cause in their own text.
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = error.source();
    }
    text
}
