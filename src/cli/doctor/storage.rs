//! Where artifacts and their record lie: rights, file system, room, and whether the database is sound.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use indicatif::BinaryBytes;
use rustix::{
    fs::{Access, access, fstatfs, statvfs},
    process::{getgid, getuid},
};

use super::Finding;
use crate::{
    blobs,
    catalog::{self, snapshots},
    config::Config,
};

/// With fewer free inodes, a disk is about to be full although it has room.
const FEW_INODES: u64 = 10_000;
/// One a day, and some patience.
const STALE_HOURS: i64 = 50;

pub(super) fn look(config: &Config) -> Vec<Finding> {
    let storage = &config.storage;
    let record = match storage.database.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let mut findings = vec![rights("artifacts", "storage.base_path", &storage.base_path)];
    findings.extend(file_system("artifacts", &storage.base_path, false));
    findings.push(room(&storage.base_path, storage.min_free_bytes));
    findings.push(rights("record", "the directory of storage.database", record));
    findings.extend(file_system("record", record, true));
    findings.push(database(&storage.database));
    findings.push(snapshots(&storage.database, config.jobs.snapshots_kept));
    findings
}

/// The directory itself, or the one in which it will be made.
fn nearest(path: &Path) -> PathBuf {
    let there = path.ancestors().find(|path| path.exists()).unwrap_or(Path::new("."));
    // A relative path's last ancestor is empty.
    if there.as_os_str().is_empty() { PathBuf::from(".") } else { there.to_owned() }
}

fn rights(check: &'static str, key: &str, path: &Path) -> Finding {
    let there = nearest(path);
    let shown = path.display();
    if !there.is_dir() {
        return Finding::fail(
            check,
            format!("{key} {shown}: {} is no directory", there.display()),
            "move it away",
        );
    }
    let all = Access::READ_OK | Access::WRITE_OK | Access::EXEC_OK;
    match access(&there, all).map_err(io::Error::from) {
        Err(cause) if cause.kind() == io::ErrorKind::ReadOnlyFilesystem => {
            Finding::fail(check, format!("{key} {shown}: {cause}"), "mount it writable")
        }
        Err(cause) => {
            let (uid, gid) = (getuid().as_raw(), getgid().as_raw());
            let cure = format!("chown -R {uid}:{gid} {}", there.display());
            Finding::fail(check, format!("{key} {shown}: {cause} for uid {uid}"), cure)
        }
        Ok(()) if there == path => Finding::ok(check, format!("{shown} can be written")),
        Ok(()) => Finding::ok(check, format!("{shown} is not there yet and can be made")),
    }
}

/// Kinds on which data does not last, by statfs(2).
fn volatile(kind: u32) -> Option<&'static str> {
    match kind {
        0x0102_1994 | 0x8584_58f6 => Some("in memory (tmpfs), and gone after a restart"),
        0x794c_7630 => Some("in the container's own layer (overlay), and gone with the container"),
        _ => None,
    }
}

fn file_system(check: &'static str, path: &Path, has_database: bool) -> Option<Finding> {
    let there = nearest(path);
    if !there.is_dir() {
        return None;
    }
    if let Err(error) = blobs::check_file_system(&there) {
        let cure = "the service will not start; remove that mount";
        return Some(Finding::fail(check, error.to_string(), cure));
    }
    let dir = File::open(&there).ok()?;
    let shown = there.display();
    match catalog::network_file_system(&dir) {
        Some(kind) if has_database => {
            let found = format!("{shown} is on {kind}, where SQLite's locks are not safe");
            return Some(Finding::fail(check, found, "put storage.database on a local disk"));
        }
        Some(kind) => {
            let cure = "works, but a local disk is faster, and a server that goes away stops all hits";
            return Some(Finding::warn(check, format!("{shown} is on {kind}"), cure));
        }
        None => {}
    }
    let why = volatile(fstatfs(&dir).ok()?.f_type as u32)?;
    Some(Finding::warn(check, format!("{shown} is {why}"), "mount a volume there, or name a place on a disk"))
}

fn room(base: &Path, min_free_bytes: u64) -> Finding {
    const CHECK: &str = "free disk";
    let there = nearest(base);
    let stat = match statvfs(&there) {
        Ok(stat) => stat,
        Err(cause) => {
            return Finding::fail(CHECK, format!("{}: {cause}", there.display()), "look at that disk");
        }
    };
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    let (shown, limit) = (BinaryBytes(free), BinaryBytes(min_free_bytes));
    let grow = "make room, or a larger disk; nothing is ever deleted by itself";
    if free < min_free_bytes {
        let found = format!("{shown}, less than storage.min_free_bytes, {limit}: nothing new is stored");
        return Finding::fail(CHECK, found, grow);
    }
    if free < min_free_bytes.saturating_mul(2) {
        return Finding::warn(CHECK, format!("{shown}, and at {limit} nothing new is stored"), grow);
    }
    // Some file systems have no such number.
    if stat.f_files > 0 && stat.f_favail < FEW_INODES {
        return Finding::warn(CHECK, format!("{shown}, but only {} inodes", stat.f_favail), grow);
    }
    Finding::ok(CHECK, shown.to_string())
}

fn database(path: &Path) -> Finding {
    const CHECK: &str = "database";
    let shown = path.display();
    match fs::metadata(path) {
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => {
            return Finding::ok(CHECK, format!("{shown} is not there yet; the first start makes it"));
        }
        Ok(found) if !found.is_file() => {
            return Finding::fail(
                CHECK,
                format!("{shown} is no file"),
                "move it away, or change storage.database",
            );
        }
        _ => {}
    }
    let cure = "artifact-cache restore --snapshot puts the newest good copy in its place; the artifacts stay";
    match catalog::examine(path) {
        Err(error) => Finding::fail(CHECK, error.to_string(), cure),
        Ok(found) if !found.problems.is_empty() => {
            Finding::fail(CHECK, format!("{shown} is damaged: {}", found.problems.join("; ")), cure)
        }
        Ok(found) if found.schema < found.known_schema => Finding::ok(
            CHECK,
            format!("sound; the next start brings schema {} to {}", found.schema, found.known_schema),
        ),
        Ok(found) => Finding::ok(CHECK, format!("sound, schema {}", found.schema)),
    }
}

/// What a lost or damaged database is replaced from.
fn snapshots(database: &Path, kept: usize) -> Finding {
    const CHECK: &str = "snapshots";
    if kept == 0 {
        let cure = "set jobs.snapshots_kept, or back up the database in another way";
        return Finding::warn(CHECK, "switched off", cure);
    }
    let newest = match snapshots::list(database) {
        Ok(mut all) => all.pop().and_then(|path| snapshots::taken_at(&path)),
        Err(cause) => {
            return Finding::fail(CHECK, cause.to_string(), "see to the directory of storage.database");
        }
    };
    let Some(newest) = newest else {
        return Finding::ok(CHECK, "none yet; the service takes one when it has something, then daily");
    };
    let hours = (jiff::Timestamp::now().as_second() - newest.as_second()) / 3600;
    if hours > STALE_HOURS {
        let cure = "the service takes one a day while it runs; if it does run, its log says why not";
        return Finding::warn(CHECK, format!("the newest is {} days old", hours / 24), cure);
    }
    Finding::ok(CHECK, format!("the newest is of {newest:.0}"))
}
