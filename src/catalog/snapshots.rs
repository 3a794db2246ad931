//! Daily copies of the database, beside it: what a lost or damaged one is replaced from.
//!
//! `metadata.db.snapshot-20261125T031500Z` is a complete database of that moment. It has this name only when it is
//! whole and on disk.

use std::{
    ffi::OsString,
    fs, io,
    path::{Path, PathBuf},
};

use jiff::{Timestamp, civil::DateTime, tz::TimeZone};

use super::detached::{CopyError, Detached, Pace, io_at, sync_parent};

const INFIX: &str = ".snapshot-";
const UNFINISHED: &str = ".snapshot.new";
/// UTC, to the second, so that the order of names is the order of time.
const TIME_FORMAT: &str = "%Y%m%dT%H%M%SZ";

/// The snapshots of a database, oldest first.
pub fn list(database: &Path) -> io::Result<Vec<PathBuf>> {
    let Some((dir, prefix)) = place(database, INFIX) else { return Ok(Vec::new()) };
    let entries = match fs::read_dir(&dir) {
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let name = entry?.file_name();
        let is_ours = name.as_encoded_bytes().starts_with(prefix.as_encoded_bytes());
        let path = dir.join(name);
        if is_ours && taken_at(&path).is_some() {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// When the newest snapshot was taken. One of the future says nothing: the clock was wrong, then or now.
pub(super) fn last(database: &Path, now: Timestamp) -> io::Result<Option<Timestamp>> {
    let taken = list(database)?;
    Ok(taken.iter().rev().filter_map(|snapshot| taken_at(snapshot)).find(|taken| *taken <= now))
}

/// When a snapshot was taken, by its name; `None` for any other file.
pub fn taken_at(snapshot: &Path) -> Option<Timestamp> {
    let (_, time) = snapshot.file_name()?.to_str()?.rsplit_once(INFIX)?;
    let time = DateTime::strptime(TIME_FORMAT, time).ok()?;
    TimeZone::UTC.to_timestamp(time).ok()
}

/// The current time as the names have it.
pub fn now() -> String {
    Timestamp::now().strftime(TIME_FORMAT).to_string()
}

/// Takes a snapshot and removes the oldest ones beyond `kept`, never the one just taken. Those with a later name are
/// from a clock that was ahead, or it is behind now: they neither count nor go. Blocks; readers and writers of the
/// database go on meanwhile.
pub(super) fn take(
    database: &Path,
    min_free_bytes: u64,
    kept: usize,
    pace: Pace,
) -> Result<PathBuf, CopyError> {
    check_room(database, min_free_bytes)?;
    let failed = io_at(database);
    let name = |suffix: &str| place(database, suffix).map(|(dir, name)| dir.join(name));
    let names = name(UNFINISHED).zip(name(&format!("{INFIX}{}", now())));
    let (unfinished, path) = names.ok_or_else(|| failed(io::ErrorKind::InvalidFilename.into()))?;
    drop(Detached::snapshot_of(database, &unfinished, Some(pace))?);
    fs::rename(&unfinished, &path).map_err(io_at(&path))?;
    sync_parent(&path)?;
    let mut older = list(database).map_err(&failed)?;
    older.retain(|other| *other < path);
    let surplus = older.len().saturating_sub(kept.saturating_sub(1));
    for old in &older[..surplus] {
        fs::remove_file(old).map_err(io_at(old))?;
    }
    Ok(path)
}

/// A copy must not take the room that downloads and the database itself need.
fn check_room(database: &Path, min_free_bytes: u64) -> Result<(), CopyError> {
    let failed = io_at(database);
    let needed = fs::metadata(database).map_err(&failed)?.len();
    let stat = rustix::fs::statvfs(database).map_err(|cause| failed(cause.into()))?;
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    match free < needed.saturating_add(min_free_bytes) {
        true => Err(CopyError::NoRoom { path: database.to_owned(), needed }),
        false => Ok(()),
    }
}

/// The directory of a database, and its name with something behind.
fn place(database: &Path, suffix: &str) -> Option<(PathBuf, OsString)> {
    let dir = match database.parent()? {
        parent if parent.as_os_str().is_empty() => Path::new("."),
        parent => parent,
    };
    let mut name = database.file_name()?.to_owned();
    name.push(suffix);
    Some((dir.to_owned(), name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_times_and_sort_by_them() {
        let at = |name: &str| taken_at(Path::new(name));
        assert!(at("metadata.db.snapshot-20261125T031500Z") < at("metadata.db.snapshot-20261125T031501Z"));
        for other in
            ["metadata.db", "metadata.db.snapshot-", "metadata.db.snapshot-20261125", "x.snapshot.new"]
        {
            assert_eq!(at(other), None, "{other}");
        }
        assert!(at(&format!("metadata.db{INFIX}{}", now())).is_some());
    }
}
