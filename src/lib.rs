//! `artifact-cache`: fetch a public HTTP(S) artifact once, keep it for ever, and never lie about its content.
//!
//! The modules in layers; each may use only those below it. ARCHITECTURE.md has the picture and the invariants.

// 6: verbs, and the only wiring
pub mod cli;
#[doc(hidden)]
pub mod fuzz;
// 5: HTTP, the only place that knows status codes and headers
pub mod server;
// 4: what is done in the background
pub mod jobs;
// 3: the product: hit or miss is decided here
pub mod cache;
// 2: what we know, what we hold, the outside; they never use one another
pub mod blobs;
pub mod catalog;
pub mod upstream;
// 1
pub mod config;
pub mod telemetry;
// 0: pure values
pub mod artifact;
pub mod error;
pub mod kill_point;
pub mod sync;
