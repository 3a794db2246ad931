//! Proxies in front of the service: nginx and Caddy, each in a directory and on an address of its own, with the files
//! that `deploy/` has for them.

use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use rustix::process::{Pid, Signal, kill_process};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, ClientConnection, RootCertStore};

use crate::harness::eventually;
use crate::program::{find, free_address};

/// The way from a client to the service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Front {
    /// Nothing between.
    Direct,
    /// nginx with one `proxy_pass` and no other setting: HTTP/1.0 behind it, buffered, and no sign that it is there.
    NginxDefaults,
    /// nginx as `deploy/nginx.conf` has it: HTTP/1.1, unbuffered, naming itself and the client.
    Nginx,
    /// Caddy as `deploy/Caddyfile` has it: TLS by its internal authority.
    Caddy,
}

impl Front {
    /// The program it needs, if any.
    pub fn program(self) -> Option<&'static str> {
        match self {
            Front::Direct => None,
            Front::NginxDefaults | Front::Nginx => Some("nginx"),
            Front::Caddy => Some("caddy"),
        }
    }

    /// Whether a broken stream shows by its framing to every client behind it. If not, the service lets the clients
    /// that don't compare lengths wait.
    pub fn shows_broken_streams(self) -> bool {
        matches!(self, Front::Direct | Front::Nginx)
    }
}

/// A running proxy; it stops when dropped.
pub struct Proxy {
    child: Child,
    /// `scheme://address`.
    pub base: String,
    /// The authority to trust, when it speaks TLS.
    pub authority: Option<PathBuf>,
    dir: tempfile::TempDir,
}

impl Proxy {
    /// Starts `front` before `service` and waits until it serves; none for [`Front::Direct`].
    pub fn start(front: Front, service: SocketAddr) -> Option<Proxy> {
        let program = find(front.program()?)?;
        let dir = tempfile::tempdir().unwrap();
        let (address, config) = (free_address(), dir.path().join("config"));
        let tls = front == Front::Caddy;
        let mut command = Command::new(program);
        command.env_clear().env("HOME", dir.path()).env("XDG_CONFIG_HOME", dir.path());
        command.current_dir(dir.path());
        if tls {
            fs::write(&config, caddy(address, dir.path())).unwrap();
            command.args(["run", "--adapter", "caddyfile", "--config"]).arg(&config);
            command.env("ARTIFACT_CACHE_SITE", format!("https://{address}"));
            command.env("ARTIFACT_CACHE_UPSTREAM", service.to_string());
            command.env("ARTIFACT_CACHE_LOG", dir.path().join("access.log"));
        } else {
            let site = if front == Front::Nginx { deployed_site } else { bare_site };
            fs::write(dir.path().join("site.conf"), site(address, service)).unwrap();
            fs::write(&config, nginx(dir.path())).unwrap();
            command.arg("-e").arg(dir.path().join("log")).arg("-p").arg(dir.path()).arg("-c").arg(&config);
        }
        let log = fs::File::options().create(true).append(true).open(dir.path().join("log")).unwrap();
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        let child = command.spawn().expect("the proxy starts");
        let scheme = if tls { "https" } else { "http" };
        let authority = tls.then(|| dir.path().join("pki/authorities/local/root.crt"));
        let mut proxy = Proxy { child, base: format!("{scheme}://{address}"), authority, dir };
        proxy.wait(address);
        Some(proxy)
    }

    fn wait(&mut self, address: SocketAddr) {
        eventually("the proxy serves", || {
            let log = || fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
            assert!(self.child.try_wait().unwrap().is_none(), "the proxy ended: {}", log());
            match &self.authority {
                None => TcpStream::connect(address).ok().map(drop),
                Some(authority) => handshake(address, authority),
            }
        });
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // It is our child and not yet waited for, so the id is still its own.
        let _ = kill_process(Pid::from_child(&self.child), Signal::KILL);
        let _ = self.child.wait();
    }
}

/// A whole TLS handshake: Caddy listens some time before it has its certificate.
fn handshake(address: SocketAddr, authority: &Path) -> Option<()> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(authority).ok()?).ok()?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().ok()?;
    let config = Arc::new(builder.with_root_certificates(roots).with_no_client_auth());
    let mut session = ClientConnection::new(config, address.ip().into()).ok()?;
    let mut socket = TcpStream::connect(address).ok()?;
    while session.is_handshaking() {
        session.complete_io(&mut socket).ok()?;
    }
    Some(())
}

/// nginx's main configuration, which includes the site as a distribution's does.
fn nginx(dir: &Path) -> String {
    let dir = dir.display();
    format!(
        "daemon off;
master_process off;
pid {dir}/pid;
events {{}}
http {{
    access_log off;
    client_body_temp_path {dir}/body;
    proxy_temp_path {dir}/proxy;
    fastcgi_temp_path {dir}/fastcgi;
    uwsgi_temp_path {dir}/uwsgi;
    scgi_temp_path {dir}/scgi;
    include {dir}/site.conf;
}}
"
    )
}

fn bare_site(address: SocketAddr, service: SocketAddr) -> String {
    format!("server {{ listen {address}; location / {{ proxy_pass http://{service}; }} }}")
}

/// `deploy/nginx.conf` with the addresses of this test.
fn deployed_site(address: SocketAddr, service: SocketAddr) -> String {
    let mut site = deployed("nginx.conf");
    for (theirs, ours) in [
        ("listen 80;", format!("listen {address};")),
        ("server 127.0.0.1:8080;", format!("server {service};")),
    ] {
        assert_eq!(site.matches(theirs).count(), 1, "deploy/nginx.conf has one `{theirs}`");
        site = site.replace(theirs, &ours);
    }
    site
}

/// Caddy's global options around `deploy/Caddyfile`, which takes its addresses from the environment.
fn caddy(address: SocketAddr, dir: &Path) -> String {
    format!(
        "{{
    admin off
    skip_install_trust
    auto_https disable_redirects
    default_bind {ip}
    storage file_system {dir}
}}
{site}",
        ip = address.ip(),
        dir = dir.display(),
        site = deployed("Caddyfile"),
    )
}

fn deployed(name: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy").join(name)).unwrap()
}
