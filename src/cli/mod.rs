//! The command line, and the only place where the parts are put together.

mod serve;

use std::{error::Error, path::PathBuf, process::ExitCode};

use clap::{Args, Parser, Subcommand};

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
    serve: ServeArgs,
}

const EXAMPLES: &str = "\
Examples:
  artifact-cache serve
      with built-in defaults: 127.0.0.1:8080, data in ./data
  artifact-cache serve --config /etc/artifact-cache.yaml
  ARTIFACT_CACHE__SERVER__PORT=8081 artifact-cache serve
      the environment overrides every key of the configuration
  curl -OJ 'http://127.0.0.1:8080/fetch?url=https://example.com/file.tar.gz'";

#[derive(Debug, Subcommand)]
enum Verb {
    /// Run the service (also when no command is given)
    Serve(ServeArgs),
}

#[derive(Debug, Clone, Args)]
struct ServeArgs {
    /// Configuration file [default: config.yaml in the working directory, if there is one; else built-in defaults]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

/// Runs what the command line says. 0: done; 1: it failed, and standard error says why; 2: the command line is wrong.
pub fn run() -> ExitCode {
    let cli = Cli::parse();
    let done = match cli.verb {
        Some(Verb::Serve(args)) => serve::serve(args.config.or(cli.serve.config)),
        None => serve::serve(cli.serve.config),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", chain(&*error));
            ExitCode::FAILURE
        }
    }
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
