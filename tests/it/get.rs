//! `artifact-cache get`: files and streams, resuming, verifying, exit codes, the progress bar.

use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use crate::harness::service::BINARY;
use crate::harness::tls::{Authority, Flaw};
use crate::harness::{Content, Reply, Service, Upstream, WRONG_SHA, eventually};

/// A directory to fetch into, and the server to fetch from.
struct Place {
    dir: tempfile::TempDir,
    server: String,
}

impl Place {
    fn new(server: impl Into<String>) -> Place {
        Place { dir: tempfile::tempdir().unwrap(), server: server.into() }
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(BINARY);
        command.env_clear().env("ARTIFACT_CACHE_SERVER", &self.server);
        command.current_dir(self.dir.path()).arg("get").args(args).stdin(Stdio::null());
        command
    }

    fn get(&self, args: &[&str]) -> Output {
        self.command(args).output().expect("the binary runs")
    }

    /// Runs it and asserts the exit code; returns what standard error says.
    #[track_caller]
    fn ends(&self, code: i32, args: &[&str]) -> String {
        let output = self.get(args);
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{args:?}: {stderr}");
        assert_eq!(stderr.is_empty(), code == 0, "quiet when all is well, and only then: {stderr}");
        stderr
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.dir.path()).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    /// Asserts that `name` has this content, and that nothing else lies here.
    #[track_caller]
    fn assert_only(&self, name: &str, content: &Content) {
        assert_eq!(self.names(), [name]);
        assert!(fs::read(self.path(name)).unwrap() == content.bytes(), "{name} differs from the artifact");
    }
}

fn json(output: &Output) -> serde_json::Value {
    let text = String::from_utf8_lossy(&output.stdout);
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text:?} {output:?}"))
}

/// A server that is scripted to the byte, with the header that says that it is a service.
fn scripted(content: &Content) -> (Upstream, Reply) {
    let etag = format!("\"{}\"", content.sha256());
    let reply = Reply::ok(content).field("X-Cache-Status", "HIT").field("ETag", &etag);
    (Upstream::start(), reply.field("X-Content-SHA256", &content.sha256()))
}

#[test]
fn to_a_file_by_name_or_by_the_urls_name_and_to_standard_output() {
    let (service, up) = (Service::new().start(), Upstream::start());
    let content = Content::new(300, 3 << 20);
    let url = up.serve("/dir/tool%201.bin", Reply::ok(&content));
    let place = Place::new(format!("http://{}", service.api));
    place.ends(0, &[&url, "-o", "file"]);
    place.assert_only("file", &content);
    fs::remove_file(place.path("file")).unwrap();
    place.ends(0, &["-O", &format!("{url}?x=y#z")]);
    place.assert_only("tool 1.bin", &content);
    for args in [&[&*url][..], &[&url, "-o", "-"]] {
        let output = place.get(args);
        assert_eq!((output.status.code(), output.stderr.len()), (Some(0), 0));
        assert!(output.stdout == content.bytes());
    }
}

#[test]
fn json_says_what_came_of_it() {
    let (service, up) = (Service::new().start(), Upstream::start());
    let content = Content::new(301, 100_000);
    let url = up.serve("/x", Reply::ok(&content));
    let place = Place::new(format!("http://{}/", service.api));
    for status in ["MISS", "HIT"] {
        let output = place.get(&[&url, "-o", "file", "--json"]);
        let expected = serde_json::json!({
            "url": url, "file": "file", "size_bytes": 100_000, "sha256": content.sha256(),
            "cache_status": status, "resumed_bytes": 0,
        });
        let mut said = json(&output);
        assert!(said["file"].as_str().unwrap().ends_with("file"), "{said}");
        said["file"] = "file".into();
        assert_eq!(said, expected);
    }
    let output = place.get(&["ftp://example.com/x", "-o", "file", "--json"]);
    let said = json(&output);
    assert_eq!(
        (output.status.code(), &said["exit_code"], &said["error"]),
        (Some(2), &2.into(), &"invalid_parameter".into())
    );
    assert!(output.stderr.is_empty());
    assert_eq!(place.get(&[&url, "--json"]).status.code(), Some(2), "both would go to standard output");
}

#[test]
fn exit_codes_say_whose_fault_it_is_and_the_message_is_the_services() {
    let (mut service, up) = (Service::new().env("UPSTREAM__MAX_RETRIES", "0").start(), Upstream::start());
    let content = Content::new(302, 1_000);
    let url = up.serve("/x", Reply::ok(&content));
    let gone = up.url("/gone");
    let place = Place::new(format!("http://{}", service.api));
    for (code, args, says) in [
        (2, &["no-url", "-o", "f"][..], "absolute"),
        (2, &["-O", "http://example.com/"], "-o"),
        (3, &[&url, "-o", "f", "--sha256", WRONG_SHA], "does not match expected value: expected 00000000"),
        (4, &[&gone, "-o", "f"], "404"),
        (4, &["http://10.0.0.1/x", "-o", "f"], "upstream.allow_private_networks"),
        (1, &[&url, "-o", "no/such/directory"], "no/such/directory.part"),
        (1, &[&url, "-o", "."], "is a directory"),
    ] {
        let stderr = place.ends(code, args);
        assert!(stderr.starts_with("error: ") && stderr.contains(says), "{args:?}: {stderr}");
        assert_eq!(place.names(), Vec::<String>::new(), "{args:?} leaves nothing behind");
    }
    let wrong_usage = place.ends(2, &[&url, "-o", "f", "--sha256", "abc"]);
    assert!(wrong_usage.contains("64 hexadecimal digits"), "{wrong_usage}");
    service.term();
    let stderr = place.ends(5, &[&url, "-o", "f"]);
    assert!(stderr.contains(&place.server) && stderr.contains("can't be reached"), "{stderr}");
}

#[test]
fn a_server_that_is_something_else_is_told_apart() {
    let web = Upstream::start();
    web.on("/fetch", |x| x.send("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"));
    let stderr = Place::new(web.url("")).ends(5, &["http://example.com/x", "-o", "f"]);
    assert!(stderr.contains("no artifact-cache"), "{stderr}");
    web.redirect("/fetch", 308, "https://elsewhere.test/fetch");
    let stderr = Place::new(web.url("")).ends(5, &["http://example.com/x", "-o", "f"]);
    assert!(stderr.contains("redirects to https://elsewhere.test/fetch; name that"), "{stderr}");
    let stderr = Place::new("artifactcache.lan").ends(2, &["http://example.com/x", "-o", "f"]);
    assert!(stderr.contains("write http://artifactcache.lan"), "{stderr}");
}

#[test]
fn a_part_that_is_there_is_continued() {
    let (service, up) = (Service::new().start(), Upstream::start());
    let content = Content::new(303, 1 << 20);
    let url = up.serve("/x", Reply::ok(&content));
    let place = Place::new(format!("http://{}", service.api));
    service.fetch(&url);
    service.wait_metric("artifact_cache_bytes_served_total", (1 << 20) as f64);
    for (more, served) in
        [(&[][..], 1_048_576 + 48_576), (&["--sha256", &content.sha256()], 1_048_576 + 2 * 48_576)]
    {
        fs::write(place.path("f.part"), content.piece(0, 1_000_000)).unwrap();
        let output = place.get(&[&[&url, "-o", "f", "--json"], more].concat());
        assert_eq!(json(&output)["resumed_bytes"], 1_000_000);
        place.assert_only("f", &content);
        service.wait_metric("artifact_cache_bytes_served_total", f64::from(served));
        fs::remove_file(place.path("f")).unwrap();
    }
}

#[test]
fn a_part_of_something_else_is_begun_again() {
    let (service, up) = (Service::new().start(), Upstream::start());
    let content = Content::new(304, 500_000);
    let url = up.serve("/x", Reply::ok(&content));
    let place = Place::new(format!("http://{}", service.api));
    for strange in [Content::new(305, 1_000), Content::new(306, 500_000), Content::new(307, 600_000)] {
        for more in [&[][..], &["--sha256", &content.sha256()]] {
            fs::write(place.path("f.part"), strange.bytes()).unwrap();
            place.ends(0, &[&[&*url, "-o", "f"], more].concat());
            place.assert_only("f", &content);
            fs::remove_file(place.path("f")).unwrap();
        }
    }
}

#[test]
fn what_has_the_checksum_already_is_not_asked_for_again() {
    let content = Content::new(308, 100_000);
    let place = Place::new("http://127.0.0.1:1");
    let args = ["http://example.com/x", "-o", "f", "--sha256", &content.sha256()];
    place.ends(5, &args);
    fs::write(place.path("f"), content.bytes()).unwrap();
    place.ends(0, &args);
    place.assert_only("f", &content);
    fs::rename(place.path("f"), place.path("f.part")).unwrap();
    place.ends(0, &args);
    place.assert_only("f", &content);
}

/// Cuts the body in the middle twice, then gives the rest.
fn flaky(content: &Content) -> Upstream {
    let (server, reply) = scripted(content);
    let (head, body) = (reply.clone(), content.clone());
    server.on("/fetch", move |x| {
        let (start, whole) = (x.range_start().unwrap_or(0), body.len());
        match x.attempt {
            1 => x.send(&head.head(200, 0))?,
            2 => x.send(&head.head(206, start))?,
            _ => return x.reply(&reply),
        }
        x.body(&body, start, start + whole / 3)?;
        x.reset()
    });
    server
}

#[test]
fn a_transfer_that_breaks_off_goes_on_where_it_broke() {
    let content = Content::new(309, 900_000);
    let server = flaky(&content);
    let place = Place::new(server.url(""));
    place.ends(0, &["http://example.com/x", "-o", "f"]);
    place.assert_only("f", &content);
    let requests = server.requests("/fetch");
    assert_eq!(requests.len(), 3);
    assert_eq!(requests[0].get("Range"), None);
    assert!(requests[2].get("Range").is_some_and(|range| range != "bytes=0-"), "{requests:?}");
    assert_eq!(requests[2].get("If-Range"), Some(&*format!("\"{}\"", content.sha256())));
    let server = flaky(&content);
    let output = Place::new(server.url("")).get(&["http://example.com/x"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(output.stdout == content.bytes(), "to a stream too, without a byte twice");
}

#[test]
fn a_transfer_that_never_gets_further_ends_and_leaves_its_part() {
    let content = Content::new(310, 90_000);
    let (server, reply) = scripted(&content);
    let body = content.clone();
    server.on("/fetch", move |x| {
        if x.attempt > 1 {
            return x.reset();
        }
        x.send(&reply.head(200, 0))?;
        x.body(&body, 0, 30_000)
    });
    let place = Place::new(server.url(""));
    let stderr = place.ends(5, &["http://example.com/x", "-o", "f", "--retries", "2"]);
    assert!(stderr.contains("can't be reached"), "{stderr}");
    assert_eq!(server.count("/fetch"), 3);
    assert_eq!(place.names(), ["f.part"]);
    assert!(fs::read(place.path("f.part")).unwrap() == content.piece(0, 30_000));
}

#[test]
fn wrong_bytes_are_not_kept() {
    let (content, other) = (Content::new(311, 50_000), Content::new(312, 50_000));
    let server = Upstream::start();
    let lying = Reply::ok(&other).field("X-Cache-Status", "HIT").field("X-Content-SHA256", &content.sha256());
    server.serve("/fetch", lying);
    let place = Place::new(server.url(""));
    for more in [&[][..], &["--sha256", &content.sha256()]] {
        let stderr = place.ends(3, &[&["http://example.com/x", "-o", "f"], more].concat());
        assert!(stderr.contains(&content.sha256()) && stderr.contains(&other.sha256()), "{stderr}");
        assert_eq!(place.names(), Vec::<String>::new());
    }
    let stderr = place.ends(3, &["http://example.com/x", "-o", "-"]);
    assert!(stderr.contains("what was written is wrong"), "{stderr}");
}

/// Waits in the middle for longer than the service waits before it streams.
fn slow(up: &Upstream, content: &Content) -> String {
    let content = content.clone();
    up.on("/slow", move |x| {
        x.send(&Reply::ok(&content).head(200, 0))?;
        x.body(&content, 0, content.len() / 2)?;
        std::thread::sleep(std::time::Duration::from_millis(600));
        x.body(&content, content.len() / 2, content.len())
    })
}

#[test]
fn a_streamed_miss_is_verified_too() {
    let (service, up) = (Service::new().streaming().start(), Upstream::start());
    let content = Content::new(313, 400_000);
    let url = slow(&up, &content);
    let place = Place::new(format!("http://{}", service.api));
    let output = place.get(&[&url, "-o", "f", "--json"]);
    assert_eq!(
        (&json(&output)["sha256"], &json(&output)["cache_status"]),
        (&content.sha256().into(), &"MISS".into())
    );
    place.assert_only("f", &content);
    assert_eq!(up.count("/slow"), 1);
}

#[test]
fn a_streamed_miss_with_a_wrong_checksum_is_code_3() {
    let (service, up) = (Service::new().streaming().start(), Upstream::start());
    let url = slow(&up, &Content::new(314, 400_000));
    let place = Place::new(format!("http://{}", service.api));
    let stderr = place.ends(3, &[&url, "-o", "f", "--sha256", WRONG_SHA]);
    assert!(stderr.contains("expected 00000000"), "{stderr}");
    assert!(!place.path("f").exists());
    assert_eq!(up.count("/slow"), 1, "the retry is answered from memory");
    service.assert_nothing_stored();
}

#[test]
fn https_with_an_authority_of_ones_own() {
    let (authority, content) = (Authority::new(), Content::new(315, 10_000));
    let server = Upstream::start_tls(authority.server(Flaw::None));
    let reply =
        Reply::ok(&content).field("X-Cache-Status", "HIT").field("X-Content-SHA256", &content.sha256());
    server.serve("/fetch", reply);
    let place = Place::new(server.url(""));
    let stderr = place.ends(5, &["http://example.com/x", "-o", "f"]);
    assert!(stderr.contains("--ca-file"), "{stderr}");
    let ca = authority.file().display().to_string();
    for server in [server.url(""), server.url("").replace("127.0.0.1", "localhost")] {
        place.ends(0, &["http://example.com/x", "-o", "f", "--ca-file", &ca, "--server", &server]);
        place.assert_only("f", &content);
    }
    let stderr = place.ends(1, &["http://example.com/x", "-o", "f", "--ca-file", "none.pem"]);
    assert!(stderr.contains("none.pem"), "{stderr}");
}

#[test]
fn two_at_once_do_not_write_into_each_other() {
    let content = Content::new(316, 100_000);
    let (server, reply) = scripted(&content);
    let gate = crate::harness::Gate::new();
    let (body, door) = (content.clone(), gate.clone());
    server.on("/fetch", move |x| {
        x.send(&reply.head(200, 0))?;
        x.body(&body, 0, 50_000)?;
        door.wait();
        x.body(&body, 50_000, body.len())
    });
    let place = Place::new(server.url(""));
    let mut first = place.command(&["http://example.com/x", "-o", "f"]).spawn().unwrap();
    eventually("half is there", || (fs::metadata(place.path("f.part")).ok()?.len() == 50_000).then_some(()));
    let stderr = place.ends(1, &["http://example.com/x", "-o", "f"]);
    assert!(stderr.contains("another get is writing it"), "{stderr}");
    gate.open();
    assert!(first.wait().unwrap().success());
    place.assert_only("f", &content);
}

#[test]
fn links_devices_and_permissions_stay_what_they_are() {
    let content = Content::new(317, 10_000);
    let (server, reply) = scripted(&content);
    server.serve("/fetch", reply);
    let place = Place::new(server.url(""));
    fs::write(place.path("real"), "old").unwrap();
    std::os::unix::fs::symlink("real", place.path("link")).unwrap();
    place.ends(0, &["http://example.com/x", "-o", "link"]);
    assert!(fs::symlink_metadata(place.path("link")).unwrap().is_symlink());
    assert!(fs::read(place.path("real")).unwrap() == content.bytes());
    fs::set_permissions(place.path("real"), fs::Permissions::from_mode(0o755)).unwrap();
    place.ends(0, &["http://example.com/x", "-o", "real"]);
    assert_eq!(fs::metadata(place.path("real")).unwrap().permissions().mode() & 0o777, 0o755);
    place.ends(0, &["http://example.com/x", "-o", "/dev/null"]);
    assert!(!fs::metadata("/dev/null").unwrap().is_file() && !Path::new("/dev/null.part").exists());
}

/// Runs it with standard error on a terminal; what was drawn there.
fn on_a_terminal(place: &Place, args: &[&str]) -> String {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    let terminal = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("there are pseudo-terminals");
    grantpt(&terminal).unwrap();
    unlockpt(&terminal).unwrap();
    let name = ptsname(&terminal, Vec::new()).unwrap();
    let end = fs::File::options().read(true).write(true).open(name.to_str().unwrap()).unwrap();
    let mut child =
        place.command(args).env("TERM", "xterm").stdout(Stdio::null()).stderr(end).spawn().unwrap();
    let reader = std::thread::spawn(move || {
        // The read fails once the last one has left the other end.
        let (mut terminal, mut drawn, mut piece) = (fs::File::from(terminal), Vec::new(), [0; 4096]);
        while let Ok(n) = terminal.read(&mut piece) {
            drawn.extend_from_slice(&piece[..n]);
        }
        String::from_utf8_lossy(&drawn).into_owned()
    });
    assert!(child.wait().unwrap().success());
    reader.join().unwrap()
}

#[test]
fn a_terminal_gets_a_progress_bar_unless_it_is_to_be_quiet() {
    let (service, up) = (Service::new().streaming().start(), Upstream::start());
    let url = slow(&up, &Content::new(318, 4 << 20));
    let place = Place::new(format!("http://{}", service.api));
    let drawn = on_a_terminal(&place, &[&url, "-o", "file.bin"]);
    for part in ["file.bin [", " of 4.00 MiB, ", "/s, ", " left"] {
        assert!(drawn.contains(part), "{part:?} is not in {drawn:?}");
    }
    assert_eq!(on_a_terminal(&place, &[&url, "-o", "file.bin", "--quiet"]), "");
}
