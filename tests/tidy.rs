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
    ("config", 1),
    ("telemetry", 1),
    ("catalog", 2),
    ("blobs", 2),
    ("upstream", 2),
    ("cache", 3),
    ("jobs", 4),
    ("server", 5),
    ("cli", 6),
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

/// The text of a document without its code blocks, in which brackets and hashes mean something else.
fn prose(document: &Path) -> String {
    let text = fs::read_to_string(document).unwrap();
    let mut is_code = false;
    let lines = text.lines().filter(|line| {
        let is_fence = line.trim_start().starts_with("```");
        is_code ^= is_fence;
        !is_code && !is_fence
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// The names by which a document's headings can be linked to, made as Git forges make them.
fn anchors(prose: &str) -> Vec<String> {
    let (mut names, mut found) = (Vec::new(), Vec::new());
    for heading in prose.lines().filter(|line| line.starts_with('#')) {
        let is_kept = |c: &char| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_');
        let text: String = heading.trim_start_matches('#').trim().chars().filter(is_kept).collect();
        let name = text.to_lowercase().replace(' ', "-");
        let twins = names.iter().filter(|other| **other == name).count();
        found.push(if twins == 0 { name.clone() } else { format!("{name}-{twins}") });
        names.push(name);
    }
    found
}

/// What is wrong with a link from `document`, if anything. Links to other hosts are not followed.
fn broken_link(document: &Path, target: &str) -> Option<String> {
    if target.contains("://") || target.starts_with("mailto:") {
        return None;
    }
    let (path, anchor) = target.split_once('#').unwrap_or((target, ""));
    let file = if path.is_empty() { document.to_path_buf() } else { document.parent().unwrap().join(path) };
    if !file.exists() {
        return Some("no such file".to_string());
    }
    let is_page = file.extension().is_some_and(|extension| extension == "md");
    let leads = anchor.is_empty() || (is_page && anchors(&prose(&file)).iter().any(|name| name == anchor));
    (!leads).then(|| "no such heading".to_string())
}

#[test]
fn links_between_documents_resolve() {
    let mut complaints = Vec::new();
    let documents = files(root(), "md");
    assert!(!documents.is_empty(), "there are documents");
    for document in documents {
        for target in prose(&document).split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let problem = broken_link(&document, target.trim());
            complaints.extend(problem.map(|problem| format!("{}: {target}: {problem}", document.display())));
        }
    }
    none("links that lead nowhere", complaints);
}

#[test]
fn anchors_are_made_as_forges_make_them() {
    let page = "# The HTTP API\n## GET /fetch\n### `503` and *more*: a, b\n## GET /fetch\n";
    assert_eq!(anchors(page), ["the-http-api", "get-fetch", "503-and-more-a-b", "get-fetch-1"]);
    let here = root().join("docs/api.md");
    assert_eq!(broken_link(&here, "security.md#no-such-heading").as_deref(), Some("no such heading"));
    assert_eq!(broken_link(&here, "no-such-page.md").as_deref(), Some("no such file"));
    assert_eq!(broken_link(&here, "#ranges"), None);
}

#[test]
fn every_page_is_in_the_contents() {
    let contents = prose(&root().join("docs/README.md"));
    let pages = files(&root().join("docs"), "md");
    let name = |page: &PathBuf| page.strip_prefix(root().join("docs")).unwrap().display().to_string();
    let is_missing = |name: &String| name != "README.md" && !contents.contains(&format!("]({name})"));
    none("pages that docs/README.md does not list", pages.iter().map(name).filter(is_missing).collect());
}

/// A test that a document names as `binary::module::function`: where its source is, and the function.
fn test_named(word: &str) -> Option<(PathBuf, &str)> {
    let parts: Vec<&str> = word.split("::").collect();
    let [binary, module, function] = parts[..] else { return None };
    let dir = root().join("tests").join(binary);
    dir.is_dir().then(|| (dir.join(format!("{module}.rs")), function))
}

#[test]
fn tests_that_documents_name_exist() {
    let (mut seen, mut complaints) = (0, Vec::new());
    for document in files(root(), "md") {
        let text = prose(&document);
        for (file, function) in text.split('`').filter_map(test_named) {
            seen += 1;
            if !fs::read_to_string(&file).unwrap_or_default().contains(&format!("fn {function}(")) {
                complaints.push(format!("{}: {function} in {}", document.display(), file.display()));
            }
        }
    }
    assert!(seen > 10, "docs/document.md names tests");
    none("tests that are named and don't exist", complaints);
}
