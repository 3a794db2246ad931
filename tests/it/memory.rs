//! Memory does not grow with artifacts or with those who wait for them.

use crate::harness::{Client, Content, End, Reply, Service, Upstream, fetch_target};

const SIZE: u64 = 1 << 30;
const CLIENTS: usize = 10;
const LIMIT: u64 = 64 << 20;

#[test]
fn ten_clients_of_one_cold_gigabyte() {
    let up = Upstream::start();
    let service = Service::new().env("FETCH__STREAM_AFTER_SECONDS", "0").start();
    let content = Content::new(170, SIZE);
    let url = up.serve("/1g", Reply::ok(&content));
    let target = fetch_target(&url);
    std::thread::scope(|scope| {
        for _ in 0..CLIENTS {
            scope.spawn(|| {
                let mut client = Client::connect(service.api);
                client.request("GET", &target, &[]);
                assert_eq!(client.head().status(), 200);
                assert_eq!(client.drain(SIZE, |_| {}), End::Complete);
            });
        }
    });
    assert_eq!(up.total(), 1);
    let peak = service.peak_rss_bytes();
    assert!(peak < LIMIT, "peak RSS was {} MiB", peak >> 20);
    assert_eq!(
        service.fetch_with(&url, &[("Range", "bytes=0-0")]).header("X-Content-SHA256"),
        content.sha256()
    );
}

#[test]
fn many_slow_readers_of_large_hits() {
    let (up, service) = (Upstream::start(), Service::new().start());
    let content = Content::new(171, 32 << 20);
    let url = up.serve("/32m", Reply::ok(&content));
    service.fetch_with(&url, &[("Range", "bytes=0-0")]);
    let mut clients: Vec<Client> = (0..200).map(|_| service.connect()).collect();
    for client in &mut clients {
        client.request("GET", &fetch_target(&url), &[]);
        assert_eq!(client.head().status(), 200);
    }
    let peak = service.peak_rss_bytes();
    assert!(peak < LIMIT, "peak RSS was {} MiB", peak >> 20);
    let end = clients[0].drain(content.len(), |_| {});
    assert_eq!(end, End::Complete);
}
