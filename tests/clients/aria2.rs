//! aria2: one file over eight connections, stored already or still arriving.

use std::path::Path;
use std::time::Duration;

use crate::harness::{Content, Reply, eventually};
use crate::support::{Ended, SIZE, Stage, arg, assert_same, need};

/// Large enough for eight connections of 1 MiB each.
const LARGE: u64 = 8 * SIZE;

fn aria2(stage: &Stage, url: &str, file: &Path) -> Ended {
    let (dir, name) =
        (file.parent().expect("it is in a directory"), file.file_name().expect("it has a name"));
    let place = [format!("--dir={}", arg(dir)), format!("--out={}", arg(Path::new(name)))];
    let authority = stage.authority().map(|file| format!("--ca-certificate={}", arg(file)));
    let mut args = vec!["--no-conf", "--quiet", "-x8", "-s8", "-k1M"];
    args.extend(place.iter().chain(&authority).map(String::as_str));
    args.push(url);
    stage.run(&need("aria2c").expect("aria2 is here"), &args)
}

on_each_front! {
    fn cold_and_hot(stage: &Stage) {
        if need("aria2c").is_some() {
            stage.assert_cold_and_hot(|url, file| aria2(stage, url, file));
        }
    }
}

on_each_front! {
    fn eight_connections_share_a_stored_file(stage: &Stage) {
        if need("aria2c").is_none() {
            return;
        }
        let (content, file) = (Content::new(78, LARGE), stage.file("large.bin"));
        let source = stage.publish("/large.bin", &content);
        stage.service.fetch(&source).assert_ok(&content.bytes());
        aria2(stage, &stage.url(&source), &file).assert_success();
        assert_same(&file, &content);
        eventually("several connections took part", || (stage.ended(&source).len() > 2).then_some(()));
        assert_eq!(stage.up.count("/large.bin"), 1);
    }
}

on_each_front! {
    fn eight_connections_share_a_running_download(stage: &Stage) {
        if need("aria2c").is_none() {
            return;
        }
        let (content, file) = (Content::new(79, LARGE), stage.file("large.bin"));
        let served = content.clone();
        let source = stage.up.on("/large.bin", move |x| {
            x.send(&Reply::ok(&served).head(200, 0))?;
            (0..LARGE).step_by(128 * 1024).try_for_each(|at| {
                std::thread::sleep(Duration::from_millis(25));
                x.body(&served, at, at + 128 * 1024)
            })
        });
        aria2(stage, &stage.url(&source), &file).assert_success();
        assert_same(&file, &content);
        // Through a proxy that names itself the stream comes in chunks, and without a length aria2 does not split.
        if matches!(stage.front, Front::Direct | Front::NginxDefaults) {
            eventually("several connections took part", || (stage.ended(&source).len() > 1).then_some(()));
        }
        assert_eq!(stage.up.count("/large.bin"), 1, "and all of them are one download");
    }
}

on_each_broken_stream! {
    fn a_streamed_miss_with_a_wrong_checksum_fails(stage: &Stage) {
        if need("aria2c").is_none() {
            return;
        }
        let (ended, content) = stage.wrong_checksum(LARGE, |url, file| aria2(stage, url, file));
        assert!(!ended.success, "a bad download is called a success: {ended:?}");
        // aria2 writes at eight places of one file, so only its bytes can tell whether it was given them all.
        let kept = std::fs::read(stage.file("bad.bin")).unwrap_or_default();
        assert!(kept != content.bytes(), "the whole of a file with a wrong checksum was handed out");
    }
}
