//! The `artifact-cache` program; everything it does is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    artifact_cache::cli::run()
}
