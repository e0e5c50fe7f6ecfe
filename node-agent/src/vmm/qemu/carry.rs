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

/// What its name has that the monitor's has not: two VMs may have their monitors in one folder.
const ENDING: &str = ".migrate";
/// Pieces of what a twin says that wait for whoever takes them. It says a few dozen bytes in all.
pub(super) const REPLIES: usize = 64;

/// A piece of a save, at most.
const PIECE_BYTES: usize = 1 << 20;
/// A piece of what a twin says, at most.
const REPLY_BYTES: usize = 64 << 10;

/// A save on its way.
pub(super) struct Carried {
    /// What QEMU gives.
    pub(super) pieces: SaveStream,
    /// What the twin says goes here. The socket stays open until this and the pieces are dropped.
    pub(super) replies: mpsc::Sender<Bytes>,
}

/// Its path, beside the monitor's.
pub(super) fn beside(monitor: &Path) -> PathBuf {
    let mut path = monitor.to_owned().into_os_string();
    path.push(ENDING);
    path.into()
}

/// A socket for QEMU to connect to, for this user alone.
pub(super) fn listen(path: &Path) -> io::Result<UnixListener> {
    remove(path);
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Waits until QEMU has connected: with its main stream first (QEMU: socket_start_outgoing_migration(), and multifd_send_setup() when
/// that one is up), then with so many more.
pub(super) async fn accept(listener: &UnixListener, more: u8) -> io::Result<(UnixStream, Vec<UnixStream>)> {
    let (main, _) = listener.accept().await?;
    let mut others = Vec::with_capacity(more.into());
    for _ in 0..more {
        others.push(listener.accept().await?.0);
    }
    Ok((main, others))
}

/// What is not there is no error.
pub(super) fn remove(path: &Path) {
    let _ = std::fs::remove_file(path);
}

/// Reads what QEMU gives on its main stream, and writes what the twin says.
pub(super) fn save(stream: UnixStream) -> Carried {
    let (from, mut to) = stream.into_split();
    let (replies, mut said) = mpsc::channel::<Bytes>(REPLIES);
    tokio::spawn(async move {
        while let Some(said) = said.recv().await {
            // QEMU has ended its migration, and says so itself.
            if to.write_all(&said).await.is_err() {
                return;
            }
        }
    });
    Carried { pieces: read(from), replies }
}

/// Reads what QEMU gives on another stream. Nobody answers there.
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
            Err(error) => Some((Err(failed("start_save", &error)), (from, buffer))),
        }
    };
    stream::unfold((from, BytesMut::new()), read).boxed()
}

/// Writes a state to QEMU, which listens at `path`, in all its streams at once, and passes on what QEMU says on the main one, the
/// first, meanwhile and afterwards, until it closes the sockets.
///
/// # Errors
/// When QEMU does not take it all.
pub(super) async fn load_all(
    path: &Path,
    streams: Vec<LoadStream>,
    replies: &mpsc::Sender<Bytes>,
) -> io::Result<()> {
    let loads = streams.into_iter().enumerate().map(|(number, stream)| {
        // What is said on the others is for nobody.
        let replies = if number == 0 { replies.clone() } else { mpsc::channel(1).0 };
        load(path, stream, replies)
    });
    try_join_all(loads).await.map(drop)
}

/// It connects with its first piece: QEMU looks at a connection's first bytes to know which stream it is, and does nothing else while
/// they do not come.
async fn load(path: &Path, mut state: LoadStream, replies: mpsc::Sender<Bytes>) -> io::Result<()> {
    let Some(first) = state.next().await else { return Ok(()) };
    let (mut from, mut to) = UnixStream::connect(path).await?.into_split();
    let answering = tokio::spawn(async move {
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
            answering.abort();
            return Err(error);
        }
        next = state.next().await;
    }
    // What QEMU still says is read until it has closed; this end is closed then, too, and not before.
    tokio::spawn(async move {
        let _ = answering.await;
        drop(to);
    });
    Ok(())
}

pub(super) fn failed(call: &'static str, error: &io::Error) -> VmmError {
    VmmError::Refused { call, code: Code::Unavailable, message: format!("the migration's socket: {error}") }
}
