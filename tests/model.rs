//! A model of publishing, deleting, sweeping, kills and power cuts, of which every reachable state is looked at.
//!
//! One content, two URLs that have it, a downloader for each, an operator who deletes, the sweep, and a machine that
//! fails. A step here is what the program does between two kill points. What the model takes for granted: a renamed or
//! unlinked name is on disk for certain once its directory is synced, and before that may be or not; file content that
//! was not synced is lost in a power cut; a committed transaction stays.
//!
//! That it can fail is shown with mistakes, each of which it finds.

use std::io::Write as _;

use stateright::{Checker, Model, Property};

const URLS: usize = 2;

/// What the program under test gets wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mistake {
    None,
    /// The row is written when the bytes have come, before they are published.
    RowBeforeBytes,
    /// The file is not synced before it gets its name.
    NoFileSync,
    /// The directory is not synced after the rename.
    NoDirSync,
    /// The sweep does not ask again under the lock.
    NoCheck,
    /// The sweep passes by what is published and not recorded yet.
    NoClaim,
    /// A deletion marks the blob even if another URL has it.
    SharedBlobDeleted,
    /// The file goes before the row.
    FileBeforeRow,
    /// The sweep notes its work before the directory is synced.
    NotedBeforeSync,
    /// The sweep notes its work for whatever deletion there is by then.
    NotedForAnyDeletion,
}

/// How far a download has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Download {
    Idle,
    /// Complete, verified, in the spool.
    Spooled,
    Synced,
    Claimed,
    /// Under its name; holds the shard's lock.
    Renamed,
    /// The name is on disk.
    Placed,
    /// The row is written.
    Recorded,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Sweep {
    Idle,
    /// It has seen this deletion.
    Listed(u8),
    /// Holds the shard's lock.
    Checked(u8),
    /// Holds the shard's lock.
    Unlinked(u8),
    Synced(u8),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Blob {
    Unknown,
    Present,
    /// By the so-many-th deletion.
    Deleted(u8),
    Swept(u8),
}

/// What lies at the blob's place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum File {
    Absent,
    /// With its bytes on disk, or only in memory.
    Good {
        synced: bool,
    },
    /// A power cut took bytes away.
    Broken,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct State {
    /// As the running system sees it.
    file: File,
    /// As a power cut would surely leave it, were the last rename or unlink lost.
    file_on_disk: File,
    rows: [bool; URLS],
    blob: Blob,
    downloads: [Download; URLS],
    sweep: Sweep,
    is_locked: bool,
    /// A client was told that it has all of it, and nobody has deleted it since.
    acknowledged: [bool; URLS],
    /// A machine failed between a rename and its row: the file may be one that nobody knows.
    may_be_orphan: bool,
    deletions: u8,
    publications: u8,
    failures: u8,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Action {
    Download(usize),
    Delete(usize),
    Sweep,
    Kill,
    /// What the disk has not been told to keep is kept or lost.
    PowerCut {
        is_kept: bool,
    },
}

/// How much may happen.
struct Store {
    mistake: Mistake,
    publications: u8,
    deletions: u8,
    failures: u8,
}

impl State {
    fn is_claimed(&self) -> bool {
        use Download::{Claimed, Placed, Recorded, Renamed};
        self.downloads.iter().any(|download| matches!(download, Claimed | Renamed | Placed | Recorded))
    }

    fn is_readable(&self) -> bool {
        matches!(self.file, File::Good { .. })
    }

    /// The service starts again: only what it holds in memory is gone.
    fn restart(&mut self) {
        use Download::{Placed, Renamed};
        self.may_be_orphan |= self.downloads.iter().any(|at| matches!(at, Renamed | Placed));
        self.downloads = [Download::Idle; URLS];
        self.sweep = Sweep::Idle;
        self.is_locked = false;
        self.failures += 1;
    }

    fn record(&mut self, url: usize) {
        self.rows[url] = true;
        self.blob = Blob::Present;
        self.may_be_orphan = false;
    }
}

impl Store {
    fn download(&self, state: &mut State, url: usize) -> Option<()> {
        use Download::*;
        state.downloads[url] = match state.downloads[url] {
            Idle if state.publications < self.publications => {
                state.publications += 1;
                Spooled
            }
            Idle => return None,
            Spooled => {
                if self.mistake == Mistake::RowBeforeBytes {
                    state.record(url);
                }
                Synced
            }
            Synced => Claimed,
            Claimed if state.is_locked => return None,
            Claimed => {
                state.is_locked = true;
                state.file = File::Good { synced: self.mistake != Mistake::NoFileSync };
                Renamed
            }
            Renamed => {
                if self.mistake != Mistake::NoDirSync {
                    state.file_on_disk = state.file;
                }
                state.is_locked = false;
                Placed
            }
            Placed => {
                state.record(url);
                Recorded
            }
            Recorded => {
                // Unless it was deleted again before the last bytes were out.
                state.acknowledged[url] = state.rows[url];
                Idle
            }
        };
        Some(())
    }

    fn delete(&self, state: &mut State, url: usize) -> Option<()> {
        if state.deletions == self.deletions || !state.rows[url] {
            return None;
        }
        state.deletions += 1;
        if self.mistake == Mistake::FileBeforeRow {
            state.file = File::Absent;
        }
        state.rows[url] = false;
        state.acknowledged[url] = false;
        if !state.rows.contains(&true) || self.mistake == Mistake::SharedBlobDeleted {
            state.blob = Blob::Deleted(state.deletions);
        }
        Some(())
    }

    fn sweep(&self, state: &mut State) -> Option<()> {
        let mistake = self.mistake;
        state.sweep = match state.sweep {
            Sweep::Idle => match state.blob {
                Blob::Deleted(deletion) => Sweep::Listed(deletion),
                _ => return None,
            },
            Sweep::Listed(_) if state.is_locked => return None,
            Sweep::Listed(deletion) => {
                let is_deleted = mistake == Mistake::NoCheck || state.blob == Blob::Deleted(deletion);
                let is_free = mistake == Mistake::NoClaim || !state.is_claimed();
                match is_deleted && is_free {
                    true => {
                        state.is_locked = true;
                        Sweep::Checked(deletion)
                    }
                    false => Sweep::Idle,
                }
            }
            Sweep::Checked(deletion) => {
                state.file = File::Absent;
                if mistake == Mistake::NotedBeforeSync && state.blob == Blob::Deleted(deletion) {
                    state.blob = Blob::Swept(deletion);
                }
                Sweep::Unlinked(deletion)
            }
            Sweep::Unlinked(deletion) => {
                state.file_on_disk = state.file;
                state.is_locked = false;
                Sweep::Synced(deletion)
            }
            Sweep::Synced(seen) => {
                if let Blob::Deleted(deletion) = state.blob
                    && (deletion == seen || mistake == Mistake::NotedForAnyDeletion)
                {
                    state.blob = Blob::Swept(deletion);
                }
                Sweep::Idle
            }
        };
        Some(())
    }

    fn power_cut(&self, state: &mut State, is_kept: bool) {
        state.restart();
        if !is_kept {
            state.file = state.file_on_disk;
        }
        if state.file == (File::Good { synced: false }) {
            state.file = File::Broken;
        }
        state.file_on_disk = state.file;
    }
}

impl Model for Store {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![State {
            file: File::Absent,
            file_on_disk: File::Absent,
            rows: [false; URLS],
            blob: Blob::Unknown,
            downloads: [Download::Idle; URLS],
            sweep: Sweep::Idle,
            is_locked: false,
            acknowledged: [false; URLS],
            may_be_orphan: false,
            deletions: 0,
            publications: 0,
            failures: 0,
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        for url in 0..URLS {
            actions.extend([Action::Download(url), Action::Delete(url)]);
        }
        actions.push(Action::Sweep);
        if state.failures < self.failures {
            actions.push(Action::Kill);
            actions.extend([true, false].map(|is_kept| Action::PowerCut { is_kept }));
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        match action {
            Action::Download(url) => self.download(&mut state, url)?,
            Action::Delete(url) => self.delete(&mut state, url)?,
            Action::Sweep => self.sweep(&mut state)?,
            Action::Kill => state.restart(),
            Action::PowerCut { is_kept } => self.power_cut(&mut state, is_kept),
        }
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Store>> {
        vec![
            Property::always(NO_ROW_WITHOUT_FILE, |_, state: &State| {
                !state.rows.contains(&true) || state.is_readable()
            }),
            Property::always(NOTHING_LOST, |_, state: &State| {
                (0..URLS).all(|url| !state.acknowledged[url] || (state.rows[url] && state.is_readable()))
            }),
            Property::always(NOTHING_LEFT, |_, state: &State| {
                let is_left = matches!(state.blob, Blob::Swept(_)) && state.file != File::Absent;
                !is_left || state.is_claimed() || state.may_be_orphan
            }),
            // That the promises above are not kept only because nothing happens.
            Property::sometimes("swept", |_, state: &State| matches!(state.blob, Blob::Swept(_))),
            Property::sometimes("published again after it was swept", |model: &Store, state: &State| {
                state.publications == model.publications
                    && state.deletions > 0
                    && state.acknowledged == [true; URLS]
            }),
            Property::sometimes("acknowledged before the last power cut", |model: &Store, state: &State| {
                state.failures == model.failures && state.acknowledged.contains(&true)
            }),
            Property::sometimes("wanted again while the sweep looks", |_, state: &State| {
                matches!(state.sweep, Sweep::Listed(_)) && state.blob == Blob::Present
            }),
        ]
    }
}

const NO_ROW_WITHOUT_FILE: &str = "never a row without its durable file";
const NOTHING_LOST: &str = "what was acknowledged and not deleted is there";
const NOTHING_LEFT: &str = "what is noted as swept has no file, but for an orphan of a crash";

fn check(mistake: Mistake, publications: u8, deletions: u8, failures: u8) -> impl Checker<Store> {
    let checker =
        Store { mistake, publications, deletions, failures }.checker().threads(2).spawn_bfs().join();
    // Past the test runner, which keeps to itself what a test prints.
    let _ = writeln!(
        std::io::stderr(),
        "model, {mistake:?}: {} states, {} of them unique",
        checker.state_count(),
        checker.unique_state_count()
    );
    checker
}

#[test]
fn every_state_keeps_the_promises() {
    let checker = check(Mistake::None, 7, 5, 4);
    checker.assert_properties();
    assert!(checker.unique_state_count() > 100_000, "{}", checker.unique_state_count());
}

#[test]
fn every_mistake_is_found() {
    for (mistake, promise) in [
        (Mistake::RowBeforeBytes, NO_ROW_WITHOUT_FILE),
        (Mistake::NoFileSync, NOTHING_LOST),
        (Mistake::NoDirSync, NOTHING_LOST),
        (Mistake::NoCheck, NOTHING_LOST),
        (Mistake::NoClaim, NO_ROW_WITHOUT_FILE),
        (Mistake::SharedBlobDeleted, NOTHING_LOST),
        (Mistake::FileBeforeRow, NOTHING_LOST),
        (Mistake::NotedBeforeSync, NOTHING_LEFT),
        (Mistake::NotedForAnyDeletion, NOTHING_LEFT),
    ] {
        let checker = check(mistake, 3, 2, 1);
        assert!(checker.discovery(promise).is_some(), "{mistake:?} keeps the promise: {promise}");
    }
}
