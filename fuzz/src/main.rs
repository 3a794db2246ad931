//! libFuzzer's entry: which target is in `FUZZ_TARGET`. Started by `fuzz/run`.
#![no_main]

use std::sync::LazyLock;

use artifact_cache::fuzz::{TARGETS, Target};

static CHOSEN: LazyLock<Target> = LazyLock::new(|| {
    let name = std::env::var("FUZZ_TARGET").unwrap_or_default();
    let known = TARGETS.map(|(name, _)| name);
    let found = TARGETS.iter().find(|(known, _)| *known == name);
    found.unwrap_or_else(|| panic!("FUZZ_TARGET={name:?}: it is one of {known:?}")).1
});

libfuzzer_sys::fuzz_target!(|data: &[u8]| CHOSEN(data));
