//! From a request's target and headers to what is wanted: both forms of `/fetch`, and the preferences.
//!
//! The values are split by hand and only `%XX` is decoded: form decoding would turn the `+` of many a file name into a
//! space, and an unencoded `url=http://h/p?a=1&b=2` must be refused, never be cut to `http://h/p?a=1`.

use std::borrow::Cow;

use http::{HeaderMap, HeaderName, Uri};
use quick_cache::sync::Cache;

use crate::{
    artifact::{Digest, SourceUrl, globs::QueryGlobs},
    error::Error,
};

/// With their URLs about 1 KiB each.
const REMEMBERED_TARGETS: usize = 8192;
const LONGEST_REMEMBERED: usize = 512;
const HINT: &str = "if it belongs to the upstream URL, percent-encode the whole value of 'url' (& as %26, ? as %3F), \
                    or use the path form /fetch/https://host/path?query";

/// Targets that were asked for lately: checking a URL is a third of the work of a hit.
#[derive(Debug)]
pub(super) struct Targets {
    known: Cache<String, (SourceUrl, Option<Digest>)>,
    ignore: QueryGlobs,
}

impl Targets {
    pub(super) fn new(ignore: QueryGlobs) -> Targets {
        Targets { known: Cache::new(REMEMBERED_TARGETS), ignore }
    }

    /// What a request's target names.
    pub(super) fn parse(&self, uri: &Uri) -> Result<(SourceUrl, Option<Digest>), Error> {
        let text = uri.path_and_query().map_or("", |target| target.as_str());
        if let Some(known) = self.known.get(text) {
            return Ok(known);
        }
        let parsed = target(uri, &self.ignore)?;
        if text.len() <= LONGEST_REMEMBERED {
            self.known.insert(text.to_owned(), parsed.clone());
        }
        Ok(parsed)
    }
}

/// The URL and the expected digest that a request's target names.
pub(crate) fn target(uri: &Uri, ignore: &QueryGlobs) -> Result<(SourceUrl, Option<Digest>), Error> {
    match uri.path().strip_prefix("/fetch/") {
        Some(rest) if !rest.is_empty() => path_form(rest, uri.query(), ignore),
        _ => query_form(uri.query().unwrap_or_default(), ignore),
    }
}

/// `/fetch?url=…&sha256=…`
fn query_form(query: &str, ignore: &QueryGlobs) -> Result<(SourceUrl, Option<Digest>), Error> {
    let (mut url, mut sha256) = (None, None);
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        let slot = match name {
            "url" => &mut url,
            "sha256" => &mut sha256,
            _ => {
                let name = percent_encoding::percent_decode_str(name).decode_utf8_lossy();
                return Err(invalid(&name, format!("Unknown parameter '{}'; {HINT}", printable(&name))));
            }
        };
        if slot.replace(value).is_some() {
            return Err(invalid(name, format!("Parameter '{name}' is given twice; {HINT}")));
        }
    }
    let url = url.filter(|url| !url.is_empty()).ok_or(Error::MissingParameter { parameter: "url" })?;
    let url = decode("url", url)?;
    Ok((parse_url(&url, ignore)?, sha256.map(parse_digest).transpose()?.flatten()))
}

/// `/fetch/https://host/path?query`, `/fetch/sha256=<hex>/https://…`: the raw text is the URL, byte for byte.
fn path_form(
    rest: &str,
    query: Option<&str>,
    ignore: &QueryGlobs,
) -> Result<(SourceUrl, Option<Digest>), Error> {
    let (sha256, rest) = match rest.strip_prefix("sha256=").and_then(|rest| rest.split_once('/')) {
        Some((digest, rest)) => (parse_digest(digest)?, rest.trim_start_matches('/')),
        None => (None, rest),
    };
    let mut url = unfold(rest).into_owned();
    if let Some(query) = query {
        url.push('?');
        url.push_str(query);
    }
    Ok((parse_url(&url, ignore)?, sha256))
}

/// Proxies fold `//` in a path: `https:/host` is `https://host` again.
fn unfold(rest: &str) -> Cow<'_, str> {
    for scheme in ["https:", "http:"] {
        if rest.get(..scheme.len()).is_some_and(|start| start.eq_ignore_ascii_case(scheme)) {
            let after = &rest[scheme.len()..];
            if after.starts_with('/') && !after.starts_with("//") {
                return Cow::Owned(format!("{scheme}/{after}"));
            }
        }
    }
    Cow::Borrowed(rest)
}

fn parse_url(text: &str, ignore: &QueryGlobs) -> Result<SourceUrl, Error> {
    SourceUrl::parse(text, ignore).map_err(|problem| invalid("url", format!("Invalid 'url': {problem}")))
}

/// Empty means not given: the document's Ansible role sends it so.
fn parse_digest(text: &str) -> Result<Option<Digest>, Error> {
    let text = decode("sha256", text)?;
    if text.is_empty() {
        return Ok(None);
    }
    Digest::parse_param(&text).map(Some).map_err(|_| {
        let message = format!("Invalid 'sha256': expected 64 hexadecimal digits, got '{}'", printable(&text));
        invalid("sha256", message)
    })
}

fn decode<'a>(name: &str, value: &'a str) -> Result<Cow<'a, str>, Error> {
    let escapes_are_whole = value
        .split('%')
        .skip(1)
        .all(|rest| rest.as_bytes().get(..2).is_some_and(|digits| digits.iter().all(u8::is_ascii_hexdigit)));
    if !escapes_are_whole {
        let message =
            format!("Invalid '{name}': a % is not followed by two hexadecimal digits; write % itself as %25");
        return Err(invalid(name, message));
    }
    percent_encoding::percent_decode_str(value)
        .decode_utf8()
        .map_err(|_| invalid(name, format!("Invalid '{name}': its percent-encoded bytes are not UTF-8")))
}

fn invalid(parameter: &str, message: String) -> Error {
    Error::InvalidParameter { parameter: printable(parameter).into_owned(), message }
}

/// Enough of a client's text to recognise it by.
fn printable(text: &str) -> Cow<'_, str> {
    const LONGEST: usize = 100;
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => Cow::Owned(format!("{}…", &text[..end])),
        None => Cow::Borrowed(text),
    }
}

/// Whether a list header (RFC 9110, section 5.6.1) has this member, whatever parameters or value follow it.
pub(super) fn has_member(headers: &HeaderMap, name: HeaderName, member: &str) -> bool {
    headers
        .get_all(name)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .any(|item| {
            let token = item.split([';', '=']).next().unwrap_or_default();
            token.trim().eq_ignore_ascii_case(member)
        })
}

/// `Prefer: wait` (RFC 7240), with any value.
pub(super) fn prefers_wait(headers: &HeaderMap) -> bool {
    has_member(headers, HeaderName::from_static("prefer"), "wait")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(target_text: &str) -> Result<(String, Option<String>), String> {
        let uri: Uri = target_text.parse().map_err(|_| "not a target".to_owned())?;
        target(&uri, &QueryGlobs::default())
            .map(|(url, digest)| (url.key().to_owned(), digest.map(|digest| digest.to_string())))
            .map_err(|error| error.to_string())
    }

    #[test]
    fn both_forms_name_the_same_artifact() {
        let hex = "ab".repeat(32);
        let expected = Ok(("https://h.org/a+b.zip?x=1&y=2".to_owned(), Some(hex.clone())));
        for target in [
            format!("/fetch?url=https%3A%2F%2Fh.org%2Fa%2Bb.zip%3Fx%3D1%26y%3D2&sha256={hex}"),
            format!("/fetch?url=https://h.org/a+b.zip?x=1%26y=2&sha256=sha256:{}", hex.to_uppercase()),
            format!("/fetch/sha256={hex}/https://h.org/a+b.zip?x=1&y=2"),
            format!("/fetch/sha256={hex}/https:/h.org/a+b.zip?x=1&y=2"),
        ] {
            assert_eq!(parse(&target), expected, "{target}");
        }
    }

    #[test]
    fn an_unencoded_ampersand_is_never_cut_off() {
        let error = parse("/fetch?url=http://h/p?a=1&b=2").unwrap_err();
        assert!(error.contains("Unknown parameter 'b'") && error.contains("percent-encode"), "{error}");
        assert!(parse("/fetch?url=http://h/1&url=http://h/2").unwrap_err().contains("given twice"));
    }

    #[test]
    fn an_empty_checksum_is_none_and_a_bad_one_is_named() {
        assert_eq!(parse("/fetch?url=http://h/&sha256="), Ok(("http://h/".to_owned(), None)));
        assert!(
            parse("/fetch?url=http://h/&sha256=abc")
                .unwrap_err()
                .contains("64 hexadecimal digits, got 'abc'")
        );
        assert!(parse("/fetch?url=http://h/%zz").unwrap_err().contains("%25"));
    }

    proptest! {
        #[test]
        fn no_target_panics(text in "/fetch[?/][ -~]{0,80}") {
            let _ = parse(&text);
        }
    }
}
