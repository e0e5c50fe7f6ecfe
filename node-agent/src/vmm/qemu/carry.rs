//! The socket by which a migration's stream leaves or enters QEMU, in both directions.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use bytes::{BufMut, Bytes, BytesMut};
use futures::future::try_join_all;
use futures::{StreamExt, stream};
use slackwater_proto::tonic::Code;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;

use super::super::{LoadStream, SaveStream, VmmError};

/// Suffix to the monitor's name: two VMs may have their monitors in one folder.
const SUFFIX: &str = ".migrate";
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

/// The path of the socket, beside the monitor's.
pub(super) fn beside(monitor: &Path) -> PathBuf {
    let mut path = monitor.to_owned().into_os_string();
    path.push(SUFFIX);
    path.into()
}

/// A socket for QEMU to connect to, for this user alone.
pub(super) fn listen(path: &Path) -> io::Result<UnixListener> {
    remove(path);
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Waits until QEMU has connected: with its main stream first (QEMU: socket_start_outgoing_migration(), and
/// multifd_send_setup() when that one is up), then with so many more.
pub(super) async fn accept(listener: &UnixListener, more: u8) -> io::Result<(UnixStream, Vec<UnixStream>)> {
    let (main, _) = listener.accept().await?;
    let mut others = Vec::with_capacity(more.into());
    for _ in 0..more {
        others.push(listener.accept().await?.0);
    }
    Ok((main, others))
}

/// A missing file is not an error.
pub(super) fn remove(path: &Path) {
    let _ = std::fs::remove_file(path);
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

/// Writes a state to QEMU, which listens at `path`, in all its streams at once, and passes on QEMU's replies
/// on the main one, the first, until QEMU closes the sockets.
///
/// # Errors
/// If QEMU does not take all of it.
pub(super) async fn load_all(
    path: &Path,
    streams: Vec<LoadStream>,
    replies: &mpsc::Sender<Bytes>,
) -> io::Result<()> {
    let loads = streams.into_iter().enumerate().map(|(number, stream)| {
        // Replies on the others are dropped.
        let replies = if number == 0 { replies.clone() } else { mpsc::channel(1).0 };
        load(path, stream, replies)
    });
    try_join_all(loads).await.map(drop)
}

/// It connects with its first piece: QEMU reads the first bytes of a connection to know which stream it is,
/// and does nothing else until they arrive.
async fn load(path: &Path, mut state: LoadStream, replies: mpsc::Sender<Bytes>) -> io::Result<()> {
    let Some(first) = state.next().await else { return Ok(()) };
    let (mut from, mut to) = UnixStream::connect(path).await?.into_split();
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
