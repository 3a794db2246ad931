//! Taste as a test: layers, lengths, module docs, and the small promises that only a reader of all files would miss.

use std::fs;
use std::path::{Path, PathBuf};

/// Longest a source file may be before its tests, in lines.
const LONGEST: usize = 600;

/// Modules and their layers (ARCHITECTURE.md). A file imports from lower layers, or from its own.
const LAYERS: &[(&str, u8)] = &[
    ("artifact", 0),
    ("error", 0),
    ("kill_point", 0),
    ("sync", 0),
    ("config", 1),
    ("telemetry", 1),
    ("catalog", 2),
    ("blobs", 2),
    ("upstream", 2),
    ("cache", 3),
    ("jobs", 4),
    ("server", 5),
    ("cli", 6),
    ("fuzz", 6),
];

/// The layer whose modules never import one another.
const APART: u8 = 2;

/// Imports against the layers that are allowed: (file's module, imported module, why).
const ALLOWED: &[(&str, &str, &str)] = &[];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// All files below `dir` with this extension, without build output and hidden directories.
fn files(dir: &Path, extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap().map(|entry| entry.unwrap()) {
        let (path, name) = (entry.path(), entry.file_name());
        let skipped = name.to_string_lossy().starts_with('.') || path == root().join("target");
        if entry.file_type().unwrap().is_dir() && !skipped {
            found.extend(files(&path, extension));
        } else if path.extension().is_some_and(|e| e == extension) {
            found.push(path);
        }
    }
    found.sort();
    found
}

/// Every source file: its path below `src`, its text, and the part of it before its tests.
fn sources() -> Vec<(String, String, String)> {
    let src = root().join("src");
    let read = |path: PathBuf| {
        let name = path.strip_prefix(&src).unwrap().display().to_string();
        let text = fs::read_to_string(&path).unwrap();
        let product = match name.ends_with("tests.rs") || name.contains("tests/") {
            true => String::new(),
            false => text.split("#[cfg(test)]").next().unwrap().to_string(),
        };
        (name, text, product)
    };
    let all: Vec<_> = files(&src, "rs").into_iter().map(read).collect();
    assert!(all.len() > 10, "the walk finds the sources");
    all
}

/// Fails with every complaint at once.
#[track_caller]
fn none(what: &str, complaints: Vec<String>) {
    assert!(complaints.is_empty(), "{what}:\n  {}", complaints.join("\n  "));
}

/// Complaints about lines of product code (comments left out) in which `wrong` finds something.
fn lines_with(wrong: impl Fn(&str, &str) -> Option<String>) -> Vec<String> {
    let mut complaints = Vec::new();
    for (name, _, product) in sources() {
        for (number, line) in
            product.lines().enumerate().filter(|(_, line)| !line.trim_start().starts_with("//"))
        {
            complaints.extend(wrong(&name, line).map(|what| format!("src/{name}:{}: {what}", number + 1)));
        }
    }
    complaints
}

#[test]
fn every_file_says_what_it_is_for() {
    let mut all = files(&root().join("src"), "rs");
    all.extend(files(&root().join("tests"), "rs"));
    let silent = |path: &PathBuf| !fs::read_to_string(path).unwrap().starts_with("//! ");
    none(
        "files without a `//!` line on top",
        all.iter().filter(|path| silent(path)).map(|p| p.display().to_string()).collect(),
    );
}

#[test]
fn no_file_is_too_long() {
    let long = |(name, _, product): (String, String, String)| {
        let lines = product.lines().count();
        (lines > LONGEST).then(|| format!("src/{name}: {lines} lines"))
    };
    none("files too long to read", sources().into_iter().filter_map(long).collect());
}

/// The module a file belongs to: its first path component.
fn module_of(name: &str) -> &str {
    name.split('/').next().unwrap().trim_end_matches(".rs")
}

fn layer_of(module: &str) -> Option<u8> {
    LAYERS.iter().find(|(name, _)| *name == module).map(|(_, layer)| *layer)
}

/// The modules of this crate named in a line: after `crate::`, also in braces.
fn imports(line: &str) -> Vec<String> {
    let identifier =
        |text: &str| text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    let mut found = Vec::new();
    for rest in line.split("crate::").skip(1) {
        match rest.strip_prefix('{') {
            None => found.push(identifier(rest)),
            Some(list) => found.extend(top_level_names(list).iter().map(|name| identifier(name))),
        }
    }
    found
}

/// `a::{b, c}, d::e}` → `a`, `d`.
fn top_level_names(list: &str) -> Vec<String> {
    let (mut depth, mut names, mut current) = (0, Vec::new(), String::new());
    for c in list.chars() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => names.push(std::mem::take(&mut current).trim().to_string()),
            _ if depth == 0 => current.push(c),
            _ => {}
        }
    }
    names.push(current.trim().to_string());
    names
}

#[test]
fn imports_point_down() {
    let mut complaints = Vec::new();
    for (name, _, product) in sources() {
        let module = module_of(&name);
        if matches!(module, "lib" | "main") {
            continue;
        }
        let Some(layer) = layer_of(module) else {
            complaints.push(format!("src/{name}: module `{module}` has no layer; add it to LAYERS"));
            continue;
        };
        // A `use crate::{…}` may span lines, so the file is read as one.
        let code: Vec<&str> = product.lines().filter(|line| !line.trim_start().starts_with("//")).collect();
        for other in imports(&code.join(" ")) {
            let Some(theirs) = layer_of(&other).filter(|_| other != module) else { continue };
            let allowed = ALLOWED.iter().any(|(from, to, _)| *from == module && *to == other);
            if !allowed && (theirs > layer || (theirs == layer && layer == APART)) {
                complaints.push(format!(
                    "src/{name}: `{module}` (layer {layer}) imports `{other}` (layer {theirs})"
                ));
            }
        }
    }
    complaints.dedup();
    none("imports against the layers", complaints);
}

#[test]
fn braces_and_paths_are_both_seen_as_imports() {
    assert_eq!(imports("use crate::artifact::Digest;"), ["artifact"]);
    assert_eq!(imports("use crate::{cache::{Body, Cache}, config::Config};"), ["cache", "config"]);
    assert_eq!(imports("let x = crate::error::Error::new(crate::config::Y);"), ["error", "config"]);
}

#[test]
fn sql_lives_in_the_catalogue() {
    const WORDS: [&str; 7] =
        ["SELECT ", "INSERT INTO", "DELETE FROM", "CREATE TABLE", "PRAGMA ", "BEGIN IMMEDIATE", "VACUUM"];
    let wrong = |name: &str, line: &str| {
        let word = WORDS.iter().find(|word| line.contains(**word))?;
        (module_of(name) != "catalog").then(|| word.to_string())
    };
    none("SQL outside the catalogue", lines_with(wrong));
}

#[test]
fn nothing_is_left_to_do() {
    const WORDS: [&str; 5] = ["todo!", "unimplemented!", "dbg!", "TODO", "FIXME"];
    let mut complaints =
        lines_with(|_, line| WORDS.iter().find(|word| line.contains(**word)).map(|w| w.to_string()));
    let ignored = concat!("#[", "ignore");
    for path in [files(&root().join("src"), "rs"), files(&root().join("tests"), "rs")].concat() {
        if fs::read_to_string(&path).unwrap().contains(ignored) {
            complaints.push(format!("{}: an ignored test", path.display()));
        }
    }
    none("left to do", complaints);
}

#[test]
fn nobodys_own_directories_are_named() {
    const PLACES: [&str; 3] = ["/home/", "/root/", "/tmp/"];
    let starts_path = |line: &str, place: &str| {
        line.match_indices(place)
            .any(|(at, _)| !line[..at].ends_with(|c: char| c.is_alphanumeric() || c == '.' || c == '}'))
    };
    let mut complaints = Vec::new();
    for (name, text, _) in sources() {
        for place in PLACES.iter().filter(|place| text.lines().any(|line| starts_path(line, place))) {
            complaints.push(format!("src/{name}: {place}"));
        }
    }
    none("paths of somebody's machine", complaints);
}

#[test]
fn unwrap_gives_its_reason() {
    let wrong = |_: &str, line: &str| line.contains(".unwrap()").then(|| line.trim().to_string());
    none(
        "unwrap() in the product (use `?`, or expect() with the reason why it cannot fail)",
        lines_with(wrong),
    );
}

#[test]
fn the_changelog_knows_this_version() {
    let log = fs::read_to_string(root().join("CHANGELOG.md")).expect("there is a CHANGELOG.md");
    assert!(
        log.contains(env!("CARGO_PKG_VERSION")),
        "CHANGELOG.md has no entry for {}",
        env!("CARGO_PKG_VERSION")
    );
}

#[test]
fn links_between_documents_resolve() {
    let mut complaints = Vec::new();
    let documents = files(root(), "md");
    assert!(!documents.is_empty(), "there are documents");
    for document in documents {
        let text = fs::read_to_string(&document).unwrap();
        for target in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let path = target.split('#').next().unwrap().trim();
            let outside = path.is_empty() || path.contains("://") || path.starts_with("mailto:");
            if !outside && !document.parent().unwrap().join(path).exists() {
                complaints.push(format!("{}: {target}", document.display()));
            }
        }
    }
    none("links that lead nowhere", complaints);
}
