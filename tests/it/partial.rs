//! Downloads that break off for good, by an upstream or by a kill, and go on later from their last checkpoint.

use std::fs::{self, File};
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use crate::harness::{Content, End, Gate, Reply, Running, Service, Upstream, eventually, fetch_target};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 8 * MIB;
/// Where the first connection of these tests ends; the last checkpoint is exactly here.
const CUT: u64 = 5 * MIB;
const STRONG: (&str, &str) = ("ETag", "\"one\"");
const RESUMED: &str = "artifact_cache_upstream_resumes_total";

/// Checkpoints at every MiB, and no second attempt within a flight.
fn service() -> Service {
    Service::new().env("STORAGE__CHECKPOINT_BYTES", "1MiB").env("UPSTREAM__MAX_RETRIES", "0")
}

/// The first connection of a path is cut at [`CUT`], the others are served well.
fn cut_once(up: &Upstream, path: &str, content: &Content, fields: &[(&str, &str)]) -> String {
    let reply = fields.iter().fold(Reply::ok(content), |reply, (name, value)| reply.field(name, value));
    let content = content.clone();
    up.on(path, move |x| match x.attempt {
        1 => {
            x.send(&reply.head(200, 0))?;
            x.body(&content, 0, CUT)
        }
        _ => x.reply(&reply),
    })
}

/// Lets a download fail for good, which leaves a spool and its checkpoint.
#[track_caller]
fn break_off(service: &Running, url: &str) {
    let left = service.spooled().len();
    service.fetch(url).assert_error(502, "upstream_error");
    assert_eq!(service.spooled().len(), left + 2, "a spool and its checkpoint: {:?}", service.spooled());
}

/// The only file of the spool directory with this extension, or without one.
#[track_caller]
fn left(service: &Running, extension: Option<&str>) -> PathBuf {
    let spooled = service.spooled();
    let is_it = |path: &&PathBuf| path.extension().and_then(|e| e.to_str()) == extension;
    spooled.iter().find(is_it).unwrap_or_else(|| panic!("no {extension:?} in {spooled:?}")).clone()
}

/// The `Range` of the last request for a path.
fn last_range(up: &Upstream, path: &str) -> Option<String> {
    up.requests(path).last().and_then(|head| head.get("Range").map(str::to_string))
}

#[test]
fn a_download_that_failed_for_good_goes_on_at_the_next_request() {
    let (up, service, content) = (Upstream::start(), service().start(), Content::new(500, SIZE));
    let fields = [STRONG, ("Content-Type", "application/x-first"), ("Content-Disposition", "filename=a.bin")];
    let url = cut_once(&up, "/cut", &content, &fields);
    break_off(&service, &url);
    assert_eq!(service.metric("artifact_cache_partial_bytes"), CUT as f64);
    assert_eq!(service.stats()["total_items"], 0, "nothing is recorded of a part");
    let answer = service.fetch(&url);
    assert_eq!(answer.assert_ok(&content.bytes()).cache_status(), "MISS");
    assert_eq!(answer.header("X-Content-SHA256"), content.sha256());
    assert_eq!(answer.header("Content-Type"), "application/x-first");
    assert!(answer.header("Content-Disposition").contains("a.bin"), "{:?}", answer.head);
    let asked = up.requests("/cut");
    assert_eq!((asked[1].get("Range"), asked[1].get("If-Range")), (Some("bytes=5242880-"), Some("\"one\"")));
    assert_eq!((asked.len(), service.metric(RESUMED)), (2, 1.0));
    assert_eq!(service.metric("artifact_cache_partial_bytes"), 0.0);
    assert_eq!(service.fetch(&url).assert_ok(&content.bytes()).cache_status(), "HIT");
}

#[test]
fn what_sigterm_breaks_off_goes_on_after_the_start() {
    let (up, content) = (Upstream::start(), Content::new(501, SIZE));
    let mut service = service().env("SERVER__SHUTDOWN_GRACE_SECONDS", "0.1").start();
    let (reply, served) = (Reply::ok(&content).field(STRONG.0, STRONG.1), content.clone());
    let url = up.on("/slow", move |x| match x.attempt {
        1 => {
            x.send(&reply.head(200, 0))?;
            x.body(&served, 0, CUT)?;
            x.hang()
        }
        _ => x.reply(&reply),
    });
    let mut client = service.connect();
    client.request("GET", &fetch_target(&url), &[]);
    service.wait_metric("artifact_cache_bytes_downloaded_total", CUT as f64);
    service.term();
    let again = service.again().start();
    again.fetch(&url).assert_ok(&content.bytes());
    assert_eq!(
        last_range(&up, "/slow").as_deref(),
        Some("bytes=5242880-"),
        "the stop wrote a last checkpoint"
    );
}

#[test]
fn it_goes_on_after_a_kill_between_any_two_steps() {
    const LARGE: u64 = 40 * MIB;
    const PIECE: u64 = 3 * MIB;
    // The first leaves something to resume; each of the others dies in the second of its kind.
    let points = [
        "checkpoint.durable:2",
        "resume.cut",
        "resume.hashed",
        "checkpoint.synced:2",
        "checkpoint.written:2",
        "checkpoint.renamed:2",
    ];
    let (up, content) = (Upstream::start(), Content::new(502, LARGE));
    let reply = Reply::ok(&content).field(STRONG.0, STRONG.1);
    let (url, sent) = up.serve_in_pieces("/flaky", reply, PIECE);
    let start = |point: &str, like: Service| like.variable("ARTIFACT_CACHE_KILL_POINT", point).start();
    let mut service = start(points[0], service().without("UPSTREAM__MAX_RETRIES"));
    for n in 0..points.len() {
        let mut client = service.connect();
        client.request("GET", &fetch_target(&url), &[]);
        let (status, _) = service.wait_exit();
        assert!(status.code().is_none(), "{} ends it: {status}", points[n]);
        assert!(client.try_head().is_err(), "nobody was told that it is whole");
        service = start(points.get(n + 1).unwrap_or(&"none"), service.again());
        assert!(service.spooled().len() == 2, "{}: {:?}", points[n], service.spooled());
    }
    let answer = service.fetch(&url);
    assert_eq!(answer.assert_ok(&content.bytes()).cache_status(), "MISS");
    assert_eq!(answer.header("X-Content-SHA256"), content.sha256());
    let (sent, kills) = (sent.load(Ordering::SeqCst), points.len() as u64);
    // A kill costs what came since the checkpoint before it: at most the piece that it was in and the one before.
    assert!(sent <= LARGE + kills * 2 * PIECE, "{sent} bytes were sent for {LARGE}");
}

#[test]
fn two_urls_get_through_a_storm_of_restarts() {
    const LARGE: u64 = 24 * MIB;
    const PIECE: u64 = 2 * MIB;
    const KILLS: u64 = 6;
    let up = Upstream::start();
    let contents = [Content::new(503, LARGE), Content::new(504, LARGE)];
    let served = contents.each_ref().map(|content| {
        let reply = Reply::ok(content).field("ETag", &format!("\"{}\"", &content.sha256()[..8]));
        up.serve_in_pieces(&format!("/{}", &content.sha256()[..8]), reply, PIECE)
    });
    let sent = || served.iter().map(|(_, sent)| sent.load(Ordering::SeqCst)).sum::<u64>();
    let mut service = service().without("UPSTREAM__MAX_RETRIES").start();
    for round in 0..KILLS {
        let clients: Vec<_> = served
            .iter()
            .map(|(url, _)| {
                let mut client = service.connect();
                client.request("GET", &fetch_target(url), &[]);
                client
            })
            .collect();
        let before = sent();
        eventually("bytes come", || (sent() >= before + 3 * PIECE).then_some(()));
        std::thread::sleep(Duration::from_millis(30 * round));
        service.kill();
        drop(clients);
        service = service.again().start();
        // And once more before anybody has asked for anything.
        service.kill();
        service = service.again().start();
    }
    for ((url, _), content) in served.iter().zip(&contents) {
        service.fetch(url).assert_ok(&content.bytes());
    }
    let sent = sent();
    assert!(sent < 2 * LARGE * KILLS / 2, "{sent} bytes were sent for {} in {KILLS} kills", 2 * LARGE);
    assert_eq!(service.stats()["total_items"], 2);
}

#[test]
fn other_content_begins_anew_and_is_never_mixed_in() {
    let (up, service) = (Upstream::start(), service().start());
    let new = Content::new(506, SIZE - 1000);
    let whole = Reply::ok(&new).field("ETag", "\"two\"");
    let range = |first: u64, total: u64| format!("Content-Range: bytes {first}-{}/{total}\r\n", total - 1);
    let lie = |status: &str, fields: String, length: u64| {
        format!("HTTP/1.1 {status}\r\n{fields}Content-Length: {length}\r\n\r\n")
    };
    let lies = [
        ("a 200", None),
        ("a 206 of another ETag", Some(lie("206 P", range(CUT, SIZE) + "ETag: \"two\"\r\n", SIZE - CUT))),
        ("a 206 of another start", Some(lie("206 P", range(0, SIZE) + "ETag: \"one\"\r\n", SIZE))),
        (
            "a 206 of another total",
            Some(lie("206 P", range(CUT, SIZE - 1) + "ETag: \"one\"\r\n", SIZE - CUT - 1)),
        ),
        ("a 416", Some(lie("416 R", format!("Content-Range: bytes */{}\r\n", CUT - 1), 0))),
    ];
    for (n, (what, lie)) in lies.into_iter().enumerate() {
        let path = format!("/changed{n}");
        let url = cut_once(&up, &path, &Content::new(505, SIZE), &[STRONG]);
        break_off(&service, &url);
        let (whole, lied) = (whole.clone(), lie.clone());
        up.on(&path, move |x| match (x.head.get("Range"), &lied) {
            (Some(_), Some(lie)) => x.send(lie),
            _ => x.reply(&whole),
        });
        service.fetch(&url).assert_ok(&new.bytes());
        assert_eq!(up.count(&path), if lie.is_some() { 3 } else { 2 }, "{what}");
        assert!(service.spooled().is_empty(), "{what} leaves nothing behind: {:?}", service.spooled());
    }
}

#[test]
fn without_a_validator_only_a_known_digest_resumes() {
    let (up, service, content) = (Upstream::start(), service().start(), Content::new(507, SIZE));
    for (n, fields) in [&[][..], &[("ETag", "W/\"one\"")]].into_iter().enumerate() {
        let (unknown, known) = (format!("/unknown{n}"), format!("/known{n}"));
        let url = cut_once(&up, &unknown, &content, fields);
        break_off(&service, &url);
        service.fetch(&url).assert_ok(&content.bytes());
        assert_eq!(last_range(&up, &unknown), None, "nothing can tell whether it is still the same");
        let url = cut_once(&up, &known, &content, fields);
        break_off(&service, &url);
        service.fetch_sha(&url, &content.sha256()).assert_ok(&content.bytes());
        assert_eq!(last_range(&up, &known).as_deref(), Some("bytes=5242880-"));
    }
}

#[test]
fn a_mixture_without_a_validator_is_found_by_the_digest() {
    let up = Upstream::start();
    let service = service().env("UPSTREAM__MAX_RETRIES", "1").start();
    let (old, new) = (Content::new(508, SIZE), Content::new(509, SIZE));
    let short = Reply::ok(&old);
    let served = old.clone();
    let url = up.on("/mixed", move |x| {
        x.send(&short.head(200, 0))?;
        x.body(&served, 0, CUT)?;
        x.reset()
    });
    // A reset may swallow the last bytes; a checkpoint there is all the same.
    assert_eq!(service.fetch(&url).status, 502);
    up.serve("/mixed", Reply::ok(&new));
    service.fetch_sha(&url, &new.sha256()).assert_ok(&new.bytes());
    let ranges: Vec<_> = up.requests("/mixed").iter().map(|head| head.get("Range").is_some()).collect();
    assert!(ranges.ends_with(&[true, false]), "it resumed, and then began anew: {ranges:?}");
}

#[test]
fn flipped_bits_begin_anew() {
    use std::os::unix::fs::FileExt;
    let (up, content) = (Upstream::start(), Content::new(510, SIZE));
    let mut service = service().start();
    for (n, offset) in [0, CUT / 2, CUT - 1].into_iter().enumerate() {
        let path = format!("/flipped{n}");
        let url = cut_once(&up, &path, &content, &[STRONG]);
        break_off(&service, &url);
        service.term();
        let spool = File::options().read(true).write(true).open(left(&service, None)).unwrap();
        let mut byte = [0];
        spool.read_exact_at(&mut byte, offset).unwrap();
        spool.write_all_at(&[byte[0] ^ 1], offset).unwrap();
        service = service.again().start();
        service.fetch(&url).assert_ok(&content.bytes());
        assert_eq!(last_range(&up, &path), None);
        service.wait_log("says why", |line| {
            line["error"] == "its bytes are not those that its checkpoint was made of"
        });
    }
}

#[test]
fn a_spoiled_checkpoint_or_spool_begins_anew() {
    let (up, content) = (Upstream::start(), Content::new(511, SIZE));
    let mut service = service().start();
    type Spoil = fn(PathBuf, PathBuf);
    let spoils: [(&str, Spoil); 8] = [
        ("an empty checkpoint", |_, checkpoint| fs::write(checkpoint, "").unwrap()),
        ("half a checkpoint", |_, checkpoint| {
            let text = fs::read(&checkpoint).unwrap();
            fs::write(checkpoint, &text[..text.len() / 2]).unwrap()
        }),
        ("noise", |_, checkpoint| fs::write(checkpoint, Content::new(1, 5_000).bytes()).unwrap()),
        ("a checkpoint far beyond the end", |_, checkpoint| {
            let text = fs::read_to_string(&checkpoint).unwrap();
            let beyond = text.replace("\"offset\":5242880", "\"offset\":18446744073709551615");
            assert_ne!(text, beyond);
            fs::write(checkpoint, beyond).unwrap()
        }),
        ("a checkpoint that is a link", |_, checkpoint| {
            let elsewhere = checkpoint.parent().unwrap().parent().unwrap().join("elsewhere");
            fs::rename(&checkpoint, &elsewhere).unwrap();
            std::os::unix::fs::symlink(elsewhere, checkpoint).unwrap()
        }),
        ("no checkpoint", |_, checkpoint| fs::remove_file(checkpoint).unwrap()),
        ("no spool", |spool, _| fs::remove_file(spool).unwrap()),
        ("a shorter spool", |spool, _| {
            File::options().write(true).open(spool).unwrap().set_len(CUT - 1).unwrap()
        }),
    ];
    for (n, (what, spoil)) in spoils.into_iter().enumerate() {
        let path = format!("/spoiled{n}");
        let url = cut_once(&up, &path, &content, &[STRONG]);
        break_off(&service, &url);
        service.term();
        spoil(left(&service, None), left(&service, Some("checkpoint")));
        service = service.again().start();
        assert!(service.spooled().is_empty(), "{what} is removed at the start: {:?}", service.spooled());
        service.fetch(&url).assert_ok(&content.bytes());
        assert_eq!(last_range(&up, &path), None, "{what}");
    }
}

#[test]
fn they_go_when_their_time_is_up_whatever_the_clock_says() {
    const DAY: Duration = Duration::from_secs(24 * 3600);
    let (up, content) = (Upstream::start(), Content::new(512, SIZE));
    let mut service = service().start();
    let urls = ["/past", "/present", "/future"].map(|path| cut_once(&up, path, &content, &[STRONG]));
    let mut checkpoints = Vec::new();
    for url in &urls {
        break_off(&service, url);
        let is_new = |path: &PathBuf| path.extension().is_some() && !checkpoints.contains(path);
        checkpoints.push(service.spooled().into_iter().find(is_new).unwrap());
    }
    service.term();
    let now = SystemTime::now();
    let times =
        [now - DAY - Duration::from_secs(60), now - DAY + Duration::from_secs(600), now + DAY * 3_000];
    for (checkpoint, time) in checkpoints.iter().zip(times) {
        File::options().write(true).open(checkpoint).unwrap().set_modified(time).unwrap();
    }
    let again = service.again().start();
    assert_eq!(again.spooled().len(), 4, "the one of yesterday is gone: {:?}", again.spooled());
    assert_eq!(again.metric("artifact_cache_partial_bytes"), 2.0 * CUT as f64);
    for url in &urls {
        again.fetch(url).assert_ok(&content.bytes());
    }
    let ranges = ["/past", "/present", "/future"].map(|path| last_range(&up, path).is_some());
    assert_eq!(ranges, [false, true, true]);
}

#[test]
fn together_they_stay_under_their_limit() {
    let (up, content) = (Upstream::start(), Content::new(513, SIZE));
    let mut service = service().env("STORAGE__PARTIAL_MAX_BYTES", "11MiB").start();
    let urls = ["/a", "/b", "/c"].map(|path| cut_once(&up, path, &content, &[STRONG]));
    for url in &urls[..2] {
        break_off(&service, url);
    }
    service.fetch(&urls[2]).assert_error(502, "upstream_error");
    assert_eq!(service.metric("artifact_cache_partial_bytes"), 2.0 * CUT as f64);
    assert_eq!(service.spooled().len(), 4);
    service.term();
    // A lower limit counts at the next start.
    let mut lower = service.again().env("STORAGE__PARTIAL_MAX_BYTES", "6MiB").start();
    assert_eq!(lower.spooled().len(), 2);
    lower.term();
    let service = lower.again().env("STORAGE__PARTIAL_MAX_BYTES", "0").start();
    assert!(service.spooled().is_empty());
    for url in &urls {
        service.fetch(url).assert_ok(&content.bytes());
    }
    let ranges = ["/a", "/b", "/c"].map(|path| last_range(&up, path).is_some());
    assert_eq!(ranges, [false; 3]);
}

/// What could not be stored even in an empty spool costs no other download what it has.
#[test]
fn they_are_not_given_up_for_what_would_not_fit_all_the_same() {
    let (up, content) = (Upstream::start(), Content::new(530, SIZE));
    let service = service().env("STORAGE__MAX_ARTIFACT_BYTES", "1000TiB").start();
    let url = cut_once(&up, "/cut", &content, &[STRONG]);
    break_off(&service, &url);
    let absurd = up.on("/absurd", |x| x.send("HTTP/1.1 200 OK\r\nContent-Length: 1000000000000000\r\n\r\n"));
    let answer = service.fetch(&absurd);
    assert_eq!(answer.assert_error(500, "internal_error")["details"], "disk full");
    assert_eq!(service.metric("artifact_cache_partial_bytes"), CUT as f64);
    service.fetch(&url).assert_ok(&content.bytes());
    assert_eq!(service.metric(RESUMED), 1.0);
}

#[test]
fn nothing_is_kept_where_nothing_is_wanted() {
    let (up, content) = (Upstream::start(), Content::new(514, SIZE));
    for (key, value) in [
        ("STORAGE__PARTIAL_MAX_BYTES", "0"),
        ("STORAGE__PARTIAL_KEEP_HOURS", "0"),
        // The default: this download is too small to be worth it.
        ("STORAGE__CHECKPOINT_BYTES", "64MiB"),
    ] {
        let service = service().env(key, value).start();
        let url = cut_once(&up, &format!("/{key}"), &content, &[STRONG]);
        service.fetch(&url).assert_error(502, "upstream_error");
        assert!(service.spooled().is_empty(), "{key}={value}: {:?}", service.spooled());
    }
}

#[test]
fn a_rejected_or_too_large_download_leaves_nothing() {
    let (up, content) = (Upstream::start(), Content::new(515, SIZE));
    let service = service().env("STORAGE__MAX_ARTIFACT_BYTES", "6MiB").start();
    let chunked = content.clone();
    let url = up.on("/endless", move |x| {
        x.send("HTTP/1.1 200 OK\r\nETag: \"one\"\r\nTransfer-Encoding: chunked\r\n\r\n")?;
        chunked.each(0, SIZE, |bytes| x.chunk(bytes))
    });
    service.fetch(&url).assert_error(502, "artifact_too_large");
    assert!(service.spooled().is_empty(), "{:?}", service.spooled());
    let small = Content::new(516, CUT);
    let url = up.serve("/wrong", Reply::ok(&small).field(STRONG.0, STRONG.1));
    service.fetch_sha(&url, crate::harness::WRONG_SHA).assert_error(409, "checksum_mismatch");
    assert!(service.spooled().is_empty(), "{:?}", service.spooled());
}

#[test]
fn what_was_there_already_is_streamed_at_once() {
    let (up, content, gate) = (Upstream::start(), Content::new(517, SIZE), Gate::new());
    let service = service().env("FETCH__STREAM_AFTER_SECONDS", "0").start();
    let (door, served) = (gate.clone(), content.clone());
    // Its length is not known before the second answer.
    let url = up.on("/streamed", move |x| match x.attempt {
        1 => {
            x.send("HTTP/1.1 200 OK\r\nETag: \"one\"\r\nTransfer-Encoding: chunked\r\n\r\n")?;
            served.each(0, CUT, |bytes| x.chunk(bytes))
        }
        _ => {
            x.send(&Reply::ok(&served).field("ETag", "\"one\"").head(206, CUT))?;
            door.wait();
            x.body(&served, CUT, SIZE)
        }
    });
    assert_eq!(service.fetch_with(&url, &[("Prefer", "wait")]).status, 502);
    let mut client = service.connect();
    client.request("GET", &fetch_target(&url), &[]);
    let head = client.head();
    assert_eq!((head.status(), head.get("Content-Length")), (200, Some("8388608")), "{head:?}");
    let mut body = client.take(CUT as usize);
    gate.open();
    assert_eq!(client.drain(SIZE - CUT, |piece| body.extend_from_slice(piece)), End::Complete);
    assert!(body == content.bytes());
}
