//! The command line, and the only place where the parts are put together.

mod backup;
mod client;
mod completions;
mod config;
mod delete;
mod doctor;
mod get;
mod health;
mod man;
mod restore;
mod serve;
mod stats;
mod systemd;
mod verify;

use std::{
    error::Error,
    io::{self, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{Args, Parser, Subcommand};
use url::Url;

use crate::config::{Config, ConfigError};

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
    /// Fetch an artifact through a running service: with progress, resumed and verified
    #[command(after_help = get::HELP)]
    Get(get::GetArgs),
    /// Ask a running service how it is
    #[command(after_help = health::HELP)]
    Health(health::HealthArgs),
    /// Show how much a running service holds and has served
    #[command(after_help = stats::HELP)]
    Stats(stats::StatsArgs),
    /// Look at a deployment and say what to do about what is wrong or risky
    #[command(after_help = doctor::HELP)]
    Doctor(doctor::DoctorArgs),
    /// Check the configuration, show what is in force and why, or print the example with all defaults
    #[command(subcommand, after_help = config::HELP)]
    Config(config::ConfigVerb),
    /// Print the script with which a shell completes this program's commands and options
    #[command(after_help = completions::HELP)]
    Completions(completions::CompletionsArgs),
    /// Print the manual page, or write those of all commands
    #[command(after_help = man::HELP)]
    Man(man::ManArgs),
    /// Copy the database and all artifacts to a directory, while the service runs or not
    #[command(after_help = backup::AFTER_HELP)]
    Backup(backup::BackupArgs),
    /// Put back a backup, or a daily snapshot of the database
    #[command(after_help = restore::AFTER_HELP)]
    Restore(restore::RestoreArgs),
    /// Delete artifacts from the cache, or files that the database does not know
    #[command(after_help = delete::AFTER_HELP)]
    Delete(delete::DeleteArgs),
    /// Read the stored files again: is everything there, and is it what it was?
    #[command(after_help = verify::HELP)]
    Verify(verify::VerifyArgs),
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
    fn load(&self) -> Result<(Config, Option<PathBuf>), ConfigError> {
        let file = self.file();
        Ok((Config::load(file.as_deref(), environment())?, file))
    }

    /// The file that is read, if there is one.
    fn file(&self) -> Option<PathBuf> {
        let default = Path::new(DEFAULT_CONFIG);
        self.config.clone().or_else(|| default.exists().then(|| default.to_owned()))
    }

    /// Where the service of this configuration answers, seen from this machine.
    fn service(&self) -> Result<Url, String> {
        let (config, _) = self.load().map_err(|error| error.to_string())?;
        service_url(config.server.host, config.server.port)
    }
}

/// Prints a verb's answer. A reader who has left, as `head` does, has seen enough.
fn print(text: &str) -> io::Result<()> {
    match io::stdout().write_all(text.as_bytes()) {
        Err(cause) if cause.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written,
    }
}

/// The environment without what is not UTF-8, which can't be ours.
fn environment() -> impl Iterator<Item = (String, String)> {
    std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
}

/// Where a listener of this machine is reached from here.
///
/// # Errors
/// A port that the system chose, which nobody but the service knows.
fn service_url(host: IpAddr, port: u16) -> Result<Url, String> {
    let host: IpAddr = match host {
        IpAddr::V4(any) if any.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(any) if any.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        host => host,
    };
    if port == 0 {
        return Err(
            "server.port is 0, so the system chose one: name it with --server http://HOST:PORT".to_owned()
        );
    }
    Url::parse(&format!("http://{}", SocketAddr::new(host, port))).map_err(|error| error.to_string())
}

/// Runs what the command line says. 0: done; 1: it failed, and standard error says why; 2: the command line is wrong;
/// other codes are in the verb's own help.
pub fn run() -> ExitCode {
    let Cli { verb, config } = Cli::parse();
    let done = match verb {
        None | Some(Verb::Serve) => serve::serve(&config),
        Some(Verb::Get(args)) => get::get(&args),
        Some(Verb::Health(args)) => health::health(&args, &config),
        Some(Verb::Stats(args)) => stats::stats(&args, &config),
        Some(Verb::Doctor(args)) => doctor::doctor(&args, &config),
        Some(Verb::Config(verb)) => config::run(&verb, &config),
        Some(Verb::Completions(args)) => completions::completions(&args),
        Some(Verb::Man(args)) => man::man(&args),
        Some(Verb::Backup(args)) => load(&config).and_then(|config| backup::backup(&config, &args)),
        Some(Verb::Restore(args)) => load(&config).and_then(|config| restore::restore(&config, &args)),
        Some(Verb::Delete(args)) => load(&config).and_then(|config| delete::delete(&config, &args)),
        Some(Verb::Verify(args)) => verify::verify(&args, &config),
    };
    done.unwrap_or_else(|error| {
        say(format_args!("error: {}", chain(&*error)));
        ExitCode::FAILURE
    })
}

fn load(args: &ConfigArgs) -> Result<Config, Box<dyn Error>> {
    Ok(args.load()?.0)
}

/// A line on standard error, if anybody takes it: `eprintln!` would panic where it is full or closed.
fn say(line: impl std::fmt::Display) {
    let _ = writeln!(io::stderr(), "{line}");
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
