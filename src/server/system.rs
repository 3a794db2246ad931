//! What operators ask: `/health`, `/api/stats`, `/metrics`.

use std::{
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use http::{HeaderName, HeaderValue, Response, StatusCode, header};
use serde_json::{Value, json};
use tokio::{sync::Mutex, task::spawn_blocking};

use super::{App, body::ResponseBody, error::Refusal};
use crate::cache::{Archive, Health};

/// How long a verdict stands: monitors must not be able to load the disk.
const HEALTH_STANDS_FOR: Duration = Duration::from_secs(5);

static X_CLIENT_IP: HeaderName = HeaderName::from_static("x-client-ip");

/// The last verdict. Its lock is held while the next one is found, so that on a disk that hangs one thread waits and no
/// more.
#[derive(Debug, Default)]
pub(super) struct HealthCheck(Arc<Mutex<Option<(Instant, Health)>>>);

impl HealthCheck {
    async fn verdict(&self, app: &Arc<App>) -> Health {
        let mut last = self.0.clone().lock_owned().await;
        if let Some((when, health)) = *last
            && when.elapsed() < HEALTH_STANDS_FOR
        {
            return health;
        }
        let cache = app.cache.clone();
        // The lock goes with it, or it would be free again when whoever asked has left. If it panics, nothing can be
        // said for the service.
        let found = spawn_blocking(move || {
            let health = cache.check_health();
            *last = Some((Instant::now(), health));
            health
        });
        found.await.unwrap_or(Health { hits: false, disk: false, database: false, archive: Archive::Known })
    }
}

/// The verdict; and in a header who is asking, as the log would name him: with that a client behind a proxy can tell
/// whether `server.trusted_proxies` is right.
pub(super) async fn health(app: &Arc<App>, client: IpAddr) -> Response<ResponseBody> {
    let health = app.health.verdict(app).await;
    let checks = checks(health);
    // Uptime Kuma looks for the word "healthy", so the other two must not contain it.
    let (status, word) = match (health.hits, checks.iter().all(|check| check.holds)) {
        (true, true) => (StatusCode::OK, "healthy"),
        (true, false) => (StatusCode::OK, "degraded"),
        (false, _) => (StatusCode::SERVICE_UNAVAILABLE, "failing"),
    };
    let now = jiff::Timestamp::now();
    let mut answer = json!({ "status": word, "timestamp": format!("{now:.0}") });
    if word != "healthy" {
        let say = |check: &Check| Value::from(if check.holds { "ok" } else { check.problem });
        answer["checks"] = checks.iter().map(|check| (check.name.to_owned(), say(check))).collect();
    }
    let mut response = json_response(status, &answer);
    if let Ok(client) = HeaderValue::try_from(client.to_canonical().to_string()) {
        response.headers_mut().insert(&X_CLIENT_IP, client);
    }
    response
}

/// One thing that health depends on.
struct Check {
    /// The member of `checks` in `/health`, and the label `check` of the metric.
    name: &'static str,
    holds: bool,
    /// What to say when it does not hold.
    problem: &'static str,
}

fn checks(Health { hits, disk, database, archive }: Health) -> [Check; 4] {
    let check = |name, holds, problem| Check { name, holds, problem };
    [
        check("storage", hits, "the store or the database can't be read"),
        check(
            "disk",
            disk,
            "less than storage.min_free_bytes is free, or the store can't be written; new artifacts are refused",
        ),
        check("database", database, "the database can't be written; new artifacts are refused"),
        check("archive", archive == Archive::Known, describe(archive)),
    ]
}

/// What the database is to the store, and what to do about it.
fn describe(archive: Archive) -> &'static str {
    match archive {
        Archive::Known => "ok",
        Archive::New => {
            "storage.database is a new one beside a store with files, which stay; point it to the right one, or run \
             artifact-cache restore --snapshot"
        }
        Archive::Other => {
            "storage.database is not the one that recorded the store, whose files stay; point it to the right one, or \
             accept it: remove the file .database in storage.base_path and restart"
        }
        Archive::Older => {
            "storage.database is an older copy of the one that recorded the store, whose files stay; point it to the \
             right one, or accept it: remove the file .database in storage.base_path and restart"
        }
        Archive::ManyOrphans => {
            "the store has many files that the database does not know, which stay; is storage.database the right one? \
             they become known when their URLs are fetched again"
        }
    }
}

pub(super) async fn stats(app: &Arc<App>) -> Result<Response<ResponseBody>, Refusal> {
    let totals = app.cache.totals()?;
    let cache = app.cache.clone();
    // A disk that hangs must hang this answer only.
    let free_bytes = spawn_blocking(move || cache.free_bytes()).await.unwrap_or(0);
    let answer = json!({
        "total_items": totals.items,
        "total_size_bytes": totals.size_bytes,
        "total_accesses": totals.accesses,
        "unique_blobs": totals.blobs,
        "stored_bytes": totals.stored_bytes,
        "hit_ratio": app.metrics.hit_ratio(),
        "free_bytes": free_bytes,
    });
    Ok(json_response(StatusCode::OK, &answer))
}

pub(super) async fn metrics(app: &Arc<App>) -> Result<Response<ResponseBody>, Refusal> {
    for check in checks(app.health.verdict(app).await) {
        app.metrics.set_check(check.name, check.holds);
    }
    let asked = app.clone();
    let text = spawn_blocking(move || asked.metrics.encode(asked.cache.sample())).await;
    let text = text.map_err(|_| Refusal::Panicked)?;
    Ok(respond(StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", text))
}

fn json_response(status: StatusCode, answer: &Value) -> Response<ResponseBody> {
    respond(status, "application/json", format!("{answer}\n"))
}

fn respond(status: StatusCode, content_type: &'static str, text: String) -> Response<ResponseBody> {
    let mut response = Response::new(ResponseBody::full(text));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}
