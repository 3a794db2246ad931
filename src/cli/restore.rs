//! `artifact-cache restore`: from a backup, or only the database from one of its snapshots.
//!
//! The same order as publishing: first every file that the database names, then the database. Until its last step
//! nothing is replaced, and what is replaced then is kept under another name.

use std::{
    error::Error,
    ffi::OsStr,
    io::{self, Write},
    path::{Path, PathBuf},
};

use clap::Args;

use super::{
    Outcome,
    backup::{CACHE, DATABASE, Tally, at, refuse_own_data, say},
};
use crate::{
    blobs::{Blobs, SweepLock, Taken, Tree, Way},
    catalog::{CopyError, Detached, Lock, RecordedBlob, snapshots},
    config::Config,
    kill_point,
};

const LATEST: &str = "latest";

pub(super) const AFTER_HELP: &str = "\
Stop the service first. DIR is what `artifact-cache backup DIR` made, or a directory with copies of metadata.db and
cache/. Files that are there and have the right size are left alone; others are moved to .quarantine/ or filled in. The
database that is replaced stays beside the new one, as DATABASE.replaced-TIME.

With --snapshot only the database is replaced. Files that the snapshot does not know stay: they are known again when
their URLs are fetched again.

Exit codes: 0 all restored; 3 restored, but some artifacts are in neither place (they are named, and fetched again when
they are asked for); 1 failed, and the database is what it was; 2 wrong command line.

Examples:
  artifact-cache restore /mnt/backup/artifact-cache
  artifact-cache restore --verify /mnt/backup/artifact-cache
  artifact-cache restore --snapshot
  artifact-cache restore --snapshot ./data/metadata.db.snapshot-20261125T031500Z";

#[derive(Debug, Args)]
pub(super) struct RestoreArgs {
    /// Directory of the backup
    #[arg(required_unless_present = "snapshot", conflicts_with = "snapshot")]
    dir: Option<PathBuf>,
    /// Replace only the database: by this snapshot of it, or by the newest that is good
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = LATEST)]
    snapshot: Option<PathBuf>,
    /// Hash every artifact, those already there too
    #[arg(long)]
    verify: bool,
}

pub(super) fn restore(config: &Config, args: &RestoreArgs) -> Outcome {
    let storage = &config.storage;
    if let Some(dir) = &args.dir {
        refuse_own_data(dir, storage)?;
    }
    let _alone = Lock::take(&storage.database)?;
    let blobs = Blobs::open(storage)?;
    let base = &storage.base_path;
    let _no_backup = SweepLock::try_exclusive(base)
        .map_err(at(base))?
        .ok_or("a backup of this store is running; wait for its end")?;
    let (source, mut database) = open_source(&storage.database, args)?;
    let backup = args.dir.as_ref().map(|dir| Tree::new(&dir.join(CACHE)));
    let tally = fill_in(&database, &blobs, backup.as_ref(), args.verify)?;
    kill_point::pass("restore.copied");
    let lost: Vec<_> = tally.lacking.iter().map(|(digest, _)| *digest).collect();
    let store = blobs.tree();
    database.adapt(&lost, |digest, size| store.holds(digest, size))?;
    let (artifacts, identity) = (database.count_artifacts()?, database.identity()?);
    let replaced = database.install(&storage.database, &snapshots::now())?;
    blobs.note_owner(identity.map(|identity| identity.to_string()).as_deref()).map_err(at(base))?;
    say!(
        "{}: {artifacts} artifacts restored in {} files of {} bytes: {} copied, {} already there, {} lacking",
        source.display(),
        tally.blobs,
        tally.bytes,
        tally.new,
        tally.blobs - tally.new,
        tally.lacking.len(),
    );
    say_what_is_left_to_do(replaced.as_deref(), base);
    Ok(tally.finish())
}

/// A copy of the database that is to be restored, beside the one it will replace, and where it came from.
fn open_source(database: &Path, args: &RestoreArgs) -> Result<(PathBuf, Detached), Box<dyn Error>> {
    let mut name = database.as_os_str().to_owned();
    name.push(".restoring");
    let to = PathBuf::from(name);
    let source = match (&args.dir, &args.snapshot) {
        (_, Some(file)) if file.as_os_str() == OsStr::new(LATEST) => return newest_good(database, &to),
        (_, Some(file)) => file.clone(),
        (Some(dir), None) => dir.join(DATABASE),
        (None, None) => return Err("name the directory of a backup, or --snapshot".into()),
    };
    if !source.is_file() {
        return Err(format!(
            "{} is not there: this is no backup or snapshot, or the backup was interrupted before it was complete; \
             run it again, or name another",
            source.display()
        )
        .into());
    }
    let copy = Detached::copy_of(&source, &to)?;
    Ok((source, copy))
}

fn newest_good(database: &Path, to: &Path) -> Result<(PathBuf, Detached), Box<dyn Error>> {
    let now = jiff::Timestamp::now();
    let is_ahead = |snapshot: &PathBuf| snapshots::taken_at(snapshot).is_some_and(|taken| taken > now);
    // One of the future was taken while a clock was ahead, so how old it is nobody knows: only if there is no other.
    let (ahead, past): (Vec<_>, Vec<_>) =
        snapshots::list(database).map_err(at(database))?.into_iter().partition(is_ahead);
    for snapshot in past.into_iter().rev().chain(ahead.into_iter().rev()) {
        match Detached::copy_of(&snapshot, to) {
            Err(error @ CopyError::Damaged { .. }) => {
                // As with `say!`.
                let _ = writeln!(io::stderr(), "warning: {error}");
            }
            copy => return Ok((snapshot, copy?)),
        }
    }
    Err(format!(
        "there is no good snapshot beside {} (its name would be {}.snapshot-TIME); restore a backup: artifact-cache \
         restore DIR",
        database.display(),
        database.display()
    )
    .into())
}

/// Gives the store every blob that the database names, from the backup if there is one.
fn fill_in(
    database: &Detached,
    blobs: &Blobs,
    backup: Option<&Tree>,
    verify: bool,
) -> Result<Tally, Box<dyn Error>> {
    let (mut store, mut tally) = (blobs.tree(), Tally::default());
    database.for_each_blob(|blob| -> Result<(), Box<dyn Error>> {
        let RecordedBlob { digest, size, .. } = blob;
        blobs.quarantine(digest, size)?;
        let is_there = store.holds(digest, size);
        let problem = if is_there && verify { store.problem(digest, size) } else { None };
        if problem.is_some() {
            blobs.quarantine_content(digest)?;
        }
        let taken = match (backup, problem) {
            (_, None) if is_there => Taken::There,
            (Some(backup), _) => store.take(backup, digest, size, Way::Copy, verify)?,
            (None, Some(problem)) => Taken::Damaged(problem),
            (None, None) => Taken::Missing,
        };
        tally.count(blob, taken);
        Ok(())
    })?;
    store.sync()?;
    Ok(tally)
}

fn say_what_is_left_to_do(replaced: Option<&Path>, base: &Path) {
    if let Some(replaced) = replaced {
        say!("the database that was there is kept as {}", replaced.display());
    }
    if rustix::process::geteuid().is_root() {
        say!(
            "restored as root: if the service runs as another user, give it the files: chown -R USER {} and the database",
            base.display()
        );
    }
}
