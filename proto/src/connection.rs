//! One connection of a caller with a certificate: its calls, its share, and its end.
//!
//! It ends when the caller goes, or when the server drains; and when one of the two certificates runs out or
//! the caller's CA is not trusted any more. Then it takes no new call, and what is under way may end within
//! [`EXPIRED_GRACE`], or [`HAND_OVER_GRACE`] on a connection that carries a hand-over: to cut that would only
//! lengthen a blackout.

use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use http_body::{Frame, SizeHint};
use hyper::server::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use slackwater_handover::Reason;
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::timeout;
use tokio_rustls::server::TlsStream;
use tonic::body::Body;
use tonic::codegen::http::{Request, Response};
use tonic::service::Routes;
use tonic::transport::server::{Connected, TcpConnectInfo, TlsConnectInfo};
use tonic::{Code, Status};
use tower::Service;
use tracing::{debug, info, warn};

use crate::accept::Accepted;
use crate::admission::{Admitted, Allowance, Callers};
use crate::identity::Role;
use crate::limits::{
    self, EXPIRED_GRACE, HAND_OVER_GRACE, HEADER_LIMIT_BYTES, KEEP_ALIVE_INTERVAL, KEEP_ALIVE_TIMEOUT,
    RESETS_PENDING, STREAM_WINDOW_BYTES,
};
use crate::refusal::Refusal;
use crate::tls::Credentials;
use crate::validity::Validity;

/// The service whose calls carry a hand-over.
const HAND_OVER: &str = "/slackwater.transfer.v1.";

/// Serves a connection to its end.
pub(crate) async fn serve(
    accepted: Accepted,
    routes: Routes,
    callers: Arc<Callers>,
    credentials: Credentials,
    mut draining: watch::Receiver<bool>,
) {
    let Accepted { tls, peer, made_with } = accepted;
    let shown = tls.get_ref().1.peer_certificates().unwrap_or_default();
    let role = shown.first().and_then(|leaf| Role::from_certificate(leaf).ok());
    let not_after = Validity::of_chain(shown).map_or(i64::MAX, |validity| validity.not_after);
    let allowance = limits::allowance(role.as_ref());
    let caller = role.as_ref().map_or_else(|| "a caller without a role".to_owned(), ToString::to_string);
    let Some(admitted) = callers.admit(role.as_ref(), allowance) else {
        let limit = allowance.connections;
        warn!(%peer, caller, limit, "refused: the caller has as many connections as it may have");
        return;
    };

    let calls = Calls::new(routes, &tls, &admitted);
    let hand_over = Arc::clone(&calls.hand_over);
    let connection = http(allowance).serve_connection(TokioIo::new(tls), TowerToHyperService::new(calls));
    let mut connection = pin!(connection);
    let drains = tokio::select! {
        _ = &mut connection => return,
        () = credentials.outlived(&made_with, not_after) => false,
        // An error means that the server is gone.
        _ = draining.wait_for(|draining| *draining) => true,
    };
    connection.as_mut().graceful_shutdown();
    if drains {
        // The server limits the time.
        connection.await.unwrap_or_default();
        return;
    }
    let grace = if hand_over.load(Ordering::Relaxed) { HAND_OVER_GRACE } else { EXPIRED_GRACE };
    info!(%peer, caller, "a connection ends: its certificate has run out, or its CA is not trusted any more");
    if timeout(grace, connection).await.is_err() {
        debug!(%peer, caller, "calls of an ended connection are broken off");
    }
}

fn http(allowance: Allowance) -> http2::Builder<TokioExecutor> {
    let mut http = http2::Builder::new(TokioExecutor::new());
    http.timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW_BYTES.min(allowance.window_bytes))
        .initial_connection_window_size(allowance.window_bytes)
        .max_concurrent_streams(allowance.calls_of_a_connection)
        .max_header_list_size(HEADER_LIMIT_BYTES)
        .max_pending_accept_reset_streams(RESETS_PENDING)
        .keep_alive_interval(KEEP_ALIVE_INTERVAL)
        .keep_alive_timeout(KEEP_ALIVE_TIMEOUT);
    http
}

/// The services, for the calls of one connection.
#[derive(Clone)]
struct Calls {
    routes: Routes,
    peer: TlsConnectInfo<TcpConnectInfo>,
    share: Arc<Semaphore>,
    hand_over: Arc<AtomicBool>,
}

impl Calls {
    fn new(routes: Routes, tls: &TlsStream<TcpStream>, admitted: &Admitted) -> Self {
        let share = Arc::clone(&admitted.calls);
        Self { routes, peer: tls.connect_info(), share, hand_over: Arc::default() }
    }
}

impl Service<Request<hyper::body::Incoming>> for Calls {
    type Response = Response<Body>;
    type Error = std::convert::Infallible;
    type Future = BoxFuture<'static, Result<Response<Body>, Self::Error>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Service::<Request<hyper::body::Incoming>>::poll_ready(&mut self.routes, cx)
    }

    fn call(&mut self, mut request: Request<hyper::body::Incoming>) -> Self::Future {
        let Ok(permit) = Arc::clone(&self.share).try_acquire_owned() else {
            return std::future::ready(Ok(too_many_calls().into_http())).boxed();
        };
        if request.uri().path().starts_with(HAND_OVER) {
            self.hand_over.store(true, Ordering::Relaxed);
        }
        // Request::peer_certs reads it.
        request.extensions_mut().insert(self.peer.clone());
        let response = self.routes.call(request);
        async move { Ok(response.await?.map(|body| Body::new(Counted { body, _permit: permit }))) }.boxed()
    }
}

fn too_many_calls() -> Status {
    let message = "the caller has as many calls under way as it may have";
    Refusal::new(Code::ResourceExhausted, Reason::Other("TooManyCalls".into()), message).into()
}

/// An answer that counts as a call under way until it has been sent.
struct Counted {
    body: Body,
    _permit: OwnedSemaphorePermit,
}

impl http_body::Body for Counted {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
