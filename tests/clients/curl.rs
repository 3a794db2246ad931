//! curl: plain, resuming, by the server's file name, by time condition, in every version of HTTP it speaks.

use std::fs;
use std::path::Path;

use crate::harness::{Content, Reply};
use crate::support::{Ended, SIZE, Stage, arg, assert_same, need};

/// `curl --fail` with further options.
fn curl(stage: &Stage, options: &[&str], url: &str, file: &Path) -> Option<Ended> {
    let fixed = ["--fail", "--silent", "--show-error", "--output", arg(file), url];
    Some(stage.run(&need("curl")?, &[options, &fixed].concat()))
}

/// Cold and hot with these options.
fn downloads(stage: &Stage, options: &[&str]) {
    if need("curl").is_some() {
        stage.assert_cold_and_hot(|url, file| curl(stage, options, url, file).expect("curl is here"));
    }
}

on_each_front! {
    fn cold_and_hot(stage: &Stage) {
        downloads(stage, &[]);
    }
}

on_each_front! {
    fn http_1_0(stage: &Stage) {
        // Without ALPN, as such an old client would be: it would offer only what Caddy refuses.
        downloads(stage, &["--http1.0", "--no-alpn"]);
    }
}

#[test]
fn http_2_without_tls() {
    crate::support::with(crate::proxies::Front::Direct, |stage| {
        downloads(stage, &["--http2-prior-knowledge"])
    });
}

on_each_broken_stream! {
    fn a_streamed_miss_with_a_wrong_checksum_fails(stage: &Stage) {
        if need("curl").is_some() {
            stage.assert_wrong_checksum_fails(|url, file| curl(stage, &[], url, file).expect("curl is here"));
        }
    }
}

#[test]
fn a_streamed_miss_with_a_wrong_checksum_fails_over_http_2_and_http_1_0() {
    if need("curl").is_none() {
        return;
    }
    for option in ["--http2-prior-knowledge", "--http1.0"] {
        crate::support::with(crate::proxies::Front::Direct, |stage| {
            stage.assert_wrong_checksum_fails(|url: &str, file: &Path| {
                curl(stage, &[option], url, file).expect("curl is here")
            });
        });
    }
}

on_each_front! {
    fn resumes_a_partial_file_cold_and_hot(stage: &Stage) {
        let content = Content::new(72, SIZE);
        let source = stage.publish("/resumed.bin", &content);
        for temperature in ["cold", "hot"] {
            let file = stage.file(temperature);
            fs::write(&file, content.piece(0, SIZE / 3)).unwrap();
            let options = ["--continue-at", "-", "--write-out", "%{http_code} %{size_download}"];
            let Some(ended) = curl(stage, &options, &stage.url(&source), &file) else { return };
            assert_eq!(ended.assert_success().stdout, format!("206 {}", SIZE - SIZE / 3), "{temperature}");
            assert_same(&file, &content);
        }
        assert_eq!(stage.up.count("/resumed.bin"), 1);
    }
}

on_each_front! {
    fn names_the_file_as_upstream_does(stage: &Stage) {
        let Some(curl) = need("curl") else { return };
        let content = Content::new(73, 4096);
        let named = Reply::ok(&content).field("Content-Disposition", "attachment; filename=\"tool-1.2.tar.gz\"");
        let source = stage.up.serve("/download", named);
        for temperature in ["cold", "hot"] {
            stage.run(&curl, &["--fail", "-sS", "-OJ", &stage.url(&source)]).assert_success();
            let file = stage.file("tool-1.2.tar.gz");
            assert_same(&file, &content);
            fs::rename(&file, stage.file(temperature)).unwrap();
        }
    }
}

on_each_front! {
    fn a_time_condition_saves_the_transfer(stage: &Stage) {
        let content = Content::new(74, SIZE);
        let (source, file) = (stage.publish("/dated.bin", &content), stage.file("dated.bin"));
        let options = ["--remote-time", "--time-cond", arg(&file), "--write-out", "%{http_code}"];
        let mut codes = Vec::new();
        for _ in 0..2 {
            let Some(ended) = curl(stage, &options, &stage.url(&source), &file) else { return };
            codes.push(ended.assert_success().stdout.clone());
            assert_same(&file, &content);
        }
        assert_eq!(codes, ["200", "304"]);
        // One second older than upstream's: changed since.
        let modified = fs::metadata(&file).unwrap().modified().unwrap() - std::time::Duration::from_secs(1);
        fs::File::options().append(true).open(&file).unwrap().set_modified(modified).unwrap();
        let ended = curl(stage, &options, &stage.url(&source), &file).expect("curl is here");
        assert_eq!(ended.assert_success().stdout, "200");
        assert_same(&file, &content);
    }
}
