//! `artifact-cache delete`: takes artifacts, or files that nobody knows, out of the cache.
//!
//! It only changes the database; the running service, or the next one, removes the files.

use std::{error::Error, process::ExitCode};

use clap::Args;
use serde_json::{Value, json};

use super::Outcome;
use crate::{
    artifact::{Digest, SourceUrl},
    blobs,
    catalog::{Editor, Removed},
    config::Config,
};

/// Some of the URLs are not in the cache.
const NOT_FOUND: u8 = 3;

/// Shown below the options.
pub(super) const AFTER_HELP: &str = "\
The database is changed at once, also while the service runs; within a second the service knows. The file goes when
jobs.delete_grace_seconds are over and the service runs, unless another URL has the same content, or it was downloaded
again meanwhile. What contents a URL has had stays on record (table versions).

Exit codes: 0 done; 1 it failed; 2 wrong usage; 3 some of the URLs are not in the cache, the others are deleted.

Examples:
  artifact-cache delete https://example.com/old.tar.gz
  artifact-cache delete --orphans
      lists files in the store that the database does not know
  artifact-cache delete --orphans --yes";

/// What to delete.
#[derive(Debug, Args)]
pub(super) struct DeleteArgs {
    /// Artifacts, by the URLs they were asked for
    #[arg(value_name = "URL", required_unless_present = "orphans", conflicts_with = "orphans")]
    urls: Vec<String>,
    /// Instead of artifacts: files that the database does not know. Lists them, unless --yes is given
    #[arg(long)]
    orphans: bool,
    /// Really delete what --orphans lists
    #[arg(long, requires = "orphans")]
    yes: bool,
    /// Delete orphans even if they are more than the files that are known
    #[arg(long, requires = "yes")]
    force: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Deletes, or lists.
pub(super) fn delete(config: &Config, args: &DeleteArgs) -> Outcome {
    let mut editor = Editor::open(&config.storage.database)?;
    match args.orphans {
        true => delete_orphans(config, &mut editor, args),
        false => delete_urls(config, &mut editor, args),
    }
}

fn delete_urls(config: &Config, editor: &mut Editor, args: &DeleteArgs) -> Outcome {
    // All are checked before the first is deleted.
    let parse = |url: &String| {
        SourceUrl::parse(url, &config.fetch.ignore_query).map_err(|problem| format!("{url:?}: {problem}"))
    };
    let urls = args.urls.iter().map(parse).collect::<Result<Vec<_>, _>>()?;
    let mut results = Vec::new();
    for url in &urls {
        let removed = editor.delete(url.key())?;
        if !args.json {
            super::print(&format!("{}\n", line(config, url, removed.as_ref())))?;
        }
        results.push((url, removed));
    }
    if args.json {
        let all: Vec<Value> = results.iter().map(|(url, removed)| object(url, removed.as_ref())).collect();
        super::print(&format!("{}\n", Value::from(all)))?;
    }
    match results.iter().all(|(_, removed)| removed.is_some()) {
        true => Ok(ExitCode::SUCCESS),
        false => Ok(NOT_FOUND.into()),
    }
}

fn line(config: &Config, url: &SourceUrl, removed: Option<&Removed>) -> String {
    let Some(Removed { sha256, size, is_blob_deleted }) = removed else {
        return format!("not in the cache: {}", url.key());
    };
    let file = match is_blob_deleted {
        true => format!("its file goes in {} s", config.jobs.delete_grace.as_secs_f32()),
        false => "its file stays, it is in use or was deleted before".to_owned(),
    };
    format!("deleted: {} (sha256 {sha256}, {size} bytes; {file})", url.key())
}

fn object(url: &SourceUrl, removed: Option<&Removed>) -> Value {
    match removed {
        None => json!({"source_url": url.key(), "deleted": false}),
        Some(Removed { sha256, size, is_blob_deleted }) => json!({
            "source_url": url.key(), "deleted": true, "sha256": sha256, "file_size": size,
            "blob_deleted": is_blob_deleted,
        }),
    }
}

fn delete_orphans(config: &Config, editor: &mut Editor, args: &DeleteArgs) -> Outcome {
    let orphans = find_orphans(config, editor)?;
    let bytes: u64 = orphans.iter().map(|(_, size)| size).sum();
    let known = editor.totals()?.blobs;
    if args.yes && !args.force && orphans.len() as u64 > known {
        return Err(format!(
            "{} files are orphans and only {known} are known to {}: is storage.database the right one? If it is, add \
             --force",
            orphans.len(),
            config.storage.database.display()
        )
        .into());
    }
    let deleted = if args.yes { editor.delete_unknown(&orphans)? } else { 0 };
    if args.json {
        let list: Vec<Value> = orphans
            .iter()
            .map(|(digest, size)| json!({"sha256": digest.to_string(), "file_size": size}))
            .collect();
        let answer = json!({"orphans": list, "file_size": bytes, "known_blobs": known, "deleted": deleted});
        super::print(&format!("{answer}\n"))?;
        return Ok(ExitCode::SUCCESS);
    }
    for (digest, size) in &orphans {
        super::print(&format!("{digest} {size}\n"))?;
    }
    super::say(match args.yes {
        true => format!("{deleted} orphans with {bytes} bytes deleted; {known} files are known"),
        false => format!(
            "{} orphans with {bytes} bytes, nothing deleted (--yes deletes them); {known} files are known",
            orphans.len()
        ),
    });
    Ok(ExitCode::SUCCESS)
}

fn find_orphans(config: &Config, editor: &Editor) -> Result<Vec<(Digest, u64)>, Box<dyn Error>> {
    let base = &config.storage.base_path;
    // Else a mistyped path would look like a store without orphans.
    std::fs::read_dir(base).map_err(|cause| format!("storage.base_path {}: {cause}", base.display()))?;
    let mut orphans = Vec::new();
    for first in 0..=u8::MAX {
        let listed = blobs::list_with_sizes(base, first)
            .map_err(|cause| format!("storage.base_path {}: {cause}", base.display()))?;
        orphans.extend(editor.unknown(listed)?);
    }
    Ok(orphans)
}
