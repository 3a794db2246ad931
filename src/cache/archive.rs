//! Whether the database is the one that records this store. A wrong, a new or an old one beside a full store costs
//! nothing, since no blob is deleted that no row says was deleted; but it must be said aloud, and at once.
//!
//! The store keeps a note of the database's identity and of how often the service had been started on it
//! (`Blobs::owner`). At a start, a database that is new, or that was started less often than the note says, or another
//! one, shows without counting anything. How many blobs it does not know is the census's to find out.

use std::sync::{
    Mutex, MutexGuard, PoisonError,
    atomic::{AtomicBool, Ordering},
};

use crate::{
    blobs::Blobs,
    catalog::{Catalog, Identity},
};

/// What a store's note says when a database was new and nobody knows which one recorded the store.
const NOBODY: &str = "unknown";

/// What the database is to the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Archive {
    /// The one that recorded it.
    Known,
    /// It was made just now, beside a store that is not empty.
    New,
    /// It recorded another store.
    Other,
    /// It recorded this store, but a later state of it has since.
    Older,
    /// It does not know more blobs than a crash can leave behind.
    ManyOrphans,
}

/// The verdict at the start, and what the census has made of it.
#[derive(Debug)]
pub(super) struct Ownership {
    archive: Mutex<Archive>,
    has_census: AtomicBool,
}

impl Ownership {
    /// Compares both sides, says aloud what is wrong, and takes possession if nothing is.
    pub(super) fn new(catalog: &Catalog, blobs: &Blobs) -> Ownership {
        let identity = catalog.identity();
        let judged = blobs.owner().and_then(|owner| {
            let archive = judge(identity, catalog.is_new(), owner.as_deref(), blobs.is_empty()?);
            Ok((archive, owner.is_none()))
        });
        let (archive, is_unclaimed) = judged.unwrap_or_else(|cause| {
            tracing::warn!(error = %cause, "can't tell whether storage.database belongs to storage.base_path");
            (Archive::Known, false)
        });
        match archive {
            Archive::Known => take_possession(catalog, blobs),
            doubt => {
                tracing::error!(
                    database_is = ?doubt,
                    "storage.database is not the one that last recorded storage.base_path; nothing is deleted, but \
                     stored artifacts may be unknown: point it to the right one, or see `artifact-cache restore`"
                );
                if is_unclaimed {
                    write_note(blobs, NOBODY);
                }
            }
        }
        Ownership { archive: Mutex::new(archive), has_census: AtomicBool::new(false) }
    }

    /// A census has been taken.
    pub(super) fn counted(&self) {
        self.has_census.store(true, Ordering::Release);
    }

    /// The verdict now. A database that knows every blob is the right one, whatever it was at the start.
    pub(super) fn verdict(&self, catalog: &Catalog, blobs: &Blobs, orphans: i64, tolerated: i64) -> Archive {
        let mut archive = self.lock();
        match *archive {
            Archive::Known if orphans > tolerated => return Archive::ManyOrphans,
            Archive::Known => {}
            _ if orphans == 0 && self.has_census.load(Ordering::Acquire) => {
                take_possession(catalog, blobs);
                *archive = Archive::Known;
            }
            _ => {}
        }
        *archive
    }

    fn lock(&self) -> MutexGuard<'_, Archive> {
        self.archive.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn judge(identity: &Identity, is_new: bool, owner: Option<&str>, is_empty: bool) -> Archive {
    let (id, starts) = match owner {
        _ if is_empty => return Archive::Known,
        None if is_new => return Archive::New,
        // A store from before there were notes.
        None => return Archive::Known,
        Some(note) => note.split_once(' ').unwrap_or((note, "")),
    };
    match starts.parse::<u64>() {
        Ok(starts) if id == identity.database_id && starts <= identity.starts => Archive::Known,
        Ok(_) if id == identity.database_id => Archive::Older,
        _ if is_new => Archive::New,
        _ => Archive::Other,
    }
}

/// Counts the start on both sides, the database's first: it may be ahead of the note, never behind. While in doubt
/// neither is counted, or a few restarts would make an old database the right one.
fn take_possession(catalog: &Catalog, blobs: &Blobs) {
    match catalog.note_start() {
        Ok(identity) => write_note(blobs, &identity.to_string()),
        // A full disk must not keep hits from being served.
        Err(cause) => tracing::warn!(error = %cause, "the start can't be noted in the database"),
    }
}

/// Failing to is no reason to stop: at the next start it is tried again.
fn write_note(blobs: &Blobs, note: &str) {
    if let Err(cause) = blobs.note_owner(Some(note)) {
        tracing::warn!(error = %cause, "can't note in storage.base_path which database records it");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_database_is_judged_by_what_the_store_has_noted() {
        let ours = Identity { database_id: "abc".into(), starts: 7 };
        for (is_new, owner, is_empty, verdict) in [
            (true, None, true, Archive::Known),
            (true, None, false, Archive::New),
            (false, None, false, Archive::Known),
            (false, Some("abc 6"), false, Archive::Known),
            (false, Some("abc 7"), false, Archive::Known),
            (false, Some("abc 8"), false, Archive::Older),
            (false, Some("def 1"), false, Archive::Other),
            (true, Some("def 1"), false, Archive::New),
            (true, Some("def 1"), true, Archive::Known),
            (false, Some(NOBODY), false, Archive::Other),
            (false, Some(""), false, Archive::Other),
        ] {
            assert_eq!(judge(&ours, is_new, owner, is_empty), verdict, "{is_new} {owner:?} {is_empty}");
        }
    }
}
