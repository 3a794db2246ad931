//! The ban on internal networks, in a network of its own where every address answers: a hole would show.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr, TcpListener, ToSocketAddrs, UdpSocket};
use std::process::Command;
use std::sync::Mutex;

use crate::harness::{Content, Reply, Service, Upstream, fetch_target, in_a_network_of_its_own, skip};

/// Runs `test` where all addresses are local and a name server of the test's own answers.
fn where_every_address_answers(name: &str, test: fn()) {
    in_a_network_of_its_own(name, || {
        let _files = set_up_network();
        test();
    });
}

/// Every address becomes local, so that a request which gets past the guard reaches the canary. Returns the
/// directory of the files mounted over the resolver's own.
fn set_up_network() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let (resolver, order) = (dir.path().join("resolv.conf"), dir.path().join("nsswitch.conf"));
    std::fs::write(&resolver, "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n").unwrap();
    std::fs::write(&order, "hosts: files dns\n").unwrap();
    for line in [
        "ip route add local 0.0.0.0/0 dev lo".to_string(),
        "ip -6 route add local ::/0 dev lo".to_string(),
        format!("mount --bind {} /etc/resolv.conf", resolver.display()),
        format!("mount --bind {} /etc/nsswitch.conf", order.display()),
    ] {
        let words: Vec<&str> = line.split(' ').collect();
        let done = Command::new(words[0]).args(&words[1..]).status().expect("the command is there");
        assert!(done.success(), "{line}");
    }
    dir
}

/// A service in which nothing internal is allowed.
fn strict() -> Service {
    Service::new().without("UPSTREAM__ALLOW_PRIVATE_NETWORKS").env("UPSTREAM__MAX_RETRIES", "1")
}

/// Answers at every address of the namespace, on both families.
fn canary() -> [Upstream; 2] {
    let ups = [Upstream::bind("0.0.0.0:80", None), Upstream::on_listener(every_v6_address(), None)];
    ups.iter().for_each(|up| drop(up.serve("/x", Reply::ok(&Content::of(b"reached")))));
    ups
}

/// Port 80 on IPv6 alone: a plain wildcard listener would take IPv4 as well and collide with the other one.
fn every_v6_address() -> TcpListener {
    use rustix::net::{AddressFamily, SocketType, bind, listen, socket, sockopt};
    let socket = socket(AddressFamily::INET6, SocketType::STREAM, None).unwrap();
    sockopt::set_ipv6_v6only(&socket, true).unwrap();
    bind(&socket, &"[::]:80".parse::<SocketAddr>().unwrap()).unwrap();
    listen(&socket, 128).unwrap();
    socket.into()
}

/// Spellings of forbidden addresses. What the URL parser refuses outright may be 400, never 200.
const SPELLINGS: &[&str] = &[
    "127.0.0.1",
    "127.1",
    "127.0.1",
    "127.255.255.254",
    "2130706433",
    "0x7f000001",
    "0x7f.1",
    "0x7f.0x0.0x0.0x1",
    "0177.0.0.1",
    "017700000001",
    "0177.1",
    "127.0.0.1.",
    "0",
    "0.0.0.0",
    "0x0",
    "0.1.2.3",
    "10.0.0.1",
    "10.255.255.255",
    "167772161",
    "0x0a000001",
    "012.0.0.1",
    "172.16.0.1",
    "172.31.255.255",
    "192.168.0.1",
    "192.168.255.255",
    "3232235521",
    "169.254.169.254",
    "0xa9fea9fe",
    "2852039166",
    "169.254.0.1",
    "100.64.0.1",
    "100.127.255.255",
    "192.0.0.1",
    "192.0.2.1",
    "198.51.100.1",
    "203.0.113.1",
    "198.18.0.1",
    "198.19.255.255",
    "192.88.99.1",
    "224.0.0.1",
    "239.255.255.255",
    "240.0.0.1",
    "255.255.255.255",
    "[::]",
    "[::1]",
    "[0:0:0:0:0:0:0:1]",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "[::ffff:10.0.0.1]",
    "[::127.0.0.1]",
    "[::ffff:0:127.0.0.1]",
    "[fc00::1]",
    "[fd12:3456::1]",
    "[fe80::1]",
    "[febf::1]",
    "[fec0::1]",
    "[ff02::1]",
    "[2001:db8::1]",
    "[3fff::1]",
    "[100::1]",
    "[64:ff9b::127.0.0.1]",
    "[64:ff9b::a00:1]",
    "[64:ff9b:1::1]",
    "[2002:7f00:1::]",
    "[2002:a00:1::1]",
    "[2001:0:7f00:1::]",
    "[2001::1]",
    "[5f00::1]",
    "localhost",
    "LOCALHOST",
    "localhost.",
    "a.localhost",
    "%6c%6f%63alhost",
    "%31%32%37.0.0.1",
    "①②⑦.⓪.⓪.①",
    "１２７.0.0.1",
    "127。0。0。1",
    "loc\u{00AD}alhost",
    "ⓛocalhost",
];

#[test]
fn without_the_guard_every_address_would_answer() {
    where_every_address_answers("guard::without_the_guard_every_address_would_answer", || {
        name_server(&[("rebind.test", &[&["93.184.215.14"], &["10.0.0.1"]]), ("six.test", &[&["fd00::1"]])]);
        let _ups = canary();
        for host in
            ["10.0.0.1", "127.0.0.1", "169.254.169.254", "93.184.215.14", "[fd00::1]", "[::1]", "six.test"]
        {
            let stream = std::net::TcpStream::connect(format!("{host}:80"));
            assert!(stream.is_ok(), "{host}: {stream:?}");
        }
        let resolved = || ("rebind.test", 80).to_socket_addrs().unwrap().next().unwrap().ip().to_string();
        assert_eq!([resolved(), resolved(), resolved()], ["93.184.215.14", "10.0.0.1", "10.0.0.1"]);
    });
}

#[test]
fn no_spelling_of_an_inside_address_gets_through() {
    where_every_address_answers("guard::no_spelling_of_an_inside_address_gets_through", || {
        assert!(SPELLINGS.len() >= 60);
        let (ups, service) = (canary(), strict().start());
        let mut wrong = Vec::new();
        for host in SPELLINGS {
            let answer = service.fetch(&format!("http://{host}/x"));
            if answer.status != 403 || answer.error() != "forbidden_upstream" {
                wrong.push(format!("{host}: {} {}", answer.status, String::from_utf8_lossy(&answer.body)));
            }
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
        assert_eq!(ups.iter().map(Upstream::total).sum::<usize>(), 0, "something was sent inside");
        let public = service.fetch("http://93.184.215.14/x");
        public.assert_ok(b"reached");
        service.fetch("http://[2606:2800:21f::1]/x").assert_ok(b"reached");
    });
}

/// A name server for the test: each name has a list of answers, one for each question of its kind in turn, the
/// last for ever. Two questions, A and AAAA, make one look-up.
fn name_server(zone: &[(&'static str, &[&[&str]])]) {
    let zone: HashMap<String, Vec<Vec<IpAddr>>> = zone
        .iter()
        .map(|(name, turns)| {
            let turns = turns.iter().map(|turn| turn.iter().map(|ip| ip.parse().unwrap()).collect());
            (name.to_string(), turns.collect())
        })
        .collect();
    let socket = UdpSocket::bind("127.0.0.1:53").unwrap();
    let asked: Mutex<HashMap<(String, u16), usize>> = Mutex::default();
    std::thread::spawn(move || {
        let mut query = [0; 512];
        while let Ok((n, peer)) = socket.recv_from(&mut query) {
            let _ = socket.send_to(&dns_answer(&query[..n], &zone, &asked), peer);
        }
    });
}

fn dns_answer(
    query: &[u8],
    zone: &HashMap<String, Vec<Vec<IpAddr>>>,
    asked: &Mutex<HashMap<(String, u16), usize>>,
) -> Vec<u8> {
    let (mut at, mut labels) = (12, Vec::new());
    while query[at] != 0 {
        let length = query[at] as usize;
        labels.push(String::from_utf8_lossy(&query[at + 1..=at + length]).to_ascii_lowercase());
        at += length + 1;
    }
    let (name, kind) = (labels.join("."), u16::from_be_bytes([query[at + 1], query[at + 2]]));
    let mut asked = asked.lock().unwrap();
    let turn = asked.entry((name.clone(), kind)).or_default();
    let answers = zone.get(&name).map(|turns| turns[(*turn).min(turns.len() - 1)].clone());
    *turn += 1;
    let known = answers.is_some();
    let wanted = |ip: &IpAddr| matches!((ip, kind), (IpAddr::V4(_), 1) | (IpAddr::V6(_), 28));
    let records: Vec<IpAddr> = answers.unwrap_or_default().into_iter().filter(wanted).collect();
    let mut reply = query[..2].to_vec();
    reply.extend([0x81, if known { 0x80 } else { 0x83 }, 0, 1, 0, records.len() as u8, 0, 0, 0, 0]);
    reply.extend_from_slice(&query[12..at + 5]);
    for ip in records {
        let data = match ip {
            IpAddr::V4(ip) => ip.octets().to_vec(),
            IpAddr::V6(ip) => ip.octets().to_vec(),
        };
        reply.extend([0xc0, 12]);
        reply.extend(kind.to_be_bytes());
        reply.extend([0, 1, 0, 0, 0, 0, 0, data.len() as u8]);
        reply.extend(data);
    }
    reply
}

#[test]
fn names_of_inside_addresses_are_forbidden() {
    where_every_address_answers("guard::names_of_inside_addresses_are_forbidden", || {
        name_server(&[
            ("inside.test", &[&["10.0.0.1"]]),
            ("loop.test", &[&["127.0.0.1", "::1"]]),
            ("metadata.test", &[&["169.254.169.254"]]),
            ("six.test", &[&["fd00::1"]]),
            ("mapped.test", &[&["::ffff:10.0.0.1"]]),
            ("public.test", &[&["93.184.215.14"]]),
            ("mixed.test", &[&["10.0.0.1", "93.184.215.14", "fd00::1"]]),
            ("empty.test", &[&[]]),
            ("localhost", &[&["93.184.215.14"]]),
            ("app.localhost", &[&["93.184.215.14"]]),
        ]);
        let (ups, service) = (canary(), strict().start());
        for host in ["inside.test", "loop.test", "metadata.test", "six.test", "mapped.test", "INSIDE.test."] {
            service.fetch(&format!("http://{host}/x")).assert_error(403, "forbidden_upstream");
        }
        for host in ["localhost", "app.localhost"] {
            service.fetch(&format!("http://{host}/x")).assert_error(403, "forbidden_upstream");
        }
        for host in ["nowhere.test", "empty.test"] {
            service.fetch(&format!("http://{host}/x")).assert_error(503, "upstream_unavailable");
        }
        assert_eq!(ups[0].total() + ups[1].total(), 0, "something was sent inside");
        service.fetch("http://public.test/x").assert_ok(b"reached");
        service.fetch("http://mixed.test/x").assert_ok(b"reached");
        assert_eq!(ups[0].requests("/x")[0].get("Host"), Some("public.test"));
    });
}

#[test]
fn a_resolver_that_fails_allows_nothing() {
    where_every_address_answers("guard::a_resolver_that_fails_allows_nothing", || {
        // Nobody answers at the name server's port.
        let (ups, service) = (canary(), strict().start());
        service.fetch("http://some.test/x").assert_error(503, "upstream_unavailable");
        assert_eq!(ups[0].total() + ups[1].total(), 0);
    });
}

#[test]
fn a_name_that_changes_its_mind_gains_nothing() {
    where_every_address_answers("guard::a_name_that_changes_its_mind_gains_nothing", || {
        name_server(&[("rebind.test", &[&["93.184.215.14"], &["127.0.0.1"], &["127.0.0.1"]])]);
        // Two servers: who answers says where the request went.
        let outside = Upstream::bind("93.184.215.14:80", None);
        let inside = Upstream::bind("127.0.0.1:80", None);
        outside.serve("/x", Reply::ok(&Content::of(b"outside")));
        inside.serve("/x", Reply::ok(&Content::of(b"inside")));
        let service = strict().start();
        service.fetch("http://rebind.test/x").assert_ok(b"outside");
        service.fetch("http://rebind.test/y").assert_error(403, "forbidden_upstream");
        assert_eq!(inside.total(), 0);
    });
}

#[test]
fn redirects_inside_are_forbidden_by_name_as_well() {
    where_every_address_answers("guard::redirects_inside_are_forbidden_by_name_as_well", || {
        name_server(&[("public.test", &[&["93.184.215.14"]]), ("inside.test", &[&["10.0.0.1"]])]);
        let outside = Upstream::bind("93.184.215.14:80", None);
        let inside = Upstream::bind("10.0.0.1:80", None);
        inside.serve("/x", Reply::ok(&Content::of(b"inside")));
        outside.redirect("/name", 302, "http://inside.test/x");
        outside.redirect("/literal", 302, "http://10.0.0.1/x");
        outside.redirect("/hex", 302, "http://0xa000001/x");
        outside.redirect("/mapped", 302, "http://[::ffff:a00:1]/x");
        let service = strict().start();
        for path in ["/name", "/literal", "/hex", "/mapped"] {
            let url = format!("http://public.test{path}");
            service.fetch(&url).assert_error(403, "forbidden_upstream");
            let head = service.request("HEAD", &fetch_target(&url), &[]);
            assert_eq!(head.status, 403, "HEAD is guarded, too");
        }
        assert_eq!(inside.total(), 0);
    });
}

#[test]
fn an_exemption_opens_its_network_and_no_other() {
    where_every_address_answers("guard::an_exemption_opens_its_network_and_no_other", || {
        let ups = canary();
        let service =
            Service::new().env("UPSTREAM__ALLOW_PRIVATE_NETWORKS", "10.1.0.0/16,fd00:1::/32").start();
        for host in ["10.1.2.3", "[::ffff:10.1.2.3]", "[fd00:1::5]"] {
            service.fetch(&format!("http://{host}/x")).assert_ok(b"reached");
        }
        let before: usize = ups.iter().map(Upstream::total).sum();
        for host in ["10.2.0.1", "127.0.0.1", "[fd00:2::5]", "[::1]"] {
            service.fetch(&format!("http://{host}/x")).assert_error(403, "forbidden_upstream");
        }
        assert_eq!(ups.iter().map(Upstream::total).sum::<usize>(), before);
    });
}

#[test]
fn through_a_proxy_inside_names_are_judged_here() {
    where_every_address_answers("guard::through_a_proxy_inside_names_are_judged_here", || {
        let proxy = Upstream::bind("93.184.215.14:3128", None);
        proxy.serve("http://public.test/x", Reply::ok(&Content::of(b"by proxy")));
        let service = strict().env("UPSTREAM__PROXY", "http://93.184.215.14:3128").start();
        for host in [
            "10.0.0.1",
            "[::1]",
            "0x7f.1",
            "localhost",
            "x.localhost",
            "printer",
            "nas.local",
            "nas.lan",
            "db.internal",
            "tv.home.arpa",
            "NAS.LAN.",
        ] {
            service.fetch(&format!("http://{host}/x")).assert_error(403, "forbidden_upstream");
        }
        assert_eq!(proxy.total(), 0);
        service.fetch("http://public.test/x").assert_ok(b"by proxy");
        assert_eq!(proxy.total(), 1);
    });
}

#[test]
fn a_proxy_may_have_an_ipv6_address() {
    let listener = match TcpListener::bind("[::1]:0") {
        Ok(listener) => listener,
        Err(e) => return skip("guard::a_proxy_may_have_an_ipv6_address", &format!("no ::1: {e}")),
    };
    let proxy = Upstream::on_listener(listener, None);
    proxy.serve("http://public.test/x", Reply::ok(&Content::of(b"by proxy")));
    let service = strict().env("UPSTREAM__PROXY", &format!("http://{}", proxy.address())).start();
    service.fetch("http://public.test/x").assert_ok(b"by proxy");
    assert_eq!(proxy.total(), 1);
}
