//! A connection that remembers the error that ended it.
//!
//! With TLS 1.3 the server judges the client's certificate after the client has finished its handshake, so
//! the refusal comes as an error of the first read. HTTP/2 turns that into "connection closed" and drops the
//! reason: it is kept here.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures::FutureExt;
use futures::future::BoxFuture;
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::tls_reason::{self, Refusal};

/// The first error of a connection, for the caller that asks why it ended.
#[derive(Debug, Clone, Default)]
pub(crate) struct Ending(Arc<Mutex<Option<Ended>>>);

/// How a connection ended.
#[derive(Debug, Clone)]
pub(crate) enum Ended {
    /// By TLS.
    Tls(Refusal),
    /// By the transport below it.
    Transport(String),
}

impl Ending {
    /// The reason, or `None` while the connection is well.
    pub(crate) fn get(&self) -> Option<Ended> {
        self.0.lock().clone()
    }

    fn record(&self, error: &io::Error) {
        let ended = match tls_reason::find(error) {
            Some(tls) => Ended::Tls(tls_reason::refusal(tls)),
            None => Ended::Transport(error.to_string()),
        };
        self.0.lock().get_or_insert(ended);
    }

    fn watch<T>(&self, poll: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if let Poll::Ready(Err(error)) = &poll {
            self.record(error);
        }
        poll
    }
}

/// `IO`, watched.
pub(crate) struct WatchedIo<IO> {
    io: IO,
    ending: Ending,
    outlived: BoxFuture<'static, ()>,
}

impl<IO> WatchedIo<IO> {
    /// Watches `io` and reports its first error to `ending`. It breaks when `outlived` is ready.
    pub(crate) fn new(io: IO, ending: Ending, outlived: impl Future<Output = ()> + Send + 'static) -> Self {
        Self { io, ending, outlived: outlived.boxed() }
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for WatchedIo<IO> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        // HTTP/2 always has a read under way.
        if self.outlived.poll_unpin(cx).is_ready() {
            self.outlived = std::future::ready(()).boxed();
            let why = "a certificate of this connection has run out, or its CA is not trusted any more";
            return self.ending.watch(Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, why))));
        }
        let poll = Pin::new(&mut self.io).poll_read(cx, buf);
        self.ending.watch(poll)
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for WatchedIo<IO> {
    // Errors of writing are not recorded: a write to a connection that the other end has closed fails with
    // "broken pipe", while the reason for the closing still waits to be read.
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::sync::oneshot;

    use super::*;

    #[tokio::test]
    async fn a_connection_that_has_outlived_its_certificate_breaks_while_it_is_read() {
        let (here, mut there) = tokio::io::duplex(64);
        let (expire, expired) = oneshot::channel::<()>();
        let ending = Ending::default();
        let mut io = WatchedIo::new(here, ending.clone(), async { expired.await.unwrap_or_default() });
        there.write_all(b"a").await.unwrap();
        assert_eq!(io.read_u8().await.unwrap(), b'a');
        let reading = tokio::spawn(async move { io.read_u8().await.unwrap_err() });
        tokio::task::yield_now().await;
        expire.send(()).unwrap();
        assert_eq!(reading.await.unwrap().kind(), io::ErrorKind::TimedOut);
        assert!(matches!(ending.get(), Some(Ended::Transport(why)) if why.contains("has run out")));
    }
}
