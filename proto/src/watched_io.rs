//! A connection that remembers the error that ended it.
//!
//! With TLS 1.3 the server judges the client's certificate after the client has finished its handshake, so
//! the refusal comes as an error of the first read. HTTP/2 turns that into "connection closed" and drops the
//! reason: it is kept here.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

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
#[derive(Debug)]
pub(crate) struct WatchedIo<IO> {
    io: IO,
    ending: Ending,
}

impl<IO> WatchedIo<IO> {
    /// Watches `io` and reports its first error to `ending`.
    pub(crate) fn new(io: IO, ending: Ending) -> Self {
        Self { io, ending }
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for WatchedIo<IO> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
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
