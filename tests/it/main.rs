//! Black-box tests: the real binary against an upstream that misbehaves, one topic a file.
// Nothing outside sees a test binary, so `pub` here only means "for the other files".
#![allow(unreachable_pub)]

mod harness;

mod archive;
mod backup;
mod bad_input;
mod checksums;
mod cli;
mod commands;
mod connections;
mod disk;
mod doctor;
mod errors;
mod fetch;
mod framing;
mod get;
mod guard;
mod hardship;
mod health;
mod http2;
mod instruments;
mod limits;
mod logs;
mod memory;
mod metrics;
mod panics;
mod partial;
mod ranges;
mod redirects;
mod retries;
mod rot;
mod shutdown;
mod single_flight;
mod storage;
mod streaming;
mod sweep;
mod tls;
mod verify;
