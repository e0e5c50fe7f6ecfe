//! A load: the data of StartLoad go through a small channel to a thread that parses them and writes them to
//! guest RAM.

use std::io::{self, Read};
use std::sync::Arc;

use bytes::{Buf, Bytes};
use slackwater_proto::limits::CHUNK_LIMIT_BYTES;
use slackwater_proto::tonic::Status;
use slackwater_proto::vmm::StartLoadRequest;
use tokio::sync::mpsc;
use tokio_stream::{Stream, StreamExt};

use crate::machine_state::MachineState;
use crate::ram::GuestRam;
use crate::saved::{self, ReadError, Shape};

/// The most pieces that wait in the channel.
const CHUNKS: usize = 4;

enum Piece {
    Data(Bytes),
    /// The caller has ended its stream.
    End,
    /// The caller's stream has failed.
    Failed(Status),
}

/// The caller's half of a load.
pub(super) struct Feed(mpsc::Sender<Piece>);

/// The VMM's half of a load.
pub(super) struct Intake(mpsc::Receiver<Piece>);

pub(super) fn channel() -> (Feed, Intake) {
    let (pieces, incoming) = mpsc::channel(CHUNKS);
    (Feed(pieces), Intake(incoming))
}

impl Feed {
    /// Forwards the caller's stream until it ends or fails, or the load fails. If this is dropped before, the
    /// load fails.
    ///
    /// A call that its caller cancels looks like the end of the stream here (tonic's decoder does that): only
    /// the state's own end record shows that it is complete.
    pub(super) async fn forward(
        self,
        mut stream: impl Stream<Item = Result<StartLoadRequest, Status>> + Unpin,
    ) {
        loop {
            let piece = match stream.next().await {
                Some(Ok(StartLoadRequest { data })) if data.len() > CHUNK_LIMIT_BYTES => {
                    let text = format!("data is {} bytes, expected at most {CHUNK_LIMIT_BYTES}", data.len());
                    Piece::Failed(Status::invalid_argument(text))
                }
                Some(Ok(StartLoadRequest { data })) if data.is_empty() => continue,
                Some(Ok(StartLoadRequest { data })) => Piece::Data(data),
                Some(Err(status)) => Piece::Failed(status),
                None => Piece::End,
            };
            let last = !matches!(piece, Piece::Data(_));
            if self.0.send(piece).await.is_err() || last {
                return;
            }
        }
    }
}

impl Intake {
    /// Reads a VM into `ram`, which is zero before, and is zero again if this fails. Blocks.
    pub(super) fn load(self, shape: Shape, ram: &Arc<GuestRam>) -> Result<MachineState, Status> {
        let mut input = Input { pieces: self.0, current: Bytes::new(), failed: None, ended: false };
        let error = match saved::read(&mut input, shape, |gpa, pages| ram.write(gpa, pages)) {
            Ok(machine) => return Ok(machine),
            Err(error) => error,
        };
        let status = match (input.failed, &error) {
            (Some(status), _) => status,
            (None, ReadError::Receive { source, .. }) => Status::aborted(format!("{error}: {source}")),
            (None, ReadError::WriteRam { source, .. }) => Status::internal(format!("{error}: {source}")),
            (None, _) => Status::invalid_argument(error.to_string()),
        };
        match ram.clear() {
            Ok(()) => Err(status),
            Err(clear) => {
                Err(Status::internal(format!("{}; RAM cannot be cleared: {clear}", status.message())))
            }
        }
    }
}

struct Input {
    pieces: mpsc::Receiver<Piece>,
    current: Bytes,
    failed: Option<Status>,
    ended: bool,
}

impl Read for Input {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        if self.current.is_empty() && !self.ended {
            match self.pieces.blocking_recv() {
                Some(Piece::Data(data)) => self.current = data,
                Some(Piece::End) => self.ended = true,
                Some(Piece::Failed(status)) => {
                    self.failed = Some(status);
                    return Err(io::ErrorKind::ConnectionAborted.into());
                }
                None => {
                    return Err(io::Error::new(
                        io::ErrorKind::ConnectionAborted,
                        "the caller has disconnected",
                    ));
                }
            }
        }
        let taken = bytes.len().min(self.current.len());
        let (to, from) = (bytes.get_mut(..taken), self.current.get(..taken));
        if let (Some(to), Some(from)) = (to, from) {
            to.copy_from_slice(from);
        }
        self.current.advance(taken);
        Ok(taken)
    }
}
