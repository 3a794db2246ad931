//! wget: plain, resuming, by time stamp, by the server's file name. It retries by itself.

use std::fs;
use std::path::Path;

use crate::harness::{Content, Reply};
use crate::support::{Ended, SIZE, Stage, arg, assert_same, need};

/// `wget` in the stage's directory.
fn wget(stage: &Stage, options: &[&str], url: &str) -> Option<Ended> {
    let authority = stage.authority().map(|file| format!("--ca-certificate={}", arg(file)));
    let fixed: Vec<&str> = authority.iter().map(String::as_str).chain(["--no-verbose", url]).collect();
    Some(stage.run(&need("wget")?, &[options, &fixed].concat()))
}

fn wget_to(stage: &Stage, url: &str, file: &Path) -> Ended {
    wget(stage, &["--output-document", arg(file)], url).expect("wget is here")
}

on_each_front! {
    fn cold_and_hot(stage: &Stage) {
        if need("wget").is_some() {
            stage.assert_cold_and_hot(|url, file| wget_to(stage, url, file));
        }
    }
}

on_each_broken_stream! {
    fn a_streamed_miss_with_a_wrong_checksum_fails(stage: &Stage) {
        if need("wget").is_some() {
            stage.assert_wrong_checksum_fails(|url, file| wget_to(stage, url, file));
        }
    }
}

on_each_front! {
    fn resumes_a_partial_file_cold_and_hot(stage: &Stage) {
        let content = Content::new(75, SIZE);
        let source = stage.publish("/resumed.bin", &content);
        let file = stage.file("resumed.bin");
        for _temperature in ["cold", "hot"] {
            fs::write(&file, content.piece(0, SIZE / 3)).unwrap();
            // It resumes the file that the URL names, so this takes the path form.
            let Some(ended) = wget(stage, &["--continue", "--server-response"], &stage.path_url(&source)) else { return };
            assert!(ended.assert_success().stderr.contains(" 206 "), "{ended:?}");
            assert_same(&file, &content);
        }
        assert_eq!(stage.up.count("/resumed.bin"), 1);
    }
}

on_each_front! {
    fn a_time_stamp_saves_the_transfer(stage: &Stage) {
        let content = Content::new(76, SIZE);
        let source = stage.publish("/dated.bin", &content);
        let url = stage.path_url(&source);
        let Some(first) = wget(stage, &["--timestamping"], &url) else { return };
        first.assert_success();
        assert_same(&stage.file("dated.bin"), &content);
        let second = wget(stage, &["--timestamping", "--server-response"], &url).expect("wget is here");
        assert!(second.assert_success().stderr.contains(" 304 "), "{second:?}");
        assert_same(&stage.file("dated.bin"), &content);
    }
}

on_each_front! {
    fn names_the_file_as_upstream_does(stage: &Stage) {
        let content = Content::new(77, 4096);
        let named = Reply::ok(&content).field("Content-Disposition", "attachment; filename=\"tool-1.2.tar.gz\"");
        let source = stage.up.serve("/download", named);
        for temperature in ["cold", "hot"] {
            let Some(ended) = wget(stage, &["--content-disposition"], &stage.url(&source)) else { return };
            ended.assert_success();
            let file = stage.file("tool-1.2.tar.gz");
            assert_same(&file, &content);
            fs::rename(&file, stage.file(temperature)).unwrap();
        }
    }
}
