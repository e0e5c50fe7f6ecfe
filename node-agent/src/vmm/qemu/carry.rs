//! The socket by which a migration's stream leaves or enters QEMU, in both directions.

use std::io;
use std::path::{Path, PathBuf};

use bytes::{BufMut, Bytes, BytesMut};
use futures::future::try_join_all;
use futures::{StreamExt, stream};
use slackwater_proto::tonic::Code;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;

use super::super::{LoadStream, SaveStream, VmmError};
use crate::host::vm::STREAM_SUFFIX;
use crate::process::folder::{Folder, find_socket};

/// The most pieces of a twin's replies that wait to be taken. It sends a few dozen bytes in all.
pub(super) const REPLIES: usize = 64;

/// The most bytes in a piece of a save.
const PIECE_BYTES: usize = 1 << 20;
/// The most bytes in a piece of a reply.
const REPLY_BYTES: usize = 64 << 10;

/// A save in progress.
pub(super) struct Carried {
    /// The pieces from QEMU.
    pub(super) pieces: SaveStream,
    /// Takes the twin's replies. The socket stays open until this and the pieces are dropped.
    pub(super) replies: mpsc::Sender<Bytes>,
}

/// The socket of a migration's stream, in the VM's folder. QEMU may write there, too: no link is followed.
#[derive(Clone, Debug)]
pub(super) struct StreamSocket {
    folder: PathBuf,
    path: PathBuf,
    /// QEMU's process.
    pid: u32,
}

impl StreamSocket {
    /// In `folder`, by the name of the monitor of the QEMU with this process.
    pub(super) fn new(folder: &Path, monitor: &Path, pid: u32) -> Self {
        let mut name = monitor.file_name().unwrap_or_default().to_owned();
        name.push(STREAM_SUFFIX);
        Self { folder: folder.to_owned(), path: folder.join(name), pid }
    }

    /// As QEMU takes it.
    pub(super) fn uri(&self) -> String {
        format!("unix:{}", self.path.display())
    }

    fn folder(&self) -> io::Result<Folder> {
        Folder::open(&self.folder)?.ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// A socket for QEMU to connect to, for its user alone.
    pub(super) fn listen(&self) -> io::Result<UnixListener> {
        self.folder()?.bind(&self.path, |path| UnixListener::bind(path))
    }

    /// A missing file is not an error.
    pub(super) fn remove(&self) {
        let _ = self.folder().and_then(|folder| folder.remove_socket(&self.path));
    }

    /// Connects to QEMU, which listens there.
    async fn connect(&self) -> io::Result<UnixStream> {
        let stream = UnixStream::connect(find_socket(&self.path)?.path()).await?;
        self.require_qemu(&stream)?;
        Ok(stream)
    }

    fn require_qemu(&self, stream: &UnixStream) -> io::Result<()> {
        let pid = stream.peer_cred()?.pid().and_then(|pid| u32::try_from(pid).ok());
        if pid == Some(self.pid) {
            return Ok(());
        }
        Err(io::Error::other(format!("the other end is process {pid:?}, and not QEMU, {}", self.pid)))
    }

    /// Waits until QEMU has connected: with its main stream first (QEMU: socket_start_outgoing_migration(),
    /// and multifd_send_setup() when that one is up), then with so many more.
    pub(super) async fn accept(
        &self,
        listener: &UnixListener,
        more: u8,
    ) -> io::Result<(UnixStream, Vec<UnixStream>)> {
        let main = self.accept_one(listener).await?;
        let mut others = Vec::with_capacity(more.into());
        for _ in 0..more {
            others.push(self.accept_one(listener).await?);
        }
        Ok((main, others))
    }

    async fn accept_one(&self, listener: &UnixListener) -> io::Result<UnixStream> {
        let (stream, _) = listener.accept().await?;
        self.require_qemu(&stream)?;
        Ok(stream)
    }
}

/// Reads QEMU's main stream, and writes the twin's replies to it.
pub(super) fn save(stream: UnixStream) -> Carried {
    let (from, mut to) = stream.into_split();
    let (replies, mut queue) = mpsc::channel::<Bytes>(REPLIES);
    tokio::spawn(async move {
        while let Some(reply) = queue.recv().await {
            // QEMU has ended its migration, and reports that itself.
            if to.write_all(&reply).await.is_err() {
                return;
            }
        }
    });
    Carried { pieces: read(from), replies }
}

/// Reads another stream of QEMU. It has no replies.
pub(super) fn save_channel(stream: UnixStream) -> SaveStream {
    read(stream)
}

fn read<R: AsyncRead + Unpin + Send + 'static>(from: R) -> SaveStream {
    let read = |(mut from, mut buffer): (R, BytesMut)| async move {
        buffer.reserve(PIECE_BYTES);
        match from.read_buf(&mut (&mut buffer).limit(PIECE_BYTES)).await {
            Ok(0) => None,
            Ok(_) => {
                let piece = buffer.split().freeze();
                Some((Ok(piece), (from, buffer)))
            }
            Err(error) => Some((Err(socket_error("start_save", &error)), (from, buffer))),
        }
    };
    stream::unfold((from, BytesMut::new()), read).boxed()
}

/// Writes a state to QEMU, which listens at `socket`, in all its streams at once, and passes on QEMU's replies
/// on the main one, the first, until QEMU closes the sockets.
///
/// # Errors
/// If QEMU does not take all of it.
pub(super) async fn load_all(
    socket: &StreamSocket,
    streams: Vec<LoadStream>,
    replies: &mpsc::Sender<Bytes>,
) -> io::Result<()> {
    let loads = streams.into_iter().enumerate().map(|(number, stream)| {
        // Replies on the others are dropped.
        let replies = if number == 0 { replies.clone() } else { mpsc::channel(1).0 };
        load(socket, stream, replies)
    });
    try_join_all(loads).await.map(drop)
}

/// It connects with its first piece: QEMU reads the first bytes of a connection to know which stream it is,
/// and does nothing else until they arrive.
async fn load(socket: &StreamSocket, mut state: LoadStream, replies: mpsc::Sender<Bytes>) -> io::Result<()> {
    let Some(first) = state.next().await else { return Ok(()) };
    let (mut from, mut to) = socket.connect().await?.into_split();
    let replying = tokio::spawn(async move {
        let mut buffer = BytesMut::with_capacity(REPLY_BYTES);
        while let Ok(read) = from.read_buf(&mut buffer).await {
            if read == 0 || replies.send(buffer.split().freeze()).await.is_err() {
                return;
            }
            buffer.reserve(REPLY_BYTES);
        }
    });
    let mut next = Some(first);
    while let Some(piece) = next {
        if let Err(error) = to.write_all(&piece).await {
            replying.abort();
            return Err(error);
        }
        next = state.next().await;
    }
    // QEMU's replies are read until it closes its end; only then is this end closed.
    tokio::spawn(async move {
        let _ = replying.await;
        drop(to);
    });
    Ok(())
}

pub(super) fn socket_error(call: &'static str, error: &io::Error) -> VmmError {
    VmmError::Refused { call, code: Code::Unavailable, message: format!("the migration's socket: {error}") }
}
