//! One download a URL, each client judged by its own checksum, nobody left waiting.

use std::sync::PoisonError;

use shuttle::sync::{
    Arc, Mutex,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

use crate::artifact::{Digest, RequestId, SourceUrl, Streaming, Want, globs::QueryGlobs};
use crate::front::Stored;
use crate::inflight::{Flight, Inflight, Stage};
use crate::{breaks, say_tried, schedules};

fn digest(byte: u8) -> Digest {
    format!("{byte:02x}").repeat(32).parse().unwrap()
}

/// What the upstream has.
fn actual() -> Digest {
    digest(0xaa)
}

fn want(sha256: Option<Digest>) -> Want {
    Want {
        url: SourceUrl::parse("http://h/x", &QueryGlobs::default()).unwrap(),
        sha256,
        streaming: Streaming::Never,
        only_if_cached: false,
        no_cache: false,
        request_id: RequestId::random(),
    }
}

/// A cache of one URL, of which only the flights are real.
struct World {
    inflight: Inflight,
    /// The catalogue.
    stored: Mutex<Option<Digest>>,
    running: AtomicUsize,
    downloads: AtomicUsize,
    /// The seeded mistake: whoever leads doesn't look again whether another flight has landed.
    forgets_to_look: bool,
}

#[derive(Debug, PartialEq)]
enum Answer {
    Content(Digest),
    Mismatch,
}

impl World {
    fn new(forgets_to_look: bool) -> Arc<World> {
        Arc::new(World {
            inflight: Inflight::new(8),
            stored: Mutex::new(None),
            running: AtomicUsize::new(0),
            downloads: AtomicUsize::new(0),
            forgets_to_look,
        })
    }

    fn look_up(&self) -> Option<Digest> {
        *self.stored.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// As `Cache::fetch` does it.
    fn fetch(self: &Arc<World>, want: &Want) -> Answer {
        let judge = |stored| match want.sha256 {
            Some(expected) if expected != stored => Answer::Mismatch,
            _ => Answer::Content(stored),
        };
        loop {
            if let Some(stored) = self.look_up() {
                return judge(stored);
            }
            let joined = self.inflight.join(want, None);
            if joined.leads {
                match self.look_up().filter(|_| !self.forgets_to_look) {
                    Some(stored) => {
                        let stored = std::sync::Arc::new(Stored(stored));
                        self.inflight.end(&joined.flight, Stage::Stored { stored, lineage: 0 });
                        continue;
                    }
                    None => {
                        let (world, flight) = (self.clone(), joined.flight.clone());
                        shuttle::thread::spawn(move || world.download(&flight));
                    }
                }
            }
            match joined.flight.subscribe().wait_for(Stage::has_ended) {
                Stage::Stored { stored, .. } => return judge(stored.0),
                Stage::Rejected { actual } if want.sha256.is_some_and(|expected| expected != actual) => {
                    return Answer::Mismatch;
                }
                // It was decided without this client.
                Stage::Rejected { .. } => {}
                other => panic!("{other:?}"),
            }
        }
    }

    fn download(&self, flight: &Flight) {
        assert_eq!(self.running.fetch_add(1, Ordering::SeqCst), 0, "one download a URL at a time");
        assert_eq!(self.look_up(), None, "what is held is not downloaded");
        self.downloads.fetch_add(1, Ordering::SeqCst);
        let stage = match flight.seal(actual()) {
            Ok(()) => {
                *self.stored.lock().unwrap_or_else(PoisonError::into_inner) = Some(actual());
                Stage::Stored { stored: std::sync::Arc::new(Stored(actual())), lineage: 0 }
            }
            Err(expected) => {
                assert!(!expected.contains(&actual()), "whoever is content is not turned away");
                Stage::Rejected { actual: actual() }
            }
        };
        self.running.fetch_sub(1, Ordering::SeqCst);
        self.inflight.end(flight, stage);
    }

    fn fetch_all(self: &Arc<World>, expected: &[Option<Digest>]) -> Vec<Answer> {
        let clients: Vec<_> = expected
            .iter()
            .map(|&sha256| {
                let world = self.clone();
                shuttle::thread::spawn(move || world.fetch(&want(sha256)))
            })
            .collect();
        clients.into_iter().map(|client| client.join().unwrap()).collect()
    }
}

fn mixed(forgets_to_look: bool) {
    let world = World::new(forgets_to_look);
    let answers = world.fetch_all(&[Some(digest(0xbb)), None, Some(actual()), Some(digest(0xcc))]);
    let content = || Answer::Content(actual());
    assert_eq!(answers, [Answer::Mismatch, content(), content(), Answer::Mismatch]);
    // Each wrong checksum may have had a download of its own before somebody was content.
    assert!((1..=3).contains(&world.downloads.load(Ordering::SeqCst)));
}

#[test]
fn everybody_gets_what_is_right_for_them() {
    schedules(20_000, || mixed(false));
}

#[test]
fn who_leads_must_look_again() {
    breaks(20_000, "what is held is not downloaded", || mixed(true));
}

#[test]
fn what_nobody_is_content_with_is_not_stored() {
    schedules(8_000, || {
        let world = World::new(false);
        let answers = world.fetch_all(&[Some(digest(0xbb)), Some(digest(0xcc)), Some(digest(0xbb))]);
        assert_eq!(answers, [Answer::Mismatch, Answer::Mismatch, Answer::Mismatch]);
        assert_eq!(world.look_up(), None);
    });
}

/// A follower gives bytes out while a download begins again. `borrows` is how it has to be done.
fn release_against_suspend(borrows: bool) {
    let inflight = Inflight::new(1);
    let flight = inflight.join(&want(None), None).flight;
    let given = Arc::new(AtomicUsize::new(0));
    let is_compared = Arc::new(AtomicBool::new(false));
    let follower = {
        let (flight, given, is_compared) = (flight.clone(), given.clone(), is_compared.clone());
        shuttle::thread::spawn(move || {
            let stage = flight.subscribe();
            for end in [10, 20] {
                let borrowed = stage.borrow();
                if !matches!(&*borrowed, Stage::Asking) {
                    return;
                }
                let kept = borrows.then_some(borrowed);
                flight.release(end);
                assert!(!is_compared.load(Ordering::SeqCst), "a release slipped past the comparison");
                given.store(end as usize, Ordering::SeqCst);
                drop(kept);
            }
        })
    };
    let released = flight.suspend();
    is_compared.store(true, Ordering::SeqCst);
    follower.join().unwrap();
    assert!(
        given.load(Ordering::SeqCst) as u64 <= released,
        "a release slipped past, and what it gave is not known"
    );
}

/// Every interleaving there is.
#[test]
fn no_release_slips_past_a_new_beginning() {
    static TRIED: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
    let scenario = || {
        TRIED.fetch_add(1, Ordering::Relaxed);
        release_against_suspend(true);
    };
    shuttle::check_dfs(scenario, None);
    let tried = TRIED.load(Ordering::Relaxed);
    say_tried(tried);
    assert!(tried > 100, "{tried}");
}

#[test]
fn releasing_without_borrowing_is_found() {
    breaks(10_000, "a release slipped past", || release_against_suspend(false));
}
