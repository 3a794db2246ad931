//! `artifact-cache get`: fetches one artifact through a running service, resumes it, verifies it, and says how it went.

mod outcome;
mod progress;
mod sink;
mod transfer;

use std::{io::IsTerminal, path::PathBuf, process::ExitCode, time::Duration};

use clap::{Args, builder::TypedValueParser};
use url::Url;

use super::{Outcome, client::ServerArgs};
use crate::artifact::{Digest, SourceUrl, globs::QueryGlobs};
use outcome::{Failure, Fetched, report};
use progress::Progress;
use sink::Sink;
use transfer::Transfer;

/// Where a service is expected when none is named.
const DEFAULT_SERVER: &str = "http://127.0.0.1:8080";

pub(super) const HELP: &str = "\
The bytes go to FILE.part, which becomes FILE when it is whole and its SHA-256 is what the service (and --sha256) says.
A FILE.part that is there already is continued. A transfer that breaks off is taken up again where it broke.

Examples:
  artifact-cache get -O https://example.com/tool-1.2.tar.gz
      to ./tool-1.2.tar.gz
  artifact-cache get https://example.com/tool.tar.gz --sha256 7a1b2c… -o tool.tar.gz
      does nothing if tool.tar.gz has this checksum already
  artifact-cache get https://example.com/tool.tar.gz | tar xz
      verified at the end: check the exit code (set -o pipefail)
  export ARTIFACT_CACHE_SERVER=https://artifactcache.lan
      then --server can be left out

Exit codes:
  0  the artifact is there, whole and verified
  1  something here failed, such as writing the file
  2  wrong usage: the command line, or a URL that the service does not take
  3  the checksum does not match
  4  the source: it has no such artifact, can't be reached, or may not be asked
  5  the service: it can't be reached, is busy, fails, or the transfer kept breaking off";

#[derive(Debug, Args)]
pub(super) struct GetArgs {
    /// What to fetch: an absolute http:// or https:// URL
    url: String,
    /// Write to FILE; - is standard output, also the default unless that is a terminal
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Write to a file named like the end of the URL's path, in the working directory
    #[arg(short = 'O', long, conflicts_with = "output")]
    remote_name: bool,
    /// The SHA-256 that it must have, 64 hex digits
    #[arg(long, value_name = "HEX", value_parser = checksum())]
    sha256: Option<Digest>,
    #[command(flatten)]
    server: ServerArgs,
    /// How often in a row to take up a transfer that brings nothing new
    #[arg(long, value_name = "N", default_value_t = 5)]
    retries: u32,
    /// How long the service may send nothing. It needs up to upstream.timeout_seconds, 600, for a source that stalls
    #[arg(long, value_name = "SECONDS", default_value = "660", value_parser = seconds())]
    timeout: Duration,
    /// No progress bar, also on a terminal
    #[arg(short, long)]
    quiet: bool,
    /// Print the result, or the error, as one JSON object on standard output
    #[arg(long)]
    json: bool,
}

fn checksum() -> impl TypedValueParser<Value = Digest> {
    clap::builder::NonEmptyStringValueParser::new().try_map(|text| Digest::parse_param(&text))
}

fn seconds() -> impl TypedValueParser<Value = Duration> {
    clap::value_parser!(u64).range(1..=86_400).map(Duration::from_secs)
}

pub(super) fn get(args: &GetArgs) -> Outcome {
    let outcome = fetch(args);
    if args.json {
        super::print(&format!("{}\n", report(&args.url, &outcome)))?;
    }
    Ok(match outcome {
        Ok(_) => ExitCode::SUCCESS,
        Err(failure) => {
            if !args.json {
                super::say(format_args!("error: {failure}"));
            }
            ExitCode::from(failure.exit_code())
        }
    })
}

fn fetch(args: &GetArgs) -> Result<Fetched, Failure> {
    let default = || Url::parse(DEFAULT_SERVER).map_err(|error| error.to_string());
    let client = args.server.client(default).map_err(Failure::Local)?;
    let mut sink = open(args)?;
    if let Some(expected) = args.sha256
        && let Some(fetched) = sink.already_has(expected)?
    {
        return Ok(fetched);
    }
    let progress = Progress::new(&sink.label(), args.quiet);
    let transfer = Transfer {
        client: &client,
        source: &args.url,
        expected: args.sha256,
        retries: args.retries,
        patience: args.timeout,
        progress: &progress,
    };
    let fetched = super::client::block_on(transfer.run(&mut sink));
    progress.end();
    fetched.map_err(|cause| Failure::Local(cause.to_string()))?
}

/// Where the bytes are to go.
fn open(args: &GetArgs) -> Result<Sink, Failure> {
    let file = if args.remote_name { Some(remote_name(&args.url)?) } else { args.output.clone() };
    match file {
        Some(file) if file.as_os_str() != "-" => Sink::file(file).map_err(Failure::Local),
        _ if args.json => {
            Err(Failure::Usage("--json needs standard output for itself; name a file with -o or -O".into()))
        }
        None if std::io::stdout().is_terminal() => Err(Failure::Usage(
            "the artifact would go to the terminal; write -O, -o FILE or, if it is meant, -o -".into(),
        )),
        _ => Ok(Sink::stdout()),
    }
}

/// The last part of the URL's path, if it can be a file's name.
fn remote_name(url: &str) -> Result<PathBuf, Failure> {
    let source =
        SourceUrl::parse(url, &QueryGlobs::default()).map_err(|error| Failure::Usage(error.to_string()))?;
    let name = source.last_segment().filter(|name| {
        !matches!(name.as_str(), "." | "..") && !name.contains('/') && !name.contains(char::is_control)
    });
    // Joined to the directory, so that a name such as "-" stays one.
    let name =
        name.ok_or_else(|| Failure::Usage("the URL ends in no file name; name a file with -o".into()))?;
    Ok(PathBuf::from(".").join(name))
}
