//! Serving: over TCP with mutual TLS, or over a Unix socket. With gRPC health, keep-alive, and an end with a
//! limit.
//!
//! Every caller must show a certificate of our CA; what it may do is for the services to ask
//! ([`crate::identity`]). A refused handshake is logged with the caller's address and the reason, and the
//! caller gets the reason, too.

use std::fs::Permissions;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::service::Routes;
use tonic::transport::Server;
use tonic::transport::server::Router;
use tonic_health::ServingStatus;
use tracing::info;

use crate::admission::Callers;
use crate::limits::{CONNECTION_WINDOW_BYTES, HEALTH_LIMIT_BYTES, STREAM_WINDOW_BYTES};
use crate::tls::Credentials;
use crate::{accept, connection};

/// Why a server ended, or did not begin.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// The transport failed.
    #[error("serving failed")]
    Serve(#[source] tonic::transport::Error),
}

/// Serves `routes` and gRPC health on `listener` with mutual TLS until `shutdown` is ready.
///
/// Each connection is made with the credentials that are in force when it comes, and does not outlive them.
/// At the end the server stops listening, reports NOT_SERVING, lets the calls that are under way end, and
/// returns when they have, or after `drain`. It closes connections that are still open then.
pub async fn serve(
    listener: TcpListener,
    credentials: &Credentials,
    routes: Routes,
    shutdown: impl Future<Output = ()>,
    drain: Duration,
) {
    let (connections, mut accepted) = mpsc::channel(1);
    let mut accepting = JoinSet::new();
    accepting.spawn(accept::accept(listener, credentials.clone(), connections));

    let (reporter, health) = tonic_health::server::health_reporter();
    let routes = routes.add_service(health.max_decoding_message_size(HEALTH_LIMIT_BYTES)).prepare();
    let (callers, draining) = (Arc::<Callers>::default(), watch::Sender::new(false));
    let mut open = JoinSet::new();
    let mut shutdown = pin!(shutdown);
    loop {
        tokio::select! {
            () = &mut shutdown => break,
            Some(accepted) = accepted.recv() => {
                let (routes, callers) = (routes.clone(), Arc::clone(&callers));
                open.spawn(connection::serve(
                    accepted,
                    routes,
                    callers,
                    credentials.clone(),
                    draining.subscribe(),
                ));
            }
            Some(_) = open.join_next() => {}
        }
    }
    accepting.shutdown().await;
    reporter.set_service_status("", ServingStatus::NotServing).await;
    draining.send_replace(true);
    let ended = async { while open.join_next().await.is_some() {} };
    if timeout(drain, ended).await.is_err() {
        broken_off(drain);
    }
}

fn broken_off(drain: Duration) {
    info!(limit_ms = drain.as_millis(), "calls still under way are broken off");
}

/// Serves `routes` on a Unix socket, without TLS, until `shutdown` is ready; ends as [`serve`] does.
///
/// # Errors
/// If the transport fails.
pub async fn serve_unix(
    listener: UnixListener,
    routes: Routes,
    shutdown: impl Future<Output = ()>,
    drain: Duration,
) -> Result<(), ServeError> {
    let router = Server::builder()
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .add_routes(routes);
    until(router, UnixListenerStream::new(listener), shutdown, drain).await
}

/// Listens on a new Unix socket at `path` that only its owner may use (mode 0600).
///
/// # Errors
/// If there is something at `path` already, or the socket cannot be made.
pub fn bind_unix(path: &Path) -> io::Result<UnixListener> {
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, Permissions::from_mode(0o600))?;
    Ok(listener)
}

async fn until(
    router: Router,
    incoming: UnixListenerStream,
    shutdown: impl Future<Output = ()>,
    drain: Duration,
) -> Result<(), ServeError> {
    let (begin_drain, draining) = oneshot::channel::<()>();
    let mut serving = std::pin::pin!(router.serve_with_incoming_shutdown(incoming, async {
        // An error means that the sender is gone, which is an end as well.
        draining.await.unwrap_or_default();
    }));
    tokio::select! {
        ended = &mut serving => return ended.map_err(ServeError::Serve),
        () = shutdown => {}
    }
    // Fails only if the server has ended, which the next line sees.
    begin_drain.send(()).unwrap_or_default();
    match timeout(drain, serving).await {
        Ok(ended) => ended.map_err(ServeError::Serve),
        Err(_) => {
            broken_off(drain);
            Ok(())
        }
    }
}
