//! What must hold whatever a client, an upstream or a configuration says: one function a target, for the fuzzer in
//! `fuzz/` and the property tests in `tests/fuzz.rs` alike. Nobody else uses them.
//!
//! Each takes any bytes and panics when a promise is broken. That nothing else panics, overflows or hangs is the first
//! promise of each.

use std::{
    sync::LazyLock,
    time::{Duration, SystemTime},
};

use http::{HeaderMap, HeaderName, HeaderValue, Method, Uri, header};

use crate::{
    artifact::{SourceUrl, Version, globs::QueryGlobs, media, source_url::MAX_URL_BYTES},
    config::Config,
    error::Error,
    server::{
        conditions::{self, Validators, Verdict},
        hot, params,
    },
    upstream::{Head, Resume, answer},
};

/// A promise, kept for any bytes.
pub type Target = fn(&[u8]);

/// All targets by name.
pub const TARGETS: [(&str, Target); 5] = [
    ("request_target", request_target),
    ("range", range),
    ("config", config),
    ("media", media_headers),
    ("upstream", upstream_headers),
];

static DEFAULTS: LazyLock<Config> = LazyLock::new(Config::default);

fn ignored() -> &'static QueryGlobs {
    &DEFAULTS.fetch.ignore_query
}

/// Percent-encodes all that is not unreserved.
fn encoded(text: &str) -> String {
    percent_encoding::utf8_percent_encode(text, percent_encoding::NON_ALPHANUMERIC).to_string()
}

/// The target of a request to `/fetch`, in either form: a key that is taken names itself, and is fit for a header and a
/// log line.
pub fn request_target(data: &[u8]) {
    let Some(uri) = std::str::from_utf8(data).ok().and_then(|text| text.parse::<Uri>().ok()) else { return };
    let (url, digest) = match params::target(&uri, ignored()) {
        Ok(named) => named,
        Err(Error::MissingParameter { .. }) => return,
        Err(Error::InvalidParameter { parameter, message }) => {
            assert!(parameter.chars().count() <= 101, "{parameter:?}");
            assert!(!message.is_empty() && message.len() < 2_000, "{message:?}");
            return;
        }
        Err(other) => panic!("a target can't fail so: {other:?}"),
    };
    check_url(&url);
    let hex = digest.map(|digest| digest.to_string()).unwrap_or_default();
    let again = format!("/fetch?url={}&sha256={hex}", encoded(url.key()));
    let again = again.parse().expect("it is all letters, digits and percent signs");
    let (same, digest_again) = params::target(&again, ignored()).expect("a key is a URL that is taken");
    assert_eq!((same.key(), digest_again), (url.key(), digest));
}

fn check_url(url: &SourceUrl) {
    let key = url.key();
    assert!(key.len() <= MAX_URL_BYTES && key.bytes().all(|byte| byte.is_ascii_graphic()), "{key:?}");
    let sent = url.upstream();
    assert!(
        matches!(sent.scheme(), "http" | "https") && sent.host_str().is_some_and(|host| !host.is_empty())
    );
    assert!(sent.username().is_empty() && sent.password().is_none() && sent.fragment().is_none(), "{sent}");
    assert_eq!(url.masked().split('?').next(), key.split('?').next(), "only the query is masked");
    if let Some(name) = media::file_name(None, url) {
        check_file_name(&name);
    }
}

/// Conditional and range fields, one a line as `name: value`, about an artifact whose size the first line says.
pub fn range(data: &[u8]) {
    let (first, rest) = split_line(data);
    let size = std::str::from_utf8(first).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(1_000);
    let headers = fields(rest);
    let known = Validators {
        etag: Some("\"a\""),
        last_modified: Some(SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777)),
        size: Some(size),
    };
    match conditions::judge(&Method::GET, &headers, known) {
        Verdict::Ranges(ranges) => {
            assert!((1..=16).contains(&ranges.len()));
            assert!(ranges.iter().all(|range| range.start < range.end && range.end <= size), "{ranges:?}");
            let bytes: u128 = ranges.iter().map(|range| u128::from(range.end - range.start)).sum();
            assert!(bytes <= u128::from(size), "no more than one body's worth: {ranges:?}");
        }
        Verdict::Unsatisfiable(told) => assert_eq!(told, size),
        Verdict::Whole | Verdict::NotModified | Verdict::PreconditionFailed => {}
    }
    let head = conditions::judge(&Method::HEAD, &headers, known);
    assert!(!matches!(head, Verdict::Ranges(_) | Verdict::Unsatisfiable(_)), "HEAD has no ranges");
    let unsized_ = conditions::judge(&Method::GET, &headers, Validators { size: None, ..known });
    assert!(
        !matches!(unsized_, Verdict::Ranges(_) | Verdict::Unsatisfiable(_)),
        "nor has what has no length"
    );
}

/// A configuration file; lines that begin with `ARTIFACT_CACHE__` are variables.
pub fn config(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let variable = |line: &&str| line.starts_with("ARTIFACT_CACHE__") && line.contains('=');
    let env = text.lines().filter(variable).filter_map(|line| {
        let (name, value) = line.split_once('=')?;
        Some((name.to_owned(), value.to_owned()))
    });
    let yaml: String = text.split_inclusive('\n').filter(|line| !variable(line)).collect();
    match Config::parse("config.yaml", &yaml, env) {
        Ok(config) => check_config(&config),
        Err(error) => {
            let message = error.to_string();
            let names_place = message.starts_with("config.yaml:") || message.starts_with("ARTIFACT_CACHE__");
            assert!(names_place, "it says where: {message:?}");
        }
    }
}

/// What the rest of the program takes for granted.
fn check_config(config: &Config) {
    let Config { server, storage, upstream, fetch, .. } = config;
    assert!(server.max_connections > 0 && upstream.max_downloads > 0);
    assert!(storage.max_artifact_bytes > 0 && fetch.tail_hold_bytes > 0);
    assert!(!storage.base_path.as_os_str().is_empty() && !storage.database.as_os_str().is_empty());
    for timeout in [server.header_timeout, server.keepalive_timeout, server.write_idle_timeout] {
        assert!(!timeout.is_zero());
    }
    for timeout in [upstream.timeout, upstream.stall, upstream.connect_timeout] {
        assert!(!timeout.is_zero());
    }
    // Deadlines are computed from them.
    for time in [upstream.timeout, fetch.stream_after, config.jobs.delete_grace, fetch.mismatch_memory] {
        assert!(std::time::Instant::now().checked_add(time).is_some(), "{time:?}");
    }
}

/// A Content-Disposition, or a Content-Type: only a clean name and a media type survive, and survive again.
pub fn media_headers(data: &[u8]) {
    let url = SourceUrl::parse("http://h/", ignored()).expect("it is a URL");
    if let Some(name) = media::file_name(Some(data), &url) {
        check_file_name(&name);
        let written = media::content_disposition(Some(&name));
        assert!(written.to_str().is_ok(), "{written:?}");
        assert_eq!(media::file_name(Some(written.as_bytes()), &url), Some(name));
    }
    if let Some(kept) = media::media_type(data) {
        assert!(HeaderValue::try_from(&kept).is_ok() && kept.len() <= 255, "{kept:?}");
        assert_eq!(media::media_type(kept.as_bytes()).as_ref(), Some(&kept));
    }
    let named = std::str::from_utf8(data).ok();
    assert!(media::media_type(media::detect(data, named).as_bytes()).is_some());
}

fn check_file_name(name: &str) {
    let is_clean =
        |c: char| !c.is_control() && !matches!(c, '/' | '\\' | '\u{2028}' | '\u{2029}' | '\u{202e}');
    assert!((1..=255).contains(&name.len()) && name.chars().all(is_clean) && name != "." && name != "..");
    assert_eq!(name.trim(), name);
}

/// An upstream's header fields, one a line: whatever is kept of them makes a proper answer, and a 206 is only taken for
/// the rest of what is there if it can be.
pub fn upstream_headers(data: &[u8]) {
    let url = SourceUrl::parse("http://h/file.bin", ignored()).expect("it is a URL");
    let headers = fields(data);
    let head = Head::read(&url, &headers, Some(1_000));
    if let Some(name) = &head.file_name {
        check_file_name(name);
    }
    if let Some(etag) = head.strong_etag() {
        assert!(
            etag.len() >= 2 && etag.len() <= 1024 && etag.starts_with('"') && etag.ends_with('"'),
            "{etag}"
        );
    }
    assert!(head.last_modified.is_none_or(|date| date <= SystemTime::now()));
    for offset in [1, 500, 999, u64::MAX] {
        let resume = Resume { offset, head: &head, length: head.length };
        if let Some(total) = answer::continues(&headers, resume) {
            assert!(total == 1_000 && offset < total, "{offset} of {total}");
        }
        let resume = Resume { offset, head: &head, length: None };
        assert!(answer::continues(&headers, resume).is_none_or(|total| offset < total));
    }
    let version = Version {
        digest: "ab".repeat(32).parse().expect("they are hex digits"),
        size: 1_000,
        content_type: head.content_type.clone(),
        content_encoding: head.content_encoding.clone(),
        file_name: head.file_name.clone(),
        etag: head.etag.clone(),
        last_modified: head.last_modified,
        fetched: SystemTime::now(),
    };
    let answer = hot::describe(&version);
    for (name, kept) in [
        (header::CONTENT_TYPE, head.content_type.as_deref()),
        (header::CONTENT_ENCODING, head.content_encoding.as_deref()),
    ] {
        let sent = answer.get(&name).and_then(|value| value.to_str().ok());
        assert!(kept.is_none() || kept == sent, "{name}: {kept:?} is sent as {sent:?}");
    }
    assert_eq!(answer.get_all(header::SET_COOKIE).iter().count(), 0);
}

/// `name: value`, one a line; what is neither is left out.
fn fields(data: &[u8]) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for line in data.split(|&byte| byte == b'\n').take(64) {
        let Some(at) = line.iter().position(|&byte| byte == b':') else { continue };
        let name = HeaderName::from_bytes(line[..at].trim_ascii());
        let value = HeaderValue::from_bytes(line[at + 1..].trim_ascii());
        if let (Ok(name), Ok(value)) = (name, value) {
            headers.append(name, value);
        }
    }
    headers
}

fn split_line(data: &[u8]) -> (&[u8], &[u8]) {
    match data.iter().position(|&byte| byte == b'\n') {
        Some(at) => (&data[..at], &data[at + 1..]),
        None => (data, &[]),
    }
}
