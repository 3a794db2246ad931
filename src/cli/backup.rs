//! `artifact-cache backup DIR`: a copy of the database and of every artifact it names, made while the service serves.
//!
//! The database first, in the state of one moment, then the files: a file is never younger than what names it. Nothing
//! is deleted meanwhile (`SweepLock`). Whatever interrupts a backup, DIR holds the one before it, this one, or none at
//! all, and never half of one: `metadata.db` is replaced when everything that the new one names is there and on disk.

use std::{
    error::Error,
    fs::{self, File, TryLockError},
    io::{self, Write},
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::Args;
use serde_json::json;

use super::Outcome;
use crate::{
    artifact::Digest,
    blobs::{SweepLock, Taken, Tree, Way},
    catalog::{Detached, RecordedBlob, snapshots},
    config::{Config, Storage},
    kill_point,
};

/// The database in a backup.
pub(super) const DATABASE: &str = "metadata.db";
/// The artifacts in a backup.
pub(super) const CACHE: &str = "cache";
const MANIFEST: &str = "manifest.json";
const LOCK: &str = ".lock";
/// A backup, or what was restored, lacks artifacts that the database names.
pub(super) const INCOMPLETE: u8 = 3;

pub(super) const AFTER_HELP: &str = "\
DIR gets metadata.db, cache/ab/cd/… and manifest.json. A file that is there already is not copied again, so the same DIR
costs little the next time. Files are checked against their SHA-256 while they are copied: damage is never backed up.
The service may run, or not. What uses DIR is `artifact-cache restore DIR`.

Exit codes: 0 complete; 3 complete but for artifacts that the store itself has lost, or has damaged (they are named);
1 failed, and DIR holds the backup that it held before, or the new one, whole, when only manifest.json or --prune failed;
2 wrong command line.

Examples:
  artifact-cache backup /mnt/backup/artifact-cache
  artifact-cache backup --verify --prune /mnt/backup/artifact-cache
  artifact-cache backup --hard-link ./data.yesterday";

/// Prints a line. That nobody can read it changes nothing of what was done, so it must not look like a failure.
macro_rules! say {
    ($($words:tt)*) => {{
        use std::io::Write;
        let _ = writeln!(std::io::stdout(), $($words)*);
    }};
}
pub(super) use say;

#[derive(Debug, Args)]
pub(super) struct BackupArgs {
    /// Directory of the backup; made if it is not there
    dir: PathBuf,
    /// Give the files a second name instead of copying them: on one file system only, and both share what happens to
    /// the disk, rot too
    #[arg(long)]
    hard_link: bool,
    /// Read everything back from the disk, and hash it again
    #[arg(long)]
    verify: bool,
    /// Remove files of earlier backups that this one does not name
    #[arg(long)]
    prune: bool,
}

/// What became of the blobs.
#[derive(Debug, Default)]
pub(super) struct Tally {
    pub(super) blobs: u64,
    pub(super) bytes: u64,
    pub(super) new: u64,
    /// What is not there, and why not.
    pub(super) lacking: Vec<(Digest, String)>,
}

impl Tally {
    /// Counts one blob; one that is missing and that no artifact has is not lacking.
    pub(super) fn count(&mut self, blob: RecordedBlob, taken: Taken) {
        let problem = match taken {
            Taken::Missing if !blob.is_named => return,
            Taken::Missing => "is missing".to_owned(),
            Taken::Damaged(problem) => problem,
            Taken::New | Taken::There => {
                self.blobs += 1;
                self.bytes += blob.size;
                self.new += u64::from(taken == Taken::New);
                return;
            }
        };
        self.lacking.push((blob.digest, problem));
    }

    /// Names what is lacking, and gives the exit code.
    pub(super) fn finish(&self) -> ExitCode {
        for (digest, problem) in &self.lacking {
            // As with `say!`.
            let _ = writeln!(io::stderr(), "warning: {digest} {problem}");
        }
        if self.lacking.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(INCOMPLETE) }
    }
}

pub(super) fn backup(config: &Config, args: &BackupArgs) -> Outcome {
    let (dir, storage) = (&args.dir, &config.storage);
    refuse_own_data(dir, storage)?;
    fs::create_dir_all(dir.join(CACHE)).map_err(at(dir))?;
    let _alone = lock(dir)?;
    let _no_deletion = SweepLock::shared(&storage.base_path).map_err(at(&storage.base_path))?;
    let snapshot = Detached::snapshot_of(&storage.database, &dir.join("metadata.db.new"), None)?;
    kill_point::pass("backup.snapshotted");
    if args.verify {
        snapshot.look_through()?;
    }
    let artifacts = snapshot.count_artifacts()?;
    let mut copies = Tree::new(&dir.join(CACHE));
    let tally = copy_blobs(&snapshot, &Tree::new(&storage.base_path), &mut copies, args)?;
    copies.sync()?;
    sync_dir(dir)?;
    kill_point::pass("backup.copied");
    // It describes what is about to go.
    remove_if_there(&dir.join(MANIFEST))?;
    let snapshot = snapshot.put_at(&dir.join(DATABASE))?;
    kill_point::pass("backup.installed");
    write_manifest(dir, &snapshot, artifacts, &tally)?;
    let pruned = if args.prune { prune(&copies, &snapshot)? } else { 0 };
    say!(
        "{}: {artifacts} artifacts in {} files of {} bytes: {} {}, {} already there, {pruned} old ones removed, {} lacking",
        dir.display(),
        tally.blobs,
        tally.bytes,
        tally.new,
        if args.hard_link { "linked" } else { "copied" },
        tally.blobs - tally.new,
        tally.lacking.len(),
    );
    Ok(tally.finish())
}

fn copy_blobs(
    snapshot: &Detached,
    store: &Tree,
    copies: &mut Tree,
    args: &BackupArgs,
) -> Result<Tally, Box<dyn Error>> {
    let way = if args.hard_link { Way::Link } else { Way::Copy };
    let mut tally = Tally::default();
    snapshot.for_each_blob(|blob| -> Result<(), Box<dyn Error>> {
        let taken = copies.take(store, blob.digest, blob.size, way, args.verify)?;
        tally.count(blob, taken);
        kill_point::pass("backup.blob");
        Ok(())
    })?;
    Ok(tally)
}

fn prune(copies: &Tree, snapshot: &Detached) -> io::Result<u64> {
    copies.remove(|digest| snapshot.names(digest).map(|named| !named).map_err(io::Error::other))
}

/// For people and scripts: what restores a backup looks at the backup itself.
fn write_manifest(
    dir: &Path,
    snapshot: &Detached,
    artifacts: u64,
    tally: &Tally,
) -> Result<(), Box<dyn Error>> {
    let manifest = json!({
        "version": 1,
        "made_by": concat!("artifact-cache ", env!("CARGO_PKG_VERSION")),
        "finished_at": snapshots::now(),
        "database_id": snapshot.identity()?.map(|identity| identity.database_id),
        "artifacts": artifacts,
        "blobs": tally.blobs,
        "bytes": tally.bytes,
        "lacking": tally.lacking.iter().map(|(digest, _)| digest.to_string()).collect::<Vec<_>>(),
    });
    let (new, path) = (dir.join("manifest.json.new"), dir.join(MANIFEST));
    let mut file = File::create(&new).map_err(at(&new))?;
    file.write_all(format!("{manifest:#}\n").as_bytes()).map_err(at(&new))?;
    file.sync_all().map_err(at(&new))?;
    fs::rename(&new, &path).map_err(at(&path))?;
    Ok(sync_dir(dir)?)
}

/// Two backups at a time into one directory would disturb each other.
fn lock(dir: &Path) -> Result<File, Box<dyn Error>> {
    let path = dir.join(LOCK);
    let file = File::options().create(true).truncate(false).write(true).open(&path).map_err(at(&path))?;
    match file.try_lock() {
        Err(TryLockError::WouldBlock) => {
            Err(format!("another backup into {} is running; wait for its end", dir.display()).into())
        }
        // Some network file systems have no locks; then it is the operator's to start only one.
        Ok(()) | Err(TryLockError::Error(_)) => Ok(file),
    }
}

/// A backup must not be the data itself, nor lie in the store.
pub(super) fn refuse_own_data(dir: &Path, storage: &Storage) -> Result<(), String> {
    let real = |path: &Path| path.canonicalize().ok();
    let same = |one: &Path, other: &Path| real(one).is_some_and(|one| Some(one) == real(other));
    // What is not made yet lies where its parent does.
    let nearest = dir.ancestors().find_map(|above| match above.as_os_str().is_empty() {
        true => real(Path::new(".")),
        false => real(above),
    });
    let is_inside = nearest.zip(real(&storage.base_path)).is_some_and(|(dir, base)| dir.starts_with(base));
    if is_inside || same(&dir.join(CACHE), &storage.base_path) || same(&dir.join(DATABASE), &storage.database)
    {
        return Err(format!(
            "{} holds the service's own data ({} and {}); name another directory for the backup, best on another disk",
            dir.display(),
            storage.base_path.display(),
            storage.database.display()
        ));
    }
    Ok(())
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(cause) if cause.kind() != io::ErrorKind::NotFound => Err(at(path)(cause)),
        _ => Ok(()),
    }
}

fn sync_dir(dir: &Path) -> io::Result<()> {
    match File::open(dir).and_then(|dir| dir.sync_all()) {
        // Some network file systems have no such call.
        Err(cause) if cause.kind() == io::ErrorKind::InvalidInput => Ok(()),
        synced => synced.map_err(at(dir)),
    }
}

/// Gives an error its path.
pub(super) fn at(path: &Path) -> impl Fn(io::Error) -> io::Error {
    let path = path.to_owned();
    move |cause| io::Error::new(cause.kind(), format!("{}: {cause}", path.display()))
}
