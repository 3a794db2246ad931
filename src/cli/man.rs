//! `artifact-cache man`: manual pages, made from the same text as `--help`.

use std::{fs, path::PathBuf, process::ExitCode};

use clap::{Args, CommandFactory};
use clap_mangen::Man;

use super::{Cli, Outcome, print};

pub(super) const HELP: &str = "\
Examples:
  artifact-cache man | man -l -
  artifact-cache man --dir /usr/local/share/man/man1
      artifact-cache.1, artifact-cache-get.1 and so on";

#[derive(Debug, Args)]
pub(super) struct ManArgs {
    /// Write the pages of all commands into DIR, which is made when it is not there
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

pub(super) fn man(args: &ManArgs) -> Outcome {
    // A page that says how to ask for help helps nobody.
    let command = Cli::command().disable_help_subcommand(true);
    match &args.dir {
        Some(dir) => {
            let failed = |cause| format!("can't write the pages into {}: {cause}", dir.display());
            fs::create_dir_all(dir).map_err(failed)?;
            clap_mangen::generate_to(command, dir).map_err(failed)?;
        }
        None => {
            let mut page = Vec::new();
            Man::new(command).render(&mut page)?;
            print(&String::from_utf8(page)?)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
