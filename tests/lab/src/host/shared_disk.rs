//! A disk that VMs in all nodes can reach, like one on a storage network: a file of this machine behind
//! `qemu-nbd`, which the nodes see as an NBD server at [`SHARED_DISK_ADDRESS`].
//!
//! ```text
//! VM's QEMU --tcp--> node's user network --nc--> a port of this machine's loopback
//!   --> qemu-nbd's Unix socket --> the file
//! ```

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, UnixStream},
    task::AbortHandle,
    time::{Instant, interval},
};

use super::children::{self, RunningChild};
use crate::error::LabError;

/// Where programs in the nodes find the shared disk: an NBD server with one export, without a name.
pub const SHARED_DISK_ADDRESS: (Ipv4Addr, u16) = (Ipv4Addr::new(10, 0, 2, 100), 10809);

const START_TIMEOUT: Duration = Duration::from_secs(10);

/// The served file. It is served until this is dropped.
#[derive(Debug)]
pub(crate) struct SharedDisk {
    path: PathBuf,
    address: SocketAddr,
    accepting: AbortHandle,
    _server: RunningChild,
}

impl SharedDisk {
    /// Creates the file, empty and of this size in MiB, and serves it.
    pub(crate) async fn start(folder: &Path, mib: u32) -> Result<Self, LabError> {
        let (path, socket) = (folder.join("shared-disk.img"), folder.join("nbd"));
        let failed = || LabError::io("serving the shared disk");
        std::fs::File::create(&path).and_then(|file| file.set_len(u64::from(mib) << 20)).map_err(failed())?;
        let server = children::start("qemu-nbd", |command| {
            // Any number of clients, also at the same time.
            command.args(["--format=raw", "--persistent", "--shared=0"]);
            command.arg("--socket").arg(&socket).arg(&path);
        })
        .await?;
        until_served(&socket).await?;
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.map_err(failed())?;
        let address = listener.local_addr().map_err(failed())?;
        let accepting = tokio::spawn(accept(listener, socket)).abort_handle();
        Ok(Self { path, address, accepting, _server: server })
    }

    /// The file.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The option of a node's user network that lets the node reach the disk.
    pub(crate) fn forward(&self) -> String {
        let (address, port) = SHARED_DISK_ADDRESS;
        let (ours, our_port) = (self.address.ip(), self.address.port());
        format!(",guestfwd=tcp:{address}:{port}-cmd:busybox nc {ours} {our_port}")
    }
}

impl Drop for SharedDisk {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn until_served(socket: &Path) -> Result<(), LabError> {
    let deadline = Instant::now() + START_TIMEOUT;
    let mut polls = interval(Duration::from_millis(20));
    while UnixStream::connect(socket).await.is_err() {
        if Instant::now() >= deadline {
            return Err(LabError::TimedOut { action: "qemu-nbd".into(), seconds: START_TIMEOUT.as_secs() });
        }
        polls.tick().await;
    }
    Ok(())
}

async fn accept(listener: TcpListener, socket: PathBuf) {
    while let Ok((mut near, _)) = listener.accept().await {
        let socket = socket.clone();
        tokio::spawn(async move {
            if let Ok(mut far) = UnixStream::connect(&socket).await {
                // Either side may close the connection.
                let _ = copy_bidirectional(&mut near, &mut far).await;
            }
        });
    }
}
