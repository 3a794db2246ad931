//! What may survive of an upstream's media type and file name, and how the file name is sent on.
//!
//! Upstream headers are hostile until parsed: only what these functions return is stored or sent.

use std::{borrow::Cow, fmt::Write as _};

use http::HeaderValue;
use mime::Mime;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};

use super::SourceUrl;

/// The longest media type that is kept, in characters (all of them ASCII).
const MAX_MEDIA_TYPE: usize = 255;

/// The longest file name that is kept, in bytes: what most file systems take.
const MAX_FILE_NAME_BYTES: usize = 255;

/// All but the `attr-char` of RFC 8187.
const NOT_ATTR_CHAR: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'!')
    .remove(b'#')
    .remove(b'$')
    .remove(b'&')
    .remove(b'+')
    .remove(b'-')
    .remove(b'.')
    .remove(b'^')
    .remove(b'_')
    .remove(b'`')
    .remove(b'|')
    .remove(b'~');

/// A `Content-Type` that is one: parsed, visible ASCII and spaces only, no wildcard, at most 255 characters.
pub fn media_type(raw: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(raw).ok()?.trim();
    if text.len() > MAX_MEDIA_TYPE || !text.bytes().all(|b| matches!(b, b' '..=b'~')) {
        return None;
    }
    let parsed: Mime = text.parse().ok()?;
    (parsed.type_() != mime::STAR && parsed.subtype() != mime::STAR).then(|| parsed.to_string())
}

/// The name to save an artifact under: that of the `Content-Disposition`, else the URL's last path segment.
///
/// It is a bare name (no directory, control or text direction characters, not `..`) of 1 to 255 bytes.
pub fn file_name(content_disposition: Option<&[u8]>, url: &SourceUrl) -> Option<String> {
    content_disposition.and_then(disposition_name).or_else(|| clean(&url.last_segment()?))
}

/// An `attachment` with this file name, by RFC 6266: for old readers in ASCII, for others exact (RFC 8187).
pub fn content_disposition(file_name: Option<&str>) -> HeaderValue {
    let bare = HeaderValue::from_static("attachment");
    let Some(name) = file_name.filter(|name| !name.is_empty()) else { return bare };
    // Some readers decode %XX inside the quotes, and some do not unescape: neither may occur there.
    let plain = |c: char| matches!(c, ' '..='~') && !matches!(c, '"' | '\\' | '%');
    let fallback: String = name.chars().map(|c| if plain(c) { c } else { '_' }).collect();
    let mut text = format!("attachment; filename=\"{fallback}\"");
    if fallback != name {
        // Writing to a String cannot fail.
        let _ = write!(text, "; filename*=UTF-8''{}", utf8_percent_encode(name, NOT_ATTR_CHAR));
    }
    HeaderValue::try_from(text).unwrap_or(bare)
}

/// The media type of an artifact whose upstream named none: by its first bytes, else by its name.
///
/// It may well be one that browsers run; the server's headers keep them from it.
pub fn detect(first_bytes: &[u8], file_name: Option<&str>) -> &'static str {
    infer::get(first_bytes)
        .map(|kind| kind.mime_type())
        .or_else(|| mime_guess::from_path(file_name?).first_raw())
        .unwrap_or("application/octet-stream")
}

fn disposition_name(raw: &[u8]) -> Option<String> {
    // Latin-1 by the letter, UTF-8 in the field. Each Latin-1 byte is the code point of its number.
    let text = match std::str::from_utf8(raw) {
        Ok(text) => Cow::Borrowed(text),
        Err(_) => Cow::Owned(raw.iter().map(|&byte| char::from(byte)).collect()),
    };
    let parameters = parameters(&text);
    let value = |wanted: &str| parameters.iter().find(|(name, _)| name.eq_ignore_ascii_case(wanted));
    let extended = value("filename*").and_then(|(_, value)| clean(&ext_value(value)?));
    extended.or_else(|| value("filename").and_then(|(_, value)| clean(value)))
}

/// The `name=value` parameters of a header; what is not one, such as the disposition type, is skipped.
fn parameters(text: &str) -> Vec<(&str, String)> {
    let mut found = Vec::new();
    let mut rest = text;
    while let Some(end) = rest.find(['=', ';']) {
        let name = rest[..end].trim();
        let is_parameter = rest[end..].starts_with('=');
        rest = &rest[end + 1..];
        if is_parameter {
            let (value, after) = parameter_value(rest.trim_start());
            found.push((name, value));
            rest = after;
        }
    }
    found
}

/// A quoted string or a token (of any characters, as servers forget the quotes), and what follows it.
fn parameter_value(text: &str) -> (String, &str) {
    let Some(quoted) = text.strip_prefix('"') else {
        let (token, rest) = text.split_once(';').unwrap_or((text, ""));
        return (token.trim_end().to_owned(), rest);
    };
    let mut value = String::new();
    let mut chars = quoted.chars();
    while let Some(c) = chars.next() {
        match c {
            '"' => break,
            '\\' => value.extend(chars.next()),
            _ => value.push(c),
        }
    }
    let rest = chars.as_str().split_once(';').map_or("", |(_, rest)| rest);
    (value, rest)
}

/// `charset'language'percent-encoded` of RFC 8187.
fn ext_value(text: &str) -> Option<String> {
    let mut parts = text.splitn(3, '\'');
    let (charset, _language, encoded) = (parts.next()?, parts.next()?, parts.next()?);
    let bytes = percent_decode_str(encoded);
    if charset.eq_ignore_ascii_case("utf-8") {
        return Some(bytes.decode_utf8().ok()?.into_owned());
    }
    charset.eq_ignore_ascii_case("iso-8859-1").then(|| bytes.map(char::from).collect())
}

fn clean(name: &str) -> Option<String> {
    let last = name.rsplit(['/', '\\']).next()?;
    let visible: String = last.chars().filter(|c| !c.is_control() && !turns_text(*c)).collect();
    let name = visible.trim_start();
    let name = name[..name.floor_char_boundary(MAX_FILE_NAME_BYTES)].trim_end();
    (!name.chars().all(|c| c == '.' || c.is_whitespace())).then(|| name.to_owned())
}

/// Characters that make a name look like another one (`exe.txt` for `txt.exe`), and line breaks of Unicode.
fn turns_text(c: char) -> bool {
    const MARKS: [char; 4] = ['\u{61c}', '\u{200e}', '\u{200f}', '\u{feff}'];
    MARKS.contains(&c) || matches!(c, '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use proptest::prelude::*;

    use super::*;
    use crate::config::Config;

    static CONFIG: LazyLock<Config> = LazyLock::new(|| Config::load(None, []).unwrap());

    fn url(raw: &str) -> SourceUrl {
        SourceUrl::parse(raw, &CONFIG.fetch.ignore_query).unwrap()
    }

    fn named(disposition: &[u8]) -> Option<String> {
        file_name(Some(disposition), &url("http://h/"))
    }

    #[test]
    fn only_media_types_survive() {
        for (raw, kept) in [
            ("application/gzip", Some("application/gzip")),
            (" text/html; charset=utf-8 ", Some("text/html; charset=utf-8")),
            ("application/vnd.x+json", Some("application/vnd.x+json")),
            ("", None),
            ("gzip", None),
            ("*/*", None),
            ("text/*", None),
            ("text/html\r\nSet-Cookie: a=b", None),
            ("text/html; a=\"\u{7f}\"", None),
            ("text/plain; charset=é", None),
            ("<script>/x", None),
        ] {
            assert_eq!(media_type(raw.as_bytes()).as_deref(), kept, "{raw:?}");
        }
        assert_eq!(media_type(b"text/\xff"), None);
        assert_eq!(media_type(format!("text/{}", "a".repeat(250)).as_bytes()).map(|t| t.len()), Some(255));
        assert_eq!(media_type(format!("text/{}", "a".repeat(251)).as_bytes()), None);
    }

    #[test]
    fn dispositions_are_read() {
        for (raw, name) in [
            ("attachment; filename=a.tar.gz", "a.tar.gz"),
            ("attachment;filename=\"a b.zip\"", "a b.zip"),
            ("ATTACHMENT ; FileName = \"a;b=c.zip\" ; x=y", "a;b=c.zip"),
            ("attachment; filename=\"a\\\"b\"", "a\"b"),
            ("inline; x=\"filename=no\"; filename=yes", "yes"),
            ("attachment; filename=a b.zip; x", "a b.zip"),
            ("attachment; filename=\"open", "open"),
            ("filename=bare", "bare"),
            ("attachment; filename=\"plain\"; filename*=UTF-8''%e2%82%ac%20rates", "€ rates"),
            ("attachment; filename*=utf-8'en'a%2Fb; filename=plain", "b"),
            ("attachment; filename*=iso-8859-1''%A3.txt", "£.txt"),
            ("attachment; filename*=UTF-8''%ff; filename=plain", "plain"),
            ("attachment; filename*=KOI8-R''%c1; filename=plain", "plain"),
            ("attachment; filename*=nothing; filename=plain", "plain"),
            ("attachment; filename*=UTF-8''..; filename=plain", "plain"),
            ("attachment; filename=first; filename=second", "first"),
            ("attachment; filename=\"../../etc/passwd\"", "passwd"),
            ("attachment; filename=\"C:\\\\x\\\\y.exe\"", "y.exe"),
            ("attachment; filename=\"naïve.txt\"", "naïve.txt"),
            ("attachment; filename=\"a\u{202e}txt.exe\"", "atxt.exe"),
            ("attachment; filename=\" .bashrc \"", ".bashrc"),
        ] {
            assert_eq!(named(raw.as_bytes()).as_deref(), Some(name), "{raw:?}");
        }
        assert_eq!(named(b"attachment; filename=\"na\xefve\"").as_deref(), Some("naïve"));
        assert_eq!(named(b"attachment; filename=\"a\r\nX: y\0\"").as_deref(), Some("aX: y"));
    }

    #[test]
    fn without_a_usable_disposition_the_url_names_it() {
        for raw in [
            "",
            "attachment",
            "attachment; filename=",
            "attachment; filename=\"..\"",
            "x; filename=a/",
            ";=;=",
        ] {
            let found = file_name(Some(raw.as_bytes()), &url("http://h/d/f%20g.bin?q=1"));
            assert_eq!(found.as_deref(), Some("f g.bin"), "{raw:?}");
        }
        assert_eq!(file_name(None, &url("http://h/a%2f..%5cb")).as_deref(), Some("b"));
        assert_eq!(file_name(None, &url("http://h/a/")), None);
        assert_eq!(file_name(None, &url("http://h/%20.%20")), None);
    }

    #[test]
    fn long_names_are_cut_between_characters() {
        let name = file_name(None, &url(&format!("http://h/a{}", "é".repeat(200)))).unwrap();
        assert_eq!(name, format!("a{}", "é".repeat(127)));
    }

    #[test]
    fn dispositions_are_written() {
        for (name, text) in [
            (None, "attachment"),
            (Some(""), "attachment"),
            (Some("a b.zip"), "attachment; filename=\"a b.zip\""),
            (Some("€"), "attachment; filename=\"_\"; filename*=UTF-8''%E2%82%AC"),
            (Some("a\"\\%.x"), "attachment; filename=\"a___.x\"; filename*=UTF-8''a%22%5C%25.x"),
            (Some("a\r\nb"), "attachment; filename=\"a__b\"; filename*=UTF-8''a%0D%0Ab"),
        ] {
            assert_eq!(content_disposition(name), text, "{name:?}");
        }
    }

    #[test]
    fn types_are_detected() {
        let gzip = b"\x1f\x8b\x08\0\0\0\0\0\0\x03";
        assert_eq!(detect(gzip, Some("a.txt")), "application/gzip");
        assert_eq!(detect(b"hello", Some("a.txt")), "text/plain");
        assert_eq!(detect(b"hello", Some("a")), "application/octet-stream");
        assert_eq!(detect(b"", None), "application/octet-stream");
    }

    fn is_clean(name: &str) -> bool {
        (1..=MAX_FILE_NAME_BYTES).contains(&name.len())
            && name.trim() == name
            && !name.chars().all(|c| c == '.')
            && !name.chars().any(|c| c.is_control() || turns_text(c) || c == '/' || c == '\\')
    }

    fn disposition() -> impl Strategy<Value = Vec<u8>> {
        let value = prop_oneof!["[ -~é/\\\\\"\0\r\n;=.]{0,300}", "[a-zA-Z0-9'%./-]{0,20}", "\\PC{0,130}"];
        prop_oneof![
            proptest::collection::vec(any::<u8>(), 0..80),
            value.clone().prop_map(|v| format!("attachment; filename=\"{v}\"").into_bytes()),
            value.prop_map(|v| format!("attachment; filename*=UTF-8''{v}; filename={v}").into_bytes()),
        ]
    }

    proptest! {
        #[test]
        fn a_file_name_is_always_clean_and_survives_the_trip(raw in disposition()) {
            if let Some(name) = named(&raw) {
                prop_assert!(is_clean(&name), "{:?}", name);
                prop_assert_eq!(named(content_disposition(Some(&name)).as_bytes()), Some(name));
            }
        }

        #[test]
        fn a_written_disposition_is_one_line_of_ascii(name: String) {
            let written = content_disposition(Some(&name));
            prop_assert!(written.to_str().is_ok());
            prop_assert_eq!(written == "attachment", name.is_empty());
            if let Some(cleaned) = clean(&name) {
                prop_assert_eq!(named(written.as_bytes()), Some(cleaned));
            }
        }

        #[test]
        fn a_media_type_is_a_header_value_and_stays_itself(
            raw in prop_oneof!["\\PC{0,40}", "[a-z*+]{1,9}/[a-z*+.]{1,9}(; ?[a-z]{1,4}=[a-z\" ;=]{0,6})?"],
        ) {
            if let Some(kept) = media_type(raw.as_bytes()) {
                prop_assert!(HeaderValue::try_from(&kept).is_ok());
                prop_assert_eq!(media_type(kept.as_bytes()), Some(kept));
            }
        }

        #[test]
        fn any_bytes_have_a_type(
            bytes in proptest::collection::vec(any::<u8>(), 0..300),
            name: String,
        ) {
            prop_assert!(media_type(detect(&bytes, Some(&name)).as_bytes()).is_some());
        }
    }
}
