//! What `deploy/` ships, tried with the programs it is for: proxies, systemd, container builder, package manager,
//! Ansible.
//!
//! `install` gets these programs and a Debian of its own to try in; what is missing is skipped by name.
// Nothing outside sees a test binary, so `pub` here only means "for the other files".
#![allow(unreachable_pub)]

// Each test binary uses a part of the harness.
#[allow(dead_code, unused_imports)]
#[path = "../it/harness/mod.rs"]
mod harness;

#[allow(dead_code)]
#[path = "../clients/program.rs"]
mod program;
#[allow(dead_code)]
#[path = "../clients/proxies.rs"]
mod proxies;
#[allow(dead_code, unused_imports, unused_macros)]
#[path = "../clients/support.rs"]
mod support;

mod compose;
mod container;
mod engine;
mod fronts;
mod machine;
mod package;
mod release;
mod role;
mod service_manager;

/// The repository.
pub fn root() -> &'static std::path::Path {
    std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
}
