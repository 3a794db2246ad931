//! Patterns over the parts of a URL: which hosts may be asked, and which query parameters are only signatures.

use std::net::Ipv6Addr;

use globset::{GlobBuilder, GlobMatcher};

/// One compiled pattern. `*` matches any characters, dots and slashes too; case never matters.
#[derive(Clone, Debug)]
struct Pattern {
    text: String,
    matcher: GlobMatcher,
}

impl Pattern {
    fn new(text: &str) -> Result<Pattern, String> {
        if text.is_empty() || text.contains(char::is_whitespace) {
            return Err("is empty or has a space in it".into());
        }
        let glob = GlobBuilder::new(text).case_insensitive(true).backslash_escape(true).build();
        let glob = glob.map_err(|e| format!("is not a pattern ({})", e.kind()))?;
        Ok(Pattern { text: text.to_owned(), matcher: glob.compile_matcher() })
    }

    fn is_match(&self, text: &str) -> bool {
        self.matcher.is_match(text)
    }
}

impl PartialEq for Pattern {
    fn eq(&self, other: &Pattern) -> bool {
        self.text == other.text
    }
}

/// A list of host patterns such as `*.example.com`. Case does not matter, and `*` may span dots.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HostGlobs(Vec<Pattern>);

impl HostGlobs {
    /// Compiles patterns; the error is the first bad one's place in the list and what is wrong with it.
    pub fn new<S: AsRef<str>>(patterns: &[S]) -> Result<HostGlobs, (usize, String)> {
        let compiled =
            patterns.iter().enumerate().map(|(at, p)| host_pattern(p.as_ref()).map_err(|e| (at, e)));
        compiled.collect::<Result<_, _>>().map(HostGlobs)
    }

    /// Whether there is no pattern at all.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether any pattern matches `host`: a name, or an address with or without URL brackets.
    pub fn is_match(&self, host: &str) -> bool {
        let host = unbracketed(host);
        let host = host.strip_suffix('.').unwrap_or(host);
        self.0.iter().any(|pattern| pattern.is_match(host))
    }
}

/// Refuses what could never match a host, since a deny list that silently matches nothing is a hole.
fn host_pattern(text: &str) -> Result<Pattern, String> {
    // Brackets are a character class in a pattern, but around an IPv6 address they are the URL's spelling.
    if let Ok(address) = unbracketed(text).parse::<Ipv6Addr>() {
        return Pattern::new(&address.to_string());
    }
    match text {
        _ if text.contains("://") || text.contains('/') => Err("is a URL or a path, not a host".into()),
        _ if text.contains(':') => Err("has a port, but only hosts are compared".into()),
        _ if !text.is_ascii() => Err("is not ASCII; such a host is compared in its xn-- form".into()),
        _ => Pattern::new(text.strip_suffix('.').unwrap_or(text)),
    }
}

fn unbracketed(host: &str) -> &str {
    host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host)
}

/// Which query parameters go upstream but are no part of what a URL names.
///
/// An entry is `NAME`, or `NAME if OTHER and OTHER …`: then it counts only in a query that has all the others.
/// Every word is a pattern, so `{a,b}` means either. Two URLs wrongly held for one would serve wrong content, while
/// two wrongly held apart cost a download: so ambiguous names should always carry a condition.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct QueryGlobs(Vec<Rule>);

#[derive(Clone, Debug, PartialEq)]
struct Rule {
    name: Pattern,
    with: Vec<Pattern>,
}

impl Rule {
    fn parse(text: &str) -> Result<Rule, String> {
        let words: Vec<&str> = text.split_whitespace().collect();
        let malformed = || "is neither a name nor \"NAME if OTHER and OTHER\"".to_owned();
        let (name, rest) = words.split_first().ok_or_else(malformed)?;
        // `if` stands before the first condition and `and` before each further one.
        let pairs = rest.chunks(2).enumerate().map(|(at, pair)| match (at, pair) {
            (0, ["if", other]) => Pattern::new(other),
            (1.., ["and", other]) => Pattern::new(other),
            _ => Err(malformed()),
        });
        Ok(Rule { name: Pattern::new(name)?, with: pairs.collect::<Result<_, _>>()? })
    }
}

impl QueryGlobs {
    /// Compiles entries; the error is the first bad one's place in the list and what is wrong with it.
    pub fn new<S: AsRef<str>>(entries: &[S]) -> Result<QueryGlobs, (usize, String)> {
        let rules = entries.iter().enumerate().map(|(at, e)| Rule::parse(e.as_ref()).map_err(|e| (at, e)));
        rules.collect::<Result<_, _>>().map(QueryGlobs)
    }

    /// Whether a parameter of this name is ignored in a query that has no other.
    pub fn is_match(&self, name: &str) -> bool {
        self.ignored(&[name]) == [true]
    }

    /// For each of a query's parameter names (percent-decoded, in any order), whether it is ignored.
    pub fn ignored(&self, names: &[&str]) -> Vec<bool> {
        let present = |pattern: &Pattern| names.iter().any(|name| pattern.is_match(name));
        let active: Vec<&Rule> = self.0.iter().filter(|rule| rule.with.iter().all(present)).collect();
        names.iter().map(|name| active.iter().any(|rule| rule.name.is_match(name))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    #[test]
    fn hosts_match_over_dots_in_any_case() {
        let globs = HostGlobs::new(&["*.Example.com", "[2001:DB8::1]", "10.0.0.*"]).unwrap();
        for host in
            ["a.example.com", "A.B.EXAMPLE.COM", "a.example.com.", "[2001:db8::1]", "2001:db8::1", "10.0.0.7"]
        {
            assert!(globs.is_match(host), "{host}");
        }
        for host in ["example.com", "a.example.com.evil.org", "2001:db8::2", "10.0.1.7"] {
            assert!(!globs.is_match(host), "{host}");
        }
        assert!(!globs.is_empty());
        assert!(HostGlobs::default().is_empty() && !HostGlobs::default().is_match("a"));
    }

    #[test]
    fn patterns_that_could_never_match_a_host_are_refused() {
        for (bad, why) in [
            ("https://a.org", "is a URL or a path, not a host"),
            ("a.org/x", "is a URL or a path, not a host"),
            ("a.org:8080", "has a port, but only hosts are compared"),
            ("*.münchen.de", "is not ASCII; such a host is compared in its xn-- form"),
            ("", "is empty or has a space in it"),
            ("a b", "is empty or has a space in it"),
        ] {
            assert_eq!(HostGlobs::new(&["fine", bad]), Err((1, why.to_owned())), "{bad}");
        }
        assert!(HostGlobs::new(&["a[b"]).unwrap_err().1.starts_with("is not a pattern ("));
    }

    #[test]
    fn a_condition_needs_all_its_names() {
        let globs = QueryGlobs::new(&["x-*", "st if sig and {sv,sw}"]).unwrap();
        assert_eq!(globs.ignored(&["X-A", "st", "sig", "SW"]), [true, true, false, false]);
        assert_eq!(globs.ignored(&["st", "sig"]), [false, false]);
        assert_eq!(globs.ignored(&["st", "sv"]), [false, false]);
        assert!(globs.is_match("x-a") && !globs.is_match("st"));
        assert_eq!(globs.ignored(&[]), [false; 0]);
    }

    #[test]
    fn malformed_conditions_are_refused() {
        for bad in ["", "a if", "a and b", "a if b and", "a if b if c", "a b"] {
            assert!(QueryGlobs::new(&[bad]).is_err(), "{bad:?}");
        }
    }

    fn left_of(query: &[&str]) -> Vec<String> {
        let ignored = Config::default().fetch.ignore_query.ignored(query);
        query.iter().zip(ignored).filter(|(_, ignored)| !ignored).map(|(n, _)| n.to_string()).collect()
    }

    #[test]
    fn default_ignores_whole_signatures() {
        for signed in [
            &[
                "X-Amz-Algorithm",
                "X-Amz-Credential",
                "X-Amz-Signature",
                "x-id",
                "response-content-disposition",
            ][..],
            &["X-Goog-Algorithm", "X-Goog-Signature", "response-content-type"],
            &["AWSAccessKeyId", "Expires", "Signature", "response-content-type"],
            &["GoogleAccessId", "Expires", "Signature"],
            &["OSSAccessKeyId", "Expires", "Signature", "security-token"],
            &[
                "x-oss-signature-version",
                "x-oss-credential",
                "x-oss-date",
                "x-oss-expires",
                "x-oss-signature",
            ],
            &["Policy", "Signature", "Key-Pair-Id"],
            &["Expires", "Signature", "Key-Pair-Id", "Hash-Algorithm"],
            &[
                "sp", "sv", "se", "sr", "sig", "rscd", "rsct", "skoid", "sktid", "skt", "ske", "sks", "skv",
                "jwt",
            ],
            &["sv", "ss", "srt", "sp", "st", "se", "sip", "spr", "sig", "response-content-disposition"],
        ] {
            assert_eq!(left_of(signed), [""; 0], "{signed:?}");
        }
    }

    #[test]
    fn default_keeps_what_may_name_content() {
        for plain in [
            &["sv"][..],
            &["sig"],
            &["st", "sp", "sr", "ss", "se", "sig"],
            &["Signature"],
            &["Expires", "Signature"],
            &["Policy", "version"],
            &["response-content-type", "file"],
            &["versionId", "generation", "snapshot", "x-oss-process"],
        ] {
            assert_eq!(left_of(plain), plain, "{plain:?}");
        }
        assert_eq!(left_of(&["X-Amz-Signature", "versionId"]), ["versionId"]);
        assert_eq!(left_of(&["sig", "sv", "snapshot"]), ["snapshot"]);
        assert_eq!(left_of(&["x-oss-signature", "x-oss-process"]), ["x-oss-process"]);
    }
}
