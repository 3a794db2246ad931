//! Ranges and validators of a stored artifact, by RFC 9110.

use crate::harness::{Content, End, Reply, Response, Running, Service, Upstream, fetch_target};

const SIZE: u64 = 10_000;

struct Stored {
    _up: Upstream,
    service: Running,
    url: String,
    content: Content,
}

impl Stored {
    fn new() -> Stored {
        let (up, service, content) = (Upstream::start(), Service::new().start(), Content::new(40, SIZE));
        let reply = Reply::ok(&content).field("Last-Modified", "Tue, 01 Oct 2024 10:00:00 GMT");
        let url = up.serve("/ranged.bin", reply.field("Content-Type", "application/x-thing"));
        service.fetch(&url).assert_ok(&content.bytes());
        Stored { _up: up, service, url, content }
    }

    fn ask(&self, fields: &[(&str, &str)]) -> Response {
        self.service.fetch_with(&self.url, fields)
    }

    fn etag(&self) -> String {
        format!("\"{}\"", self.content.sha256())
    }
}

#[test]
fn one_range() {
    let stored = Stored::new();
    let bytes = stored.content.bytes();
    for (range, first, last) in [
        ("bytes=0-0", 0, 0),
        ("bytes=0-99", 0, 99),
        ("bytes=9000-", 9000, 9999),
        ("bytes=-1", 9999, 9999),
        ("bytes=-20000", 0, 9999),
        ("bytes=9999-18446744073709551615", 9999, 9999),
        ("bytes=5-99999999999999999999999", 5, 9999),
        ("BYTES=3-4", 3, 4),
    ] {
        let answer = stored.ask(&[("Range", range)]);
        assert_eq!((answer.status, &answer.end), (206, &End::Complete), "{range}");
        assert_eq!(answer.header("Content-Range"), format!("bytes {first}-{last}/10000"), "{range}");
        assert!(answer.body == bytes[first..=last], "{range}");
        assert_eq!((answer.cache_status(), answer.header("ETag")), ("HIT", stored.etag().as_str()));
    }
}

#[test]
fn what_is_no_range_is_ignored() {
    let stored = Stored::new();
    for range in [
        "bytes",
        "bytes=",
        "bytes=a-b",
        "bytes=9-3",
        "lines=1-2",
        "bytes=1-2;3",
        "bytes 1-2",
        "bytes=-",
        "bytes=0x1-2",
    ] {
        stored.ask(&[("Range", range)]).assert_ok(&stored.content.bytes());
    }
}

#[test]
fn a_range_outside_is_416() {
    let stored = Stored::new();
    for range in ["bytes=10000-", "bytes=10000-10001", "bytes=-0", "bytes=18446744073709551615-"] {
        let answer = stored.ask(&[("Range", range)]);
        answer.assert_error(416, "range_not_satisfiable");
        assert_eq!(answer.header("Content-Range"), "bytes */10000", "{range}");
    }
}

#[test]
fn several_ranges_are_multipart() {
    let stored = Stored::new();
    let answer = stored.ask(&[("Range", "bytes=0-9,100-119, -5")]);
    assert_eq!((answer.status, &answer.end), (206, &End::Complete));
    let boundary =
        answer.header("Content-Type").strip_prefix("multipart/byteranges; boundary=").expect("multipart");
    let boundary = boundary.trim_matches('"');
    let bytes = stored.content.bytes();
    let mut expected = Vec::new();
    for (first, last) in [(0, 9), (100, 119), (9995, 9999)] {
        expected.push((format!("bytes {first}-{last}/10000"), bytes[first..=last].to_vec()));
    }
    assert_eq!(parts(&answer.body, boundary), expected);
}

/// The parts of a multipart body: each Content-Range and its bytes.
fn parts(body: &[u8], boundary: &str) -> Vec<(String, Vec<u8>)> {
    let delimiter = format!("--{boundary}").into_bytes();
    let starts: Vec<usize> = (0..body.len()).filter(|&at| body[at..].starts_with(&delimiter)).collect();
    let part = |pair: &[usize]| {
        let part = &body[pair[0] + delimiter.len() + 2..pair[1] - 2];
        let end = part.windows(4).position(|w| w == b"\r\n\r\n").expect("a part has a head");
        let head = String::from_utf8_lossy(&part[..end]).to_ascii_lowercase();
        assert!(head.contains("content-type: application/x-thing"), "{head}");
        let line = head.lines().find_map(|line| line.strip_prefix("content-range: ")).expect("Content-Range");
        (line.to_string(), part[end + 4..].to_vec())
    };
    starts.windows(2).map(part).collect()
}

#[test]
fn too_many_or_overlapping_ranges_are_the_whole() {
    let stored = Stored::new();
    let many: Vec<String> = (0..500).map(|n| format!("{}-{}", n * 4, n * 4 + 1)).collect();
    let seventeen: Vec<String> = (0..17).map(|n| format!("{}-{}", n * 4, n * 4 + 1)).collect();
    for range in [many.join(","), seventeen.join(","), "0-100,50-150".to_string(), "0-,0-,0-".to_string()] {
        stored.ask(&[("Range", &format!("bytes={range}"))]).assert_ok(&stored.content.bytes());
    }
}

#[test]
fn conditions() {
    let stored = Stored::new();
    let (etag, weak) = (stored.etag(), format!("W/{}", stored.etag()));
    let (then, before, later) =
        ("Tue, 01 Oct 2024 10:00:00 GMT", "Mon, 30 Sep 2024 10:00:00 GMT", "Wed, 02 Oct 2024 10:00:00 GMT");
    for (name, value, status) in [
        ("If-None-Match", etag.as_str(), 304),
        ("If-None-Match", weak.as_str(), 304),
        ("If-None-Match", "*", 304),
        ("If-None-Match", "\"other\"", 200),
        ("If-Match", etag.as_str(), 200),
        ("If-Match", "*", 200),
        ("If-Match", weak.as_str(), 412),
        ("If-Match", "\"other\"", 412),
        ("If-Modified-Since", then, 304),
        ("If-Modified-Since", later, 304),
        ("If-Modified-Since", before, 200),
        ("If-Modified-Since", "nonsense", 200),
        ("If-Unmodified-Since", before, 412),
        ("If-Unmodified-Since", then, 200),
    ] {
        let answer = stored.ask(&[(name, value)]);
        assert_eq!(answer.status, status, "{name}: {value}");
        match status {
            304 => assert_eq!((answer.header("ETag"), answer.body.len()), (etag.as_str(), 0)),
            412 => drop(answer.assert_error(412, "precondition_failed")),
            _ => drop(answer.assert_ok(&stored.content.bytes()).clone()),
        }
    }
}

#[test]
fn if_range() {
    let stored = Stored::new();
    let etag = stored.etag();
    let weak = format!("W/{etag}");
    for (condition, status) in [
        (etag.as_str(), 206),
        ("\"other\"", 200),
        (weak.as_str(), 200),
        ("Tue, 01 Oct 2024 10:00:00 GMT", 206),
        ("Mon, 30 Sep 2024 10:00:00 GMT", 200),
    ] {
        let answer = stored.ask(&[("Range", "bytes=1-2"), ("If-Range", condition)]);
        assert_eq!(answer.status, status, "If-Range: {condition}");
    }
}

#[test]
fn last_modified_is_never_in_the_future() {
    let (up, service) = (Upstream::start(), Service::new().start());
    let reply = Reply::ok(&Content::of(b"x")).field("Last-Modified", "Fri, 01 Jan 2999 00:00:00 GMT");
    let answer = service.fetch(&up.serve("/future", reply));
    assert!(!answer.header("Last-Modified").is_empty() && !answer.header("Last-Modified").contains("2999"));
}

#[test]
fn head_with_a_range_has_no_body() {
    let stored = Stored::new();
    let answer = stored.service.request("HEAD", &fetch_target(&stored.url), &[("Range", "bytes=0-9")]);
    // RFC 9110: Range is defined for GET only.
    assert_eq!((answer.status, answer.header("Content-Length")), (200, "10000"));
}

#[test]
fn a_range_of_a_miss_downloads_the_whole() {
    let (up, service, content) = (Upstream::start(), Service::new().start(), Content::new(41, SIZE));
    let url = up.serve("/cold", Reply::ok(&content));
    let answer = service.fetch_with(&url, &[("Range", "bytes=10-19")]);
    assert_eq!((answer.status, answer.cache_status()), (206, "MISS"));
    assert!(answer.body == content.bytes()[10..20]);
    assert_eq!(up.requests("/cold")[0].get("Range"), None);
    service.fetch(&url).assert_ok(&content.bytes());
}

#[test]
fn an_empty_artifact_has_no_range() {
    let (up, service) = (Upstream::start(), Service::new().start());
    let url = up.serve("/none", Reply::ok(&Content::of(b"")));
    service.fetch(&url).assert_ok(b"");
    for range in ["bytes=0-0", "bytes=0-", "bytes=-1"] {
        let answer = service.fetch_with(&url, &[("Range", range)]);
        // RFC 9110 leaves it open whether a suffix of nothing can be had.
        assert!(
            answer.status == 416 || (range == "bytes=-1" && answer.status == 200),
            "{range}: {}",
            answer.status
        );
    }
}
