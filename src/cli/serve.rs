//! `artifact-cache serve`: from the configuration to a running service, and to its clean end.

use std::{error::Error, net::SocketAddr, path::Path, process::ExitCode, sync::Arc, time::Duration};

use tokio::{
    net::{TcpListener, TcpSocket},
    signal::unix::{SignalKind, signal},
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use super::{ConfigArgs, Outcome, systemd};
use crate::{
    blobs::Blobs,
    cache::Cache,
    catalog::Catalog,
    config::Config,
    jobs,
    server::{self, App, Role},
    telemetry::{self, Metrics},
    upstream::Upstream,
};

/// Threads for waiting, beside those of downloads.
const BLOCKING_THREADS: usize = 256;
/// Open files and connections of a busy service, as configured by default.
const DESCRIPTORS: u64 = 16_384;
/// Connections that may wait to be accepted; the system has a limit of its own (net.core.somaxconn). With the usual 128 a
/// burst of a few hundred makes whoever comes next wait a second or more, until its SYN is sent again.
const BACKLOG: u32 = 4096;
/// How long the ends of abandoned downloads may keep the process; and a database that can't be closed.
const RUNTIME_GRACE: Duration = Duration::from_secs(1);
/// How long a disk that hangs may keep it, with the grace time and the above no longer than Docker's ten seconds. What
/// was acknowledged is in the write-ahead log all the same.
const CHECKPOINT_GRACE: Duration = Duration::from_secs(1);

/// Serves until SIGTERM or SIGINT.
pub(super) fn serve(args: &ConfigArgs) -> Outcome {
    let (config, file) = args.load()?;
    // Before the first thread, which is the log's.
    let limit = make_room_for_descriptors();
    let log = telemetry::init(&config.logging)?;
    if let Err(cause) = limit {
        tracing::warn!(error = %cause, "can't raise the limit on open files");
    }
    // Each download has a thread that writes; the others are for what waits for the disk now and then.
    let blocking_threads = config.upstream.max_downloads.saturating_add(BLOCKING_THREADS);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .max_blocking_threads(blocking_threads)
        .build()?;
    let metrics = Metrics::new(log.dropped_lines());
    telemetry::watch_panics(metrics.clone());
    let served = runtime.block_on(run(config, file.as_deref(), metrics));
    runtime.shutdown_timeout(RUNTIME_GRACE);
    served.map(|()| ExitCode::SUCCESS)
}

async fn run(config: Config, file: Option<&Path>, metrics: Arc<Metrics>) -> Result<(), Box<dyn Error>> {
    // Signals are caught from here on, so that one that comes early still ends things properly.
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let blobs = Blobs::open(&config.storage)?;
    let readers = std::thread::available_parallelism().map_or(2, usize::from);
    let catalog = Catalog::open(&config.storage.database, readers)?;
    let upstream = Upstream::new(&config.upstream)?;
    let listeners = bind(&config)?;
    announce(&config, file, &listeners);
    let cache = Cache::new(&config, catalog, blobs, upstream, metrics.clone());
    let background = config.jobs.clone();
    let app = App::new(cache.clone(), metrics, config);
    let shutdown = CancellationToken::new();
    let serving = tokio::spawn(server::serve(app, listeners, shutdown.clone()));
    tokio::spawn(jobs::run(cache.clone(), background, shutdown.clone()));
    systemd::ready(cache.clone());
    let signalled = tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    };
    tracing::info!(signal = signalled, "stopping");
    systemd::stopping();
    shutdown.cancel();
    let ending = async {
        // First thing, because the grace time may be cut short from outside.
        let (ended, ()) = tokio::join!(serving, checkpoint(&cache));
        checkpoint(&cache).await;
        ended
    };
    tokio::select! {
        ended = ending => ended?,
        _ = terminate.recv() => tracing::warn!("stopping at once"),
        _ = interrupt.recv() => tracing::warn!("stopping at once"),
    }
    // Closing the database waits for what is being written: on a thread that the runtime needn't wait for.
    tokio::task::spawn_blocking(move || drop(cache));
    tracing::info!("stopped");
    Ok(())
}

async fn checkpoint(cache: &Cache) {
    if timeout(CHECKPOINT_GRACE, cache.checkpoint()).await.is_err() {
        tracing::warn!(
            "the database takes too long to write; its write-ahead log keeps what is not in it yet"
        );
    }
}

/// The sockets to serve: those that systemd hands over, and for what it does not, those of the configuration.
fn bind(config: &Config) -> Result<Vec<(TcpListener, Role)>, Box<dyn Error>> {
    let server = &config.server;
    let mut listeners = Vec::new();
    for (listener, role) in systemd::inherited_listeners()? {
        listeners.push((TcpListener::from_std(listener)?, role));
    }
    let inherited = |wanted| listeners.iter().any(|(_, role)| *role == wanted);
    let (has_api, has_metrics) = (inherited(Role::Api), inherited(Role::Metrics));
    if !has_api {
        let api = SocketAddr::new(server.host, server.port);
        listeners.push((listen(api, "server.port")?, Role::Api));
    }
    if !has_metrics && server.metrics_port != 0 {
        let metrics = SocketAddr::new(server.host, server.metrics_port);
        match listen(metrics, "server.metrics_port") {
            Ok(listener) => listeners.push((listener, Role::Metrics)),
            Err(error) if config.metrics_port_given => return Err(error),
            Err(error) => {
                tracing::warn!(error = %error, "no separate metrics port; /metrics is on the API port too");
            }
        }
    }
    Ok(listeners)
}

fn listen(address: SocketAddr, key: &str) -> Result<TcpListener, Box<dyn Error>> {
    let listen = || {
        let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
        // A new start must not wait for the connections of the one before to be forgotten.
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        socket.listen(BACKLOG)
    };
    listen().map_err(|cause: std::io::Error| format!("can't listen on {address} ({key}): {cause}").into())
}

fn announce(config: &Config, file: Option<&Path>, listeners: &[(TcpListener, Role)]) {
    if config.upstream.proxy.is_some() {
        tracing::warn!(
            "upstream.proxy resolves host names itself: internal networks are only refused by name here"
        );
    }
    let ignored = ["http_proxy", "https_proxy", "all_proxy"].into_iter().filter(|name| {
        [name.to_string(), name.to_uppercase()].iter().any(|name| std::env::var_os(name).is_some())
    });
    for name in ignored {
        tracing::warn!(variable = name, "ignored; set upstream.proxy to go through a proxy");
    }
    let address = |role| {
        let listener = listeners.iter().find(|(_, of)| *of == role);
        listener.and_then(|(listener, _)| listener.local_addr().ok()).map(|address| address.to_string())
    };
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        config = %file.map_or("built-in defaults".into(), |file| file.display().to_string()),
        base_path = %config.storage.base_path.display(),
        database = %config.storage.database.display(),
        api = address(Role::Api),
        metrics = address(Role::Metrics),
        "listening"
    );
}

/// Every connection and every open artifact needs a descriptor; the soft limit of 1,024 is for programs that use
/// select(2). The kernel's table of them is made as large as it will be at once: while a process has several threads,
/// each doubling of it holds up whoever opens a file then until every processor has left the old table, some 10 ms.
fn make_room_for_descriptors() -> std::io::Result<()> {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
    let highest = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX).min(DESCRIPTORS) as i32 - 1;
    // A small table works too.
    let _ = rustix::io::fcntl_dupfd_cloexec(std::io::stdin(), highest);
    raised.map_err(Into::into)
}
