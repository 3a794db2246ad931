//! A service as an operator has it: both ports, its data in `data/` as on the pages, an upstream, and some traffic.

use std::path::PathBuf;
use std::time::Duration;

use crate::harness::{Content, Reply, Running, Service, Upstream};
use crate::program::free_address;

/// How long the upstream thinks before each answer: a miss must be seen to be slower than a hit.
const THINKS: Duration = Duration::from_millis(150);

/// The service and what it downloads from.
pub struct Stage {
    pub service: Running,
    pub up: Upstream,
}

/// What [`Stage::traffic`] did.
pub struct Traffic {
    pub hits: u64,
    pub misses: u64,
    pub errors: u64,
    /// Bytes of the stored contents, each counted once.
    pub stored_bytes: u64,
    /// The URLs that are stored.
    pub sources: Vec<String>,
    /// The one that failed.
    pub gone: String,
}

impl Traffic {
    pub fn requests(&self) -> u64 {
        self.hits + self.misses + self.errors
    }
}

impl Stage {
    pub fn new() -> Stage {
        let service = Service::new();
        std::fs::create_dir(service.dir().join("data")).unwrap();
        let data = |name: &str| service.dir().join("data").join(name).display().to_string();
        let (base, database) = (data("cache"), data("metadata.db"));
        // The metrics port has to be named, so it must be one that nobody takes meanwhile.
        let own = free_address();
        let service = service
            .env("STORAGE__BASE_PATH", &base)
            .env("STORAGE__DATABASE", &database)
            .env("SERVER__HOST", &own.ip().to_string())
            .env("SERVER__METRICS_PORT", &own.port().to_string());
        Stage { service: service.start(), up: Upstream::start() }
    }

    /// The directory in which an operator types.
    pub fn dir(&self) -> PathBuf {
        self.service.service().dir().to_path_buf()
    }

    /// Puts a file upstream that is sent after some thought; returns its URL.
    pub fn publish(&self, path: &str, content: &Content) -> String {
        let reply = Reply::ok(content);
        self.up.on(path, move |x| {
            std::thread::sleep(THINKS);
            x.reply(&reply)
        })
    }

    /// Three misses, two of which have the same content, six hits and a failure; returns when all are counted.
    pub fn traffic(&self) -> Traffic {
        let (tool, image) = (Content::new(90, 300_000), Content::new(91, 5_000_000));
        let sources = vec![
            self.publish("/tool-1.2.tar.gz", &tool),
            self.publish("/mirror/tool-1.2.tar.gz", &tool),
            self.publish("/image.iso", &image),
        ];
        for _ in 0..3 {
            for (source, content) in sources.iter().zip([&tool, &tool, &image]) {
                self.service.fetch(source).assert_ok(&content.bytes());
            }
        }
        let gone = self.up.serve("/gone.zip", Reply::new(404, Content::of(b"")));
        self.service.fetch(&gone).assert_error(502, "upstream_error");
        let did =
            Traffic { hits: 6, misses: 3, errors: 1, stored_bytes: tool.len() + image.len(), sources, gone };
        let counted = "artifact_cache_request_duration_seconds_count";
        self.service.wait_metric(counted, did.requests() as f64);
        did
    }
}
