//! The process dies at every named place between two steps (`kill_point::pass` in the sources), one by one.

use std::collections::BTreeSet;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};

use crate::audit::Audit;
use crate::harness::{Content, Reply, Running, Service, Upstream, fetch_target};
use crate::workload::{Acknowledged, content, fetch, upstream, url};
use crate::{beside_others, report};

const VARIABLE: &str = "ARTIFACT_CACHE_KILL_POINT";
/// Downloads in flight when a miss dies.
const IN_FLIGHT: u64 = 3;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn rust_files(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let (dirs, files): (Vec<_>, Vec<_>) = entries.partition(|path| path.is_dir());
    let files = files.into_iter().filter(|path| path.extension().is_some_and(|e| e == "rs"));
    files.chain(dirs.iter().flat_map(|dir| rust_files(dir))).collect()
}

/// Every name in the sources.
fn names() -> BTreeSet<String> {
    let texts =
        rust_files(&root().join("src")).into_iter().map(|path| std::fs::read_to_string(path).unwrap());
    texts
        .flat_map(|text| text.split("kill_point::pass(\"").skip(1).map(first_string).collect::<Vec<_>>())
        .collect()
}

fn first_string(rest: &str) -> String {
    rest.split('"').next().unwrap_or_default().to_owned()
}

#[test]
fn nothing_acknowledged_is_lost_at_any_kill_point() {
    let _turn = beside_others();
    let (mut here, mut elsewhere) = (0, Vec::new());
    for name in names() {
        match name.split('.').next().unwrap_or_default() {
            "publish" | "record" => die_in_a_miss(&name),
            "quarantine" => die_healing(&name),
            "open" => die_starting(&name, &name),
            "migrate" => {
                die_starting(&name, &name);
                die_starting(&name, &format!("{name}:2"));
            }
            _ => {
                elsewhere.push(name);
                continue;
            }
        }
        here += 1;
    }
    assert!(here >= 10, "the search of the sources finds {here} kill points");
    for name in &elsewhere {
        assert!(
            is_tried_elsewhere(name),
            "no test dies at {name:?}: make it happen here or in a test of its own"
        );
    }
    report(format_args!(
        "{here} kill points, and {} in the tests of their topics: 0 violations",
        elsewhere.len()
    ));
}

/// Another test names it.
fn is_tried_elsewhere(name: &str) -> bool {
    let quoted = format!("\"{name}");
    rust_files(&root().join("tests"))
        .iter()
        .any(|path| std::fs::read_to_string(path).unwrap().contains(&quoted))
}

/// Waits for the end that the kill point makes.
#[track_caller]
fn assert_dies(service: &mut Running, name: &str) {
    let (status, stderr) = service.wait_exit();
    assert_eq!(status.signal(), Some(9), "{name} is not passed: {status} {stderr}");
}

/// Several downloads, of which the second one to come by dies there; a first one was answered.
fn die_in_a_miss(name: &str) {
    let (up, acknowledged) = (upstream(), Acknowledged::default());
    let mut service = Service::new()
        .env("FETCH__STREAM_AFTER_SECONDS", "0")
        .variable(VARIABLE, &format!("{name}:2"))
        .start();
    let api = service.api;
    assert!(fetch(api, &up, 0, &acknowledged), "the first one lands");
    // Different contents, the largest among them.
    std::thread::scope(|scope| {
        for n in 0..IN_FLIGHT {
            let (up, acknowledged) = (&up, &acknowledged);
            scope.spawn(move || fetch(api, up, 4 + 4 * n, acknowledged));
        }
    });
    assert_dies(&mut service, name);
    let service = service.again().variable(VARIABLE, "").start();
    Audit::of(&service, &acknowledged).assert_clean(name, IN_FLIGHT as usize);
    // Whatever was left half done is done again, and what was left over is adopted.
    for n in 0..IN_FLIGHT {
        service.fetch(&url(&up, 4 + 4 * n)).assert_ok(&content(4 + 4 * n).bytes());
    }
    Audit::of(&service, &acknowledged).assert_clean(name, 0);
}

/// A stored file is damaged, and the hit that finds it dies while it sets it aside.
fn die_healing(name: &str) {
    let (up, kept) = (Upstream::start(), Content::new(1, 50_000));
    let url = up.serve("/kept", Reply::ok(&kept));
    let mut service = Service::new().variable(VARIABLE, name).start();
    service.fetch(&url).assert_ok(&kept.bytes());
    let blob = service.blob(&kept.sha256());
    std::fs::write(&blob, b"damaged").unwrap();
    let mut client = service.connect();
    client.request("GET", &fetch_target(&url), &[]);
    assert!(client.try_head().is_err(), "{name} is passed before anything is answered");
    assert_dies(&mut service, name);
    let service = service.again().variable(VARIABLE, "").start();
    service.fetch(&url).assert_ok(&kept.bytes());
    let quarantine = std::fs::read_dir(service.service().base_path().join(".quarantine")).unwrap();
    let set_aside: Vec<_> = quarantine.map(|entry| std::fs::read(entry.unwrap().path()).unwrap()).collect();
    assert_eq!(set_aside, [b"damaged"], "{name}: what was damaged is kept for its owner");
    Audit::of(&service, &Acknowledged::default()).assert_clean(name, 0);
}

/// The very first start dies.
fn die_starting(name: &str, point: &str) {
    let (up, acknowledged) = (upstream(), Acknowledged::default());
    let service = Service::new().variable(VARIABLE, point);
    let (code, stderr) = service.refused();
    assert_eq!((code, stderr.as_str()), (-1, ""), "{name} ends the process by a signal");
    let service = service.variable(VARIABLE, "").start();
    assert!(fetch(service.api, &up, 0, &acknowledged));
    Audit::of(&service, &acknowledged).assert_clean(point, 0);
}
