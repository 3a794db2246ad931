//! Real clients against the real binary, straight and through proxies in front of it, one client a file.
//!
//! Each downloads cold and hot, uses what it has of resuming and conditions, and meets a streamed miss whose checksum
//! turns out wrong: whatever it keeps of that, it must not call it a success. `install` gets the clients; one that is
//! missing is skipped by name.
// Nothing outside sees a test binary, so `pub` here only means "for the other files".
#![allow(unreachable_pub)]

// Half of the harness is for tests that speak HTTP themselves.
#[allow(dead_code, unused_imports)]
#[path = "../it/harness/mod.rs"]
mod harness;

mod program;
mod proxies;
#[macro_use]
mod support;

mod ansible;
mod aria2;
mod curl;
mod pip;
mod requests;
mod urllib;
mod wget;
