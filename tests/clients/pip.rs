//! pip, given a wheel's URL.

use std::path::Path;

use crate::harness::{Content, WRONG_SHA};
use crate::support::{Ended, Stage, arg, need_in_venv};

/// Writes a wheel that holds one module and enough ballast to be streamed.
const MAKE_WHEEL: &str = r#"
import random, sys, zipfile
with zipfile.ZipFile(sys.argv[1], "w") as wheel:
    wheel.writestr("demo.py", "answer = 42\n")
    wheel.writestr("demo-1.0.data/data/ballast", random.Random(1).randbytes(512 * 1024))
    wheel.writestr("demo-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: demo\nVersion: 1.0\n")
    wheel.writestr("demo-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    names = wheel.namelist() + ["demo-1.0.dist-info/RECORD"]
    wheel.writestr("demo-1.0.dist-info/RECORD", "".join(name + ",,\n" for name in names))
"#;

const NAME: &str = "/demo-1.0-py3-none-any.whl";

/// The wheel's bytes.
fn wheel(stage: &Stage, python: &Path) -> Content {
    let file = stage.file("made.whl");
    stage.run(python, &["-c", MAKE_WHEEL, arg(&file)]).assert_success();
    Content::of(&std::fs::read(file).unwrap())
}

fn pip(stage: &Stage, python: &Path, url: &str, target: &str) -> Ended {
    let options = ["-m", "pip", "install", "--no-deps", "--no-index", "--disable-pip-version-check"];
    let place = stage.file(target);
    stage.run(python, &[&options[..], &["--target", arg(&place), url]].concat())
}

on_each_front! {
    fn installs_a_wheel_by_its_url_cold_and_hot(stage: &Stage) {
        let Some(python) = need_in_venv("python") else { return };
        let wheel = wheel(stage, &python);
        let source = stage.publish(NAME, &wheel);
        // The second time by digest, which is another URL to pip: its own cache does not know it.
        let urls = [stage.path_url(&source), stage.path_url_sha(&source, &wheel.sha256())];
        for (url, target) in urls.iter().zip(["cold", "hot"]) {
            pip(stage, &python, url, target).assert_success();
            let module = std::fs::read_to_string(stage.file(target).join("demo.py")).unwrap();
            assert_eq!(module, "answer = 42\n");
        }
        assert_eq!(stage.up.count(NAME), 1);
        stage.wait_for_hit(&source);
    }
}

on_each_broken_stream! {
    fn a_streamed_miss_with_a_wrong_checksum_is_not_installed(stage: &Stage) {
        let Some(python) = need_in_venv("python") else { return };
        let source = stage.publish_slowly(NAME, &wheel(stage, &python));
        let ended = pip(stage, &python, &stage.path_url_sha(&source, WRONG_SHA), "target");
        assert!(!ended.success, "a bad wheel is called a success: {ended:?}");
        assert!(!stage.file("target").join("demo.py").exists(), "nothing of it is installed");
        stage.assert_streamed_and_broken();
    }
}
