//! Python's requests: the newest, and the one that Debian ships.
//!
//! Debian 12's takes a short body for whole, whatever `Content-Length` says. It does notice a reset, and chunks without
//! the last one; so it is fooled behind a proxy that turns the first into a plain end and is not sent the second.

use std::path::{Path, PathBuf};

use crate::harness::skip;
use crate::support::{Ended, Stage, arg, find, need, need_in_venv, test_name};

/// Runs `fetch.py`; its way, URL, file.
pub fn fetch_py(stage: &Stage, python: &Path, way: &str, url: &str, file: &Path) -> Ended {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/clients/fetch.py");
    stage.run(python, &[script, way, url, arg(file)])
}

/// The Python of the environment that `install` makes, with the newest requests.
fn newest() -> Option<PathBuf> {
    need_in_venv("python")
}

/// Debian's own Python, if it has Debian's own requests.
fn debians() -> Option<PathBuf> {
    let python = need("/usr/bin/python3")?;
    let module = find("/usr/lib/python3/dist-packages/requests/__init__.py");
    if module.is_none() {
        skip(&test_name(), "python3-requests is not installed");
    }
    module.and(Some(python))
}

fn downloads(stage: &Stage, python: Option<PathBuf>) {
    let Some(python) = python else { return };
    stage.assert_cold_and_hot(|url, file| {
        fetch_py(stage, &python, "requests_content", url, file).assert_success();
        fetch_py(stage, &python, "requests_stream", url, file)
    });
}

fn refuses(stage: &Stage, python: Option<PathBuf>, way: &str) {
    if let Some(python) = python {
        stage.assert_wrong_checksum_fails(|url, file| fetch_py(stage, &python, way, url, file));
    }
}

on_each_front! {
    fn newest_cold_and_hot(stage: &Stage) {
        downloads(stage, newest());
    }
}

on_each_front! {
    fn debians_cold_and_hot(stage: &Stage) {
        downloads(stage, debians());
    }
}

on_each_broken_stream! {
    careless: fn newest_content_refuses_a_streamed_miss_with_a_wrong_checksum(stage: &Stage) {
        refuses(stage, newest(), "requests_content");
    }
}

on_each_broken_stream! {
    careless: fn newest_stream_refuses_a_streamed_miss_with_a_wrong_checksum(stage: &Stage) {
        refuses(stage, newest(), "requests_stream");
    }
}

on_each_broken_stream! {
    careless: fn debians_content_refuses_a_streamed_miss_with_a_wrong_checksum(stage: &Stage) {
        refuses(stage, debians(), "requests_content");
    }
}

on_each_broken_stream! {
    careless: fn debians_stream_refuses_a_streamed_miss_with_a_wrong_checksum(stage: &Stage) {
        refuses(stage, debians(), "requests_stream");
    }
}
