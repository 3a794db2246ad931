//! urllib of Debian's Python, in the three ways that scripts use it.
//!
//! `copyfileobj` reads in pieces, and Python 3.11 takes a plain end in the middle of a `Content-Length` for the end:
//! it is fooled where Debian's requests is (requests.rs).

use std::path::{Path, PathBuf};

use crate::requests::fetch_py;
use crate::support::{Stage, need};

fn python() -> Option<PathBuf> {
    need("/usr/bin/python3")
}

fn downloads(stage: &Stage, way: &str) {
    if let Some(python) = python() {
        stage.assert_cold_and_hot(|url, file| fetch_py(stage, &python, way, url, file));
    }
}

fn refuses(stage: &Stage, way: &str) {
    if let Some(python) = python() {
        stage.assert_wrong_checksum_fails(|url: &str, file: &Path| fetch_py(stage, &python, way, url, file));
    }
}

on_each_front! {
    fn urlopen_read_cold_and_hot(stage: &Stage) {
        downloads(stage, "urlopen_read");
    }
}

on_each_front! {
    fn urlretrieve_cold_and_hot(stage: &Stage) {
        downloads(stage, "urlretrieve");
    }
}

on_each_front! {
    fn copyfileobj_cold_and_hot(stage: &Stage) {
        downloads(stage, "copyfileobj");
    }
}

on_each_broken_stream! {
    careless: fn urlopen_read_refuses_a_streamed_miss_with_a_wrong_checksum(stage: &Stage) {
        refuses(stage, "urlopen_read");
    }
}

on_each_broken_stream! {
    careless: fn urlretrieve_refuses_a_streamed_miss_with_a_wrong_checksum(stage: &Stage) {
        refuses(stage, "urlretrieve");
    }
}

on_each_broken_stream! {
    careless: fn copyfileobj_refuses_a_streamed_miss_with_a_wrong_checksum(stage: &Stage) {
        refuses(stage, "copyfileobj");
    }
}
