//! From a TCP connection to a caller with a certificate. Callers without one are bounded in number and time,
//! and cannot keep others out ([`Handshakes`]).

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tracing::warn;

use crate::admission::Handshakes;
use crate::limits::{CONNECT_TIMEOUT, HANDSHAKES};
use crate::tls::{Credentials, Material};
use crate::tls_reason::{self, Refusal};

/// How long to wait when the kernel gives no connection, out of descriptors for example.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// At most one line of the log in this time says that handshakes were dropped.
const SAY_DROPPED_EVERY: Duration = Duration::from_secs(10);

/// A caller that has shown a certificate of our CA.
pub(crate) struct Accepted {
    pub(crate) tls: TlsStream<TcpStream>,
    pub(crate) peer: SocketAddr,
    /// What this end has shown.
    pub(crate) made_with: Arc<Material>,
}

/// Accepts for ever, each connection with the credentials that are in force when it comes.
pub(crate) async fn accept(
    listener: TcpListener,
    credentials: Credentials,
    connections: mpsc::Sender<Accepted>,
) {
    let mut waiting = Handshakes::<AbortHandle>::new(HANDSHAKES);
    let mut handshakes = JoinSet::new();
    let mut dropped = Dropped::default();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(ended) = handshakes.join_next() => {
                // One that was dropped has left the list already.
                if let Ok(number) = ended {
                    waiting.ended(number);
                }
                continue;
            }
        };
        let (tcp, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                warn!(%error, "cannot accept a connection");
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let number = waiting.number();
        let (made_with, connections) = (credentials.current(), connections.clone());
        let handshake = handshakes.spawn(async move {
            if let Some(tls) = handshake(&made_with, tcp, peer).await {
                // Fails only while the server ends.
                connections.send(Accepted { tls, peer, made_with }).await.unwrap_or_default();
            }
            number
        });
        if let Some(oldest) = waiting.admit(number, peer.ip(), handshake) {
            oldest.abort();
            dropped.one();
        }
    }
}

/// `None`, with the reason logged, if the caller was refused.
async fn handshake(made_with: &Material, tcp: TcpStream, peer: SocketAddr) -> Option<TlsStream<TcpStream>> {
    if let Err(error) = tcp.set_nodelay(true) {
        warn!(%peer, %error, "connection lost before the TLS handshake");
        return None;
    }
    let acceptor = TlsAcceptor::from(Arc::clone(&made_with.server));
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

/// Counts handshakes that were dropped, and says so now and then.
#[derive(Default)]
struct Dropped {
    count: u64,
    said: Option<Instant>,
}

impl Dropped {
    fn one(&mut self) {
        self.count += 1;
        if self.said.is_none_or(|said| said.elapsed() >= SAY_DROPPED_EVERY) {
            warn!(
                dropped = self.count,
                limit = HANDSHAKES,
                "too many connections without a TLS handshake: the oldest were dropped"
            );
            *self = Self { count: 0, said: Some(Instant::now()) };
        }
    }
}
