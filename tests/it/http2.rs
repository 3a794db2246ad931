//! HTTP/2 in the clear, with prior knowledge: the same answers, and failures are stream resets.

use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper::client::conn::http2::{self, SendRequest, handshake};
use hyper_util::rt::{TokioExecutor, TokioIo};

use crate::harness::{
    Content, Gate, PATIENCE, Reply, Running, Service, Upstream, WRONG_SHA, fetch_sha_target, fetch_target,
};

type Sender = SendRequest<Empty<Bytes>>;

/// Runs an asynchronous test on a runtime of its own.
fn run<T>(test: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test)
}

async fn connect(service: &Running) -> Sender {
    let stream = tokio::net::TcpStream::connect(service.api).await.unwrap();
    let (sender, connection) = handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    sender
}

async fn get(sender: &mut Sender, target: &str) -> Response<Incoming> {
    let request = Request::get(format!("http://cache.test{target}")).body(Empty::new()).unwrap();
    sender.send_request(request).await.expect("an answer")
}

#[test]
fn many_requests_on_one_connection() {
    let (up, service) = (Upstream::start(), Service::new().start());
    let content = Content::new(180, 300_000);
    let url = up.serve("/h2", Reply::ok(&content));
    run(async {
        let mut sender = connect(&service).await;
        let answers = (0..20).map(|_| {
            let (mut sender, target) = (sender.clone(), fetch_target(&url));
            tokio::spawn(async move {
                get(&mut sender, &target).await.into_body().collect().await.unwrap().to_bytes()
            })
        });
        for answer in answers.collect::<Vec<_>>() {
            assert!(answer.await.unwrap() == content.bytes());
        }
        let hit = get(&mut sender, &fetch_target(&url)).await;
        assert_eq!((hit.status().as_u16(), hit.headers()["x-cache-status"].as_bytes()), (200, &b"HIT"[..]));
        let error = get(&mut sender, "/fetch").await;
        assert_eq!(error.status(), 400);
        drop((hit, error, sender));
    });
    assert_eq!(up.count("/h2"), 1);
}

#[test]
fn a_failed_stream_is_reset_and_the_connection_lives_on() {
    let (up, service) = (Upstream::start(), Service::new().streaming().start());
    let (content, gate) = (Content::new(181, 1 << 20), Gate::new());
    let (door, served) = (gate.clone(), content.clone());
    let url = up.on("/late", move |x| {
        x.send(&Reply::ok(&served).head(200, 0))?;
        x.body(&served, 0, served.len() - 1)?;
        door.wait();
        x.body(&served, served.len() - 1, served.len())
    });
    run(async {
        let mut sender = connect(&service).await;
        let answer = get(&mut sender, &fetch_sha_target(&url, WRONG_SHA)).await;
        assert_eq!(answer.status(), 200);
        gate.open();
        let body = answer.into_body().collect().await;
        assert!(body.is_err(), "a clean end would make a wrong file look right");
        let retry = get(&mut sender, &fetch_sha_target(&url, WRONG_SHA)).await;
        assert_eq!(retry.status(), 409, "the same connection answers on");
    });
}

/// Waits for the end of a body, which must come within [`PATIENCE`].
async fn end_of(body: Incoming) -> Result<Bytes, hyper::Error> {
    let whole = tokio::time::timeout(PATIENCE, body.collect()).await;
    whole.expect("the stream hangs").map(|body| body.to_bytes())
}

#[test]
fn a_client_that_gives_no_window_is_dropped() {
    let up = Upstream::start();
    let service = Service::new().env("SERVER__WRITE_IDLE_TIMEOUT_SECONDS", "0.5").start();
    let url = up.serve("/h2", Reply::ok(&Content::new(182, 1 << 20)));
    service.fetch_with(&url, &[("Range", "bytes=0-0")]);
    run(async {
        let stream = tokio::net::TcpStream::connect(service.api).await.unwrap();
        let mut builder = http2::Builder::new(TokioExecutor::new());
        builder.initial_stream_window_size(0);
        let (mut sender, connection) = builder.handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        let answer = get(&mut sender, &fetch_target(&url)).await;
        assert_eq!(answer.status(), 200);
        assert!(end_of(answer.into_body()).await.is_err(), "not a byte was taken");
    });
    service.wait_metric("artifact_cache_requests_total{status=\"error\"}", 1.0);
}

#[test]
fn waiting_for_upstream_is_no_clients_fault() {
    let up = Upstream::start();
    let service = Service::new()
        .streaming()
        .env("SERVER__WRITE_IDLE_TIMEOUT_SECONDS", "0.3")
        .env("SERVER__KEEPALIVE_TIMEOUT_SECONDS", "0.3")
        .start();
    let content = Content::new(183, 500_000);
    let served = content.clone();
    let url = up.on("/pauses", move |x| {
        x.send(&Reply::ok(&served).head(200, 0))?;
        for n in 0..3 {
            std::thread::sleep(Duration::from_secs(1));
            x.body(&served, n * 200_000, (n + 1) * 200_000)?;
        }
        Ok(())
    });
    run(async {
        let mut sender = connect(&service).await;
        let answer = get(&mut sender, &fetch_target(&url)).await;
        assert!(end_of(answer.into_body()).await.unwrap() == content.bytes());
    });
}
