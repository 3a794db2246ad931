//! The URL of an artifact: checked, in its canonical form (the cache key), and fit to be logged.

use std::{borrow::Cow, fmt, sync::Arc};

use percent_encoding::percent_decode_str;
use url::Url;

use super::globs::QueryGlobs;

/// The longest URL that is taken, in bytes, as sent and in canonical form.
pub const MAX_URL_BYTES: usize = 8 * 1024;

/// A checked absolute http or https URL. Cheap to clone.
///
/// Its debug form is [`masked`](SourceUrl::masked), so that no log shows a secret by accident.
#[derive(Clone)]
pub struct SourceUrl(Arc<Forms>);

struct Forms {
    key: String,
    upstream: Url,
}

/// What is wrong with a URL, and the cure.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct InvalidUrl(pub String);

impl SourceUrl {
    /// Checks `raw`, the percent-decoded value of `url` or the text of the path form. Query parameters that
    /// `ignore` names go upstream but are no part of the key.
    ///
    /// # Errors
    /// Whatever is not an absolute http(s) URL without credentials, or is longer than [`MAX_URL_BYTES`].
    pub fn parse(raw: &str, ignore: &QueryGlobs) -> Result<SourceUrl, InvalidUrl> {
        refuse_bad_text(raw)?;
        refuse_bad_authority(raw)?;
        let mut upstream =
            Url::parse(raw).map_err(|error| InvalidUrl(format!("the URL cannot be parsed: {error}")))?;
        upstream.set_fragment(None);
        drop_trailing_dot(&mut upstream)?;
        if upstream.port() == Some(0) {
            return Err(invalid("port 0 cannot be connected to; leave the port out or give the right one"));
        }
        // Percent-encoding may have made it longer, and a key must itself be a URL that is taken.
        refuse_too_long(upstream.as_str())?;
        let key = without_ignored(&upstream, ignore);
        Ok(SourceUrl(Arc::new(Forms { key, upstream })))
    }

    /// The canonical form, under which the artifact is stored and shown.
    pub fn key(&self) -> &str {
        &self.0.key
    }

    /// What is sent upstream: the canonical form with the ignored parameters still in.
    pub fn upstream(&self) -> &Url {
        &self.0.upstream
    }

    /// The key for logs: values of parameters that look like secrets are `***`.
    pub fn masked(&self) -> Cow<'_, str> {
        mask(&self.0.key)
    }

    /// The last segment of the path, percent-decoded, if it is not empty. It may hold any character.
    pub fn last_segment(&self) -> Option<String> {
        let segment = self.0.upstream.path_segments()?.next_back()?;
        (!segment.is_empty()).then(|| percent_decode_str(segment).decode_utf8_lossy().into_owned())
    }
}

impl fmt::Debug for SourceUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SourceUrl({})", self.masked())
    }
}

fn invalid(text: &str) -> InvalidUrl {
    InvalidUrl(text.to_owned())
}

fn refuse_too_long(text: &str) -> Result<(), InvalidUrl> {
    if text.len() <= MAX_URL_BYTES {
        return Ok(());
    }
    Err(InvalidUrl(format!("the URL is longer than {MAX_URL_BYTES} bytes; use a shorter one")))
}

/// Refuses what a URL parser would silently strip or turn into something else.
fn refuse_bad_text(raw: &str) -> Result<(), InvalidUrl> {
    if raw.is_empty() {
        return Err(invalid("the URL is empty; give an absolute one such as https://example.com/file"));
    }
    refuse_too_long(raw)?;
    match raw.chars().find(|&c| c == ' ' || c == '\\' || c.is_control()) {
        None => Ok(()),
        Some(' ') => Err(invalid("the URL contains a space; write %20 (in a query parameter, %2520)")),
        Some('\\') => Err(invalid("the URL contains a backslash; write / or %5C")),
        Some(c) => Err(InvalidUrl(format!(
            "the URL contains the control character U+{:04X}; remove it or percent-encode it",
            u32::from(c)
        ))),
    }
}

/// Judges scheme, credentials and host on the text itself, as parsers forgive missing and extra slashes.
fn refuse_bad_authority(raw: &str) -> Result<(), InvalidUrl> {
    const CURE: &str = "give an absolute one such as https://example.com/file";
    let Some((scheme, rest)) = raw.split_once(':') else {
        return Err(InvalidUrl(format!("the URL has no scheme; {CURE}")));
    };
    if !["http", "https"].iter().any(|known| scheme.eq_ignore_ascii_case(known)) {
        return Err(invalid("the URL's scheme is not supported; use http:// or https://"));
    }
    let Some(rest) = rest.strip_prefix("//") else {
        return Err(InvalidUrl(format!("the URL is not absolute; {CURE}")));
    };
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    if authority.contains('@') {
        return Err(invalid(
            "the URL contains a user or password; only public artifacts are cached, so leave it out",
        ));
    }
    if authority.is_empty() || authority.starts_with(':') {
        return Err(InvalidUrl(format!("the URL has no host; {CURE}")));
    }
    Ok(())
}

fn drop_trailing_dot(url: &mut Url) -> Result<(), InvalidUrl> {
    let Some(host) = url.domain() else { return Ok(()) };
    let bare = host.strip_suffix('.').unwrap_or(host);
    if bare.split('.').any(str::is_empty) {
        return Err(invalid("the URL's host has an empty label; write it as in example.com"));
    }
    if bare.len() == host.len() {
        return Ok(());
    }
    let bare = bare.to_owned();
    url.set_host(Some(&bare)).map_err(|error| InvalidUrl(format!("the URL's host is not valid: {error}")))
}

fn without_ignored(url: &Url, ignore: &QueryGlobs) -> String {
    let Some(query) = url.query() else { return url.as_str().to_owned() };
    let pieces: Vec<&str> = query.split('&').collect();
    let names: Vec<Cow<'_, str>> = pieces.iter().map(|piece| parameter_name(piece)).collect();
    let ignored = ignore.ignored(&names.iter().map(AsRef::as_ref).collect::<Vec<_>>());
    if !ignored.contains(&true) {
        return url.as_str().to_owned();
    }
    let kept: Vec<&str> =
        pieces.iter().zip(ignored).filter(|(_, gone)| !gone).map(|(piece, _)| *piece).collect();
    let mut key = url.clone();
    key.set_query(kept.iter().any(|piece| !piece.is_empty()).then(|| kept.join("&")).as_deref());
    key.into()
}

fn parameter_name(piece: &str) -> Cow<'_, str> {
    let name = piece.split('=').next().unwrap_or_default();
    percent_decode_str(name).decode_utf8_lossy()
}

fn mask(key: &str) -> Cow<'_, str> {
    let Some((base, query)) = key.split_once('?') else { return Cow::Borrowed(key) };
    let mut masked = format!("{base}?");
    let mut found = false;
    // Old servers separate by semicolon too; for a log one mask too many does no harm.
    for piece in query.split_inclusive(['&', ';']) {
        let (text, separator) = piece.split_at(piece.trim_end_matches(['&', ';']).len());
        match text.split_once('=') {
            Some((name, _)) if looks_secret(&parameter_name(name)) => {
                found = true;
                masked.extend([name, "=***"]);
            }
            _ => masked.push_str(text),
        }
        masked.push_str(separator);
    }
    if found { Cow::Owned(masked) } else { Cow::Borrowed(key) }
}

/// Long words count anywhere in the name, short ones only as a whole word or at its end (`keyboard` is none).
fn looks_secret(name: &str) -> bool {
    const ANYWHERE: [&str; 6] = ["token", "signature", "secret", "passw", "credential", "apikey"];
    const WORDS: [&str; 7] = ["sig", "key", "auth", "authorization", "pwd", "pass", "jwt"];
    let name = name.to_ascii_lowercase();
    ANYWHERE.iter().any(|word| name.contains(word))
        || WORDS.iter().any(|word| name.ends_with(word))
        || name.split(|c: char| !c.is_ascii_alphanumeric()).any(|part| WORDS.contains(&part))
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use proptest::prelude::*;

    use super::*;
    use crate::config::Config;

    static CONFIG: LazyLock<Config> = LazyLock::new(|| {
        let globs = "X-Amz-*,sig,sv if sig".to_owned();
        Config::load(None, [("ARTIFACT_CACHE__FETCH__IGNORE_QUERY".to_owned(), globs)]).unwrap()
    });

    fn parse(raw: &str) -> Result<SourceUrl, InvalidUrl> {
        SourceUrl::parse(raw, &CONFIG.fetch.ignore_query)
    }

    fn good(raw: &str) -> SourceUrl {
        parse(raw).unwrap_or_else(|error| panic!("{raw}: {error}"))
    }

    #[test]
    fn spellings_of_one_url_have_one_key() {
        for (raw, key) in [
            ("https://example.com", "https://example.com/"),
            ("HTTPS://EXAMPLE.com:443/A", "https://example.com/A"),
            ("http://example.com:80/a", "http://example.com/a"),
            ("http://example.com:443/a", "http://example.com:443/a"),
            ("http://example.com:/a", "http://example.com/a"),
            ("http://example.com./a", "http://example.com/a"),
            ("http://example%2ecom/a", "http://example.com/a"),
            ("http://example.com/a#part", "http://example.com/a"),
            ("http://example.com/a/../b", "http://example.com/b"),
            ("http://bücher.example/", "http://xn--bcher-kva.example/"),
            ("http://example.com/jdk+7.tar", "http://example.com/jdk+7.tar"),
            ("http://example.com/a@b", "http://example.com/a@b"),
            ("http://0x7f.1/", "http://127.0.0.1/"),
            ("http://[0:0:0:0:0:0:0:1]/", "http://[::1]/"),
        ] {
            assert_eq!(good(raw).key(), key, "{raw}");
        }
    }

    #[test]
    fn bad_urls_are_refused_with_a_cure() {
        let long = format!("http://h/{}", "a".repeat(MAX_URL_BYTES));
        let grows = format!("http://h/{}", "é".repeat(MAX_URL_BYTES / 3));
        for (raw, why) in [
            ("", "empty"),
            ("http://h/a b", "space"),
            (" http://h/", "space"),
            ("http://h/a\tb", "U+0009"),
            ("ht\ntp://h/", "U+000A"),
            ("http://h/\r", "U+000D"),
            ("http://h/\0", "U+0000"),
            ("http://h/\u{7f}", "U+007F"),
            ("http://h/\u{85}", "U+0085"),
            ("http:\\\\h\\", "backslash"),
            ("http://h\\@evil/", "backslash"),
            ("h", "no scheme"),
            ("//h/a", "no scheme"),
            ("ftp://h/", "scheme is not supported"),
            ("file:///etc/passwd", "scheme is not supported"),
            ("localhost:80/a", "scheme is not supported"),
            ("http:foo", "not absolute"),
            ("http:/host/a", "not absolute"),
            ("http:///host/a", "no host"),
            ("http://", "no host"),
            ("http://?a", "no host"),
            ("http://:80/", "no host"),
            ("http://./", "empty label"),
            ("http://a..b/", "empty label"),
            ("http://a../", "empty label"),
            ("http://u@h/", "user or password"),
            ("http://u:p@h/", "user or password"),
            ("http://@h/", "user or password"),
            ("http://h:0/", "port 0"),
            ("http://h:65536/", "cannot be parsed"),
            ("http://1.2.3.4.5/", "cannot be parsed"),
            ("http://[::1/", "cannot be parsed"),
            ("http://h%00/", "cannot be parsed"),
            (&long, "longer than 8192"),
            (&grows, "longer than 8192"),
        ] {
            let error = parse(raw).expect_err(raw).to_string();
            assert!(error.contains(why), "{raw:?}: {error}");
        }
    }

    #[test]
    fn ignored_parameters_go_upstream_only() {
        for (query, kept) in [
            ("?a=1&X-Amz-Date=2&b=3", "?a=1&b=3"),
            ("?x-amz-date=2", ""),
            ("?X%2DAmz-Date=2", ""),
            ("?&sig=2", ""),
            ("?sv=1&sig=2&c", "?c"),
            ("?sv=1", "?sv=1"),
            ("?", "?"),
            ("?b=%2f+&&a='", "?b=%2f+&&a=%27"),
        ] {
            let url = good(&format!("http://h/p{query}#f"));
            assert_eq!(url.key(), format!("http://h/p{kept}"), "{query}");
            assert_eq!(url.upstream().as_str(), format!("http://h/p{query}").replace('\'', "%27"));
        }
    }

    #[test]
    fn secrets_are_masked() {
        for (query, masked) in [
            ("token=abc", "token=***"),
            ("a=1&X-Token=s&b=2", "a=1&X-Token=***&b=2"),
            ("apiKey=s", "apiKey=***"),
            ("api_key=s", "api_key=***"),
            ("key=s=t", "key=***"),
            ("access%5Ftoken=s", "access%5Ftoken=***"),
            ("Signature=s;PASSWORD=t", "Signature=***;PASSWORD=***"),
            (
                "passwd=s&auth=t&credential=u&client_secret=v",
                "passwd=***&auth=***&credential=***&client_secret=***",
            ),
            ("Key-Pair-Id=s", "Key-Pair-Id=***"),
            ("keyboard=us&author=x&design=y&page=2", "keyboard=us&author=x&design=y&page=2"),
            ("token", "token"),
        ] {
            let url = good(&format!("http://h/token=1?{query}"));
            assert_eq!(url.masked(), format!("http://h/token=1?{masked}"));
            assert_eq!(format!("{url:?}"), format!("SourceUrl({})", url.masked()));
        }
    }

    #[test]
    fn last_segment_is_decoded() {
        let last = |raw| good(raw).last_segment();
        assert_eq!(last("http://h/a/b%20c.tar?x=/y").as_deref(), Some("b c.tar"));
        assert_eq!(last("http://h/a%2fb").as_deref(), Some("a/b"));
        assert_eq!(last("http://h/a/"), None);
        assert_eq!(last("http://h"), None);
    }

    fn urlish() -> impl Strategy<Value = String> {
        let host = prop_oneof!["[a-zA-Z0-9.%:\\[\\]①é。-]{1,12}", "[a-z]{1,6}\\.example\\.?"];
        let rest = "[a-zA-Z0-9/.%?&=+#;:@'é\"<>|{}^~-]{0,40}";
        let query = "((X-Amz-a|sig|sv|b|token|)(=[a-z%&;+]{0,4})?&?){0,5}";
        ("(http|https|HTTP)", host, rest, query)
            .prop_map(|(scheme, host, rest, query)| format!("{scheme}://{host}/{rest}?{query}"))
    }

    proptest! {
        #[test]
        fn any_text_is_judged_without_a_panic(text: String, url in urlish()) {
            let _ = parse(&text).map(|url| url.masked().len());
            let _ = parse(&format!("http://{text}")).map(|url| url.last_segment());
            let _ = parse(&url);
        }

        #[test]
        fn the_key_of_a_key_is_itself(raw in urlish()) {
            if let Ok(url) = parse(&raw) {
                let again = good(url.key());
                prop_assert_eq!(again.key(), url.key());
                prop_assert!(!url.key().contains('#') && url.key().is_ascii());
            }
        }

        #[test]
        fn a_masked_secret_is_gone(value in "[G-Z]{4,20}") {
            let url = good(&format!("http://h/?a=1&my_token={value}&b=2"));
            prop_assert!(!url.masked().contains(&value));
        }
    }
}
