//! Pages of `docs/`: their code blocks, run as they stand there.

use std::path::PathBuf;
use std::process::Command;

use crate::program::{Ended, run};
use crate::stage::Stage;

/// The line before a block that no test can run; what follows is the reason.
const NOT_RUN: &str = "<!-- not run: ";

/// A page of the documentation.
pub struct Page {
    name: &'static str,
    text: String,
}

/// A fenced block of a page.
#[derive(Debug, Clone)]
pub struct Block {
    /// The heading above it.
    pub heading: String,
    /// The word behind the fence.
    pub language: String,
    pub text: String,
    /// It says of itself that no test runs it.
    pub not_run: bool,
}

impl Page {
    /// Reads `docs/<name>`.
    pub fn read(name: &'static str) -> Page {
        let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("docs").join(name);
        Page { name, text: std::fs::read_to_string(path).unwrap() }
    }

    pub fn text(&self) -> &str {
        &self.text
    }

    /// Its fenced blocks in this language.
    pub fn blocks(&self, language: &str) -> Vec<Block> {
        let (mut found, mut open): (Vec<Block>, Option<Block>) = (Vec::new(), None);
        let (mut heading, mut not_run) = (String::new(), false);
        for line in self.text.lines() {
            match (&mut open, line.strip_prefix("```")) {
                (Some(_), Some("")) => found.extend(open.take()),
                (Some(block), _) => block.text += &format!("{line}\n"),
                (None, Some(word)) => {
                    let (heading, language) = (heading.clone(), word.to_string());
                    open = Some(Block { heading, language, text: String::new(), not_run });
                    not_run = false;
                }
                (None, None) if line.starts_with('#') => {
                    heading = line.trim_start_matches('#').trim().to_string()
                }
                (None, None) => not_run = line.starts_with(NOT_RUN) || (not_run && line.is_empty()),
            }
        }
        assert!(open.is_none(), "{}: a block that does not end", self.name);
        found.retain(|block| block.language == language);
        found
    }

    /// Runs every shell block in order and returns what each printed. Places are put in for those that the page names:
    /// addresses, `/data`, `https://example.com`, and what `also` says.
    #[track_caller]
    pub fn run(&self, stage: &Stage, also: &[(&str, &str)]) -> Vec<(Block, Ended)> {
        let blocks: Vec<Block> = self.blocks("bash").into_iter().filter(|block| !block.not_run).collect();
        assert!(!blocks.is_empty(), "{} has blocks to run", self.name);
        let ran = blocks.into_iter().map(|block| {
            let ended = bash(stage, &block.text, also);
            assert!(ended.success, "{} under {:?}:\n{}{ended:?}", self.name, block.heading, block.text);
            (block, ended)
        });
        ran.collect()
    }
}

/// Runs a script in the operator's directory, places put in as in [`Page::run`]; any failing command ends it.
#[track_caller]
pub fn bash(stage: &Stage, script: &str, also: &[(&str, &str)]) -> Ended {
    let (api, metrics) = (stage.service.api.to_string(), stage.service.metrics.unwrap().to_string());
    let data = stage.dir().join("data").display().to_string();
    let upstream = stage.up.url("");
    let places = [
        ("https://artifactcache.lan", format!("http://{api}")),
        ("localhost:8080", api.clone()),
        ("127.0.0.1:8080", api),
        ("localhost:9090", metrics),
        ("/data", data),
        ("https://example.com", upstream.clone()),
        ("https://github.com", upstream.clone()),
        ("https://repo1.maven.org", upstream),
    ];
    let mut script = also.iter().fold(script.to_string(), |script, (from, to)| script.replace(from, to));
    for (from, to) in &places {
        script = script.replace(from, to);
    }
    let mut command = Command::new("bash");
    command.args(["-euo", "pipefail", "-c", &script]).current_dir(stage.dir());
    command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
    command.env("HOME", stage.dir()).env("LC_ALL", "C.UTF-8");
    run(command)
}

/// What the block under this heading printed.
#[track_caller]
pub fn printed<'a>(ran: &'a [(Block, Ended)], heading: &str) -> &'a str {
    let under: Vec<_> = ran.iter().filter(|(block, _)| block.heading == heading).collect();
    assert_eq!(under.len(), 1, "one block under {heading:?}");
    &under[0].1.stdout
}
