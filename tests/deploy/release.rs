//! The files of a release: the same from the same input, and complete.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;

use serde_json::Value;

use crate::harness::content::sha256;
use crate::package::build_package;
use crate::program::need;
use crate::root;

/// The output of `deploy/dependencies`.
fn dependencies(what: &str) -> String {
    let output = Command::new(root().join("deploy/dependencies")).arg(what).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Name and version of every crate that cargo itself says is linked into the program; procedural macros, which it lists
/// too, are left out with what only they need.
fn linked() -> BTreeSet<String> {
    let args = ["tree", "--locked", "--edges", "normal,no-proc-macro", "--prefix", "none", "--format", "{p}"];
    let mut found = BTreeSet::new();
    for target in ["x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"] {
        let cargo = std::env::var_os("CARGO").unwrap_or("cargo".into());
        let output =
            Command::new(cargo).args(args).args(["--target", target]).current_dir(root()).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let name = |line: &str| line.split(' ').take(2).collect::<Vec<_>>().join(" ").replace(" v", " ");
        found.extend(text.lines().filter(|line| !line.is_empty()).map(name));
    }
    found.retain(|package| !package.starts_with("artifact-cache "));
    assert!(found.len() > 50, "{found:?}");
    found
}

#[test]
fn the_bill_of_materials_lists_what_is_linked() {
    if need("python3").is_none() {
        return;
    }
    let bill: Value = serde_json::from_str(&dependencies("sbom")).unwrap();
    assert_eq!((&bill["bomFormat"], &bill["specVersion"]), (&"CycloneDX".into(), &"1.5".into()));
    let text = |value: &Value| value.as_str().unwrap_or_default().to_string();
    let components = bill["components"].as_array().unwrap();
    let named: BTreeSet<String> =
        components.iter().map(|c| format!("{} {}", text(&c["name"]), text(&c["version"]))).collect();
    assert_eq!(named, linked());
    for component in components {
        assert!(component["licenses"][0]["expression"].is_string(), "a licence: {component}");
    }
}

#[test]
fn every_linked_library_has_its_licence_text() {
    if need("python3").is_none() {
        return;
    }
    let text = dependencies("licences");
    let missing: Vec<_> =
        linked().into_iter().filter(|package| !text.contains(&format!("\n{package} ("))).collect();
    assert_eq!(missing, Vec::<String>::new());
    assert!(
        !text.contains("without a text of their own"),
        "{}",
        text.split("without a text").last().unwrap()
    );
}

#[test]
fn the_same_program_gives_the_same_package() {
    let mut digests = BTreeSet::new();
    for _ in 0..2 {
        let dir = tempfile::tempdir().unwrap();
        let Some(package) = build_package(dir.path()) else { return };
        digests.insert(sha256(&fs::read(package).unwrap()));
    }
    assert_eq!(digests.len(), 1, "two builds of one package differ");
}
