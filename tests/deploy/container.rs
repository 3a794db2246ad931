//! The container: built by buildah from the repository's Dockerfile, run without privileges, and the compose file.
//!
//! What is replaced is named here: the base is a Debian (and a bare C library) made on this machine instead of a pulled
//! image, and the builder's `cargo` hands over the program that the tests have, instead of compiling for minutes: that it
//! does in `compose`. All other lines of the Dockerfile are carried out as they are.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::harness::service::BINARY;
use crate::harness::{Client, Content, Reply, Upstream, eventually, fetch_target, skip};
use crate::program::{free_address, need, test_name};
use crate::root;

/// buildah with a storage of its own.
struct Builder {
    program: PathBuf,
    dir: tempfile::TempDir,
    driver: &'static str,
}

impl Builder {
    /// None, and the test is skipped, where containers can't be built.
    fn new() -> Option<Builder> {
        let program = need("buildah")?;
        if !rustix::process::geteuid().is_root() || !root().join("target/debian").is_dir() {
            skip(&test_name(), "needs root and the Debian of tests/deploy/install");
            return None;
        }
        let mut builder = Builder { program, dir: tempfile::tempdir().unwrap(), driver: "overlay" };
        if !builder.command(&["images"]).output().unwrap().status.success() {
            builder.driver = "vfs";
        }
        Some(builder)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        let at = |name: &str| self.dir.path().join(name);
        command.arg("--root").arg(at("images")).arg("--runroot").arg(at("run"));
        command.args(["--storage-driver", self.driver]).args(args).stdin(Stdio::null());
        command.env("BUILDAH_ISOLATION", "chroot").current_dir(root());
        command
    }

    /// Runs it to its end, which must be a good one: what it writes to standard output.
    #[track_caller]
    fn run(&self, args: &[&str]) -> String {
        let output = self.command(args).output().unwrap();
        let stdout = String::from_utf8_lossy(&output.stdout).trim().to_string();
        assert!(
            output.status.success(),
            "buildah {args:?}: {stdout} {}",
            String::from_utf8_lossy(&output.stderr)
        );
        stdout
    }

    /// An image of these files: (what to copy, where to). Built on `base`, which may be `scratch`.
    fn image(&self, name: &str, base: &str, files: &[(&Path, &str)]) {
        let container = self.run(&["from", "--pull-never", base]);
        for (file, to) in files {
            self.run(&["add", "--quiet", &container, file.to_str().unwrap(), to]);
        }
        self.run(&["commit", "--quiet", "--rm", &container, name]);
    }

    /// The Debian, a builder on it, and a base with nothing but a C library.
    fn bases(&self) {
        let debian = root().join("target/debian");
        self.image("localhost/debian", "scratch", &[(&debian, "/")]);
        let file = |name: &str, text: &str| {
            let path = self.dir.path().join(name);
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
            path
        };
        let cargo = file(
            "cargo",
            "#!/bin/sh -e\n[ \"$*\" = \"build --release --locked\" ]\n\
             test -f Cargo.lock -a -f src/main.rs -a -f migrations/sqlite/0001_initial.sql\n\
             mkdir -p target/release\nmv /prebuilt target/release/artifact-cache\n",
        );
        let strip = file("strip", "#!/bin/sh -e\ntest \"$1\" = --strip-debug -a -x \"$2\"\n");
        let prebuilt = self.dir.path().join("prebuilt");
        let stripped =
            Command::new("strip").arg("--strip-debug").arg("-o").arg(&prebuilt).arg(BINARY).status();
        assert!(stripped.expect("binutils are here").success());
        let tools = [(&*cargo, "/usr/local/bin/"), (&*strip, "/usr/local/bin/"), (&*prebuilt, "/prebuilt")];
        self.image("localhost/builder", "localhost/debian", &tools);
        let libraries = libraries(&debian);
        let libraries: Vec<(&Path, &str)> =
            libraries.iter().map(|(from, to)| (from.as_path(), to.as_str())).collect();
        self.image("localhost/bare", "scratch", &libraries);
    }

    /// Builds the Dockerfile on this base: the image's name.
    fn build(&self, base: &str) -> String {
        let image = format!("localhost/artifact-cache-on-{base}");
        let (builder, base) = ("BUILDER=localhost/builder", format!("BASE=localhost/{base}"));
        let options = ["--quiet", "--pull-never", "--format", "docker", "--isolation", "chroot", "--layers"];
        let args = ["--build-arg", builder, "--build-arg", &base, "--tag", &image, "."];
        self.run(&[&["build"], &options[..], &args].concat());
        image
    }
}

/// The shared libraries of the program, and what loads them: in this Debian, and where they belong.
fn libraries(debian: &Path) -> Vec<(PathBuf, String)> {
    let output = Command::new("ldd").arg(BINARY).output().expect("ldd comes with the C library");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let paths = text.split_whitespace().filter(|word| word.starts_with('/')).map(str::to_string);
    let there: Vec<_> =
        paths.map(|path| (fs::canonicalize(debian.join(&path[1..])).unwrap(), path)).collect();
    assert!(there.len() >= 3, "{text}");
    there
}

/// A container in which the service runs; it is ended when dropped.
struct Container {
    child: Child,
    log: Vec<Value>,
    api: SocketAddr,
}

impl Container {
    /// Runs the image's own command with `data` as its volume; an error is what the service says when it refuses.
    fn start(builder: &Builder, container: &str, data: &Path) -> Result<Container, String> {
        let api = free_address();
        let mut command = run_in(builder, container, data, api, &["/usr/local/bin/artifact-cache", "serve"]);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
        let mut container = Container { child, log: Vec::new(), api };
        for line in lines.by_ref() {
            container.log.push(serde_json::from_str::<Value>(&line).unwrap_or(Value::String(line)));
            if container.log.last().is_some_and(|line| line["msg"] == "listening") {
                // The rest is read so that nothing blocks.
                std::thread::spawn(move || lines.for_each(drop));
                return Ok(container);
            }
        }
        let mut said = String::new();
        let mut stderr = container.child.stderr.take().unwrap();
        stderr.read_to_string(&mut said).unwrap();
        // What is no line of the log is buildah's way to pass standard error on.
        let rest = container.log.iter().map(|line| line.as_str().unwrap_or_default());
        Err(rest.chain([said.as_str()]).collect::<Vec<_>>().join("\n"))
    }

    /// The service's own process, which has no shell around it, but is not our child.
    fn service(&self) -> Option<Pid> {
        let mut ids = vec![self.child.id() as i32];
        while let Some(id) = ids.pop() {
            let name = fs::read_to_string(format!("/proc/{id}/comm")).unwrap_or_default();
            if name.trim() == "artifact-cache" {
                return Pid::from_raw(id);
            }
            for task in fs::read_dir(format!("/proc/{id}/task")).into_iter().flatten().flatten() {
                let children = fs::read_to_string(task.path().join("children")).unwrap_or_default();
                ids.extend(children.split_whitespace().filter_map(|id| id.parse::<i32>().ok()));
            }
        }
        None
    }

    fn get(&self, target: &str) -> crate::harness::Response {
        let mut client = Client::connect(self.api);
        client.request("GET", target, &[("Connection", "close")]);
        client.response("GET")
    }

    /// SIGTERM, as `docker stop` sends it to the first process: the container's exit code.
    fn stop(mut self) -> Option<i32> {
        kill_process(self.service().expect("it runs"), Signal::TERM).unwrap();
        let ended = eventually("the container ends", || self.child.try_wait().unwrap());
        ended.code()
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        if let Some(service) = self.service() {
            let _ = kill_process(service, Signal::KILL);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A command in a container, with the image's own user, directory and environment.
fn run_in(builder: &Builder, container: &str, data: &Path, api: SocketAddr, command: &[&str]) -> Command {
    let volume = format!("{}:/data", data.display());
    let mut run = vec!["run".to_string(), "--volume".to_string(), volume];
    for (key, value) in [
        ("SERVER__HOST", api.ip().to_string()),
        ("SERVER__PORT", api.port().to_string()),
        ("SERVER__METRICS_PORT", "0".to_string()),
        ("UPSTREAM__ALLOW_PRIVATE_NETWORKS", "127.0.0.0/8".to_string()),
        ("STORAGE__MIN_FREE_BYTES", "1MiB".to_string()),
    ] {
        run.extend(["--env".to_string(), format!("ARTIFACT_CACHE__{key}={value}")]);
    }
    run.extend([container.to_string(), "--".to_string()]);
    let args: Vec<&str> = run.iter().map(String::as_str).chain(command.iter().copied()).collect();
    builder.command(&args)
}

/// A directory on the host that belongs to `owner`.
fn volume(builder: &Builder, name: &str, owner: u32) -> PathBuf {
    let path = builder.dir.path().join(name);
    fs::create_dir(&path).unwrap();
    chown(&path, Some(owner), Some(owner)).unwrap();
    path
}

/// A container of this image, without the volume that buildah would put over ours.
fn container_of(builder: &Builder, image: &str) -> String {
    let container = builder.run(&["from", "--pull-never", image]);
    builder.run(&["config", "--volume", "/data-", &container]);
    container
}

#[test]
fn the_image_serves_as_an_ordinary_user_who_may_write_to_its_volume_only() {
    let Some(builder) = Builder::new() else { return };
    builder.bases();
    for base in ["debian", "bare"] {
        let image = builder.build(base);
        let container = container_of(&builder, &image);
        serves(&builder, &container, &volume(&builder, &format!("data-{base}"), 1000));
        if base == "bare" {
            check_settings(&builder, &image);
            check_files(&builder, &container);
            check_wrong_owners(&builder, &container);
        }
    }
}

fn serves(builder: &Builder, container: &str, data: &Path) {
    let (up, content) = (Upstream::start(), Content::new(90, 100_000));
    let url = fetch_target(&up.serve("/in-a-container.bin", Reply::ok(&content)));
    let running = Container::start(builder, container, data).expect("it starts");
    for status in ["MISS", "HIT"] {
        assert_eq!(running.get(&url).assert_ok(&content.bytes()).cache_status(), status);
    }
    let listening = running.log.last().unwrap().clone();
    assert_eq!(
        (&listening["config"], &listening["base_path"], &listening["database"]),
        (&"config.yaml".into(), &"/data/cache".into(), &"/data/metadata.db".into()),
        "the image's own configuration"
    );
    let health = ["/usr/local/bin/artifact-cache", "health"];
    let output = run_in(builder, container, data, running.api, &health).output().unwrap();
    assert!(output.status.success(), "the image's health check: {output:?}");
    let pid = running.service().expect("it runs").as_raw_nonzero();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let ids = |name: &str| status.lines().find(|line| line.starts_with(name)).map(str::to_string);
    assert_eq!(ids("Uid:").as_deref(), Some("Uid:\t1000\t1000\t1000\t1000"));
    assert_eq!(ids("Gid:").as_deref(), Some("Gid:\t1000\t1000\t1000\t1000"));
    let environment = fs::read_to_string(format!("/proc/{pid}/environ")).unwrap();
    assert!(environment.split('\0').any(|variable| variable == "SQLITE_TMPDIR=/data"), "{environment:?}");
    assert_eq!(running.stop(), Some(0), "SIGTERM ends it well");
    let blob = content.sha256();
    let on_the_host = data.join("cache").join(&blob[..2]).join(&blob[2..4]).join(&blob);
    assert!(fs::read(on_the_host).unwrap() == content.bytes(), "the volume has the artifact");
    let running = Container::start(builder, container, data).expect("it starts");
    assert_eq!(running.get(&url).assert_ok(&content.bytes()).cache_status(), "HIT");
    assert_eq!(running.stop(), Some(0));
}

/// What `docker inspect` would show.
fn check_settings(builder: &Builder, image: &str) {
    let about: Value = serde_json::from_str(&builder.run(&["inspect", "--type", "image", image])).unwrap();
    let config = &about["Docker"]["config"];
    assert_eq!(config["User"], "1000:1000");
    assert_eq!(config["WorkingDir"], "/app");
    assert_eq!(config["Entrypoint"], serde_json::json!(["/usr/local/bin/artifact-cache"]));
    assert_eq!(config["Cmd"], serde_json::json!(["serve"]));
    assert_eq!(config["Volumes"], serde_json::json!({ "/data": {} }));
    assert_eq!(config["ExposedPorts"], serde_json::json!({ "8080/tcp": {}, "9090/tcp": {} }));
    let check = serde_json::json!(["CMD", "/usr/local/bin/artifact-cache", "health"]);
    assert_eq!(config["Healthcheck"]["Test"], check);
}

/// Besides the base's, only the few files that are meant to be there, none of them writable for the service.
fn check_files(builder: &Builder, container: &str) {
    let mounted = PathBuf::from(builder.run(&["mount", container]));
    for file in ["usr/local/bin/artifact-cache", "app/config.yaml", "etc/ssl/certs/ca-certificates.crt"] {
        let found = fs::metadata(mounted.join(file)).unwrap_or_else(|e| panic!("{file}: {e}"));
        assert_eq!(std::os::unix::fs::MetadataExt::uid(&found), 0, "{file} is root's");
    }
    let ours = Command::new("find")
        .arg(&mounted)
        .args(["-xdev", "-uid", "1000", "-printf", "%P\n"])
        .output()
        .unwrap();
    let mut ours: Vec<_> = String::from_utf8(ours.stdout).unwrap().lines().map(str::to_string).collect();
    ours.sort();
    assert_eq!(ours, ["data", "data/cache"], "all that the service's user owns");
    let open = ["-xdev", "-perm", "-o+w", "!", "-type", "l", "-printf", "%P\n"];
    let open = Command::new("find").arg(&mounted).args(open).output().unwrap();
    assert_eq!(String::from_utf8(open.stdout).unwrap(), "", "writable for everyone");
    builder.run(&["umount", container]);
}

/// Docker makes a missing `./data` root's; whoever is told so is told the cure.
fn check_wrong_owners(builder: &Builder, container: &str) {
    let data = volume(builder, "roots", 0);
    let refused =
        |data: &Path| Container::start(builder, container, data).err().expect("it refuses to start");
    assert_names(&refused(&data), "/data/cache", "chown -R 1000:1000 /data ");
    // In the repository it is not quite empty, nor is a fresh file system.
    fs::write(data.join(".gitkeep"), "").unwrap();
    fs::create_dir(data.join("lost+found")).unwrap();
    assert_names(&refused(&data), "/data/cache", "chown -R 1000:1000 /data ");
    // The artifacts' directory alone was mended.
    fs::create_dir(data.join("cache")).unwrap();
    chown(data.join("cache"), Some(1000), Some(1000)).unwrap();
    let said = refused(&data);
    assert_names(&said, "/data/metadata.db", "must be able to write to /data");
    assert!(!said.contains("mkdir"), "the database is no directory: {said}");
    fs::remove_dir_all(data.join("cache")).unwrap();
    // An archive that root copied.
    chown(&data, Some(1000), Some(1000)).unwrap();
    fs::create_dir(data.join("cache")).unwrap();
    assert_names(&refused(&data), "/data/cache", "chown -R 1000:1000 /data/cache ");
    chown(data.join("cache"), Some(1000), Some(1000)).unwrap();
    fs::write(data.join("metadata.db"), "").unwrap();
    fs::set_permissions(data.join("metadata.db"), PermissionsExt::from_mode(0o644)).unwrap();
    assert_names(&refused(&data), "/data/metadata.db", "chown -R 1000:1000 /data ");
    // The cure cures.
    chown(data.join("metadata.db"), Some(1000), Some(1000)).unwrap();
    let done = Command::new("chown").args(["-R", "1000:1000"]).arg(&data).status().unwrap();
    assert!(done.success());
    assert_eq!(Container::start(builder, container, &data).expect("it starts").stop(), Some(0));
}

#[track_caller]
fn assert_names(stderr: &str, path: &str, command: &str) {
    assert!(stderr.contains(path) && stderr.contains("1000:1000") && stderr.contains(command), "{stderr}");
}

/// `docker-compose config` with both profiles, as a value.
fn composed() -> Option<Value> {
    let program = need("docker-compose")?;
    let args = ["--profile", "caddy", "--profile", "prometheus", "config"];
    let output = Command::new(program).args(args).current_dir(root()).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Some(serde_saphyr::from_str(&text).unwrap())
}

#[test]
fn the_compose_file_is_valid_and_has_the_documents_ports_and_volumes() {
    let Some(compose) = composed() else { return };
    let service = &compose["services"]["artifact-cache"];
    let texts = |list: &Value| -> Vec<String> {
        list.as_array().into_iter().flatten().map(|v| v.as_str().unwrap_or_default().to_string()).collect()
    };
    assert_eq!(texts(&service["ports"]), ["127.0.0.1:8080:8080/tcp", "127.0.0.1:9090:9090/tcp"]);
    let volumes = texts(&service["volumes"]);
    let ends = |end: &str| volumes.iter().any(|volume| volume.ends_with(end));
    assert!(ends("/data:/data:rw") && ends("/deploy/config.yaml:/app/config.yaml:ro"), "{volumes:?}");
    assert_eq!(service["user"], "1000:1000");
    assert_eq!(service["read_only"], true);
    let grace = service["stop_grace_period"].as_str().and_then(|text| text.strip_suffix('s')).unwrap();
    assert!(grace.parse::<u32>().unwrap() > 8 + 3, "longer than the service takes at most: {grace}");
    let profiles = |name: &str| texts(&compose["services"][name]["profiles"]);
    assert_eq!(
        (profiles("caddy"), profiles("prometheus")),
        (vec!["caddy".into()], vec!["prometheus".into()])
    );
    assert_eq!(service["profiles"], Value::Null, "the service itself is always started");
    // Docker would make a directory of what is missing.
    for name in ["artifact-cache", "caddy", "prometheus"] {
        for volume in texts(&compose["services"][name]["volumes"]) {
            let source = volume.split(':').next().unwrap();
            assert!(
                !source.starts_with('/') || Path::new(source).exists(),
                "{source} is mounted and not there"
            );
        }
    }
    assert!(root().join("deploy/prometheus/prometheus.yml").is_file(), "Prometheus' configuration");
}
