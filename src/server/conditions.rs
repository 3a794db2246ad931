//! Preconditions and ranges (RFC 9110, sections 13 and 14): what of an artifact a request gets.

use std::{
    ops::Range,
    time::{Duration, SystemTime},
};

use http::{HeaderMap, HeaderName, Method, header};

/// More ranges than this in one request are answered with the whole.
const MAX_RANGES: usize = 16;

/// What is known of an artifact when a request about it is judged.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Validators<'a> {
    /// With its quotes; strong.
    pub(crate) etag: Option<&'a str>,
    pub(crate) last_modified: Option<SystemTime>,
    pub(crate) size: Option<u64>,
}

/// What a request gets.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The whole.
    Whole,
    /// These ranges, at least one, none overlapping, each inside the artifact.
    Ranges(Vec<Range<u64>>),
    /// 304.
    NotModified,
    /// 412.
    PreconditionFailed,
    /// 416, of an artifact of so many bytes.
    Unsatisfiable(u64),
}

/// The request's preconditions can be judged only by the digest.
pub(super) fn need_digest(headers: &HeaderMap) -> bool {
    [header::IF_MATCH, header::IF_NONE_MATCH, header::IF_UNMODIFIED_SINCE]
        .iter()
        .any(|name| headers.contains_key(name))
}

/// Evaluates in the order of RFC 9110, section 13.2.2.
pub(crate) fn judge(method: &Method, headers: &HeaderMap, known: Validators<'_>) -> Verdict {
    if headers.contains_key(header::IF_MATCH) {
        if !etag_matches(headers, header::IF_MATCH, known.etag, Strength::Strong) {
            return Verdict::PreconditionFailed;
        }
    } else if let Some(since) = date(headers, header::IF_UNMODIFIED_SINCE)
        && known.last_modified.is_none_or(|modified| seconds(modified) > seconds(since))
    {
        return Verdict::PreconditionFailed;
    }
    if headers.contains_key(header::IF_NONE_MATCH) {
        if etag_matches(headers, header::IF_NONE_MATCH, known.etag, Strength::Weak) {
            return Verdict::NotModified;
        }
    } else if let Some(since) = date(headers, header::IF_MODIFIED_SINCE)
        && known.last_modified.is_some_and(|modified| seconds(modified) <= seconds(since))
    {
        return Verdict::NotModified;
    }
    let (Some(size), Some(range), &Method::GET) = (known.size, text(headers, header::RANGE), method) else {
        return Verdict::Whole;
    };
    if if_range_holds(headers, known) { select(range, size) } else { Verdict::Whole }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Strength {
    Strong,
    Weak,
}

fn etag_matches(headers: &HeaderMap, name: HeaderName, etag: Option<&str>, strength: Strength) -> bool {
    let values = headers.get_all(name);
    let mut items = values.iter().filter_map(|value| value.to_str().ok()).flat_map(|value| value.split(','));
    items.any(|item| {
        let item = item.trim();
        let item = if strength == Strength::Weak { item.strip_prefix("W/").unwrap_or(item) } else { item };
        item == "*" || Some(item) == etag
    })
}

/// RFC 9110, section 13.1.5: an entity tag compares strongly, a date exactly.
fn if_range_holds(headers: &HeaderMap, known: Validators<'_>) -> bool {
    match text(headers, header::IF_RANGE) {
        None => !headers.contains_key(header::IF_RANGE),
        Some(tag) if tag.starts_with('"') => Some(tag) == known.etag,
        Some(date) => match (httpdate::parse_http_date(date), known.last_modified) {
            (Ok(date), Some(modified)) => seconds(date) == seconds(modified),
            _ => false,
        },
    }
}

/// RFC 9110, section 14.1.2. A malformed header is ignored.
fn select(range: &str, size: u64) -> Verdict {
    let Some((unit, specs)) = range.split_once('=') else { return Verdict::Whole };
    if !unit.trim().eq_ignore_ascii_case("bytes") {
        return Verdict::Whole;
    }
    let specs: Option<Vec<Option<Range<u64>>>> =
        specs.split(',').map(|spec| parse(spec.trim(), size)).collect();
    let Some(specs) = specs else { return Verdict::Whole };
    let count = specs.len();
    let ranges: Vec<Range<u64>> = specs.into_iter().flatten().collect();
    let mut ordered = ranges.clone();
    ordered.sort_by_key(|range| range.start);
    let overlap = ordered.windows(2).any(|pair| pair[1].start < pair[0].end);
    match ranges.is_empty() {
        true => Verdict::Unsatisfiable(size),
        false if count > MAX_RANGES || overlap => Verdict::Whole,
        false => Verdict::Ranges(ranges),
    }
}

/// `None` when malformed, `Some(None)` when well-formed but outside the artifact.
fn parse(spec: &str, size: u64) -> Option<Option<Range<u64>>> {
    let (first, last) = spec.split_once('-')?;
    // More digits than fit are still digits: a position past any end.
    let number = |text: &str| {
        (!text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()))
            .then(|| text.parse::<u64>().unwrap_or(u64::MAX))
    };
    if first.is_empty() {
        let length = number(last)?.min(size);
        return Some((length > 0).then(|| size - length..size));
    }
    let first = number(first)?;
    let last = if last.is_empty() { u64::MAX } else { number(last)? };
    if last < first {
        return None;
    }
    Some((first < size).then(|| first..last.saturating_add(1).min(size)))
}

fn text(headers: &HeaderMap, name: HeaderName) -> Option<&str> {
    headers.get(name)?.to_str().ok().map(str::trim)
}

fn date(headers: &HeaderMap, name: HeaderName) -> Option<SystemTime> {
    httpdate::parse_http_date(text(headers, name)?).ok()
}

/// HTTP dates have whole seconds.
fn seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs()
}

#[cfg(test)]
mod tests {
    #![expect(clippy::single_range_in_vec_init, reason = "one range is one range")]

    use proptest::prelude::*;

    use super::*;

    fn judged(pairs: &[(&'static str, &str)]) -> Verdict {
        let headers =
            pairs.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect();
        let modified = SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777);
        let known = Validators { etag: Some("\"a\""), last_modified: Some(modified), size: Some(100) };
        judge(&Method::GET, &headers, known)
    }

    #[test]
    fn ranges() {
        for (range, expected) in [
            ("bytes=0-9", Verdict::Ranges(vec![0..10])),
            ("bytes=90-", Verdict::Ranges(vec![90..100])),
            ("bytes=-5", Verdict::Ranges(vec![95..100])),
            ("bytes=-500", Verdict::Ranges(vec![0..100])),
            ("bytes=0-18446744073709551615", Verdict::Ranges(vec![0..100])),
            ("bytes=99999999999999999999999-", Verdict::Unsatisfiable(100)),
            ("bytes=0-1, 5-6,-1", Verdict::Ranges(vec![0..2, 5..7, 99..100])),
            ("bytes=0-1,200-", Verdict::Ranges(vec![0..2])),
            ("bytes=0-50,20-60", Verdict::Whole),
            ("bytes=100-", Verdict::Unsatisfiable(100)),
            ("bytes=-0", Verdict::Unsatisfiable(100)),
            ("bytes=5-4", Verdict::Whole),
            ("bytes=", Verdict::Whole),
            ("bytes=a-b", Verdict::Whole),
            ("bytes=+1-2", Verdict::Whole),
            ("lines=0-9", Verdict::Whole),
        ] {
            assert_eq!(judged(&[("range", range)]), expected, "{range}");
        }
    }

    #[test]
    fn preconditions_in_the_order_of_the_rfc() {
        let (same, later, earlier) = (
            "Sun, 06 Nov 1994 08:49:37 GMT",
            "Sun, 06 Nov 1994 08:49:38 GMT",
            "Sun, 06 Nov 1994 08:49:36 GMT",
        );
        for (headers, expected) in [
            (vec![("if-none-match", "\"b\", W/\"a\"")], Verdict::NotModified),
            (vec![("if-none-match", "\"b\""), ("if-modified-since", later)], Verdict::Whole),
            (vec![("if-none-match", "*")], Verdict::NotModified),
            (vec![("if-modified-since", same)], Verdict::NotModified),
            (vec![("if-modified-since", earlier)], Verdict::Whole),
            (vec![("if-modified-since", "yesterday")], Verdict::Whole),
            (vec![("if-match", "\"b\"")], Verdict::PreconditionFailed),
            (vec![("if-match", "W/\"a\"")], Verdict::PreconditionFailed),
            (vec![("if-match", "\"a\"")], Verdict::Whole),
            (vec![("if-unmodified-since", earlier)], Verdict::PreconditionFailed),
            (vec![("if-unmodified-since", same)], Verdict::Whole),
            (vec![("range", "bytes=0-0"), ("if-range", "\"a\"")], Verdict::Ranges(vec![0..1])),
            (vec![("range", "bytes=0-0"), ("if-range", "\"b\"")], Verdict::Whole),
            (vec![("range", "bytes=0-0"), ("if-range", "W/\"a\"")], Verdict::Whole),
            (vec![("range", "bytes=0-0"), ("if-range", same)], Verdict::Ranges(vec![0..1])),
            (vec![("range", "bytes=0-0"), ("if-range", later)], Verdict::Whole),
        ] {
            assert_eq!(judged(&headers), expected, "{headers:?}");
        }
    }

    proptest! {
        #[test]
        fn whatever_is_selected_lies_inside_and_is_no_more_than_the_whole(range in "bytes=[0-9, -]{0,40}", size in 0u64..200) {
            match select(&range, size) {
                Verdict::Ranges(ranges) => {
                    prop_assert!(!ranges.is_empty());
                    prop_assert!(ranges.iter().all(|range| range.start < range.end && range.end <= size));
                    prop_assert!(ranges.iter().map(|range| range.end - range.start).sum::<u64>() <= size);
                }
                Verdict::Unsatisfiable(told) => prop_assert_eq!(told, size),
                other => prop_assert_eq!(other, Verdict::Whole),
            }
        }
    }
}
