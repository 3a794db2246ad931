//! Which addresses and hosts may be reached: the ban on internal networks, by address and never by spelling.
//!
//! The table follows the special-purpose address registries of IANA (RFC 6890 and its successors), and is
//! stricter in two places: blocks that those call globally reachable but that host no artifacts are in it
//! too, and of IPv6 nothing outside the global unicast range is reached.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs},
};

use ipnet::IpNet;
use tokio::sync::Semaphore;
use url::{Host, Url};

use crate::config::{HostGlobs, Upstream};

/// Judges hosts and addresses by the configuration. No request is sent before its address was judged here.
#[derive(Debug, Clone)]
pub struct Guard {
    proxied: bool,
    exempt: Vec<IpNet>,
    allow_hosts: HostGlobs,
    deny_hosts: HostGlobs,
}

/// A host or address that may not be reached.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct Forbidden {
    /// Which network or rule forbids it, and the setting that would allow it.
    pub reason: String,
}

/// Why a host has no address to connect to.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ResolveError {
    /// It has none that may be reached.
    #[error(transparent)]
    Forbidden(#[from] Forbidden),
    /// It could not be resolved, or has none at all.
    #[error("{0}")]
    Dns(String),
}

impl Guard {
    /// A guard with the host lists, exemptions and proxy of this configuration.
    pub fn new(cfg: &Upstream) -> Guard {
        Guard {
            proxied: cfg.proxy.is_some(),
            exempt: cfg.allow_private_networks.clone(),
            allow_hosts: cfg.allow_hosts.clone(),
            deny_hosts: cfg.deny_hosts.clone(),
        }
    }

    /// Judges one address; an IPv4 address inside an IPv6 one is judged too.
    ///
    /// # Errors
    /// An address of a special-purpose network that is not exempt.
    pub fn judge_ip(&self, ip: IpAddr) -> Result<(), Forbidden> {
        // A mapped address connects to its IPv4 address, so exemptions of either form hold for it.
        let mapped = ip.to_canonical();
        if self.exempt.iter().any(|net| net.contains(&ip) || net.contains(&mapped)) {
            return Ok(());
        }
        let Some((culprit, network)) = forbidden_network(ip) else { return Ok(()) };
        let subject = if culprit == ip { ip.to_string() } else { format!("{ip} holds {culprit}, which") };
        let Network { net, name } = network;
        Err(forbidden(format!(
            "{subject} is in an internal network ({net}, {name}); \
             allow it with upstream.allow_private_networks"
        )))
    }

    /// Judges what needs no resolver: the host lists, literal addresses and, as a proxy resolves names,
    /// those that are internal by their form.
    ///
    /// # Errors
    /// A host that these forbid, and a URL without one.
    pub fn judge_host(&self, url: &Url) -> Result<(), Forbidden> {
        let Some(host) = url.host() else { return Err(forbidden("the URL has no host".to_owned())) };
        let name = plain_name(&host);
        // An IPv4-mapped address is looked up in that form too, as a list may have it so.
        let full = if let Host::Ipv6(ip) = host { ip.to_string() } else { name.clone() };
        let listed = |globs: &HostGlobs| globs.is_match(&name) || globs.is_match(&full);
        if listed(&self.deny_hosts) {
            return Err(forbidden(format!("{name} is in upstream.deny_hosts")));
        }
        if !self.allow_hosts.is_empty() && !listed(&self.allow_hosts) {
            return Err(forbidden(format!("{name} is not in upstream.allow_hosts")));
        }
        match host {
            Host::Ipv4(ip) => self.judge_ip(ip.into()),
            Host::Ipv6(ip) => self.judge_ip(ip.into()),
            Host::Domain(_) if self.proxied && is_internal_name(&name) => Err(forbidden(format!(
                "{name} is an internal name, which is never asked of upstream.proxy; use a public name"
            ))),
            Host::Domain(_) => Ok(()),
        }
    }

    /// The addresses of `host` that may be reached, in the resolver's order; connect to these and no others.
    ///
    /// Literals and `localhost` never reach a resolver; other names are resolved once, with no time-out.
    ///
    /// # Errors
    /// `Forbidden` when the host has addresses but none that may be reached, `Dns` when it has none or the
    /// resolver failed.
    pub async fn resolve(&self, host: Host<&str>, port: u16) -> Result<Vec<SocketAddr>, ResolveError> {
        let name = plain_name(&host);
        let local = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
        match host {
            Host::Ipv4(ip) => self.vet(&name, [SocketAddr::new(ip.into(), port)]),
            Host::Ipv6(ip) => self.vet(&name, [SocketAddr::new(ip.into(), port)]),
            Host::Domain(_) if is_localhost(&name) => {
                self.vet(&name, local.map(|ip| SocketAddr::new(ip, port)))
            }
            Host::Domain(_) => {
                let found = look_up(&name, port).await;
                self.vet(&name, found.map_err(|error| ResolveError::Dns(format!("{name}: {error}")))?)
            }
        }
    }

    /// Keeps the addresses that may be reached.
    fn vet(
        &self,
        name: &str,
        found: impl IntoIterator<Item = SocketAddr>,
    ) -> Result<Vec<SocketAddr>, ResolveError> {
        let mut allowed = Vec::new();
        let mut refusal = None;
        for address in found {
            match self.judge_ip(address.ip()) {
                Ok(()) => allowed.push(address),
                Err(forbidden) => refusal = refusal.or(Some(forbidden)),
            }
        }
        match refusal {
            _ if !allowed.is_empty() => Ok(allowed),
            Some(refusal) if name.parse::<IpAddr>().is_ok() => Err(refusal.into()),
            Some(Forbidden { reason }) => {
                Err(forbidden(format!("{name} has no address that may be reached: {reason}")).into())
            }
            None => Err(ResolveError::Dns(format!("{name}: the resolver found no address"))),
        }
    }
}

fn forbidden(reason: String) -> Forbidden {
    Forbidden { reason }
}

/// The host as messages name it: lower-case, no trailing dot, no brackets, a mapped address as IPv4.
fn plain_name<S: AsRef<str>>(host: &Host<S>) -> String {
    match host {
        Host::Domain(name) => name.as_ref().trim_end_matches('.').to_ascii_lowercase(),
        Host::Ipv4(ip) => ip.to_string(),
        Host::Ipv6(ip) => ip.to_canonical().to_string(),
    }
}

fn is_localhost(name: &str) -> bool {
    name == "localhost" || name.ends_with(".localhost")
}

fn is_internal_name(name: &str) -> bool {
    const SUFFIXES: [&str; 4] = [".local", ".lan", ".internal", ".home.arpa"];
    !name.contains('.')
        || is_localhost(name)
        || SUFFIXES.iter().any(|suffix| name.ends_with(suffix) || name == &suffix[1..])
}

/// The forbidden network of `ip`, or of an IPv4 address inside it, and which of these addresses it was.
fn forbidden_network(ip: IpAddr) -> Option<(IpAddr, &'static Network)> {
    let inside = match ip {
        IpAddr::V4(_) => Vec::new(),
        IpAddr::V6(ip) => embedded(ip),
    };
    if inside.is_empty() {
        return Some((ip, FORBIDDEN.iter().find(|row| row.net.contains(&ip))?));
    }
    inside.into_iter().find_map(|ip| forbidden_network(ip.into()))
}

/// The IPv4 addresses that packets to `ip` may end at, for the forms that are reachable beyond IPv6 itself.
fn embedded(ip: Ipv6Addr) -> Vec<Ipv4Addr> {
    let bits = ip.to_bits();
    // Truncation to the 32 bits in question is meant.
    let at = |shift: u32| Ipv4Addr::from_bits((bits >> shift) as u32);
    match ip.segments() {
        [0, 0, 0, 0, 0, 0xffff, ..] | [0x64, 0xff9b, 0, 0, 0, 0, ..] => vec![at(0)],
        [0x2002, ..] => vec![at(80)],
        // Teredo: the server, and the client with its bits inverted.
        [0x2001, 0, ..] => vec![at(64), Ipv4Addr::from_bits(!(bits as u32))],
        _ => Vec::new(),
    }
}

struct Network {
    net: IpNet,
    name: &'static str,
}

const fn v4(a: u8, b: u8, c: u8, prefix: u8, name: &'static str) -> Network {
    Network { net: IpNet::new_assert(IpAddr::V4(Ipv4Addr::new(a, b, c, 0)), prefix), name }
}

/// `high` are the first 64 bits of the network.
const fn v6(high: u64, prefix: u8, name: &'static str) -> Network {
    Network { net: IpNet::new_assert(IpAddr::V6(Ipv6Addr::from_bits((high as u128) << 64)), prefix), name }
}

/// What is never reached unless exempt; the first row that fits names it. IPv4-mapped, NAT64, 6to4 and Teredo
/// addresses are judged by the IPv4 addresses inside and do not get here.
const FORBIDDEN: &[Network] = &[
    v4(0, 0, 0, 8, "this network"),
    v4(10, 0, 0, 8, "private"),
    v4(100, 64, 0, 10, "carrier-grade NAT"),
    v4(127, 0, 0, 8, "loopback"),
    v4(169, 254, 0, 16, "link-local and cloud metadata"),
    v4(172, 16, 0, 12, "private"),
    v4(192, 0, 0, 24, "protocol assignments"),
    v4(192, 0, 2, 24, "documentation"),
    v4(192, 31, 196, 24, "AS112 sink"),
    v4(192, 52, 193, 24, "multicast tunnelling"),
    v4(192, 88, 99, 24, "6to4 relay"),
    v4(192, 168, 0, 16, "private"),
    v4(192, 175, 48, 24, "AS112 sink"),
    v4(198, 18, 0, 15, "benchmarking"),
    v4(198, 51, 100, 24, "documentation"),
    v4(203, 0, 113, 24, "documentation"),
    v4(224, 0, 0, 4, "multicast"),
    Network { net: IpNet::new_assert(IpAddr::V4(Ipv4Addr::BROADCAST), 32), name: "broadcast" },
    v4(240, 0, 0, 4, "reserved"),
    Network { net: IpNet::new_assert(IpAddr::V6(Ipv6Addr::UNSPECIFIED), 128), name: "unspecified" },
    Network { net: IpNet::new_assert(IpAddr::V6(Ipv6Addr::LOCALHOST), 128), name: "loopback" },
    v6(0, 96, "IPv4-compatible"),
    v6(0x0064_ff9b_0001_0000, 48, "local NAT64"),
    v6(0x0100_0000_0000_0000, 64, "discard"),
    v6(0x2001_0000_0000_0000, 23, "protocol assignments"),
    v6(0x2001_0db8_0000_0000, 32, "documentation"),
    v6(0x2620_004f_8000_0000, 48, "AS112 sink"),
    v6(0x3fff_0000_0000_0000, 20, "documentation"),
    v6(0x5f00_0000_0000_0000, 16, "segment routing"),
    v6(0xfc00_0000_0000_0000, 7, "unique local"),
    v6(0xfe80_0000_0000_0000, 10, "link-local"),
    v6(0xfec0_0000_0000_0000, 10, "site-local"),
    v6(0xff00_0000_0000_0000, 8, "multicast"),
    // All that is not 2000::/3.
    v6(0, 3, "not global unicast"),
    v6(0x4000_0000_0000_0000, 2, "not global unicast"),
    v6(0x8000_0000_0000_0000, 1, "not global unicast"),
];

/// Questions to the resolver at a time. One that hangs keeps its thread whatever becomes of the asker, and these must not
/// be all the threads there are.
static QUESTIONS: Semaphore = Semaphore::const_new(64);

/// All addresses of a name, from the system's resolver.
pub(super) async fn look_up(name: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
    // Never closed.
    let permit = QUESTIONS.acquire().await.map_err(io::Error::other)?;
    let name = name.to_owned();
    tokio::task::spawn_blocking(move || {
        let _permit = permit;
        (name.as_str(), port).to_socket_addrs().map(Iterator::collect)
    })
    .await
    .map_err(io::Error::other)?
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::config::Config;

    fn guard(settings: &[(&str, &str)]) -> Guard {
        let env = settings.iter().map(|(key, value)| {
            (format!("ARTIFACT_CACHE__UPSTREAM__{}", key.to_uppercase()), (*value).to_owned())
        });
        Guard::new(&Config::load(None, env).unwrap().upstream)
    }

    fn judge(guard: &Guard, url: &str) -> Result<(), Forbidden> {
        guard.judge_host(&Url::parse(url).unwrap_or_else(|error| panic!("{url}: {error}")))
    }

    /// Runs `resolve` for a host that needs no resolver.
    fn resolve(guard: &Guard, url: &str) -> Result<Vec<SocketAddr>, ResolveError> {
        let url = Url::parse(url).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(guard.resolve(url.host().unwrap(), 80))
    }

    const INSIDE: &[&str] = &[
        "127.0.0.1",
        "127.1",
        "127.0.1",
        "127.255.255.254",
        "2130706433",
        "0x7f000001",
        "0x7F.0.0.1",
        "0x7f.1",
        "017700000001",
        "0177.0.0.1",
        "0177.0.0x0.1",
        "127.0.0.1.",
        "127.0.0.1%2e",
        "%31%32%37.0.0.1",
        "①②⑦.⓪.⓪.①",
        "127。0。0。1",
        "１２７．0.0.1",
        "0",
        "0.0.0.0",
        "0x0",
        "0.1.2.3",
        "10.0.0.1",
        "10.255.255.255",
        "167772161",
        "012.1",
        "0xa.1",
        "100.64.0.1",
        "100.127.255.255",
        "169.254.169.254",
        "2852039166",
        "0xA9FEA9FE",
        "0251.0376.0251.0376",
        "172.16.0.1",
        "172.31.255.255",
        "192.168.0.1",
        "192.168.257",
        "3232235521",
        "192.0.0.8",
        "192.0.2.1",
        "192.31.196.1",
        "192.52.193.1",
        "192.88.99.1",
        "192.175.48.1",
        "198.18.0.1",
        "198.19.255.255",
        "198.51.100.1",
        "203.0.113.1",
        "224.0.0.1",
        "239.255.255.255",
        "240.0.0.1",
        "255.255.255.255",
        "4294967295",
        "[::]",
        "[::1]",
        "[0:0:0:0:0:0:0:1]",
        "[0000::0001]",
        "[::ffff:127.0.0.1]",
        "[::FFFF:7f00:1]",
        "[0:0:0:0:0:ffff:10.0.0.1]",
        "[::ffff:169.254.169.254]",
        "[::127.0.0.1]",
        "[::8.8.8.8]",
        "[::ffff:0:127.0.0.1]",
        "[64:ff9b::127.0.0.1]",
        "[64:ff9b::a00:1]",
        "[64:ff9b:1::8.8.8.8]",
        "[64:ff9b:1:a00:0:100::]",
        "[100::1]",
        "[2002:7f00:1::]",
        "[2002:a00:1::1]",
        "[2001:0:7f00:1::f7f7:f7f7]",
        "[2001:0:808:808::80ff:fffe]",
        "[2001:2::1]",
        "[2001:10::1]",
        "[2001:20::1]",
        "[2001:db8::1]",
        "[2620:4f:8000::1]",
        "[3fff::1]",
        "[5f00::1]",
        "[fc00::1]",
        "[fd00:ec2::254]",
        "[FD12:3456::1]",
        "[fe80::1]",
        "[febf::1]",
        "[fec0::1]",
        "[ff02::1]",
        "[4000::1]",
        "[9000::1]",
        "[e000::1]",
    ];

    const OUTSIDE: &[&str] = &[
        "1.1.1.1",
        "8.8.8.8",
        "134744072",
        "9.255.255.255",
        "11.0.0.0",
        "100.63.255.255",
        "100.128.0.0",
        "126.1.1.1",
        "128.0.0.1",
        "169.253.1.1",
        "172.15.255.255",
        "172.32.0.0",
        "192.0.1.1",
        "192.167.1.1",
        "192.169.0.0",
        "198.17.1.1",
        "198.20.0.0",
        "223.255.255.255",
        "[2606:4700::1111]",
        "[2001:200::1]",
        "[2a00:1450::1]",
        "[::ffff:8.8.8.8]",
        "[64:ff9b::8.8.8.8]",
        "[2002:808:808::1]",
        "[2001:0:808:808::f7f7:f7f7]",
    ];

    #[test]
    fn every_spelling_of_an_inside_address_is_forbidden() {
        let guard = guard(&[]);
        for host in INSIDE {
            let url = format!("http://{host}/");
            let reason = judge(&guard, &url).expect_err(host).reason;
            assert!(reason.contains("is in an internal network ("), "{host}: {reason}");
            assert_eq!(resolve(&guard, &url), Err(forbidden(reason).into()), "{host}");
        }
    }

    #[test]
    fn outside_addresses_are_allowed() {
        let guard = guard(&[]);
        for host in OUTSIDE {
            let url = format!("http://{host}/");
            assert_eq!(judge(&guard, &url), Ok(()), "{host}");
            assert_eq!(resolve(&guard, &url).map(|found| found.len()), Ok(1), "{host}");
        }
    }

    #[test]
    fn each_row_of_the_table_is_forbidden_under_its_name() {
        let guard = guard(&[]);
        for row in FORBIDDEN {
            assert_eq!(row.net, row.net.trunc(), "{} has bits beyond its prefix", row.net);
            // A row before it may name one end, or judge it by the IPv4 address inside, but never both.
            let ends = [row.net.network(), row.net.broadcast()];
            let named = format!("({}, {})", row.net, row.name);
            assert!(
                ends.iter().any(|ip| guard.judge_ip(*ip).is_err_and(|no| no.reason.contains(&named))),
                "{named}"
            );
        }
    }

    #[test]
    fn the_reason_names_network_and_setting() {
        let reason = |ip: &str| guard(&[]).judge_ip(ip.parse().unwrap()).unwrap_err().reason;
        assert_eq!(
            reason("10.0.0.1"),
            "10.0.0.1 is in an internal network (10.0.0.0/8, private); \
             allow it with upstream.allow_private_networks"
        );
        assert!(
            reason("64:ff9b::a00:1").starts_with("64:ff9b::a00:1 holds 10.0.0.1, which is in an internal")
        );
    }

    #[test]
    fn exemptions_hold_for_the_address_and_its_mapped_form_only() {
        let guard = guard(&[("allow_private_networks", "10.1.0.0/16,fd00::/8,127.0.0.0/8")]);
        for host in ["10.1.2.3", "[::ffff:10.1.2.3]", "[fd00::1]", "127.0.0.1"] {
            assert_eq!(judge(&guard, &format!("http://{host}/")), Ok(()), "{host}");
        }
        for host in [
            "10.2.0.1",
            "[::ffff:10.2.0.1]",
            "[64:ff9b::10.1.2.3]",
            "[2002:a01:203::]",
            "[::10.1.2.3]",
            "[::1]",
        ] {
            assert!(judge(&guard, &format!("http://{host}/")).is_err(), "{host}");
        }
        let mapped = self::guard(&[("allow_private_networks", "::ffff:10.0.0.0/104")]);
        assert_eq!(judge(&mapped, "http://[::ffff:10.0.0.1]/"), Ok(()));
        assert!(judge(&mapped, "http://10.0.0.1/").is_err());
    }

    #[test]
    fn host_lists_judge_names_and_literals() {
        let listed = guard(&[("allow_hosts", "*.example.com,1.1.1.1"), ("deny_hosts", "bad.example.com")]);
        for (host, allowed) in [
            ("a.example.com", true),
            ("A.B.EXAMPLE.com.", true),
            ("1.1.1.1", true),
            ("[::ffff:1.1.1.1]", true),
            ("8.8.8.8", false),
            ("example.org", false),
            ("bad.example.com", false),
            ("BAD.example.com.", false),
            ("bad%2Eexample.com", false),
        ] {
            assert_eq!(judge(&listed, &format!("http://{host}/")).is_ok(), allowed, "{host}");
        }
        let mapped = guard(&[("deny_hosts", "::ffff:1.1.1.1,8.8.8.8")]);
        assert!(judge(&mapped, "http://[::ffff:1.1.1.1]/").is_err());
        assert!(judge(&mapped, "http://[::ffff:8.8.8.8]/").is_err());
        let inside = guard(&[("allow_hosts", "10.0.0.1")]);
        assert!(judge(&inside, "http://10.0.0.1/").is_err(), "the host list is no exemption");
    }

    #[test]
    fn internal_names_are_not_asked_of_a_proxy() {
        let direct = guard(&[]);
        let proxied = guard(&[("proxy", "http://127.0.0.1:3128")]);
        for host in [
            "nas",
            "NAS.",
            "localhost",
            "a.localhost",
            "printer.local",
            "router.lan.",
            "x.internal",
            "metadata.google.internal",
            "x.home.arpa",
            "home.arpa",
        ] {
            assert_eq!(judge(&direct, &format!("http://{host}/")), Ok(()), "{host}");
            assert!(judge(&proxied, &format!("http://{host}/")).is_err(), "{host}");
        }
        for host in ["example.com", "local.example", "notlocal.example.lander"] {
            assert_eq!(judge(&proxied, &format!("http://{host}/")), Ok(()), "{host}");
        }
        assert!(judge(&proxied, "http://127.1/").is_err());
    }

    #[test]
    fn localhost_is_loopback_without_a_resolver() {
        for host in ["localhost", "LOCALHOST.", "a.b.localhost"] {
            let url = format!("http://{host}/");
            assert!(matches!(resolve(&guard(&[]), &url), Err(ResolveError::Forbidden(_))), "{host}");
            let open = guard(&[("allow_private_networks", "127.0.0.0/8")]);
            assert_eq!(resolve(&open, &url), Ok(vec!["127.0.0.1:80".parse().unwrap()]), "{host}");
        }
    }

    #[test]
    fn what_the_resolver_says_is_judged() {
        // The system's resolver reads the first as an address, and refuses the second, without asking anyone.
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let resolve = |guard: &Guard, name| runtime.block_on(guard.resolve(Host::Domain(name), 80));
        assert!(matches!(resolve(&guard(&[]), "127.1"), Err(ResolveError::Forbidden(_))));
        let open = guard(&[("allow_private_networks", "127.0.0.0/8")]);
        assert!(resolve(&open, "127.1").unwrap().contains(&"127.0.0.1:80".parse().unwrap()));
        assert!(matches!(resolve(&open, "no host"), Err(ResolveError::Dns(_))));
    }

    #[test]
    fn forbidden_addresses_are_dropped_from_a_mixed_answer() {
        let guard = guard(&[]);
        let found =
            |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect::<Vec<SocketAddr>>();
        assert_eq!(
            guard.vet("x.example", found(&["10.0.0.1:80", "1.1.1.1:80", "[::1]:80", "8.8.8.8:80"])),
            Ok(found(&["1.1.1.1:80", "8.8.8.8:80"]))
        );
        let refused = guard.vet("x.example", found(&["10.0.0.1:80", "[::1]:80"])).unwrap_err().to_string();
        assert!(
            refused.starts_with("x.example has no address that may be reached: 10.0.0.1 is in"),
            "{refused}"
        );
        assert!(matches!(guard.vet("x.example", []), Err(ResolveError::Dns(_))));
    }

    proptest! {
        #[test]
        fn forms_that_hold_an_ipv4_address_are_judged_like_it(bits: u32, low: u64) {
            let guard = guard(&[]);
            let verdict = |ip: IpAddr| guard.judge_ip(ip).is_ok();
            let v6 = |bits: u128| IpAddr::V6(Ipv6Addr::from_bits(bits));
            let alone = verdict(Ipv4Addr::from_bits(bits).into());
            let (bits, low) = (u128::from(bits), u128::from(low));
            prop_assert_eq!(verdict(v6(0xffff << 32 | bits)), alone);
            prop_assert_eq!(verdict(v6(0x64_ff9b << 96 | bits)), alone);
            prop_assert_eq!(verdict(v6(0x2002 << 112 | bits << 80 | low)), alone);
            let teredo = v6(0x2001 << 112 | 0x0808_0808 << 64 | (!bits & 0xffff_ffff));
            prop_assert_eq!(verdict(teredo), alone);
        }

        #[test]
        fn all_ipv6_outside_global_unicast_is_forbidden(bits: u128) {
            let ip = Ipv6Addr::from_bits(bits);
            let ok = guard(&[]).judge_ip(ip.into()).is_ok();
            prop_assert!(!ok || bits >> 125 == 1 || !embedded(ip).is_empty());
        }
    }
}
