//! The fuzz targets as property tests: every file of the corpus, and what becomes of it when it is changed at random.
//!
//! `fuzz/run TARGET SECONDS` lets a fuzzer search in the same functions, led by what it reaches of the code. What it finds
//! goes into `fuzz/corpus/TARGET` when it is mended, and from then on is tried here.

use std::path::PathBuf;

use artifact_cache::fuzz::{TARGETS, Target};
use proptest::collection::vec;
use proptest::prelude::*;

/// What the parsers look for; most random bytes never get past the first of it.
const WORDS: [&str; 48] = [
    "/fetch",
    "/fetch/",
    "url=",
    "sha256=",
    "https://",
    "http:/",
    "&",
    "?",
    "#",
    "%2F",
    "%00",
    "%",
    "+",
    "@",
    ":",
    "..",
    "//",
    "\\",
    "[::1]",
    "é",
    "\u{202e}",
    "bytes=",
    "-",
    ",",
    "0",
    "18446744073709551615",
    "\"",
    "\"a\"",
    "W/",
    "*",
    ";",
    "filename=",
    "filename*=",
    "UTF-8''",
    "'",
    "\r\n",
    "\n",
    "\0",
    ": ",
    "  ",
    "[",
    "]",
    "{",
    "}",
    "null",
    "server:",
    "ARTIFACT_CACHE__",
    "bytes 1-999/1000",
];

fn directory(target: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target)
}

fn corpus(target: &str) -> Vec<Vec<u8>> {
    let entries = std::fs::read_dir(directory(target)).unwrap_or_else(|error| panic!("{target}: {error}"));
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files.iter().map(|file| std::fs::read(file).unwrap()).collect()
}

/// One change; places are parts of the length in 65,536ths, so that they fit whatever they are applied to.
#[derive(Debug, Clone)]
enum Change {
    Put(u16, Vec<u8>),
    Overwrite(u16, u8),
    Remove(u16, u16),
    Repeat(u16, u16),
    Splice(u16, usize, u16),
}

fn change() -> impl Strategy<Value = Change> {
    let word = prop::sample::select(&WORDS[..]).prop_map(|word| word.as_bytes().to_vec());
    let bytes = prop_oneof![3 => word, 1 => vec(any::<u8>(), 1..4)];
    prop_oneof![
        3 => (any::<u16>(), bytes).prop_map(|(at, bytes)| Change::Put(at, bytes)),
        2 => any::<(u16, u8)>().prop_map(|(at, byte)| Change::Overwrite(at, byte)),
        2 => (any::<u16>(), 1..16u16).prop_map(|(at, length)| Change::Remove(at, length)),
        1 => (any::<u16>(), 1..16u16).prop_map(|(at, length)| Change::Repeat(at, length)),
        1 => any::<(u16, usize, u16)>().prop_map(|(at, other, from)| Change::Splice(at, other, from)),
    ]
}

fn apply(mut bytes: Vec<u8>, change: &Change, corpus: &[Vec<u8>]) -> Vec<u8> {
    let place = |at: u16, length: usize| usize::from(at) * (length + 1) / 65_536;
    match change {
        Change::Put(at, new) => {
            let at = place(*at, bytes.len());
            bytes.splice(at..at, new.iter().copied());
        }
        Change::Overwrite(at, byte) => {
            let at = place(*at, bytes.len());
            bytes.splice(at..(at + 1).min(bytes.len()), [*byte]);
        }
        Change::Remove(at, length) => {
            let at = place(*at, bytes.len());
            bytes.drain(at..(at + usize::from(*length)).min(bytes.len()));
        }
        Change::Repeat(at, length) => {
            let at = place(*at, bytes.len());
            let part = bytes[at..(at + usize::from(*length)).min(bytes.len())].to_vec();
            bytes.splice(at..at, part);
        }
        Change::Splice(at, other, from) => {
            let other = &corpus[other % corpus.len()];
            bytes.truncate(place(*at, bytes.len()));
            bytes.extend_from_slice(&other[place(*from, other.len())..]);
        }
    }
    bytes
}

fn try_target(name: &str, cases: u32) {
    let (_, target) = *TARGETS.iter().find(|(known, _)| *known == name).expect("it is a target");
    try_promise(name, cases, target);
}

/// The corpus as it is, then `cases` others: nine in ten are changed ones, the rest are random bytes.
fn try_promise(name: &str, cases: u32, target: Target) {
    let corpus = corpus(name);
    assert!(corpus.len() > 5, "the corpus of {name} is there");
    corpus.iter().for_each(|bytes| target(bytes));
    let config = ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() };
    let mut runner = proptest::test_runner::TestRunner::new(config);
    let changed = (0..corpus.len(), vec(change(), 1..6)).prop_map(|(seed, changes)| {
        changes.iter().fold(corpus[seed].clone(), |bytes, change| apply(bytes, change, &corpus))
    });
    let any_bytes = vec(any::<u8>(), 0..120);
    let outcome = runner.run(&prop_oneof![9 => changed, 1 => any_bytes], |bytes| {
        target(&bytes);
        Ok(())
    });
    outcome.unwrap_or_else(|error| panic!("{name}: {error}"));
}

#[test]
fn request_target() {
    try_target("request_target", 20_000);
}

#[test]
fn range() {
    try_target("range", 20_000);
}

#[test]
fn config() {
    try_target("config", 10_000);
}

#[test]
fn media() {
    try_target("media", 20_000);
}

#[test]
fn upstream() {
    try_target("upstream", 20_000);
}

/// A promise that only a changed input breaks.
#[test]
#[should_panic(expected = "twice")]
fn a_broken_promise_is_found() {
    try_promise("request_target", 20_000, |data| {
        let times = data.windows(7).filter(|part| part == b"sha256=").count();
        assert!(times < 2, "twice");
    });
}

/// A target that nobody tries here, or a directory that no target has.
#[test]
fn every_target_has_its_corpus_and_its_test() {
    let mut known: Vec<String> = TARGETS.iter().map(|(name, _)| name.to_string()).collect();
    known.sort();
    let entries = std::fs::read_dir(directory("")).unwrap();
    let mut found: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    found.sort();
    assert_eq!(found, known);
    let text = include_str!("fuzz.rs");
    assert!(known.iter().all(|name| text.contains(&format!("fn {name}()"))), "{known:?}");
}
