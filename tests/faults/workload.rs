//! What is fetched while faults happen, and a record, outside of the service, of what clients were told.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::harness::client::Head;
use crate::harness::{Client, Content, End, Reply, Running, Upstream, fetch_target};

/// Clients of [`Load::run`], and so the most downloads that a fault can find in flight.
pub const CLIENTS: u64 = 4;

/// Nothing, one byte, and sizes on both sides of the tail that is held back and of a spool step.
const SIZES: [u64; 5] = [5_000, 0, 70_000, 1, 300_000];

/// An item with this number or a higher one is large, so that it is synced before its end too, and its upstream does not
/// say how large, so that what is allocated ahead has to be given back.
pub const LARGE: u64 = 1 << 40;

/// The content of item `n`. Two neighbours have the same, so that publishing one content twice is part of every load.
pub fn content(n: u64) -> Content {
    if n >= LARGE {
        return Content::new(n, 40 << 20);
    }
    let pair = n / 2;
    Content::new(pair, SIZES[(pair % 5) as usize])
}

/// An upstream that has every item, each at [`url`].
pub fn upstream() -> Upstream {
    let up = Upstream::start();
    up.on("/item", |x| {
        let n = x.head.line.split(['=', ' ']).nth(2).and_then(|n| n.parse().ok());
        let n = n.expect("the number of an item");
        if n < LARGE {
            return x.reply(&Reply::ok(&content(n)));
        }
        x.send("HTTP/1.1 200 OK\r\n\r\n")?;
        x.body(&content(n), 0, u64::MAX)
    });
    up
}

/// Where item `n` is.
pub fn url(up: &Upstream, n: u64) -> String {
    up.url(&format!("/item?n={n}"))
}

/// The URLs that were answered completely, with the number of their item.
#[derive(Default)]
pub struct Acknowledged {
    urls: Mutex<BTreeMap<String, u64>>,
    /// What was answered while nothing counted.
    late: Mutex<BTreeMap<String, u64>>,
    suspended: AtomicBool,
}

impl Acknowledged {
    /// A client has got all of it.
    pub fn add(&self, url: String, n: u64) {
        let suspended = self.suspended.load(Ordering::SeqCst);
        if suspended { &self.late } else { &self.urls }.lock().unwrap().insert(url, n);
    }

    /// All of them so far.
    pub fn all(&self) -> BTreeMap<String, u64> {
        self.urls.lock().unwrap().clone()
    }

    /// From now on nothing counts, or it does again.
    pub fn suspend(&self, suspended: bool) {
        self.suspended.store(suspended, Ordering::SeqCst);
    }

    /// What was answered while nothing counted, once.
    pub fn take_late(&self) -> BTreeMap<String, u64> {
        std::mem::take(&mut self.late.lock().unwrap())
    }

    /// Begins a new list, for a new service.
    pub fn forget(&self) {
        self.urls.lock().unwrap().clear();
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.urls.lock().unwrap().len()
    }
}

/// A load of fresh items, each asked for once.
pub struct Load<'a> {
    /// Who has them.
    pub up: &'a Upstream,
    /// The number of the next item; shared by all loads on one service.
    pub next: &'a AtomicU64,
    /// Where complete answers are recorded.
    pub acknowledged: &'a Acknowledged,
}

impl Load<'_> {
    /// Fetches with [`CLIENTS`] clients from `service` while `fault` runs, which must end the service.
    pub fn run(&self, service: &mut Running, fault: impl FnOnce(&mut Running)) {
        let (over, api) = (AtomicBool::new(false), service.api);
        // Connected before anything can happen, so that no client is kept out.
        let clients: Vec<Client> = (0..CLIENTS).map(|_| Client::connect(api)).collect();
        std::thread::scope(|scope| {
            for client in clients {
                scope.spawn(|| self.fetch_until(client, &over));
            }
            fault(service);
            over.store(true, Ordering::SeqCst);
        });
    }

    fn fetch_until(&self, mut client: Client, over: &AtomicBool) {
        while !over.load(Ordering::SeqCst) {
            let n = self.next.fetch_add(1, Ordering::SeqCst);
            let url = url(self.up, n);
            client.request("GET", &fetch_target(&url), &[]);
            let Some(head) = head(&mut client) else { return };
            let answer = client.body("GET", &head);
            if (answer.status, &answer.end) == (200, &End::Complete) {
                answer.assert_ok(&content(n).bytes());
                self.acknowledged.add(url, n);
            }
        }
    }
}

/// The head of the answer, if the service lives to give one. It may fail or die, but not keep a client waiting.
fn head(client: &mut Client) -> Option<Head> {
    match client.try_head() {
        Ok(head) => Some(head),
        Err(error) => {
            let hangs = matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut);
            assert!(!hangs, "a request is not answered: {error}");
            None
        }
    }
}

/// Fetches item `n` on a connection of its own; says whether it was answered completely, and records that.
///
/// An answer that is neither right nor an error as documented fails the test.
pub fn fetch(api: SocketAddr, up: &Upstream, n: u64, acknowledged: &Acknowledged) -> bool {
    let Ok(mut client) = Client::try_connect(api) else { return false };
    let url = url(up, n);
    client.request("GET", &fetch_target(&url), &[("Connection", "close")]);
    let Some(head) = head(&mut client) else { return false };
    let answer = client.body("GET", &head);
    match answer.status {
        200 if answer.end == End::Complete => {
            answer.assert_ok(&content(n).bytes());
            acknowledged.add(url, n);
            true
        }
        // The end was held back, so nobody takes it for the whole.
        200 => false,
        _ => {
            answer.assert_error(500, "internal_error");
            false
        }
    }
}
