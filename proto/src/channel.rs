//! Connecting: to an agent over TCP with mutual TLS, or to a VMM over a Unix socket.
//!
//! [`connect`] returns only when the other end has answered, so that a refused certificate is an error of
//! `connect`, and not of some later call. Such a channel connects again by itself when the
//! connection is lost; calls that were under way then fail with UNAVAILABLE. A cut link is noticed after at
//! most [`KEEP_ALIVE_INTERVAL`](crate::limits::KEEP_ALIVE_INTERVAL) plus
//! [`KEEP_ALIVE_TIMEOUT`](crate::limits::KEEP_ALIVE_TIMEOUT).

use std::error::Error;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tokio::net::{TcpStream, UnixStream};
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::pki_types::ServerName;
use tonic::codegen::http::Uri;
use tonic::codegen::http::uri::Authority;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;
use tower::service_fn;

use crate::identity::is_node_name;
use crate::limits::{
    CONNECT_TIMEOUT, CONNECTION_WINDOW_BYTES, EXPIRED_GRACE, HAND_OVER_GRACE, HEALTH_LIMIT_BYTES,
    KEEP_ALIVE_INTERVAL, KEEP_ALIVE_TIMEOUT, STREAM_WINDOW_BYTES,
};
use crate::tls::Credentials;
use crate::tls_reason::{self, Refusal};
use crate::validity::Validity;
use crate::watched_io::{Ended, Ending, WatchedIo};

/// Why a connection did not come up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// Not host:port.
    #[error("`{address}` is no address: it must be host:port, as in 10.0.0.7:7443 or [fd00::7]:7443")]
    Address {
        /// What was given.
        address: String,
    },
    /// Not a name that a node can have.
    #[error("`{node}` is no node name: it must be a DNS name in lower case")]
    NodeName {
        /// What was given.
        node: String,
    },
    /// Our own credentials do not make a TLS client.
    #[error("cannot set up TLS: {reason}")]
    Configure {
        /// What rustls said.
        reason: String,
    },
    /// No TCP connection.
    #[error("cannot connect to {node} at {address}: {reason}")]
    Unreachable {
        /// Whom we wanted.
        node: String,
        /// Where.
        address: String,
        /// Why not.
        reason: String,
    },
    /// Their certificate was not issued by our CA, or is not valid now.
    #[error("{node} at {address} showed a certificate that is refused here: {reason}")]
    TheirCertificate {
        /// Whom we wanted.
        node: String,
        /// Where.
        address: String,
        /// Why it is refused.
        reason: String,
    },
    /// Another node answers at that address.
    #[error("{address} is not {node}: its certificate is for {}", names(presented))]
    WrongName {
        /// Whom we wanted.
        node: String,
        /// Where.
        address: String,
        /// The names that the certificate carries.
        presented: Vec<String>,
    },
    /// Their certificate is good and has the node's name, but is not that of the node's agent.
    #[error("{address} is not the agent of {node}: {reason}")]
    WrongRole {
        /// Whom we wanted.
        node: String,
        /// Where.
        address: String,
        /// Whose certificate it is.
        reason: String,
    },
    /// Our certificate was not accepted there.
    #[error("{node} at {address} refuses our certificate: {reason}")]
    OurCertificate {
        /// Whom we wanted.
        node: String,
        /// Where.
        address: String,
        /// Why it is refused.
        reason: String,
    },
    /// Connected, and then it did not go on as gRPC over TLS does.
    #[error("{node} at {address} does not answer as an agent: {reason}")]
    Answer {
        /// Whom we wanted.
        node: String,
        /// Where.
        address: String,
        /// What happened instead.
        reason: String,
    },
    /// No Unix socket, or no process listens on it.
    #[error("cannot connect to the socket {path}: {reason}")]
    Socket {
        /// The socket.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
}

fn names(presented: &[String]) -> String {
    if presented.is_empty() { "no name at all".to_owned() } else { presented.join(", ") }
}

/// Whom to call, where, and with what.
#[derive(Clone)]
struct Target {
    credentials: Credentials,
    /// How long the connection may go on after a certificate has run out.
    grace: Duration,
    name: ServerName<'static>,
    node: String,
    address: String,
}

/// Connects to the agent of `node` at `address` (host:port) with mutual TLS, and waits until it has answered
/// a health check.
///
/// Only the agent of that node is accepted: its certificate must carry the node's name as a DNS name, and
/// as its one role by URI ([`crate::identity`]).
///
/// Each connection is made with the credentials that are in force then, and ends when one of the two
/// certificates runs out: calls that are under way then are lost, and the channel connects again.
///
/// # Errors
/// See [`ConnectError`]; each of TCP, TLS and the answer has [`CONNECT_TIMEOUT`].
pub async fn connect(credentials: &Credentials, address: &str, node: &str) -> Result<Channel, ConnectError> {
    // The server ends it first, if it can, and tells.
    connect_for(credentials, address, node, EXPIRED_GRACE + EXPIRED_GRACE).await
}

/// As [`connect`], for a hand-over: it is not cut when a certificate runs out, but has
/// [`HAND_OVER_GRACE`].
///
/// # Errors
/// As [`connect`].
pub async fn connect_for_hand_over(
    credentials: &Credentials,
    address: &str,
    node: &str,
) -> Result<Channel, ConnectError> {
    connect_for(credentials, address, node, HAND_OVER_GRACE).await
}

async fn connect_for(
    credentials: &Credentials,
    address: &str,
    node: &str,
    grace: Duration,
) -> Result<Channel, ConnectError> {
    let bad_address = || ConnectError::Address { address: address.to_owned() };
    let authority: Authority = address.parse().map_err(|_| bad_address())?;
    if authority.port_u16().is_none() || authority.host().is_empty() || address.contains('@') {
        return Err(bad_address());
    }
    let bad_name = || ConnectError::NodeName { node: node.to_owned() };
    if !is_node_name(node) {
        return Err(bad_name());
    }
    let configure = |reason: String| ConnectError::Configure { reason };
    let target = Target {
        credentials: credentials.clone(),
        grace,
        name: ServerName::try_from(node.to_owned()).map_err(|_| bad_name())?,
        node: node.to_owned(),
        address: address.to_owned(),
    };

    // Dialled here, where the error still has its type; tonic gets the connection ready-made, and dials again
    // only if it is lost.
    let ending = Ending::default();
    let first = Arc::new(Mutex::new(Some(target.dial(ending.clone()).await?)));
    let uri = |scheme: &str| {
        format!("{scheme}://{authority}").parse::<Uri>().map_err(|error| configure(error.to_string()))
    };
    // tonic must not add TLS of its own, hence http in the endpoint; the requests say https all the same.
    let endpoint = tuned(Endpoint::from(uri("http")?).origin(uri("https")?));
    let again = target.clone();
    let connector = service_fn(move |_: Uri| {
        let ready = first.lock().take();
        let target = again.clone();
        async move {
            match ready {
                Some(io) => Ok(TokioIo::new(io)),
                None => target.dial(Ending::default()).await.map(TokioIo::new),
            }
        }
    });
    let channel =
        endpoint.connect_with_connector(connector).await.map_err(|error| target.no_answer(chain(&error)))?;

    let mut health = HealthClient::new(channel.clone()).max_decoding_message_size(HEALTH_LIMIT_BYTES);
    match timeout(CONNECT_TIMEOUT, health.check(HealthCheckRequest::default())).await {
        Ok(Ok(_)) => Ok(channel),
        // It speaks gRPC and has let us in; that it has no health service is none of our business.
        Ok(Err(status)) if status.code() == Code::Unimplemented => Ok(channel),
        Ok(Err(status)) => Err(match ending.get() {
            Some(Ended::Tls(refusal)) => target.tls_error(refusal),
            Some(Ended::Transport(reason)) => target.no_answer(reason),
            None => target.no_answer(words(&status)),
        }),
        Err(_) => Err(target.no_answer(format!("nothing within {} s", CONNECT_TIMEOUT.as_secs()))),
    }
}

impl Target {
    async fn dial(&self, ending: Ending) -> Result<WatchedIo<TlsStream<TcpStream>>, ConnectError> {
        let made_with = self.credentials.current();
        let tls = made_with
            .client(&self.node)
            .map_err(|error| ConnectError::Configure { reason: error.to_string() })?;
        let unreachable = |reason: String| ConnectError::Unreachable {
            node: self.node.clone(),
            address: self.address.clone(),
            reason,
        };
        let tcp = timeout(CONNECT_TIMEOUT, TcpStream::connect(&self.address))
            .await
            .map_err(|_| unreachable(format!("no answer within {} s", CONNECT_TIMEOUT.as_secs())))?
            .and_then(|tcp| tcp.set_nodelay(true).map(|()| tcp))
            .map_err(|error| unreachable(error.to_string()))?;
        match timeout(CONNECT_TIMEOUT, TlsConnector::from(Arc::new(tls)).connect(self.name.clone(), tcp))
            .await
        {
            Ok(Ok(tls)) if tls.get_ref().1.alpn_protocol() == Some(b"h2") => {
                let shown = tls.get_ref().1.peer_certificates().unwrap_or_default();
                let not_after = Validity::of_chain(shown).map_or(i64::MAX, |validity| validity.not_after);
                let (credentials, grace) = (self.credentials.clone(), self.grace);
                let outlived = async move {
                    credentials.outlived(&made_with, not_after).await;
                    sleep(grace).await;
                };
                Ok(WatchedIo::new(tls, ending, outlived))
            }
            Ok(Ok(_)) => Err(self.no_answer("it does not speak HTTP/2".to_owned())),
            Ok(Err(error)) => Err(match tls_reason::find(&error) {
                Some(tls) => self.tls_error(tls_reason::refusal(tls)),
                None => self.no_answer(format!("TLS handshake: {error}")),
            }),
            Err(_) => Err(self.no_answer(format!("no TLS within {} s", CONNECT_TIMEOUT.as_secs()))),
        }
    }

    fn tls_error(&self, refusal: Refusal) -> ConnectError {
        let (node, address) = (self.node.clone(), self.address.clone());
        match refusal {
            Refusal::Ours(reason) => ConnectError::OurCertificate { node, address, reason },
            Refusal::Theirs(reason) => ConnectError::TheirCertificate { node, address, reason },
            Refusal::WrongName(presented) => ConnectError::WrongName { node, address, presented },
            Refusal::WrongRole(reason) => ConnectError::WrongRole { node, address, reason },
            Refusal::Protocol(reason) => ConnectError::Answer { node, address, reason },
        }
    }

    fn no_answer(&self, reason: String) -> ConnectError {
        ConnectError::Answer { node: self.node.clone(), address: self.address.clone(), reason }
    }
}

/// Connects to the gRPC service on the Unix socket at `path`: [`open_unix`], then [`over_unix`].
///
/// # Errors
/// As [`open_unix`].
pub async fn connect_unix(path: &Path) -> Result<Channel, ConnectError> {
    open_unix(path).await.map(over_unix)
}

/// Connects to the Unix socket at `path`, and says nothing yet.
///
/// # Errors
/// If there is no such socket, no process listens on it, or it may not be used.
pub async fn open_unix(path: &Path) -> Result<UnixStream, ConnectError> {
    UnixStream::connect(path).await.map_err(|error| ConnectError::Socket {
        path: path.to_owned(),
        reason: match error.kind() {
            io::ErrorKind::NotFound => "it does not exist".to_owned(),
            io::ErrorKind::ConnectionRefused => "no process listens on it (it has ended)".to_owned(),
            io::ErrorKind::PermissionDenied => "permission denied".to_owned(),
            _ => error.to_string(),
        },
    })
}

/// Speaks gRPC over a Unix socket that is connected already, so that the process behind it can be identified
/// first.
///
/// The channel lives as long as this one connection: only the process that was identified can answer on it.
pub fn over_unix(stream: UnixStream) -> Channel {
    let mut stream = Some(stream);
    // The authority is localhost since h2 rejects a path. No keep-alive: a process that ends closes its
    // socket.
    Endpoint::from_static("http://localhost")
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .connect_with_connector_lazy(service_fn(move |_: Uri| {
            let stream = stream.take();
            async move {
                stream.map(TokioIo::new).ok_or_else(|| io::Error::other("the process has closed its socket"))
            }
        }))
}

fn tuned(endpoint: Endpoint) -> Endpoint {
    endpoint
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
        .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
}

/// What a failed call means, for a person: the words of the other end, or, if the call was lost on the way,
/// why. (`transport error` alone, as tonic puts it, does not help.)
pub fn words(status: &Status) -> String {
    match status.source() {
        Some(source) => {
            let mut text = "connection lost".to_owned();
            for cause in chain(source).split(": ").filter(|cause| *cause != "transport error") {
                append(&mut text, cause);
            }
            text
        }
        None if status.message().is_empty() => status.code().description().to_owned(),
        None => status.message().to_owned(),
    }
}

/// Whether a call was lost on the way, and not refused by the other end. Then it is not known whether it has
/// been carried out.
pub fn is_lost(status: &Status) -> bool {
    // What came over the wire has no source; what was made here, from an error of the transport, has.
    status.source().is_some() || status.code() == Code::Unavailable
}

/// An error and all its causes in one line, each said once.
pub(crate) fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        append(&mut text, &cause.to_string());
        next = cause.source();
    }
    text
}

fn append(text: &mut String, cause: &str) {
    if !cause.is_empty() && !text.contains(cause) {
        text.push_str(": ");
        text.push_str(cause);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_call_differs_from_a_refused_one_and_neither_error_repeats_itself() {
        let refused = Status::failed_precondition("the VM is paused");
        assert_eq!((words(&refused).as_str(), is_lost(&refused)), ("the VM is paused", false));
        let refused = Status::aborted("");
        assert_eq!((words(&refused).as_str(), is_lost(&refused)), ("The operation was aborted", false));

        let mut lost = Status::unknown("transport error");
        lost.set_source(Arc::new(io::Error::other("connection reset")));
        assert_eq!((words(&lost).as_str(), is_lost(&lost)), ("connection lost: connection reset", true));
        lost.set_source(Arc::new(io::Error::other("transport error: connection reset: connection reset")));
        assert_eq!(words(&lost), "connection lost: connection reset");
    }
}
