//! Pages with commands for operators, run as they stand there, on a running and on a stopped service.

use crate::harness::{Content, Reply, Running, eventually};
use crate::page::{Page, bash, printed};
use crate::program::need;
use crate::stage::Stage;

/// What the tables say of each artifact that must outlive maintenance.
fn rows(service: &Running) -> Vec<(i64, String, String)> {
    let connection = service.sqlite();
    let mut query =
        connection.prepare("SELECT id, source_url, storage_path FROM artifacts ORDER BY id").unwrap();
    let rows = query.query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?))).unwrap();
    rows.collect::<Result<_, _>>().unwrap()
}

fn has_programs() -> bool {
    ["sqlite3", "jq", "curl"].iter().all(|program| need(program).is_some())
}

#[test]
fn the_first_steps_lead_to_an_artifact() {
    if !has_programs() {
        return;
    }
    let stage = Stage::new();
    let content = Content::new(92, 100_000);
    stage.publish("/file.tar.gz", &content);
    let ran = Page::read("first-steps.md").run(&stage, &[]);
    assert_eq!(std::fs::read(stage.dir().join("file.tar.gz")).unwrap(), content.bytes());
    assert!(printed(&ran, "Does it work?").contains(r#""status":"healthy""#));
    let blocks: Vec<_> = ran.iter().filter(|(block, _)| block.heading == "Fetch something").collect();
    assert!(blocks[1].1.stdout.to_lowercase().contains("x-cache-status: hit"), "{blocks:?}");
    let error: serde_json::Value = serde_json::from_str(printed(&ran, "Insist on its content")).unwrap();
    assert_eq!((&error["error"], &error["actual"]), (&"checksum_mismatch".into(), &content.sha256().into()));
    let seen = printed(&ran, "See what is there");
    assert!(seen.contains("artifact_cache_requests_total{status=\"hit\"}"), "{seen}");
}

#[test]
fn maintenance_of_a_running_and_of_a_stopped_service() {
    if !has_programs() {
        return;
    }
    let mut stage = Stage::new();
    let did = stage.traffic();
    // Of the size the page looks for, but without its bytes; no row knows it.
    let orphan = "ab".repeat(32);
    let path = stage.service.blob(&orphan);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::File::create(&path).unwrap().set_len(3 << 30).unwrap();
    let page = Page::read("maintenance.md");
    let before = (rows(&stage.service), stage.service.stats()["stored_bytes"].clone());
    let digest = before.0[0].2.rsplit('/').next().unwrap().to_string();
    let also = [("7a1b2c3d4e5f6a7b8c9d0e1f2a3b4c5d6e7f8a9b0c1d2e3f4a5b6c7d8e9f0a1b", digest.as_str())];

    let ran = page.run(&stage, &also);
    let stats: serde_json::Value = serde_json::from_str(printed(&ran, "Statistics")).unwrap();
    assert_eq!(stats["total_items"], 3);
    assert!(printed(&ran, "Disk space").contains("data/cache"), "{ran:?}");
    let large: Vec<_> = ran.iter().filter(|(block, _)| block.heading == "Large files").collect();
    assert_eq!(large[0].1.stdout.lines().count(), 1, "only the large one: {large:?}");
    assert!(large[0].1.stdout.contains(&orphan));
    let by_digest: Vec<&str> = large[1].1.stdout.lines().collect();
    assert_eq!(by_digest.len(), 2 + 3, "two URLs have that content, and three are known: {by_digest:?}");
    assert_eq!(by_digest[2], format!("5000000|{}", did.sources[2]), "the largest comes first");
    assert_eq!(printed(&ran, "The database"), "ok\n");
    assert_eq!(printed(&ran, "Is every file what it should be?"), "");
    assert_eq!(printed(&ran, "Files that the database does not know"), format!("{orphan}\n"));

    // VACUUM and ANALYZE have run beside the service: nothing has changed, and it serves, records and counts on.
    assert_eq!(rows(&stage.service), before.0);
    assert_eq!(stage.service.stats()["stored_bytes"], before.1);
    assert_eq!(stage.service.fetch(&did.sources[0]).cache_status(), "HIT");
    let later = stage.publish("/later.bin", &Content::new(93, 1_000));
    assert_eq!(stage.service.fetch(&later).cache_status(), "MISS");
    assert_eq!(stage.service.fetch(&later).cache_status(), "HIT");
    let before = rows(&stage.service);
    assert_eq!(before.len(), 4);

    stage.service.term();
    let script = "sqlite3 /data/metadata.db 'PRAGMA integrity_check;' 'VACUUM;' 'ANALYZE;'";
    assert_eq!(bash(&stage, script, &[]).assert_success().stdout, "ok\n");
    let again = stage.service.again().start();
    assert_eq!(rows(&again), before);
    assert_eq!(again.fetch(&later).cache_status(), "HIT");
}

#[test]
fn vacuum_and_downloads_do_not_disturb_each_other() {
    if !has_programs() {
        return;
    }
    let stage = Stage::new();
    let did = stage.traffic();
    let fresh: Vec<_> = (0..40)
        .map(|n| stage.up.serve(&format!("/fresh-{n}"), Reply::ok(&Content::new(200 + n, 50_000))))
        .collect();
    std::thread::scope(|scope| {
        let operator = scope.spawn(|| {
            let script = "for i in 1 2 3 4 5 6 7 8; do sqlite3 -cmd '.timeout 10000' /data/metadata.db 'VACUUM; ANALYZE;'; done";
            bash(&stage, script, &[]).assert_success();
        });
        for (n, url) in fresh.iter().enumerate() {
            stage.service.fetch(url).assert_ok(&Content::new(200 + n as u64, 50_000).bytes());
            assert_eq!(stage.service.fetch(&did.sources[0]).cache_status(), "HIT");
        }
        operator.join().unwrap();
    });
    let urls: Vec<_> = rows(&stage.service).into_iter().map(|(_, url, _)| url).collect();
    assert_eq!(urls, [did.sources, fresh].concat());
    assert_eq!(bash(&stage, "sqlite3 /data/metadata.db 'PRAGMA integrity_check'", &[]).stdout, "ok\n");
}

/// The commands of the README and of the API's page, each in a directory of its own.
#[test]
fn the_examples_of_the_readme_and_the_api_work() {
    if !has_programs() || need("wget").is_none() {
        return;
    }
    let (stage, content) = (Stage::new(), Content::new(97, 70_000));
    stage.publish("/file.tar.gz", &content);
    let named = Reply::ok(&content).field("Content-Disposition", "attachment; filename=file.tar.gz");
    stage.up.serve("/get", named);
    let also = [("<64 hex digits>", content.sha256())];
    let also = also.each_ref().map(|(from, to)| (*from, to.as_str()));
    let mut ran = 0;
    for block in
        [Page::read("../README.md"), Page::read("api.md")].iter().flat_map(|page| page.blocks("bash"))
    {
        let is_ours = |line: &&str| line.starts_with("curl ") || line.starts_with("wget ");
        for command in block.text.lines().filter(is_ours) {
            let script = format!("cd $(mktemp -d -p .); {command}; sha256sum *");
            let sum = bash(&stage, &script, &also);
            assert!(sum.stdout.starts_with(&content.sha256()), "{command}: {sum:?}");
            ran += 1;
        }
    }
    assert!(ran >= 7, "{ran} commands");
    let asked = stage.up.requests("/get");
    assert_eq!(asked.len(), 1, "the query and the path form mean the same");
    assert!(asked[0].line.contains("/get?name=file&os=linux "), "{asked:?}");
}

/// The checks that the document's section Troubleshooting asks for.
#[test]
fn the_documents_troubleshooting_commands_work() {
    if !has_programs() {
        return;
    }
    let stage = Stage::new();
    let did = stage.traffic();
    let source = &did.sources[0];
    let path = rows(&stage.service)[0].2.clone();
    let say = |script: &str| bash(&stage, script, &[]).assert_success().stdout.clone();
    assert!(say(&format!("ls -la /data/cache/{path}")).contains("300000"));
    let row =
        say(&format!("sqlite3 /data/metadata.db \"SELECT * FROM artifacts WHERE source_url='{source}';\""));
    assert!(row.contains(&path) && row.contains("|300000|"), "{row}");
    assert!(say("curl localhost:8080/api/stats").contains("\"total_items\":3"));
    let asked = bash(&stage, &format!("time curl -I {source}"), &[]);
    assert!(asked.stdout.starts_with("HTTP/1.1 200") && asked.stderr.contains("real"), "{asked:?}");
    let durations = say("curl localhost:9090/metrics | grep duration");
    assert!(durations.contains("artifact_cache_request_duration_seconds_count 10"), "{durations}");
    assert_eq!(say("sqlite3 /data/metadata.db 'PRAGMA journal_mode=WAL;'"), "wal\n", "it is already");
    for command in ["VACUUM;", "ANALYZE;"] {
        // As written there, sqlite3 does not wait for the service's own writing.
        eventually(command, || {
            let ended = bash(&stage, &format!("sqlite3 /data/metadata.db \"{command}\""), &[]);
            assert!(ended.success || ended.stderr.contains("database is locked"), "{ended:?}");
            ended.success.then_some(())
        });
    }
    let open = say("find /data/cache -type f -size +1G -exec ls -lh {} \\;");
    assert_eq!(open, "", "none is that large");
}
