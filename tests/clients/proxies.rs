//! Proxies in front of the service: nginx and Caddy, each in a directory and on an address of its own.

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
    /// nginx as it should be: HTTP/1.1, unbuffered, naming the client.
    Nginx,
    /// Caddy with TLS by its internal authority.
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
        if tls {
            fs::write(&config, caddy(address, service, dir.path())).unwrap();
            command.args(["run", "--adapter", "caddyfile", "--config"]).arg(&config);
        } else {
            fs::write(&config, nginx(front, address, service, dir.path())).unwrap();
            command.arg("-e").arg(dir.path().join("log")).arg("-p").arg(dir.path()).arg("-c").arg(&config);
        }
        let log = fs::File::options().create(true).append(true).open(dir.path().join("log")).unwrap();
        command
            .env_clear()
            .env("HOME", dir.path())
            .env("XDG_CONFIG_HOME", dir.path())
            .current_dir(dir.path());
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

fn nginx(front: Front, address: SocketAddr, service: SocketAddr, dir: &Path) -> String {
    let dir = dir.display();
    let settings = match front {
        Front::Nginx => {
            "proxy_http_version 1.1;
            proxy_buffering off;
            proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;"
        }
        _ => "",
    };
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
    server {{
        listen {address};
        location / {{
            proxy_pass http://{service};
            {settings}
        }}
    }}
}}
"
    )
}

fn caddy(address: SocketAddr, service: SocketAddr, dir: &Path) -> String {
    format!(
        "{{
    admin off
    skip_install_trust
    auto_https disable_redirects
    storage file_system {dir}
}}
https://{address} {{
    bind {ip}
    tls internal
    reverse_proxy {service}
}}
",
        dir = dir.display(),
        ip = address.ip(),
    )
}
