//! How one value of the configuration is read from its text: numbers, seconds, sizes, networks and the like.
//!
//! An error says what is wrong and continues the sentence that begins with the value.

use std::{net::IpAddr, ops::RangeInclusive, path::PathBuf, time::Duration};

use http::HeaderValue;
use ipnet::IpNet;
use url::Url;

/// A year: longer is a slip, and far below what a clock can add.
const MAX_SECONDS: f64 = 365.0 * 86_400.0;

pub(super) fn whole<T: TryFrom<u64>>(text: &str, range: RangeInclusive<u64>) -> Result<T, String> {
    if text.is_empty() || !text.bytes().all(|b| b.is_ascii_digit()) {
        return Err("is not a whole number".into());
    }
    let number = text.parse().ok().filter(|n| range.contains(n)).and_then(|n| T::try_from(n).ok());
    number.ok_or_else(|| format!("is not from {} to {}", range.start(), range.end()))
}

/// Seconds, fractions allowed.
pub(super) fn seconds(text: &str) -> Result<Duration, String> {
    let number = text.parse::<f64>().ok().filter(|n| n.is_finite()).ok_or("is not a number of seconds")?;
    if !(0.0..=MAX_SECONDS).contains(&number) {
        return Err("is not between 0 and a year".into());
    }
    Duration::try_from_secs_f64(number).map_err(|e| e.to_string())
}

/// Seconds where none would mean that nothing ever works. A millisecond is the timer's resolution.
pub(super) fn some_seconds(text: &str) -> Result<Duration, String> {
    match seconds(text)? {
        short if short < Duration::from_millis(1) => Err("is too short".into()),
        enough => Ok(enough),
    }
}

/// Whole hours, up to a year of them.
pub(super) fn hours(text: &str) -> Result<Duration, String> {
    whole(text, 0..=8_760).map(|hours: u64| Duration::from_secs(hours * 3600))
}

/// Bytes: a plain number, or one with a unit, `64KiB`, `10 MB`, `1.5GiB`. Binary units by 1024, decimal by 1000.
pub(super) fn size(text: &str) -> Result<u64, String> {
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let unit_bytes: u128 = match unit.trim_start().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "kb" => 1000,
        "mb" => 1000_u128.pow(2),
        "gb" => 1000_u128.pow(3),
        "tb" => 1000_u128.pow(4),
        "kib" => 1 << 10,
        "mib" => 1 << 20,
        "gib" => 1 << 30,
        "tib" => 1 << 40,
        _ => return Err("has no unit known here".into()),
    };
    let bytes = decimal_times(number, unit_bytes).ok_or("is not a size")?;
    // Lengths of files and database columns are signed.
    u64::try_from(bytes).ok().filter(|b| i64::try_from(*b).is_ok()).ok_or_else(|| "is too large".into())
}

/// `number` × `factor`, exactly, rounded down. None if `number` is not digits with at most nine after the point.
fn decimal_times(number: &str, factor: u128) -> Option<u128> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    if fraction.is_empty() || fraction.len() > 9 || whole.len() > 19 {
        return None;
    }
    let scale = 10_u128.pow(u32::try_from(fraction.len()).ok()?);
    let scaled = whole.parse::<u128>().ok()? * scale + fraction.parse::<u128>().ok()?;
    Some(scaled.checked_mul(factor)? / scale)
}

pub(super) fn some_size(text: &str) -> Result<u64, String> {
    match size(text)? {
        0 => Err("is nothing at all".into()),
        bytes => Ok(bytes),
    }
}

pub(super) fn address(text: &str) -> Result<IpAddr, String> {
    text.parse().map_err(|_| "is not an IP address".into())
}

/// A CIDR, or an address, which is a network of one.
pub(super) fn network(text: &str) -> Result<IpNet, String> {
    if let Ok(address) = text.parse::<IpAddr>() {
        return Ok(address.into());
    }
    let net: IpNet = text.parse().map_err(|_| "is not a network")?;
    match net.trunc() {
        trunc if trunc == net => Ok(net),
        // One address that was meant must not quietly become sixteen million.
        trunc => Err(format!("has address bits after its prefix (the network is {trunc})")),
    }
}

pub(super) fn path(text: &str) -> Result<PathBuf, String> {
    match text {
        "" => Err("is empty".into()),
        _ if text.contains('\0') => Err("has a NUL in it".into()),
        _ => Ok(text.into()),
    }
}

pub(super) fn user_agent(text: &str) -> Result<HeaderValue, String> {
    if text.trim().is_empty() {
        return Err("is empty".into());
    }
    HeaderValue::from_str(text).map_err(|_| "has characters that a header cannot carry".into())
}

pub(super) fn proxy(text: &str) -> Result<Url, String> {
    let url = Url::parse(text).map_err(|e| format!("is not a URL ({e})"))?;
    match &url {
        _ if url.scheme() != "http" => Err("is not an http:// URL".into()),
        // Passwords in a configuration end up in logs.
        _ if !url.username().is_empty() || url.password().is_some() => {
            Err("has a user or password in it".into())
        }
        _ if url.path() != "/" || url.query().is_some() || url.fragment().is_some() => {
            Err("has more than host and port".into())
        }
        _ => Ok(url),
    }
}

/// One of a closed set of words, in any case.
pub(super) fn word<T: Copy>(text: &str, words: &[(&str, T)]) -> Result<T, String> {
    let found = words.iter().find(|(word, _)| word.eq_ignore_ascii_case(text));
    found.map(|(_, value)| *value).ok_or_else(|| "is not one of the words known here".into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("0", 0),
            ("65536", 65_536),
            ("64KiB", 65_536),
            ("64 kib", 65_536),
            ("10MB", 10_000_000),
            ("1.5GiB", 1_610_612_736),
            ("0.1kB", 100),
            ("100GiB", 107_374_182_400),
            ("2TiB", 2_199_023_255_552),
            ("9223372036854775807", i64::MAX as u64),
        ] {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for (text, why) in [
            ("", "is not a size"),
            ("GiB", "is not a size"),
            ("1.2.3MB", "is not a size"),
            (".5MB", "is not a size"),
            ("5.MB", "is not a size"),
            ("-1", "has no unit known here"),
            ("10K", "has no unit known here"),
            ("10 parsecs", "has no unit known here"),
            ("9223372036854775808", "is too large"),
            ("9999999999999999999TiB", "is too large"),
        ] {
            assert_eq!(size(text), Err(why.to_owned()), "{text}");
        }
    }

    proptest! {
        #[test]
        fn a_size_is_its_number_times_its_unit(n in 0_u64..1 << 20, unit in 0_usize..5, space in any::<bool>()) {
            let name = ["B", "KiB", "MiB", "GiB", "TiB"][unit];
            let text = format!("{n}{}{name}", if space { " " } else { "" });
            prop_assert_eq!(size(&text), Ok(n << (10 * unit)));
            prop_assert_eq!(size(&text.to_lowercase()), size(&text));
        }

        #[test]
        fn no_text_makes_a_value_panic(text in "\\PC{0,40}") {
            let _ = (size(&text), seconds(&text), network(&text), proxy(&text), whole::<u16>(&text, 0..=65_535));
        }

        #[test]
        fn digits_and_points_never_panic(text in "[0-9.]{0,60}(KiB|TB|)") {
            if let Ok(bytes) = size(&text) {
                prop_assert!(i64::try_from(bytes).is_ok());
            }
        }
    }

    #[test]
    fn second_values() {
        assert_eq!(seconds("0.25"), Ok(Duration::from_millis(250)));
        assert_eq!(seconds("0"), Ok(Duration::ZERO));
        for bad in ["10s", "", "nan", "inf"] {
            assert_eq!(seconds(bad), Err("is not a number of seconds".into()), "{bad}");
        }
        assert_eq!(seconds("-1"), Err("is not between 0 and a year".into()));
        assert_eq!(seconds("1e300"), Err("is not between 0 and a year".into()));
        assert_eq!(some_seconds("0.0001"), Err("is too short".into()));
    }
}
