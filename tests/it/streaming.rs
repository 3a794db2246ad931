//! Verified streaming: the body starts early, its tail waits until everything is proven, a failure is never a clean end.

use std::sync::Arc;

use crate::harness::client::{Client, Head};
use crate::harness::{
    Content, End, Gate, QUIET, Reply, Running, Service, Upstream, WRONG_SHA, eventually, fetch_sha_target,
    fetch_target,
};

const SIZE: u64 = 1 << 20;
const HOLD: u64 = 64 * 1024;

/// How a staged upstream goes on once its gate opens.
#[derive(Clone, Copy, PartialEq)]
enum Then {
    Rest,
    Reset,
}

/// An upstream that sends all but the last byte of 1 MiB, then waits.
struct Staged {
    up: Upstream,
    url: String,
    content: Content,
    gate: Gate,
}

impl Staged {
    fn new(then: Then) -> Staged {
        Staged::framed(then, true)
    }

    fn framed(then: Then, length_known: bool) -> Staged {
        let (up, gate, content) = (Upstream::start(), Gate::new(), Content::new(30, SIZE));
        let (door, served) = (gate.clone(), content.clone());
        let url = up.on("/staged.bin", move |x| {
            match length_known {
                true => x.send(&Reply::ok(&served).head(200, 0))?,
                false => x.send("HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")?,
            }
            x.body(&served, 0, SIZE - 1)?;
            door.wait();
            match then {
                Then::Rest => x.body(&served, SIZE - 1, SIZE),
                Then::Reset => x.reset(),
            }
        });
        Staged { up, url, content, gate }
    }
}

/// Starts a fetch and returns once its head is there.
fn begin(service: &Running, target: &str, fields: &[(&str, &str)]) -> (Client, Head) {
    let mut client = service.connect();
    client.request("GET", target, fields);
    let head = client.head();
    (client, head)
}

#[test]
fn the_body_starts_early_and_the_tail_is_held_back() {
    let (staged, service) = (Staged::new(Then::Rest), Service::new().streaming().start());
    let (mut client, head) = begin(&service, &fetch_target(&staged.url), &[]);
    assert_eq!((head.status(), head.get("X-Cache-Status")), (200, Some("MISS")));
    assert_eq!(head.get("Content-Length"), Some("1048576"), "a known length is told");
    assert_eq!(head.get("X-Content-SHA256"), None, "nobody knows the digest yet");
    let released = client.take((SIZE - HOLD) as usize);
    assert!(released == staged.content.bytes()[..(SIZE - HOLD) as usize], "what is released is right");
    assert_eq!(client.whatever_comes(QUIET).len(), 0, "not one byte of the tail before the proof");
    staged.gate.open();
    let tail = client.take(HOLD as usize);
    assert!(tail == staged.content.bytes()[(SIZE - HOLD) as usize..]);
    assert_eq!(service.fetch(&staged.url).assert_ok(&staged.content.bytes()).cache_status(), "HIT");
}

#[test]
fn the_tail_is_released_only_when_the_artifact_is_recorded() {
    let (staged, service) = (Staged::new(Then::Rest), Service::new().streaming().start());
    let (mut client, _) = begin(&service, &fetch_target(&staged.url), &[]);
    client.take((SIZE - HOLD) as usize);
    assert_eq!(service.stats()["total_items"], 0);
    staged.gate.open();
    client.take(1);
    assert_eq!(service.count_rows("SELECT count(*) FROM artifacts"), 1, "row before tail");
    assert!(service.blob(&staged.content.sha256()).is_file(), "blob before tail");
    client.take(HOLD as usize - 1);
}

#[test]
fn the_clients_own_digest_is_announced_while_streaming() {
    let (staged, service) = (Staged::new(Then::Rest), Service::new().streaming().start());
    let digest = staged.content.sha256();
    let (mut client, head) = begin(&service, &fetch_sha_target(&staged.url, &digest), &[]);
    assert_eq!(head.get("X-Content-SHA256"), Some(digest.as_str()));
    staged.gate.open();
    client.body("GET", &head).assert_ok(&staged.content.bytes());
}

#[test]
fn a_wrong_digest_breaks_the_stream_before_its_end() {
    let (staged, service) = (Staged::new(Then::Rest), Service::new().streaming().start());
    let (mut client, head) = begin(&service, &fetch_sha_target(&staged.url, WRONG_SHA), &[]);
    assert_eq!(head.status(), 200);
    client.take((SIZE - HOLD) as usize);
    staged.gate.open();
    assert_eq!(client.end(), End::Reset, "with Content-Length a failure is a reset, not a close");
    service.assert_nothing_stored();
    let retry = service.fetch_sha(&staged.url, WRONG_SHA);
    assert_eq!(retry.assert_error(409, "checksum_mismatch")["actual"], staged.content.sha256());
    assert_eq!(staged.up.count("/staged.bin"), 1, "the retry is answered from memory");
}

#[test]
fn an_upstream_that_breaks_off_resets_the_stream() {
    let staged = Staged::new(Then::Reset);
    let service = Service::new().streaming().env("UPSTREAM__MAX_RETRIES", "1").start();
    let (mut client, head) = begin(&service, &fetch_target(&staged.url), &[]);
    assert_eq!(head.status(), 200);
    assert_eq!(client.take((SIZE - HOLD) as usize).len() as u64, SIZE - HOLD);
    staged.gate.open();
    assert_eq!(client.end(), End::Reset);
    service.assert_nothing_stored();
    service.wait_metric("artifact_cache_requests_total{status=\"error\"}", 1.0);
}

#[test]
fn behind_a_proxy_that_names_itself_the_stream_is_chunked() {
    let service = Service::new().streaming().start();
    let staged = Staged::new(Then::Rest);
    let fields = [("Via", "1.1 proxy"), ("X-Forwarded-For", "192.0.2.1")];
    let (mut client, head) = begin(&service, &fetch_target(&staged.url), &fields);
    assert_eq!(head.get("Transfer-Encoding"), Some("chunked"));
    assert_eq!(head.get("Content-Length"), None);
    staged.gate.open();
    client.body("GET", &head).assert_ok(&staged.content.bytes());
}

#[test]
fn behind_a_proxy_that_does_not_the_stream_has_a_length() {
    let service = Service::new().streaming().start();
    for (name, value) in
        [("Forwarded", "for=192.0.2.1"), ("X-Forwarded-For", "192.0.2.1"), ("X-Forwarded-Proto", "https")]
    {
        let staged = Staged::new(Then::Rest);
        let (mut client, head) = begin(&service, &fetch_target(&staged.url), &[(name, value)]);
        assert_eq!(head.get("Transfer-Encoding"), None, "{name}");
        staged.gate.open();
        client.body("GET", &head).assert_ok(&staged.content.bytes());
    }
}

#[test]
fn a_broken_chunked_stream_has_no_last_chunk() {
    let staged = Staged::new(Then::Reset);
    let service = Service::new().streaming().env("UPSTREAM__MAX_RETRIES", "1").start();
    let (mut client, head) = begin(&service, &fetch_target(&staged.url), &[("Via", "1.1 proxy")]);
    staged.gate.open();
    let answer = client.body("GET", &head);
    assert_ne!(answer.end, End::Complete, "the client must see that it is broken");
    assert!(answer.body.len() as u64 <= SIZE - HOLD);
    service.assert_nothing_stored();
}

#[test]
fn an_unknown_length_streams_in_chunks() {
    let (staged, service) = (Staged::framed(Then::Rest, false), Service::new().streaming().start());
    let (mut client, head) = begin(&service, &fetch_target(&staged.url), &[]);
    assert_eq!(head.get("Transfer-Encoding"), Some("chunked"));
    staged.gate.open();
    client.body("GET", &head).assert_ok(&staged.content.bytes());
}

#[test]
fn the_digest_comes_as_a_trailer_for_those_who_take_trailers() {
    let (staged, service) = (Staged::framed(Then::Rest, false), Service::new().streaming().start());
    let fields = [("TE", "trailers"), ("Connection", "TE")];
    let (mut client, head) = begin(&service, &fetch_target(&staged.url), &fields);
    staged.gate.open();
    let answer = client.body("GET", &head);
    answer.assert_ok(&staged.content.bytes());
    assert_eq!(answer.trailers.get("X-Content-SHA256"), Some(staged.content.sha256().as_str()));
}

#[test]
fn http_1_0_gets_a_length_or_waits() {
    let service = Service::new().streaming().start();
    for known in [true, false] {
        let staged = Staged::framed(Then::Rest, known);
        let mut client = service.connect();
        client.send(format!("GET {} HTTP/1.0\r\nHost: h\r\n\r\n", fetch_target(&staged.url)));
        if known {
            let head = client.head();
            assert_eq!((head.status(), head.get("Content-Length")), (200, Some("1048576")));
            staged.gate.open();
            client.body("GET", &head).assert_ok(&staged.content.bytes());
        } else {
            assert_eq!(client.whatever_comes(QUIET * 2).len(), 0, "without a length it waits for the whole");
            staged.gate.open();
            let answer = client.response("GET");
            answer.assert_ok(&staged.content.bytes());
            assert_eq!(answer.head.get("Transfer-Encoding"), None);
        }
    }
}

#[test]
fn prefer_wait_never_streams_early() {
    let (staged, service) = (Staged::new(Then::Rest), Service::new().streaming().start());
    let mut client = service.connect();
    client.request("GET", &fetch_target(&staged.url), &[("Prefer", "wait=100")]);
    assert_eq!(client.whatever_comes(QUIET * 2).len(), 0);
    staged.gate.open();
    let answer = client.response("GET");
    answer.assert_ok(&staged.content.bytes());
    assert_eq!(answer.header("X-Content-SHA256"), staged.content.sha256());
}

#[test]
fn prefer_wait_gets_409_where_a_stream_would_break() {
    let (staged, service) = (Staged::new(Then::Rest), Service::new().streaming().start());
    let mut client = service.connect();
    client.request("GET", &fetch_sha_target(&staged.url, WRONG_SHA), &[("Prefer", "wait")]);
    assert_eq!(client.whatever_comes(QUIET * 2).len(), 0);
    staged.gate.open();
    client.response("GET").assert_error(409, "checksum_mismatch");
}

#[test]
fn errors_keep_their_codes_however_late_they_come() {
    let (up, service) = (Upstream::start(), Service::new().streaming().start());
    let gate = Gate::new();
    let door = gate.clone();
    let url = up.on("/late404", move |x| {
        door.wait();
        x.reply(&Reply::new(404, Content::of(b"no")))
    });
    let mut client = service.connect();
    client.request("GET", &fetch_target(&url), &[]);
    assert_eq!(client.whatever_comes(QUIET * 2).len(), 0, "no 200 before upstream has answered");
    gate.open();
    assert_eq!(client.response("GET").assert_error(502, "upstream_error")["status_code"], 404);
}

#[test]
fn one_who_joins_late_streams_from_the_start() {
    let (staged, service) = (Staged::new(Then::Rest), Service::new().streaming().start());
    let (mut first, first_head) = begin(&service, &fetch_target(&staged.url), &[]);
    first.take((SIZE - HOLD) as usize);
    let (mut second, second_head) = begin(&service, &fetch_target(&staged.url), &[]);
    assert!(second_head.get("Cache-Status").unwrap().contains("collapsed"), "{second_head:?}");
    assert!(first_head.get("Cache-Status").unwrap().contains("fwd=uri-miss"), "{first_head:?}");
    assert_eq!(second.take((SIZE - HOLD) as usize).len() as u64, SIZE - HOLD);
    assert_eq!(second.whatever_comes(QUIET).len(), 0, "its tail is held back, too");
    staged.gate.open();
    assert_eq!(second.take(HOLD as usize).len() as u64, HOLD);
    assert_eq!(first.take(HOLD as usize).len() as u64, HOLD);
}

#[test]
fn a_range_of_a_running_download_is_served_as_it_arrives() {
    let (staged, service) = (Staged::new(Then::Rest), Service::new().streaming().start());
    let fields = [("Range", "bytes=1000-200999")];
    let (mut client, head) = begin(&service, &fetch_target(&staged.url), &fields);
    assert_eq!((head.status(), head.get("Content-Range")), (206, Some("bytes 1000-200999/1048576")));
    let free = 200_000 - HOLD as usize;
    assert!(client.take(free) == staged.content.bytes()[1000..1000 + free]);
    assert_eq!(client.whatever_comes(QUIET).len(), 0, "a 206 has a tail of its own");
    staged.gate.open();
    assert!(client.take(HOLD as usize) == staged.content.bytes()[1000 + free..201_000]);
}

#[test]
fn a_body_shorter_than_the_tail_waits_for_the_proof() {
    let (up, service) = (Upstream::start(), Service::new().streaming().start());
    let (gate, content) = (Gate::new(), Content::new(31, HOLD / 2));
    let (door, served) = (gate.clone(), Arc::new(content.clone()));
    let url = up.on("/short", move |x| {
        x.send(&Reply::ok(&served).head(200, 0))?;
        x.body(&served, 0, 100)?;
        door.wait();
        x.body(&served, 100, served.len())
    });
    let (mut client, head) = begin(&service, &fetch_target(&url), &[]);
    assert_eq!(client.whatever_comes(QUIET).len(), 0);
    gate.open();
    client.body("GET", &head).assert_ok(&content.bytes());
}

#[test]
fn a_slow_reader_gets_the_whole_body() {
    let (up, service) = (Upstream::start(), Service::new().env("FETCH__STREAM_AFTER_SECONDS", "0").start());
    let content = Content::new(32, 8 << 20);
    let url = up.serve("/big", Reply::ok(&content));
    let (mut client, head) = begin(&service, &fetch_target(&url), &[]);
    eventually("it is stored although nobody reads", || (service.stats()["total_items"] == 1).then_some(()));
    client.body("GET", &head).assert_ok(&content.bytes());
}

#[test]
fn the_framing_can_be_forced() {
    for (framing, proxied, chunked) in [("chunked", false, true), ("content-length", true, false)] {
        let service = Service::new().streaming().env("FETCH__STREAM_FRAMING", framing).start();
        let staged = Staged::new(Then::Rest);
        let fields = if proxied { &[("Via", "1.1 proxy")][..] } else { &[] };
        let (mut client, head) = begin(&service, &fetch_target(&staged.url), fields);
        assert_eq!(head.get("Transfer-Encoding").is_some(), chunked, "{framing}");
        assert_eq!(head.get("Content-Length").is_some(), !chunked, "{framing}");
        staged.gate.open();
        client.body("GET", &head).assert_ok(&staged.content.bytes());
    }
}

#[test]
fn the_tails_length_is_a_matter_of_configuration() {
    let service = Service::new().streaming().env("FETCH__TAIL_HOLD_BYTES", "300KiB").start();
    let staged = Staged::new(Then::Rest);
    let (mut client, _) = begin(&service, &fetch_target(&staged.url), &[]);
    let free = (SIZE - 300 * 1024) as usize;
    assert_eq!(client.take(free).len(), free);
    assert_eq!(client.whatever_comes(QUIET).len(), 0);
    staged.gate.open();
    assert_eq!(client.take(300 * 1024).len(), 300 * 1024);
}

#[test]
fn the_last_bytes_of_a_running_download_wait_for_the_proof() {
    let (staged, service) = (Staged::new(Then::Rest), Service::new().streaming().start());
    let (mut client, head) = begin(&service, &fetch_target(&staged.url), &[("Range", "bytes=-1000")]);
    assert_eq!((head.status(), head.get("Content-Range")), (206, Some("bytes 1047576-1048575/1048576")));
    assert_eq!(client.whatever_comes(QUIET).len(), 0);
    staged.gate.open();
    assert!(client.take(1000) == staged.content.bytes()[1_047_576..]);
}

#[test]
fn an_empty_body_has_no_tail_to_hold_back_so_its_head_waits() {
    let (up, service) = (Upstream::start(), Service::new().env("FETCH__STREAM_AFTER_SECONDS", "0").start());
    // Each a fresh chance for a head that says "200, Content-Length: 0" before the digest is judged.
    for n in 0..20 {
        let url = up.serve(&format!("/empty{n}"), Reply::ok(&Content::of(b"")));
        service.fetch_sha(&url, WRONG_SHA).assert_error(409, "checksum_mismatch");
    }
    service.assert_nothing_stored();
}
