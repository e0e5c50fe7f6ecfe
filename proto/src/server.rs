//! Serving: over TCP with mutual TLS, or over a Unix socket. With gRPC health, keep-alive, and an end with a
//! limit.
//!
//! Every caller must show a certificate of our CA; what it may do is for the services to ask
//! ([`crate::identity`]). A refused handshake is logged with the caller's address and the reason, and the
//! caller gets the reason, too.

use std::fs::Permissions;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixListener};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tonic::service::Routes;
use tonic::transport::Server;
use tonic::transport::server::Router;
use tonic_health::ServingStatus;
use tracing::{info, warn};

use crate::limits::{
    CONNECT_TIMEOUT, CONNECTION_WINDOW_BYTES, KEEP_ALIVE_INTERVAL, KEEP_ALIVE_TIMEOUT, STREAM_WINDOW_BYTES,
};
use crate::tls::Credentials;
use crate::tls_reason::{self, Refusal};

/// Why a server ended, or did not begin.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// Our own credentials do not make a TLS server.
    #[error("cannot set up TLS: {reason}")]
    Configure {
        /// What rustls said.
        reason: String,
    },
    /// The transport failed.
    #[error("serving failed")]
    Serve(#[source] tonic::transport::Error),
}

/// Serves `routes` and gRPC health on `listener` with mutual TLS until `shutdown` is ready.
///
/// Then it stops listening, reports NOT_SERVING, lets the calls that are under way end, and returns when they
/// have, or after `drain`. Connections that are still open then end with the process.
///
/// # Errors
/// If TLS cannot be set up, or the transport fails.
pub async fn serve(
    listener: TcpListener,
    credentials: &Credentials,
    routes: Routes,
    shutdown: impl Future<Output = ()>,
    drain: Duration,
) -> Result<(), ServeError> {
    let tls = credentials.server().map_err(|error| ServeError::Configure { reason: error.to_string() })?;
    let (connections, incoming) = mpsc::channel(1);
    let mut accepting = JoinSet::new();
    accepting.spawn(accept(listener, TlsAcceptor::from(Arc::new(tls)), connections));

    let (reporter, health) = tonic_health::server::health_reporter();
    let router = Server::builder()
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .http2_keepalive_interval(Some(KEEP_ALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEP_ALIVE_TIMEOUT))
        .add_routes(routes.add_service(health));
    let before_drain = async {
        accepting.shutdown().await;
        reporter.set_service_status("", ServingStatus::NotServing).await;
    };
    until(router, ReceiverStream::new(incoming), shutdown, before_drain, drain).await
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
    until(router, UnixListenerStream::new(listener), shutdown, async {}, drain).await
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

async fn until<IO, I>(
    router: Router,
    incoming: I,
    shutdown: impl Future<Output = ()>,
    before_drain: impl Future<Output = ()>,
    drain: Duration,
) -> Result<(), ServeError>
where
    I: tokio_stream::Stream<Item = io::Result<IO>>,
    IO: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
    IO: tonic::transport::server::Connected,
{
    let (begin_drain, draining) = oneshot::channel::<()>();
    let mut serving = std::pin::pin!(router.serve_with_incoming_shutdown(incoming, async {
        // An error means that the sender is gone, which is an end as well.
        draining.await.unwrap_or_default();
    }));
    tokio::select! {
        ended = &mut serving => return ended.map_err(ServeError::Serve),
        () = shutdown => {}
    }
    before_drain.await;
    // Fails only if the server has ended, which the next line sees.
    begin_drain.send(()).unwrap_or_default();
    match timeout(drain, serving).await {
        Ok(ended) => ended.map_err(ServeError::Serve),
        Err(_) => {
            info!(limit_ms = drain.as_millis(), "calls still under way are broken off");
            Ok(())
        }
    }
}

/// Handshakes at a time: a caller that says nothing holds one of them for [`CONNECT_TIMEOUT`] only.
const HANDSHAKES: usize = 64;

/// How long to wait when the kernel gives no connection, out of descriptors for example.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

async fn accept(
    listener: TcpListener,
    acceptor: TlsAcceptor,
    connections: mpsc::Sender<io::Result<TlsStream<TcpStream>>>,
) {
    let slots = Arc::new(Semaphore::new(HANDSHAKES));
    let mut handshakes = JoinSet::new();
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        let (tcp, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                warn!(%error, "cannot accept a connection");
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let (acceptor, connections) = (acceptor.clone(), connections.clone());
        handshakes.spawn(async move {
            if let Some(tls) = handshake(&acceptor, tcp, peer).await {
                // Fails only while the server ends.
                connections.send(Ok(tls)).await.unwrap_or_default();
            }
            drop(slot);
        });
        while handshakes.try_join_next().is_some() {}
    }
}

/// `None`, with the reason logged, if the caller was refused.
async fn handshake(acceptor: &TlsAcceptor, tcp: TcpStream, peer: SocketAddr) -> Option<TlsStream<TcpStream>> {
    if let Err(error) = tcp.set_nodelay(true) {
        warn!(%peer, %error, "connection lost before the TLS handshake");
        return None;
    }
    match timeout(CONNECT_TIMEOUT, acceptor.accept(tcp).into_fallible()).await {
        Ok(Ok(tls)) => Some(tls),
        Ok(Err((error, tcp))) => {
            warn!(%peer, reason = why_refused(&error), "TLS handshake refused");
            linger(tcp).await;
            None
        }
        Err(_) => {
            let reason = format!("not finished within {} s", CONNECT_TIMEOUT.as_secs());
            warn!(%peer, reason, "TLS handshake refused");
            None
        }
    }
}

fn why_refused(error: &io::Error) -> String {
    match tls_reason::find(error).map(tls_reason::refusal) {
        Some(Refusal::Theirs(reason)) => format!("the caller's certificate: {reason}"),
        Some(Refusal::Ours(reason)) => {
            format!("the caller does not accept this server's certificate: {reason}")
        }
        Some(Refusal::WrongName(names)) => format!("the caller's certificate is for {}", names.join(", ")),
        Some(Refusal::WrongRole(reason) | Refusal::Protocol(reason)) => reason,
        None => error.to_string(),
    }
}

/// Takes in what the caller has sent meanwhile, until it closes. A socket that is closed with unread data is
/// reset, and the reset would overtake the TLS alert that gives the caller the reason.
async fn linger(mut tcp: TcpStream) {
    let until_closed = async {
        tcp.shutdown().await?;
        let mut rest = [0; 4096];
        while tcp.read(&mut rest).await? > 0 {}
        io::Result::Ok(())
    };
    // Whatever comes of it: the connection has been refused.
    timeout(Duration::from_secs(1), until_closed).await.unwrap_or(Ok(())).unwrap_or_default();
}
