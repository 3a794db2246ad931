//! What must be true after any fault, asked of the files, of the database and of the running service.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use crate::harness::{End, PATIENCE, Running, Service, content, fetch_target};
use crate::workload::{Acknowledged, content as item};

/// Acknowledged items that are also fetched again, the newest ones.
const FETCHED_AGAIN: usize = 20;

/// What was found.
#[derive(Debug, Default)]
pub struct Audit {
    /// Blob files that no row knows.
    pub orphans: usize,
    /// Whatever breaks a promise, in words.
    pub violations: Vec<String>,
}

impl Audit {
    /// Audits a service that has just been started again and has nothing to do.
    pub fn of(service: &Running, acknowledged: &Acknowledged) -> Audit {
        let mut audit = Audit::of_files(service.service(), acknowledged);
        audit.fetch_again(service, acknowledged);
        audit
    }

    /// Audits what a service has, without asking it for anything; it may be stopped.
    pub fn of_files(service: &Service, acknowledged: &Acknowledged) -> Audit {
        let mut audit = Audit::default();
        let files = audit.read_files(&service.base_path());
        let rows = audit.read_rows(&service.database(), &files);
        audit.orphans = files.keys().filter(|digest| !rows.blobs.contains(*digest)).count();
        for (url, n) in &acknowledged.all() {
            let digest = item(*n).sha256();
            match rows.artifacts.get(url) {
                None => audit.broken(format!("acknowledged and lost: {url}")),
                Some(recorded) if *recorded != digest => {
                    audit.broken(format!("{url} is recorded as {recorded}, not {digest}"));
                }
                Some(_) => {}
            }
        }
        audit
    }

    /// Fails the test on any violation, and when more than `orphans` blobs are unknown to the catalogue.
    #[track_caller]
    pub fn assert_clean(&self, what: &str, orphans: usize) {
        assert!(self.violations.is_empty(), "{what}:\n  {}", self.violations.join("\n  "));
        assert!(self.orphans <= orphans, "{what}: {} orphans, expected at most {orphans}", self.orphans);
    }

    fn broken(&mut self, what: String) {
        self.violations.push(what);
    }

    /// Every blob file with its size; each must have the content that its name says, and the spool must be empty.
    fn read_files(&mut self, base: &Path) -> BTreeMap<String, u64> {
        let mut found = BTreeMap::new();
        let fan =
            |dir: &Path| listed(dir).into_iter().filter(|path| name(path).len() == 2).collect::<Vec<_>>();
        for file in fan(base).iter().flat_map(|outer| fan(outer)).flat_map(|inner| listed(&inner)) {
            match std::fs::read(&file) {
                Ok(bytes) if content::sha256(&bytes) == name(&file) => {
                    found.insert(name(&file), bytes.len() as u64);
                }
                Ok(bytes) => self.broken(format!("{} has {} other bytes", file.display(), bytes.len())),
                Err(error) => self.broken(format!("{} can't be read: {error}", file.display())),
            }
        }
        for leftover in listed(&base.join(".spool")) {
            self.broken(format!("left in the spool: {}", leftover.display()));
        }
        found
    }

    fn read_rows(&mut self, database: &Path, files: &BTreeMap<String, u64>) -> Rows {
        let db = rusqlite::Connection::open(database).unwrap();
        db.busy_timeout(PATIENCE).unwrap();
        let rows = Rows::read(&db);
        for (table, digest, size) in &rows.promised {
            match files.get(digest) {
                None => self.broken(format!("{table} has a row without its bytes: {digest}")),
                Some(found) if found != size => {
                    self.broken(format!("{table} says {size} bytes of {digest}, which has {found}"));
                }
                Some(_) => {}
            }
        }
        for complaint in &rows.complaints {
            self.broken(complaint.clone());
        }
        rows
    }

    /// The newest acknowledged items must be hits. (Their upstream is asked for nothing: a hit says that it was not.)
    fn fetch_again(&mut self, service: &Running, acknowledged: &Acknowledged) {
        let all = acknowledged.all();
        let mut newest: Vec<_> = all.iter().collect();
        newest.sort_by_key(|(_, n)| std::cmp::Reverse(**n));
        for (url, n) in newest.into_iter().take(FETCHED_AGAIN) {
            let answer = service.get(&fetch_target(url));
            let is_right = answer.body == item(*n).bytes() && answer.end == End::Complete;
            if (answer.status, answer.cache_status(), is_right) != (200, "HIT", true) {
                let status = answer.cache_status().to_owned();
                self.broken(format!("{url} is answered {} {status:?}, right: {is_right}", answer.status));
            }
        }
    }
}

/// What the database says.
struct Rows {
    /// Digests by URL.
    artifacts: BTreeMap<String, String>,
    /// Digests of the blobs that are known, in whatever state.
    blobs: BTreeSet<String>,
    /// Table, digest and size of each row that promises bytes.
    promised: Vec<(&'static str, String, u64)>,
    complaints: Vec<String>,
}

impl Rows {
    fn read(db: &rusqlite::Connection) -> Rows {
        let mut promised = Vec::new();
        for (table, sql) in [
            ("artifacts", "SELECT content_hash, file_size FROM artifacts"),
            ("blobs", "SELECT content_hash, file_size FROM blobs WHERE state = 'present'"),
        ] {
            let pairs: Vec<(String, u64)> =
                all(db, sql, |row| Ok((row.get(0)?, row.get::<_, i64>(1)? as u64)));
            promised.extend(pairs.into_iter().map(|(digest, size)| (table, digest, size)));
        }
        let artifacts =
            all(db, "SELECT source_url, content_hash FROM artifacts", |row| Ok((row.get(0)?, row.get(1)?)));
        let blobs = all(db, "SELECT content_hash FROM blobs", |row| row.get(0));
        let checks: Vec<String> = all(db, "PRAGMA integrity_check", |row| row.get(0));
        let mut complaints: Vec<String> = checks.into_iter().filter(|line| line != "ok").collect();
        // One row each when the sums agree with counting.
        for (what, sql) in [
            (
                "artifacts",
                "SELECT 1 FROM totals WHERE items = (SELECT count(*) FROM artifacts)
                 AND size_bytes = (SELECT coalesce(sum(file_size), 0) FROM artifacts)
                 AND accesses = (SELECT coalesce(sum(access_count), 0) FROM artifacts)",
            ),
            (
                "blobs",
                "SELECT 1 FROM totals WHERE blobs = (SELECT count(*) FROM blobs WHERE state = 'present')
                 AND stored_bytes = (SELECT coalesce(sum(file_size), 0) FROM blobs WHERE state = 'present')",
            ),
        ] {
            if all(db, sql, |row| row.get::<_, i64>(0)).len() != 1 {
                complaints.push(format!("the totals are not those of {what}"));
            }
        }
        Rows {
            artifacts: artifacts.into_iter().collect(),
            blobs: blobs.into_iter().collect(),
            promised,
            complaints,
        }
    }
}

fn all<T>(
    db: &rusqlite::Connection,
    sql: &str,
    read: impl FnMut(&rusqlite::Row<'_>) -> rusqlite::Result<T>,
) -> Vec<T> {
    let mut statement = db.prepare(sql).unwrap();
    statement.query_map([], read).unwrap().map(|row| row.unwrap()).collect()
}

fn listed(dir: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}
