//! What a service manager hands over, and what it is told: systemd's socket activation, readiness and watchdog.
//!
//! Both are environment variables, so all of this does nothing where there is no systemd.

use std::{
    env,
    error::Error,
    net::TcpListener,
    os::fd::{FromRawFd, OwnedFd},
    sync::Arc,
};

use rustix::net::sockopt;
use sd_notify::NotifyState;

use crate::{cache::Cache, server::Role};

/// The name (`FileDescriptorName=`) of the socket that only gets `/metrics`, `/health` and `/api/stats`.
const METRICS_SOCKET: &str = "metrics";

/// The listening sockets that systemd opened for us; a socket named `metrics` is for metrics, any other is the API's.
///
/// Errors name the socket that can't be used and the unit setting that would be right. Must be called once at most:
/// each call would own the same descriptors.
pub(super) fn inherited_listeners() -> Result<Vec<(TcpListener, Role)>, Box<dyn Error>> {
    let sockets = match env::var_os("LISTEN_FDNAMES") {
        Some(_) => sd_notify::listen_fds_with_names()?.collect(),
        // Names are optional; without them all are the API's.
        None => sd_notify::listen_fds()?.map(|fd| (fd, String::new())).collect::<Vec<_>>(),
    };
    let take = |(fd, name): (i32, String)| {
        // SAFETY: LISTEN_PID names this process, so the descriptors 3, 4, … are open and were passed to be owned by it
        // (sd_listen_fds(3)); nothing else here knows them, and we are called once.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        let role = if name == METRICS_SOCKET { Role::Metrics } else { Role::Api };
        Ok((tcp_listener(socket, &name)?, role))
    };
    sockets.into_iter().map(take).collect()
}

fn tcp_listener(socket: OwnedFd, name: &str) -> Result<TcpListener, Box<dyn Error>> {
    let listens = sockopt::socket_acceptconn(&socket).unwrap_or(false);
    let listener = TcpListener::from(socket);
    if !listens || listener.local_addr().is_err() {
        return Err(format!(
            "the socket {name:?} passed by the service manager is not a listening TCP socket: use ListenStream=PORT \
             or ListenStream=ADDRESS:PORT with Accept=no"
        )
        .into());
    }
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Says that the service listens, and from then on that it is alive, as often as the unit's `WatchdogSec=` wants.
///
/// Alive means that the runtime runs its tasks and the catalogue answers, be it with an error: a restart cures what
/// hangs, not what fails. Must be called in the runtime.
pub(super) fn ready(cache: Arc<Cache>) {
    notify(&[NotifyState::Ready]);
    let Some(limit) = sd_notify::watchdog_enabled() else { return };
    tokio::spawn(async move {
        // systemd's own advice: twice as often as it looks.
        let mut due = tokio::time::interval(limit / 2);
        loop {
            due.tick().await;
            let _ = cache.totals();
            notify(&[NotifyState::Watchdog]);
        }
    });
}

/// Says that the service has begun to stop, so that nobody waits for its watchdog or starts what depends on it.
pub(super) fn stopping() {
    notify(&[NotifyState::Stopping]);
}

/// A service manager that can't be told is no reason to stop serving.
fn notify(states: &[NotifyState]) {
    if let Err(cause) = sd_notify::notify(states) {
        tracing::warn!(error = %cause, "can't notify the service manager");
    }
}
