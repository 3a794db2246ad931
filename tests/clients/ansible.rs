//! Ansible's `get_url`, run as a user would: `ansible localhost -m get_url -a …`.

use std::path::Path;
use std::time::Duration;

use crate::harness::{Content, Reply};
use crate::proxies::Front;
use crate::support::{Ended, SIZE, Stage, arg, assert_same, need_in_venv};

/// What a task says of itself.
#[derive(Debug, PartialEq, Eq)]
enum Task {
    Changed,
    Ok,
    Failed,
}

/// `get_url` of `url` to `file` with further arguments of the module (`name=value`) and of the command.
fn get_url(stage: &Stage, url: &str, file: &Path, more: &str, options: &[&str]) -> Option<(Ended, Task)> {
    let (ansible, python) = (need_in_venv("ansible")?, need_in_venv("python")?);
    let module = format!("url='{url}' dest='{}' {more}", arg(file));
    let interpreter = format!("ansible_python_interpreter={}", arg(&python));
    let fixed = ["localhost", "-i", "localhost,", "-c", "local", "-e", &interpreter];
    let ended = stage.run(&ansible, &[&fixed, options, &["-m", "get_url", "-a", &module]].concat());
    let says = |word: &str| ended.stdout.contains(&format!("localhost | {word}"));
    let task = match (says("CHANGED"), says("SUCCESS"), says("FAILED!")) {
        (true, false, false) => Task::Changed,
        (false, true, false) => Task::Ok,
        (false, false, true) => Task::Failed,
        _ => panic!("get_url says {ended:?}"),
    };
    assert_eq!(ended.success, task != Task::Failed, "{ended:?}");
    Some((ended, task))
}

on_each_front! {
    fn cold_and_hot(stage: &Stage) {
        if need_in_venv("ansible").is_some() {
            stage.assert_cold_and_hot(|url, file| get_url(stage, url, file, "", &[]).expect("Ansible is here").0);
        }
    }
}

#[test]
fn with_a_checksum_it_changes_once_and_then_is_ok() {
    crate::support::with(Front::Direct, |stage| {
        let (content, file) = (Content::new(80, SIZE), stage.file("tool"));
        let digest = content.sha256();
        let source = stage.publish("/tool", &content);
        let (url, checksum) = (stage.url_sha(&source, &digest), format!("checksum=sha256:{digest}"));
        let run = |more: &str, options: &[&str]| get_url(stage, &url, &file, more, options);

        let Some((ended, task)) = run(&checksum, &["--check"]) else { return };
        assert_eq!(task, Task::Changed, "{ended:?}");
        assert!(!file.exists(), "--check downloads nothing");
        let expected = [
            (checksum.as_str(), Task::Changed),
            (&checksum, Task::Ok),
            ("force=yes", Task::Ok),
            ("", Task::Ok),
        ];
        for (more, wanted) in expected {
            let (ended, task) = run(more, &[]).expect("Ansible is here");
            assert_eq!(task, wanted, "{more} {ended:?}");
            assert_same(&file, &content);
        }
        assert_eq!(stage.up.requests("/tool").iter().filter(|head| head.line.starts_with("GET")).count(), 1);
    });
}

#[test]
fn an_empty_sha256_and_a_checksum_of_the_module_alone_work_too() {
    crate::support::with(Front::Direct, |stage| {
        let (content, file) = (Content::new(81, 4096), stage.file("tool"));
        let source = stage.publish("/tool", &content);
        let checksum = format!("checksum=sha256:{}", content.sha256());
        let Some((ended, task)) = get_url(stage, &stage.url_sha(&source, ""), &file, &checksum, &[]) else {
            return;
        };
        assert_eq!(task, Task::Changed, "{ended:?}");
        assert_same(&file, &content);
    });
}

on_each_front! {
    fn a_download_longer_than_its_time_out_succeeds_because_it_is_streamed(stage: &Stage) {
        let (content, file) = (Content::new(82, SIZE), stage.file("slow"));
        let served = content.clone();
        // 32 KiB every 90 ms: three seconds in all, never silent for the two that the client allows.
        let source = stage.up.on("/slow", move |x| {
            x.send(&Reply::ok(&served).head(200, 0))?;
            (0..SIZE).step_by(32 * 1024).try_for_each(|at| {
                std::thread::sleep(Duration::from_millis(90));
                x.body(&served, at, at + 32 * 1024)
            })
        });
        let Some((ended, task)) = get_url(stage, &stage.url(&source), &file, "timeout=2", &[]) else { return };
        assert_eq!(task, Task::Changed, "{ended:?}");
        assert_same(&file, &content);
    }
}

on_each_broken_stream! {
    fn a_streamed_miss_with_a_wrong_checksum_fails(stage: &Stage) {
        if need_in_venv("ansible").is_some() {
            stage.assert_wrong_checksum_fails(|url, file| {
                get_url(stage, url, file, "", &[]).expect("Ansible is here").0
            });
            assert!(!stage.file("bad.bin").exists(), "Ansible leaves no file behind");
        }
    }
}
