//! Publish, record, delete and sweep of one digest at once: never a row without its file.

use std::path::PathBuf;
use std::sync::{
    Arc, LazyLock,
    atomic::{AtomicU64, Ordering},
};
use std::time::SystemTime;

use artifact_cache::artifact::{Digest, Version};
use artifact_cache::catalog::{Catalog, Editor, Record};
use artifact_cache::config::Config;
use shuttle::thread::{spawn, yield_now};
use tokio::runtime::Runtime;

use crate::blobs::{Blobs, Origin, Removal, Written};
use crate::{breaks, schedules};

/// What every schedule shares: opening a database takes longer than a schedule.
struct Shared {
    config: Config,
    catalog: Catalog,
    /// Runs what is a future or needs a thread; none of it is scheduled.
    runtime: Runtime,
    next: AtomicU64,
    _dir: tempfile::TempDir,
}

/// In memory where that can be had: an fsync there costs nothing, and none of this is about power cuts.
fn shared() -> &'static Shared {
    static SHARED: LazyLock<Shared> = LazyLock::new(|| {
        let memory = PathBuf::from("/dev/shm");
        let dir = tempfile::tempdir_in(&memory).or_else(|_| tempfile::tempdir()).unwrap();
        let mut config = Config::default();
        config.storage.base_path = dir.path().join("cache");
        config.storage.database = dir.path().join("metadata.db");
        config.storage.min_free_bytes = 0;
        let catalog = Catalog::open(&config.storage.database, 1).unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().unwrap();
        Shared { config, catalog, runtime, next: AtomicU64::new(0), _dir: dir }
    });
    &SHARED
}

/// What somebody gets wrong.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Mistake {
    None,
    /// The publisher gives its claim up before the row is there.
    NoClaim,
    /// The sweep doesn't ask again under the lock.
    NoCheck,
}

/// One content, the URLs that have it, and the store that it is in.
struct World {
    base: PathBuf,
    blobs: Arc<Blobs>,
    content: String,
    digest: Digest,
    mistake: Mistake,
}

impl World {
    fn new(mistake: Mistake) -> Arc<World> {
        let content = format!("content {}", shared().next.fetch_add(1, Ordering::Relaxed));
        // One for each test: only one at a time may have it open, and what has failed doesn't close it.
        let mut storage = shared().config.storage.clone();
        storage.base_path.push(format!("{mistake:?}"));
        let base = storage.base_path.clone();
        let blobs = Arc::new(Blobs::open(&storage).unwrap());
        let mut world = World { base, blobs, content, digest: "00".repeat(32).parse().unwrap(), mistake };
        world.digest = world.written().digest;
        Arc::new(world)
    }

    /// A finished download.
    fn written(&self) -> Written {
        let runtime = &shared().runtime;
        let _inside = runtime.enter();
        let origin = Origin { source_url: String::new(), head: serde_json::Value::Null };
        let mut spool = self.blobs.spool(None, origin).unwrap();
        runtime.block_on(async {
            spool.write(self.content.clone().into()).await.unwrap();
            spool.finish().await.unwrap()
        })
    }

    fn url(&self, name: &str) -> String {
        format!("http://h/{name}/{}", self.digest)
    }

    /// As a download lands.
    fn publish(&self, written: Written, name: &str) {
        let (_, claim) = self.blobs.publish_now(&written).unwrap();
        let claim = Some(claim).filter(|_| self.mistake != Mistake::NoClaim);
        yield_now();
        let version = Version {
            digest: self.digest,
            size: self.content.len() as u64,
            content_type: None,
            content_encoding: None,
            file_name: None,
            etag: None,
            last_modified: None,
            fetched: SystemTime::now(),
        };
        let record = Record { source_url: self.url(name).into(), version };
        // The claim stays here: shuttle's locks can't be taken by the catalogue's thread.
        shared().runtime.block_on(shared().catalog.record(record, ())).unwrap();
        self.check();
        yield_now();
        drop(claim);
    }

    /// As the command does it, beside the service.
    fn delete(&self, name: &str) {
        let mut editor = Editor::open(&shared().config.storage.database).unwrap();
        editor.delete(&self.url(name)).unwrap();
        self.check();
    }

    /// As the job does it.
    fn sweep(&self) {
        let listed = shared().catalog.unswept(1000).unwrap();
        let ours: Vec<_> = listed.into_iter().filter(|blob| blob.digest == self.digest).collect();
        yield_now();
        for blob in ours {
            let is_deleted = || match self.mistake {
                Mistake::NoCheck => Ok(true),
                _ => shared().catalog.is_deleted(&blob),
            };
            let removal = self.blobs.remove(blob.digest, blob.at(), is_deleted).unwrap();
            self.check();
            yield_now();
            if matches!(removal, Removal::Gone(_)) {
                shared().runtime.block_on(shared().catalog.mark_swept(vec![blob])).unwrap();
            }
        }
    }

    fn is_there(&self) -> bool {
        let hex = self.digest.to_string();
        let path = self.base.join(&hex[..2]).join(&hex[2..4]).join(&hex);
        std::fs::read(path).is_ok_and(|bytes| bytes == self.content.as_bytes())
    }

    /// At this moment no row is without its file. (No other thread runs meanwhile.)
    fn check(&self) {
        for name in ["one", "two", "three"] {
            let row = shared().catalog.find(&self.url(name)).unwrap();
            assert!(row.is_none() || self.is_there(), "the row of {name} has no file");
        }
    }
}

fn scenario(mistake: Mistake) {
    let world = World::new(mistake);
    world.publish(world.written(), "one");
    let (two, three) = (world.written(), world.written());
    let run = |work: Box<dyn FnOnce(&World) + Send>| {
        let world = world.clone();
        spawn(move || work(&world))
    };
    let threads = [
        run(Box::new(|world| world.publish(two, "two"))),
        run(Box::new(|world| world.publish(three, "three"))),
        run(Box::new(|world| ["one", "two"].iter().for_each(|name| world.delete(name)))),
        run(Box::new(|world| (0..2).for_each(|_| world.sweep()))),
    ];
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    // "three" is never deleted.
    assert!(world.is_there());
    // When all is over what nobody wants goes, and leaves nothing to do.
    world.delete("two");
    world.delete("three");
    world.sweep();
    assert!(!world.is_there(), "deleted and swept");
    assert!(shared().catalog.unswept(1000).unwrap().iter().all(|blob| blob.digest != world.digest));
}

#[test]
fn never_a_row_without_its_file() {
    schedules(2_000, || scenario(Mistake::None));
}

#[test]
fn publishing_without_a_claim_is_found() {
    breaks(4_000, "has no file", || scenario(Mistake::NoClaim));
}

#[test]
fn sweeping_without_asking_again_is_found() {
    breaks(4_000, "has no file", || scenario(Mistake::NoCheck));
}
