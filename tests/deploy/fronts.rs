//! The proxies' files of `deploy/` in front of the service, seen by curl.

use std::fs;

use crate::harness::{Content, Gate, Reply, Service, WRONG_SHA, eventually};
use crate::program::need;
use crate::proxies::Front;
use crate::support::{SIZE, Stage, arg, assert_same};

/// Both, as deployed.
const FRONTS: [Front; 2] = [Front::Caddy, Front::Nginx];

/// Runs `check` behind each proxy; its arguments: the stage, and curl with these options, which must succeed: what it
/// writes to standard output.
fn behind_each(service: fn() -> Service, check: impl Fn(&Stage, &dyn Fn(&[&str]) -> String)) {
    let Some(program) = need("curl") else { return };
    for front in FRONTS {
        let Some(stage) = Stage::new(front, service()) else { continue };
        let curl = |options: &[&str]| {
            let ended = stage.run(&program, &[&["--fail", "-sS"], options].concat());
            ended.assert_success().stdout.clone()
        };
        check(&stage, &curl);
    }
}

/// A field of a head as curl prints it.
fn field<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    let is_it =
        |line: &&str| line.to_ascii_lowercase().starts_with(&format!("{}:", name.to_ascii_lowercase()));
    head.lines().find(is_it).and_then(|line| line.split_once(": ")).map(|(_, value)| value.trim())
}

#[test]
fn misses_hits_ranges_and_heads() {
    behind_each(Service::new, |stage, curl| {
        let content = Content::new(80, SIZE);
        let (source, file) = (stage.publish("/a.bin", &content), stage.file("a.bin"));
        let url = stage.url(&source);
        let head = curl(&["--head", &url]);
        assert_eq!(field(&head, "X-Cache-Status"), Some("MISS"));
        assert_eq!(field(&head, "Content-Length"), Some(SIZE.to_string().as_str()));
        assert_eq!(stage.service.stats()["total_items"], 0, "HEAD downloads nothing");
        for status in ["MISS", "HIT"] {
            let head = curl(&["--dump-header", "-", "--output", arg(&file), &url]);
            assert_eq!(field(&head, "X-Cache-Status"), Some(status), "{head}");
            assert_eq!(field(&head, "X-Content-SHA256"), Some(content.sha256().as_str()));
            assert_same(&file, &content);
        }
        assert_eq!(field(&curl(&["--head", &url]), "X-Cache-Status"), Some("HIT"));
        let options = ["--range", "100-1099", "--dump-header", "-", "--output", arg(&file), &url];
        let head = curl(&options);
        assert_eq!(field(&head, "Content-Range"), Some(format!("bytes 100-1099/{SIZE}").as_str()));
        assert!(fs::read(&file).unwrap() == content.piece(100, 1100), "the range");
        let options = ["--range", "0-9,100-109", "--dump-header", "-", "--output", arg(&file), &url];
        let kind = field(&curl(&options), "Content-Type").map(str::to_string).unwrap_or_default();
        assert!(kind.starts_with("multipart/byteranges"), "{kind}");
    });
}

#[test]
fn a_slow_miss_comes_while_it_is_downloaded() {
    behind_each(
        || Service::new().streaming(),
        |stage, curl| {
            let (content, gate) = (Content::new(81, SIZE), Gate::new());
            let (body, held) = (content.clone(), gate.clone());
            let source = stage.up.on("/slow.bin", move |x| {
                x.send(&Reply::ok(&body).head(200, 0))?;
                x.body(&body, 0, SIZE / 2)?;
                held.wait();
                x.body(&body, SIZE / 2, SIZE)
            });
            let (file, url) = (stage.file("slow.bin"), stage.url(&source));
            std::thread::scope(|scope| {
                // Opened in any case, or a test that fails here would wait for its own client.
                let opener = scope.spawn(|| {
                    let begun = || fs::metadata(&file).is_ok_and(|file| file.len() > SIZE / 4).then_some(());
                    let seen = std::panic::catch_unwind(|| eventually("bytes before the end", begun));
                    gate.open();
                    seen
                });
                curl(&["--no-buffer", "--output", arg(&file), &url]);
                assert!(opener.join().unwrap().is_ok(), "{:?} hands on a running download", stage.front);
            });
            assert_same(&file, &content);
        },
    );
}

#[test]
fn a_transfer_that_breaks_off_fails_in_every_version_of_http() {
    let Some(program) = need("curl") else { return };
    // Caddy's TLS refuses an offer of HTTP/1.0 by ALPN; nginx has no HTTP/2 without TLS.
    for (front, versions) in
        [(Front::Caddy, ["--http1.1", "--http2"].as_slice()), (Front::Nginx, &["--http1.1", "--http1.0"])]
    {
        for version in versions {
            let Some(stage) = Stage::new(front, Service::new().streaming()) else { continue };
            let (ended, content) = stage.wrong_checksum(SIZE, |url, file| {
                stage.run(&program, &["--fail", "-sS", version, "--output", arg(file), url])
            });
            assert!(!ended.success, "{front:?} {version}: a broken transfer is a success: {ended:?}");
            let kept = fs::read(stage.file("bad.bin")).unwrap_or_default();
            assert!(
                !kept.is_empty() && kept != content.bytes(),
                "{front:?} {version}: begun and not completed"
            );
        }
    }
}

#[test]
fn a_rejected_checksum_is_answered_409_through_the_proxy() {
    let Some(program) = need("curl") else { return };
    for front in FRONTS {
        let Some(stage) = Stage::new(front, Service::new()) else { continue };
        let url = stage.url_sha(&stage.publish("/b.bin", &Content::new(82, 1000)), WRONG_SHA);
        let ended = stage.run(&program, &["-sS", "--write-out", "%{http_code}", &url]);
        assert!(ended.stdout.ends_with("409") && ended.stdout.contains("checksum_mismatch"), "{ended:?}");
    }
}

/// The addresses that the log names for a client at 127.0.0.9 who claims to be somebody else.
fn logged_client(stage: &Stage, curl: &dyn Fn(&[&str]) -> String) -> String {
    let source = stage.publish("/c.bin", &Content::new(83, 1000));
    let claim = ["--header", "X-Forwarded-For: 203.0.113.7", "--interface", "127.0.0.9"];
    curl(&[&claim[..], &["--output", arg(&stage.file("c.bin")), &stage.url(&source)]].concat());
    let line = stage.service.wait_log("the miss", |line| line["source_url"] == source.as_str());
    line["client_ip"].as_str().unwrap_or_default().to_string()
}

#[test]
fn the_client_is_who_the_trusted_proxy_says_and_not_who_it_claims_to_be() {
    behind_each(Service::new, |stage, curl| {
        assert_eq!(logged_client(stage, curl), "127.0.0.9", "{:?}", stage.front);
    });
}

#[test]
fn a_proxy_that_is_not_trusted_is_the_client() {
    let untrusting = || Service::new().env("SERVER__TRUSTED_PROXIES", "192.0.2.1/32");
    behind_each(untrusting, |stage, curl| {
        let client = logged_client(stage, curl);
        assert!(client.starts_with("127.0.0.1:"), "{:?}: {client}", stage.front);
    });
}

#[test]
fn the_path_form_arrives_byte_for_byte_also_with_folded_slashes() {
    behind_each(Service::new, |stage, curl| {
        let content = Content::new(84, 1000);
        let (path, query) = ("/dir/name%2Bwith%20signs+and~more.tar.gz", "?a=1&b=%2F");
        let source = stage.publish(path, &content) + query;
        for (n, url) in [&source, &source.replacen("://", ":/", 1)].iter().enumerate() {
            let file = stage.file("path.bin");
            let head = curl(&["--dump-header", "-", "--output", arg(&file), &stage.path_url(url)]);
            assert_eq!(field(&head, "X-Cache-Status"), Some(["MISS", "HIT"][n]), "{:?} {url}", stage.front);
            assert_same(&file, &content);
        }
        let url = stage.path_url_sha(&source, &content.sha256());
        assert_eq!(field(&curl(&["--head", &url]), "X-Cache-Status"), Some("HIT"));
        let asked: Vec<_> = stage.up.requests(path).into_iter().map(|head| head.line).collect();
        assert_eq!(asked, [format!("GET {path}{query} HTTP/1.1")]);
    });
}

#[test]
fn a_request_as_long_as_the_service_allows_passes() {
    behind_each(Service::new, |stage, curl| {
        let (content, file) = (Content::new(85, 1000), stage.file("long.bin"));
        let source = stage.publish("/long", &content) + "?" + &"x".repeat(7 << 10);
        // Every `x` could have been sent encoded.
        let url = stage.url(&source).replace('x', "%78");
        curl(&["--output", arg(&file), &url]);
        assert_same(&file, &content);
    });
}
