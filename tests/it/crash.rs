//! SIGKILL under load: nothing that was answered completely is lost, nothing partial is visible.

use std::sync::Mutex;
use std::time::Duration;

use crate::harness::{Client, Content, End, Reply, Service, Upstream, eventually, fetch_target};

const ROUNDS: u64 = 6;
const CLIENTS: u64 = 4;
const EACH: u64 = 40;

/// Sizes on both sides of the tail and of a spool step.
fn content(round: u64, n: u64) -> Content {
    Content::new(round * 1_000 + n, [0, 1, 5_000, 70_000, 1_200_000][(n % 5) as usize])
}

/// Fetches until the service is gone; returns what was answered completely.
fn load(api: std::net::SocketAddr, urls: &[(u64, String)], answered: &Mutex<Vec<(u64, String)>>) {
    let Ok(stream) = std::net::TcpStream::connect(api) else { return };
    drop(stream);
    let mut client = Client::connect(api);
    for (n, url) in urls {
        client.request("GET", &fetch_target(url), &[]);
        let Ok(head) = client.try_head() else { return };
        let answer = client.body("GET", &head);
        if answer.status != 200 || answer.end != End::Complete {
            return;
        }
        answered.lock().unwrap().push((*n, url.clone()));
    }
}

#[test]
fn what_was_answered_is_there_after_every_kill() {
    let up = Upstream::start();
    let mut service = Service::new().env("FETCH__STREAM_AFTER_SECONDS", "0").start();
    let answered: Mutex<Vec<(u64, String)>> = Mutex::default();
    for round in 0..ROUNDS {
        let urls: Vec<(u64, String)> = (0..CLIENTS * EACH)
            .map(|n| (round * 1_000 + n, up.serve(&format!("/r{round}/{n}"), Reply::ok(&content(round, n)))))
            .collect();
        let api = service.api;
        std::thread::scope(|scope| {
            for part in urls.chunks(EACH as usize) {
                let answered = &answered;
                scope.spawn(move || load(api, part, answered));
            }
            std::thread::sleep(Duration::from_millis(20 + 37 * round));
            service.kill();
        });
        service = service.again().start();
        for (id, url) in answered.lock().unwrap().iter() {
            let asked = up.total();
            let answer = service.fetch(url);
            answer.assert_ok(&content(id / 1_000, id % 1_000).bytes());
            assert_eq!((answer.cache_status(), up.total()), ("HIT", asked), "round {round}: {url}");
        }
    }
    assert!(!answered.lock().unwrap().is_empty(), "the kills came too early to show anything");
    let check: String = service.sqlite().query_row("PRAGMA integrity_check", [], |r| r.get(0)).unwrap();
    assert_eq!(check, "ok");
    let stats = service.stats();
    assert_eq!(
        stats["total_items"],
        service.count_rows("SELECT count(*) FROM artifacts"),
        "totals agree: {stats}"
    );
    let size = service.count_rows("SELECT coalesce(sum(file_size), 0) FROM artifacts");
    assert_eq!(stats["total_size_bytes"], size, "{stats}");
    eventually("no spool is left", || service.spooled().is_empty().then_some(()));
}
