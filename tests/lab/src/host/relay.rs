//! A relay from this machine to a server. It can be cut as a network can: the sender gets no answer, and no
//! error either.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::AbortHandle,
};

use crate::error::LabError;

/// How much is copied at once.
const PIECE_BYTES: usize = 64 << 10;

/// A port on the loopback interface that forwards to another. It and its connections end when this is
/// dropped.
#[derive(Debug)]
pub struct Relay {
    address: SocketAddr,
    open: Arc<watch::Sender<bool>>,
    accepting: AbortHandle,
}

impl Relay {
    /// Opens a relay to `to`.
    ///
    /// # Errors
    /// When no port is available.
    pub async fn to(to: SocketAddr) -> Result<Self, LabError> {
        let failed = LabError::io(format!("opening a relay to {to}"));
        let listener = match TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await {
            Ok(listener) => listener,
            Err(error) => return Err(failed(error)),
        };
        let address = listener.local_addr().map_err(failed)?;
        let open = Arc::new(watch::Sender::new(true));
        let gate = Arc::downgrade(&open);
        let accepting = tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                let Some(gate) = gate.upgrade() else { return };
                let gate = gate.subscribe();
                tokio::spawn(pass(near, to, gate));
            }
        });
        Ok(Self { address, open, accepting: accepting.abort_handle() })
    }

    /// The address to connect to.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// From now on nothing arrives at either end. Data in transit is kept.
    pub fn cut(&self) {
        self.open.send_replace(false);
    }

    /// Data that was kept arrives, then data that follows it.
    pub fn restore(&self) {
        self.open.send_replace(true);
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn pass(near: TcpStream, to: SocketAddr, mut gate: watch::Receiver<bool>) {
    if gate.wait_for(|open| *open).await.is_err() {
        return;
    }
    let Ok(far) = TcpStream::connect(to).await else { return };
    // Small messages must not wait: a late message would look like a fault of its sender.
    let _ = (near.set_nodelay(true), far.set_nodelay(true));
    let (near_reads, near_writes) = near.into_split();
    let (far_reads, far_writes) = far.into_split();
    tokio::join!(copy(near_reads, far_writes, gate.clone()), copy(far_reads, near_writes, gate));
}

/// Copies one direction. The end of the stream, too, passes only while the relay is open.
async fn copy(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    mut gate: watch::Receiver<bool>,
) {
    let mut piece = vec![0; PIECE_BYTES];
    loop {
        let read = from.read(&mut piece).await.unwrap_or(0);
        if gate.wait_for(|open| *open).await.is_err() {
            return;
        }
        let Some(read) = piece.get(..read).filter(|read| !read.is_empty()) else {
            let _ = to.shutdown().await;
            return;
        };
        if to.write_all(read).await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn a_relay_that_is_cut_keeps_what_is_sent_until_it_is_restored() {
        let server = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let relay = Relay::to(server.local_addr().unwrap()).await.unwrap();
        let mut near = TcpStream::connect(relay.address()).await.unwrap();
        let (mut far, _) = server.accept().await.unwrap();
        near.write_all(b"a").await.unwrap();
        let mut read = [0; 1];
        far.read_exact(&mut read).await.unwrap();
        relay.cut();
        near.write_all(b"b").await.unwrap();
        assert!(timeout(Duration::from_millis(100), far.read_exact(&mut read)).await.is_err());
        relay.restore();
        far.read_exact(&mut read).await.unwrap();
        assert_eq!(&read, b"b");
        drop(far);
        assert_eq!(near.read(&mut read).await.unwrap(), 0, "the far end is gone");
    }
}
