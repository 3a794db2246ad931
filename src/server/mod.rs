//! HTTP: the only place that knows status codes, headers and JSON.
//!
//! `serve` takes bound listeners and a shutdown token, so that what runs in production is what is tested.

mod answer;
mod body;
pub(crate) mod conditions;
mod connection;
mod error;
mod exchange;
mod fetch;
mod framing;
pub(crate) mod params;
mod sendfile;
mod system;

/// What `benches/hot.rs` measures, and nobody else uses.
#[doc(hidden)]
pub mod hot {
    use std::time::SystemTime;

    use http::{HeaderMap, Method};

    use super::{answer, conditions};
    use crate::artifact::Version;

    /// Judges a request with these headers about an artifact of this size.
    pub fn judge(headers: &HeaderMap, size: u64) -> bool {
        let last_modified = Some(SystemTime::UNIX_EPOCH);
        let known = conditions::Validators { etag: Some("\"a\""), last_modified, size: Some(size) };
        conditions::judge(&Method::GET, headers, known) == conditions::Verdict::Whole
    }

    /// Builds the headers that every answer about a version has.
    pub fn describe(version: &Version) -> HeaderMap {
        answer::describe(version)
    }
}

use std::{
    convert::Infallible,
    future::Future,
    panic::AssertUnwindSafe,
    pin::pin,
    sync::Arc,
    task::Poll,
    time::{Duration, Instant},
};

use http::{Method, Request, Response, header};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
};
use tokio::net::TcpListener;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{artifact::RequestId, cache::Cache, config::Config, telemetry::Metrics};
use body::ResponseBody;
use connection::{Connection, Registry, Socket};
use error::Refusal;

/// Of a request's head.
const MAX_HEAD_BYTES: usize = 64 * 1024;
/// HTTP/2 streams of one connection.
const MAX_STREAMS: u32 = 128;

/// Everything that answers need.
#[derive(Debug)]
pub struct App {
    cache: Arc<Cache>,
    metrics: Arc<Metrics>,
    config: Config,
    health: system::HealthCheck,
    targets: params::Targets,
}

/// What a listener is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Everything.
    Api,
    /// Everything but `/fetch`.
    Metrics,
}

impl App {
    /// Puts the parts together.
    pub fn new(cache: Arc<Cache>, metrics: Arc<Metrics>, config: Config) -> Arc<App> {
        let targets = params::Targets::new(config.fetch.ignore_query.clone());
        Arc::new(App { cache, metrics, config, health: system::HealthCheck::default(), targets })
    }
}

/// Serves until `shutdown` is cancelled, then finishes what ends within `server.shutdown_grace_seconds` and breaks off
/// the rest.
pub async fn serve(app: Arc<App>, listeners: Vec<(TcpListener, Role)>, shutdown: CancellationToken) {
    let registry = Registry::new(&app.config.server);
    let tasks = TaskTracker::new();
    for (listener, role) in listeners {
        if let Err(cause) = sendfile::prepare(&listener) {
            tracing::warn!(error = %cause, "can't set the options of a listener's connections");
        }
        tasks.spawn(accept(app.clone(), registry.clone(), listener, role, shutdown.clone(), tasks.clone()));
    }
    let reaper = tokio::spawn(registry.clone().reap());
    shutdown.cancelled().await;
    tasks.close();
    if tokio::time::timeout(app.config.server.shutdown_grace, tasks.wait()).await.is_err() {
        registry.close_all();
        // They only have to notice.
        let _ = tokio::time::timeout(Duration::from_secs(1), tasks.wait()).await;
    }
    reaper.abort();
}

async fn accept(
    app: Arc<App>,
    registry: Arc<Registry>,
    listener: TcpListener,
    role: Role,
    shutdown: CancellationToken,
    tasks: TaskTracker,
) {
    let mut last_warning = None;
    loop {
        let accepted = tokio::select! {
            accepted = registry.accept(&listener) => accepted,
            () = shutdown.cancelled() => return,
        };
        match accepted {
            Ok((socket, connection)) => {
                tasks.spawn(converse(app.clone(), role, socket, connection, shutdown.clone()));
            }
            Err(cause) => {
                // Out of descriptors, most likely.
                registry.close_idlest();
                if last_warning.is_none_or(|last: Instant| last.elapsed() >= Duration::from_secs(1)) {
                    last_warning = Some(Instant::now());
                    tracing::warn!(error = %cause, "can't accept a connection");
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }
}

/// Answers one connection's requests, until it or the service ends.
async fn converse(
    app: Arc<App>,
    role: Role,
    socket: Socket,
    connection: Arc<Connection>,
    shutdown: CancellationToken,
) {
    let mut protocols = auto::Builder::new(TokioExecutor::new());
    protocols
        .http1()
        // No limit on the number of headers is set: hyper's own is a hundred, and any other costs an allocation.
        .timer(TokioTimer::new())
        // The registry keeps the time: hyper's own time-out would also end an idle connection.
        .header_read_timeout(None)
        .max_buf_size(MAX_HEAD_BYTES);
    protocols
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(MAX_HEAD_BYTES as u32)
        .max_send_buf_size(MAX_HEAD_BYTES)
        .keep_alive_interval(Duration::from_secs(30));
    let service = service_fn(|request| {
        let (app, connection) = (app.clone(), connection.clone());
        async move { Ok::<_, Infallible>(answer_or_panic(app, role, connection, request).await) }
    });
    let mut conversation = pin!(protocols.serve_connection(TokioIo::new(socket), service));
    let mut draining = false;
    loop {
        tokio::select! {
            // What goes wrong here is the client's; what it was answered is in the log already.
            _ = conversation.as_mut() => return,
            () = connection.closed() => return,
            () = shutdown.cancelled(), if !draining => {
                draining = true;
                conversation.as_mut().graceful_shutdown();
            }
        }
    }
}

/// A panic costs one request a 500, and nobody else anything.
async fn answer_or_panic(
    app: Arc<App>,
    role: Role,
    connection: Arc<Connection>,
    request: Request<Incoming>,
) -> Response<ResponseBody> {
    let busy = connection.begin_request(request.version());
    let request_id = exchange::request_id(request.headers());
    let as_problem = params::has_member(request.headers(), header::ACCEPT, "application/problem+json");
    let mut answering = pin!(route(&app, role, &connection, request, request_id.clone()));
    let answer = std::future::poll_fn(|cx| {
        // Nothing that a panic can leave half-done is used again: the future is dropped.
        match std::panic::catch_unwind(AssertUnwindSafe(|| answering.as_mut().poll(cx))) {
            Ok(poll) => poll,
            Err(_) => Poll::Ready(Err(Refusal::Panicked)),
        }
    })
    .await;
    let mut response = answer.unwrap_or_else(|refusal| refusal.into_response(as_problem));
    response.headers_mut().insert(exchange::X_REQUEST_ID.clone(), request_id.to_header());
    response.body_mut().hold(busy);
    response
}

/// All routes.
async fn route(
    app: &Arc<App>,
    role: Role,
    connection: &Arc<Connection>,
    request: Request<Incoming>,
    request_id: RequestId,
) -> Result<Response<ResponseBody>, Refusal> {
    let path = request.uri().path();
    let is_read = matches!(*request.method(), Method::GET | Method::HEAD);
    if request.headers().contains_key(header::TRANSFER_ENCODING) {
        // Nothing here has a use for a body, and one whose length two headers disagree on is an attack.
        return Err(Refusal::BadFraming);
    }
    // The future of an answer is moved once for each request, which is felt when it is large: what hits don't need is boxed.
    match path {
        _ if role == Role::Api && (path == "/fetch" || path.starts_with("/fetch/")) => {
            Ok(fetch::fetch(app, connection, request, request_id).await)
        }
        "/health" | "/api/stats" | "/metrics" if !is_read => Err(Refusal::MethodNotAllowed),
        "/health" => {
            let client = exchange::client_ip(app, connection.peer(), request.headers());
            Ok(Box::pin(system::health(app, client)).await)
        }
        "/api/stats" => Box::pin(system::stats(app)).await,
        "/metrics" => Box::pin(system::metrics(app)).await,
        _ => Err(Refusal::NotFound),
    }
}
