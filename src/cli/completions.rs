//! `artifact-cache completions SHELL`.

use std::process::ExitCode;

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::{Cli, Outcome, print};

pub(super) const HELP: &str = "\
Examples:
  artifact-cache completions bash > /etc/bash_completion.d/artifact-cache
  artifact-cache completions fish > ~/.config/fish/completions/artifact-cache.fish
  artifact-cache completions zsh > /usr/local/share/zsh/site-functions/_artifact-cache";

#[derive(Debug, Args)]
pub(super) struct CompletionsArgs {
    /// Which shell
    shell: Shell,
}

pub(super) fn completions(args: &CompletionsArgs) -> Outcome {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "artifact-cache", &mut script);
    print(&String::from_utf8(script)?)?;
    Ok(ExitCode::SUCCESS)
}
