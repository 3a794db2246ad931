//! Thousands of clients that are slow on purpose beside a few that are not.
//!
//! What is compared is a 99th percentile beside them with one without them, a moment before, in the same process and on
//! the same machine. It is the median of the percentiles of ten short windows, so that a hiccup of the machine spoils a
//! window, not the figure; and of three pairs the lower figure of each kind counts, since noise only adds.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::harness::{Client, Content, Reply, Running, Service, Upstream, eventually, fetch_target};
use crate::harness::{raise_file_limit, skip};
use crate::{alone, beside_others, report};

/// `server.max_connections`: all there is room for.
const CONNECTIONS: usize = 4_096;
const DRIBBLERS: usize = 1_500;
const SIPPERS: usize = 1_500;
const HONEST: usize = 2;
const IDLE: usize = CONNECTIONS - DRIBBLERS - SIPPERS - HONEST;
const PAIRS: usize = 3;
const WINDOWS: usize = 10;
/// Answers in one window, at least.
const WINDOW: usize = 300;
/// All of them together are some seconds, so that every slow client has its turn.
const SHORTEST_WINDOW: Duration = Duration::from_millis(250);
const MOST_TIMES_SLOWER: f64 = 3.0;

/// A connection that is up to no good, and what it does every second.
enum Slow {
    /// Sends one more byte of a head that never ends.
    Dribbler(TcpStream),
    /// Reads one more byte of a large answer.
    Sipper(TcpStream),
    /// Nothing.
    Idle { _connection: TcpStream },
}

impl Slow {
    fn connect(api: SocketAddr, target: &str) -> Vec<Slow> {
        let connect = |hello: &str| {
            let mut stream = small_window(api);
            stream.write_all(hello.as_bytes()).unwrap();
            stream.set_nonblocking(true).unwrap();
            stream
        };
        let ask = format!("GET {target} HTTP/1.1\r\nHost: h\r\n\r\n");
        let mut all = Vec::new();
        all.extend((0..DRIBBLERS).map(|_| Slow::Dribbler(connect("GET /health HTTP/1.1\r\nX: "))));
        all.extend((0..SIPPERS).map(|_| Slow::Sipper(connect(&ask))));
        all.extend((0..IDLE).map(|_| Slow::Idle { _connection: connect("") }));
        all
    }

    /// Its turn; false when the service has closed it.
    fn act(&mut self) -> bool {
        let done = match self {
            Slow::Dribbler(stream) => stream.write(b"x"),
            Slow::Sipper(stream) => stream.read(&mut [0]),
            Slow::Idle { .. } => return true,
        };
        match done {
            Ok(length) => length > 0,
            Err(error) => error.kind() == ErrorKind::WouldBlock,
        }
    }
}

/// Connects with the least receive buffer, so that what nobody reads stays with the service.
fn small_window(api: SocketAddr) -> TcpStream {
    use rustix::net::{AddressFamily, SocketType, connect, socket, sockopt};
    let socket = socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
    sockopt::set_socket_recv_buffer_size(&socket, 4096).unwrap();
    connect(&socket, &api).expect("the service accepts connections");
    TcpStream::from(socket)
}

/// Every second each of them does what it does, one after the other, until `over`. Returns how many are still
/// connected then.
fn torment(mut slow: Vec<Slow>, over: &AtomicBool) -> usize {
    const SLICES: usize = 50;
    let mut slice = 0;
    while !over.load(Ordering::SeqCst) {
        let mut number = 0;
        slow.retain_mut(|one| {
            number += 1;
            number % SLICES != slice || one.act()
        });
        slice = (slice + 1) % SLICES;
        std::thread::sleep(Duration::from_secs(1) / SLICES as u32);
    }
    slow.len()
}

/// The 99th percentile of honest hits, in seconds.
fn p99(honest: &mut [Client], target: &str, body: &[u8]) -> f64 {
    let mut one = |n: usize| {
        let client = &mut honest[n % HONEST];
        let asked = Instant::now();
        client.request("GET", target, &[]);
        client.response("GET").assert_ok(body);
        asked.elapsed().as_secs_f64()
    };
    let mut window = || {
        let (began, mut times) = (Instant::now(), Vec::new());
        while times.len() < WINDOW || began.elapsed() < SHORTEST_WINDOW {
            times.push(one(times.len()));
        }
        times.sort_by(f64::total_cmp);
        times[times.len() * 99 / 100]
    };
    let mut windows: Vec<f64> = (0..WINDOWS).map(|_| window()).collect();
    windows.sort_by(f64::total_cmp);
    windows[WINDOWS / 2]
}

/// The same artifact, without the slow ones and with them: both percentiles, and how many slow ones held on.
fn pair(service: &Running, small: &str, body: &[u8], large: &str) -> (f64, f64, usize) {
    let mut honest: Vec<Client> = (0..HONEST).map(|_| service.connect()).collect();
    let quiet = p99(&mut honest, small, body);
    let (slow, over) = (Slow::connect(service.api, large), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let tormenting = scope.spawn(|| torment(slow, &over));
        // All are accepted, those that ask for something have been heard.
        eventually("every connection is open", || (descriptors(service) >= CONNECTIONS).then_some(()));
        let loaded = p99(&mut honest, small, body);
        over.store(true, Ordering::SeqCst);
        (quiet, loaded, tormenting.join().unwrap())
    })
}

fn descriptors(service: &Running) -> usize {
    // Read from outside: a request would be one connection more.
    std::fs::read_dir(format!("/proc/{}/fd", service.pid())).expect("Linux lists them").count()
}

#[test]
fn three_thousand_slow_clients_harm_nobody() {
    let name = "load::three_thousand_slow_clients_harm_nobody";
    if !raise_file_limit(3 * CONNECTIONS as u64) {
        return skip(name, "needs 12,288 open files");
    }
    let _alone = alone();
    let up = Upstream::start();
    // They are to stay, so that there is something to measure beside; `connections` in the suite tries the deadlines.
    let service = Service::new().env("SERVER__HEADER_TIMEOUT_SECONDS", "600").start();
    let (small, large) = (Content::new(1, 20_000), Content::new(2, 16 << 20));
    let (small_url, large_url) =
        (up.serve("/small", Reply::ok(&small)), up.serve("/large", Reply::ok(&large)));
    service.fetch(&small_url).assert_ok(&small.bytes());
    service.fetch_with(&large_url, &[("Range", "bytes=0-0")]);
    let (small_target, large_target) = (fetch_target(&small_url), fetch_target(&large_url));
    let before = descriptors(&service);
    let (mut best_quiet, mut best_loaded) = (f64::MAX, f64::MAX);
    for _ in 0..PAIRS {
        let (quiet, loaded, held) = pair(&service, &small_target, &small.bytes(), &large_target);
        assert_eq!(held, CONNECTIONS - HONEST, "no slow connection was closed before its time");
        (best_quiet, best_loaded) = (best_quiet.min(quiet), best_loaded.min(loaded));
        // Whatever was left over of a broken answer is given back too.
        eventually("every descriptor is back", || (descriptors(&service) <= before).then_some(()));
    }
    report(format_args!(
        "p99 of a 20 kB hit: {:.0} µs, beside {} slow connections {:.0} µs",
        best_quiet * 1e6,
        CONNECTIONS - HONEST,
        best_loaded * 1e6
    ));
    let slower = best_loaded / best_quiet;
    assert!(slower <= MOST_TIMES_SLOWER, "{slower:.1} times as slow beside slow clients");
}

/// With a queue of 128 the next connection's SYN is dropped, and sent again after a second.
#[test]
fn a_burst_of_connections_keeps_nobody_waiting() {
    const BURST: usize = 1_000;
    let name = "load::a_burst_of_connections_keeps_nobody_waiting";
    let limit = std::fs::read_to_string("/proc/sys/net/core/somaxconn").unwrap_or_default();
    if limit.trim().parse::<usize>().is_ok_and(|limit| limit <= BURST) || !raise_file_limit(4_000) {
        return skip(name, "needs 4,000 open files and net.core.somaxconn over 1,000");
    }
    let _turn = beside_others();
    let service = Service::new().start();
    // A service that accepts nothing for a moment, because it is busy.
    service.signal(Signal::STOP);
    let short_of_a_second = Duration::from_millis(900);
    let connect = |_| TcpStream::connect_timeout(&service.api, short_of_a_second).ok();
    let burst: Vec<TcpStream> = (0..BURST).map_while(connect).collect();
    service.signal(Signal::CONT);
    assert_eq!(burst.len(), BURST, "connections before one would have had to wait for a second");
}
