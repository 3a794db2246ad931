//! SHA-256 digests: the name of every content the cache holds, and the running hash that makes one.

use std::{fmt, ops::Deref, str::FromStr};

use serde::{Serialize, Serializer};
use sha2::{Digest as _, Sha256};

/// The SHA-256 of some content; shown as 64 lower-case hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest([u8; 32]);

/// Why a text is not a [`Digest`]; its display says what would be one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a SHA-256 checksum: exactly 64 hexadecimal digits are needed")]
pub struct InvalidDigest;

impl Digest {
    /// Reads a checksum as clients send it: 64 hex digits in either case, `sha256:` in front allowed.
    ///
    /// # Errors
    /// Anything else, the empty text among it.
    pub fn parse_param(text: &str) -> Result<Digest, InvalidDigest> {
        text.strip_prefix("sha256:").unwrap_or(text).parse()
    }

    /// The 32 bytes of the digest.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The 64 lower-case hex digits, without an allocation.
    pub fn hex(&self) -> HexDigest {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let mut text = [0; 64];
        for (pair, byte) in text.chunks_exact_mut(2).zip(self.0) {
            pair[0] = DIGITS[usize::from(byte >> 4)];
            pair[1] = DIGITS[usize::from(byte & 15)];
        }
        HexDigest(text)
    }
}

impl From<[u8; 32]> for Digest {
    fn from(bytes: [u8; 32]) -> Digest {
        Digest(bytes)
    }
}

impl FromStr for Digest {
    type Err = InvalidDigest;

    fn from_str(text: &str) -> Result<Digest, InvalidDigest> {
        let text: &[u8; 64] = text.as_bytes().try_into().map_err(|_| InvalidDigest)?;
        let mut bytes = [0; 32];
        for (byte, pair) in bytes.iter_mut().zip(text.chunks_exact(2)) {
            *byte = nibble(pair[0])? << 4 | nibble(pair[1])?;
        }
        Ok(Digest(bytes))
    }
}

fn nibble(digit: u8) -> Result<u8, InvalidDigest> {
    match digit {
        b'0'..=b'9' => Ok(digit - b'0'),
        b'a'..=b'f' => Ok(digit - b'a' + 10),
        b'A'..=b'F' => Ok(digit - b'A' + 10),
        _ => Err(InvalidDigest),
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.hex())
    }
}

/// The hex digits of a [`Digest`], on the stack; use it as a `&str`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct HexDigest([u8; 64]);

impl Deref for HexDigest {
    type Target = str;

    fn deref(&self) -> &str {
        // Cannot fail: only `Digest::hex` builds one, out of ASCII digits.
        std::str::from_utf8(&self.0).expect("hex digits are ASCII")
    }
}

impl AsRef<str> for HexDigest {
    fn as_ref(&self) -> &str {
        self
    }
}

impl fmt::Display for HexDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self)
    }
}

impl fmt::Debug for HexDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self)
    }
}

/// A SHA-256 that is still being computed. A clone goes its own way, so a prefix can be hashed in passing.
#[derive(Clone, Debug, Default)]
pub struct Hasher(Sha256);

impl Hasher {
    /// A hash of nothing yet.
    pub fn new() -> Hasher {
        Hasher::default()
    }

    /// Takes in the next bytes of the content.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The digest of all that was taken in.
    pub fn finish(self) -> Digest {
        Digest(self.0.finalize().into())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ABC: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    fn hash(bytes: &[u8]) -> Digest {
        let mut hasher = Hasher::new();
        hasher.update(bytes);
        hasher.finish()
    }

    #[test]
    fn known_answers() {
        assert_eq!(hash(b"abc").to_string(), ABC);
        assert_eq!(hash(b"").to_string(), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    }

    #[test]
    fn either_case_and_prefix_are_read() {
        let abc = hash(b"abc");
        assert_eq!(ABC.to_uppercase().parse(), Ok(abc));
        assert_eq!(Digest::parse_param(ABC), Ok(abc));
        assert_eq!(Digest::parse_param(&format!("sha256:{ABC}")), Ok(abc));
        assert_eq!(format!("sha256:{ABC}").parse::<Digest>(), Err(InvalidDigest));
    }

    #[test]
    fn other_texts_are_refused() {
        let wide = "é".repeat(32);
        let long = format!("{ABC}0");
        let twice = format!("sha256:sha256:{ABC}");
        let sign = format!("+{}", &ABC[1..]);
        let space = format!(" {}", &ABC[1..]);
        let other = format!("{}g", &ABC[1..]);
        for text in ["", "sha256:", "abc", &ABC[1..], &long, &twice, &wide, &sign, &space, &other] {
            assert_eq!(Digest::parse_param(text), Err(InvalidDigest), "{text}");
        }
    }

    #[test]
    fn a_clone_of_the_hasher_goes_its_own_way() {
        let mut hasher = Hasher::new();
        hasher.update(b"ab");
        let prefix = hasher.clone().finish();
        hasher.update(b"c");
        assert_eq!(prefix, hash(b"ab"));
        assert_eq!(hasher.finish(), hash(b"abc"));
    }

    proptest! {
        #[test]
        fn text_and_json_round_trip(bytes: [u8; 32]) {
            let digest = Digest::from(bytes);
            prop_assert_eq!(digest.as_bytes(), &bytes);
            prop_assert_eq!(digest.hex().parse::<Digest>(), Ok(digest));
            prop_assert_eq!(format!("{digest:?}"), digest.to_string());
            prop_assert_eq!(serde_json::to_string(&digest).unwrap(), format!("\"{digest}\""));
        }

        #[test]
        fn any_text_is_read_or_refused(text: String) {
            prop_assert_eq!(text.parse::<Digest>().is_ok(),
                text.len() == 64 && text.bytes().all(|b| b.is_ascii_hexdigit()));
        }

        #[test]
        fn order_is_that_of_the_text(a: [u8; 32], b: [u8; 32]) {
            let (a, b) = (Digest::from(a), Digest::from(b));
            prop_assert_eq!(a.cmp(&b), a.to_string().cmp(&b.to_string()));
        }
    }
}
