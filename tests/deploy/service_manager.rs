//! systemd's side, played by the test: the notification socket, the watchdog, and sockets that were opened before.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::PathBuf;
use std::thread::JoinHandle;

use crate::harness::{Content, PATIENCE, Running, Service, Upstream, eventually};
use crate::program::{free_address, need};

/// The socket that systemd would listen on for what its services say.
struct Listener {
    socket: UnixDatagram,
    path: PathBuf,
}

impl Listener {
    fn bind(service: &Service) -> Listener {
        let path = service.dir().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        Listener { socket, path }
    }

    /// The next thing that is said.
    #[track_caller]
    fn hears(&self) -> String {
        let mut message = [0; 4096];
        let length = self.socket.recv(&mut message).expect("the service says something");
        String::from_utf8_lossy(&message[..length]).trim_end().to_string()
    }
}

fn notifying(service: Service) -> (Listener, Service) {
    let listener = Listener::bind(&service);
    let path = listener.path.display().to_string();
    (listener, service.variable("NOTIFY_SOCKET", &path))
}

#[test]
fn ready_is_said_when_it_listens_and_stopping_when_it_stops() {
    let (systemd, service) = notifying(Service::new());
    let mut running = service.start();
    assert_eq!(systemd.hears(), "READY=1");
    assert_eq!(running.get("/health").status, 200);
    running.term();
    assert_eq!(systemd.hears(), "STOPPING=1", "nothing else is said without a watchdog");
}

#[test]
fn ready_is_not_said_by_a_service_that_cannot_start() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let (systemd, service) = notifying(Service::new().env("SERVER__PORT", &port));
    let (code, stderr) = service.refused();
    assert_eq!((code, stderr.contains(&port)), (1, true), "{stderr}");
    systemd.socket.set_nonblocking(true).unwrap();
    assert!(systemd.socket.recv(&mut [0; 64]).is_err(), "nothing was said");
}

#[test]
fn the_watchdog_is_fed_while_it_works() {
    let (systemd, service) = notifying(Service::new().variable("WATCHDOG_USEC", "200000"));
    let mut running = service.start();
    assert_eq!(systemd.hears(), "READY=1");
    for _ in 0..5 {
        assert_eq!(systemd.hears(), "WATCHDOG=1");
    }
    running.signal_term();
    let last = std::iter::repeat_with(|| systemd.hears()).find(|said| said != "WATCHDOG=1");
    assert_eq!(last.as_deref(), Some("STOPPING=1"));
    assert_eq!(running.wait_exit().0.code(), Some(0));
}

#[test]
fn a_watchdog_of_another_process_is_not_fed() {
    let elsewhere = std::process::id().to_string();
    let service = Service::new().variable("WATCHDOG_USEC", "200000").variable("WATCHDOG_PID", &elsewhere);
    let (systemd, service) = notifying(service);
    let mut running = service.start();
    assert_eq!(systemd.hears(), "READY=1");
    running.term();
    assert_eq!(systemd.hears(), "STOPPING=1");
}

#[test]
fn a_service_manager_that_cannot_be_told_is_no_reason_to_stop() {
    let running = Service::new().variable("NOTIFY_SOCKET", "/nonexistent/notify").start();
    running.wait_log("a warning", |line| line["msg"] == "can't notify the service manager");
    assert_eq!(running.get("/health").status, 200);
}

/// Has `systemd-socket-activate` listen (`options`) and start `service` with the first connection.
fn activated(service: Service, options: &[&str]) -> Option<Service> {
    let mut starter = vec![need("systemd-socket-activate")?.display().to_string()];
    starter.extend(options.iter().map(|option| option.to_string()));
    // It passes on no other variables.
    starter.extend(service.environment().keys().flat_map(|name| ["-E".to_string(), name.clone()]));
    Some(service.started_by(&starter))
}

/// Asks for `/health` as soon as somebody listens there: the answer.
fn first_client(address: SocketAddr) -> JoinHandle<String> {
    std::thread::spawn(move || {
        let mut socket = eventually("systemd listens", || TcpStream::connect(address).ok());
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.write_all(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        socket.read_to_string(&mut answer).unwrap();
        answer
    })
}

fn start_by_a_request(service: Service, address: SocketAddr) -> Running {
    let client = first_client(address);
    let running = service.start();
    let answer = client.join().unwrap();
    assert!(
        answer.starts_with("HTTP/1.1 200 "),
        "the request that started the service is answered: {answer}"
    );
    running
}

#[test]
fn sockets_of_systemd_are_used_by_their_names() {
    let (api, metrics) = (free_address(), free_address());
    let (api_text, metrics_text) = (api.to_string(), metrics.to_string());
    let options = ["-l", &metrics_text, "-l", &api_text, "--fdname", "metrics:api"];
    let Some(service) = activated(Service::new(), &options) else { return };
    let running = start_by_a_request(service, api);
    assert_eq!((running.api, running.metrics), (api, Some(metrics)));
    let (up, content) = (Upstream::start(), Content::new(1, 1000));
    running.fetch(&up.serve("/a", crate::harness::Reply::ok(&content))).assert_ok(&content.bytes());
    let mut other = crate::harness::Client::connect(metrics);
    for (target, status) in [("/metrics", 200), ("/fetch?url=http://example.com/", 404)] {
        other.request("GET", target, &[]);
        assert_eq!(other.response("GET").status, status, "{target} of the metrics socket");
    }
}

#[test]
fn a_socket_without_a_name_is_the_apis_and_the_configuration_gives_the_rest() {
    let api = free_address();
    let service = Service::new().env("SERVER__METRICS_PORT", &free_address().port().to_string());
    let Some(service) = activated(service, &["-l", &api.to_string()]) else { return };
    let running = start_by_a_request(service, api);
    assert_eq!(running.api, api);
    assert_ne!(running.metrics, None, "its own listener for metrics");
}

#[test]
fn a_socket_that_is_not_tcp_is_refused_with_its_name_and_the_cure() {
    let service = Service::new();
    let path = service.dir().join("socket");
    let options = ["-l", path.to_str().unwrap(), "--fdname", "web"];
    let Some(service) = activated(service, &options) else { return };
    let client =
        std::thread::spawn(move || eventually("systemd listens", || UnixStream::connect(&path).ok()));
    let (code, stderr) = service.refused();
    drop(client.join().unwrap());
    assert_eq!(code, 1);
    assert!(stderr.contains("\"web\"") && stderr.contains("ListenStream="), "{stderr}");
}
