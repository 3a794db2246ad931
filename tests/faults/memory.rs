//! A limit of 256 MiB on all memory, the page cache included, and 64 downloads and 64 readers of 4 GiB files in it.
//!
//! Nobody waits for all of the 512 GiB: the files are real in their length, and each transfer goes as far as the time
//! allows. What would grow with the transfers would have grown by then: what has gone through is several times the limit.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::harness::{Client, Content, Reply, Service, Upstream, eventually, fetch_target, skip};
use crate::{beside_others, report, rounds};

const LIMIT: u64 = 256 << 20;
const TRANSFERS: u64 = 64;
const SIZE: u64 = 4 << 30;
/// What 4 GiB of zeros hash to, which is what a file reads as that is all hole.
const DIGEST_OF_ZEROS: &str = "8479e43911dc45e89f934fe48d01297e16f51d17aa561d4d1c216b1ae0fcddca";

/// A control group of its own, removed when it is dropped.
struct Group {
    dir: PathBuf,
    /// Version 2, whose files have other names.
    unified: bool,
}

impl Group {
    fn make() -> Result<Group, String> {
        let root = Path::new("/sys/fs/cgroup");
        let controllers = std::fs::read_to_string(root.join("cgroup.controllers")).unwrap_or_default();
        let unified = controllers.split_whitespace().any(|controller| controller == "memory");
        let parent = if unified { root.to_owned() } else { root.join("memory") };
        let dir = parent.join(format!("artifact-cache-test-{}", std::process::id()));
        std::fs::create_dir(&dir).map_err(|error| format!("no control group: {error}"))?;
        let group = Group { dir, unified };
        let limit = if unified { "memory.max" } else { "memory.limit_in_bytes" };
        group.write(limit, LIMIT)?;
        // Swapping would only hide it; where there is none, there is no such file.
        let _ = group.write(if unified { "memory.swap.max" } else { "memory.swappiness" }, 0);
        Ok(group)
    }

    fn write(&self, file: &str, value: u64) -> Result<(), String> {
        std::fs::write(self.dir.join(file), value.to_string()).map_err(|error| format!("{file}: {error}"))
    }

    /// The most that was in use, as far as this version tells.
    fn peak(&self) -> u64 {
        let file = if self.unified { "memory.peak" } else { "memory.max_usage_in_bytes" };
        let text = std::fs::read_to_string(self.dir.join(file)).unwrap_or_default();
        text.trim().parse().unwrap_or(0)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Possible once its process is gone.
        let _ = std::fs::remove_dir(&self.dir);
    }
}

#[test]
fn sixty_four_transfers_of_four_gigabytes_each_way_in_256_mib() {
    let name = "memory::sixty_four_transfers_of_four_gigabytes_each_way_in_256_mib";
    let _turn = beside_others();
    let group = match Group::make() {
        Ok(group) => group,
        Err(why) => return skip(name, &why),
    };
    // MiB that each transfer must have moved before it is enough.
    let enough = rounds("ARTIFACT_CACHE_TEST_TRANSFER_MIB", 12) << 20;
    let up = Upstream::start();
    let mut service = Service::new().start();
    // The few megabytes of its start are with the group that it comes from.
    group.write("cgroup.procs", service.pid().into()).expect("the service can be moved");
    let kept = up.serve("/kept", Reply::ok(&Content::of(b"kept")));
    service.fetch(&kept).assert_ok(b"kept");

    // A stored artifact of 4 GiB that takes no space.
    let stored = up.url("/stored");
    let blob = service.blob(DIGEST_OF_ZEROS);
    std::fs::create_dir_all(blob.parent().unwrap()).unwrap();
    std::fs::File::create(&blob).unwrap().set_len(SIZE).unwrap();
    let row = "INSERT INTO artifacts (source_url, content_hash, file_size) VALUES (?1, ?2, ?3)";
    service.sqlite().execute(row, (&stored, DIGEST_OF_ZEROS, SIZE as i64)).unwrap();

    // Its length is not announced, or so many at once would be refused for lack of disk.
    let sent = Arc::new(AtomicU64::new(0));
    for n in 0..TRANSFERS {
        let (content, sent) = (Content::new(n, SIZE), sent.clone());
        up.on(&format!("/download{n}"), move |x| {
            x.send("HTTP/1.1 200 OK\r\n\r\n")?;
            let mut at = 0;
            while at < SIZE {
                let piece = content.piece(at, SIZE);
                x.raw(&piece)?;
                at += piece.len() as u64;
                sent.fetch_add(piece.len() as u64, Ordering::SeqCst);
            }
            Ok(())
        });
    }
    let mut downloading: Vec<Client> = Vec::new();
    for n in 0..TRANSFERS {
        let mut client = service.connect();
        client.request("GET", &fetch_target(&up.url(&format!("/download{n}"))), &[]);
        downloading.push(client);
    }
    let api = service.api;
    std::thread::scope(|scope| {
        for n in 0..TRANSFERS {
            let target = fetch_target(&stored);
            scope.spawn(move || {
                let mut client = Client::connect(api);
                // Each its own part, so that the page cache helps nobody.
                let range = format!("bytes={}-", n * (SIZE / TRANSFERS));
                client.request("GET", &target, &[("Range", &range)]);
                assert_eq!(client.head().status(), 206);
                let mut zeros = true;
                client.drain(enough, |bytes| zeros &= bytes.iter().all(|byte| *byte == 0));
                assert!(zeros, "what is read is what is stored");
            });
        }
    });
    eventually("every download has come far", || {
        (sent.load(Ordering::SeqCst) >= TRANSFERS * enough).then_some(())
    });
    service.fetch(&kept).assert_ok(b"kept");
    let (rss, all) = (service.peak_rss_bytes(), group.peak());
    assert!(rss < LIMIT / 2, "peak RSS is {} MiB", rss >> 20);
    report(format_args!(
        "64 downloads and 64 hits of 4 GiB in 256 MiB: {} MiB in, {} MiB out, peak RSS {} MiB, with page cache {} MiB",
        sent.load(Ordering::SeqCst) >> 20,
        (TRANSFERS * enough) >> 20,
        rss >> 20,
        all >> 20
    ));
    // Killed with all of it under way: nobody waits for 256 GiB.
    service.kill();
}
