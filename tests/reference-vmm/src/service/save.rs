//! A save: one task from StartSave to its end, and the stream that it feeds.
//!
//! The task waits for FinishSave, then writes the saved VM into a channel of a few chunks, from which the
//! stream reads: a slow reader slows the writer down. The save succeeds when the stream has been read to its
//! end. It ends without a result when the stream is dropped, or [`Save::abort`] is called: the stream then
//! ends with an error.

use std::io::{self, Write};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use futures::Stream;
use slackwater_proto::tonic::Status;
use slackwater_proto::vmm::StartSaveResponse;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::spawn_blocking;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tracing::info;

use crate::machine_state::MachineState;
use crate::ram::GuestRam;
use crate::saved::{self, Shape};

/// The largest chunk of the stream, in bytes.
const CHUNK_BYTES: usize = 256 << 10;
/// The most chunks that wait in the channel.
const CHUNKS: usize = 4;

/// Why a save ended without a result.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum SaveError {
    #[error("the save was aborted")]
    Aborted,
    #[error("the save has ended without a result: its stream was closed")]
    ReaderGone,
    #[error("the save has ended without a result: cannot read guest RAM: {0}")]
    ReadRam(String),
}

impl From<SaveError> for Status {
    fn from(error: SaveError) -> Self {
        match error {
            SaveError::Aborted | SaveError::ReaderGone => Self::aborted(error.to_string()),
            SaveError::ReadRam(_) => Self::internal(error.to_string()),
        }
    }
}

type Outcome = Result<(), SaveError>;

/// A save under way.
#[derive(Debug)]
pub(super) struct Save {
    finish: Option<oneshot::Sender<MachineState>>,
    abort: CancellationToken,
    remaining_bytes: Arc<AtomicU64>,
    outcome: watch::Receiver<Option<Outcome>>,
}

impl Save {
    /// Starts a save. `ended` runs before [`Self::outcome`] resolves.
    pub(super) fn start<E>(
        ram: Arc<GuestRam>,
        shape: Shape,
        abort: CancellationToken,
        ended: impl FnOnce() -> E + Send + 'static,
    ) -> (Self, SaveStream)
    where
        E: Future<Output = ()> + Send,
    {
        let (chunks, incoming) = mpsc::channel(CHUNKS);
        let (finish, finishing) = oneshot::channel();
        let (all_read, mut drained) = oneshot::channel();
        let (publish, outcome) = watch::channel(None);
        let remaining_bytes = Arc::new(AtomicU64::new(shape.ram_bytes));
        let stream = SaveStream {
            chunks: incoming,
            aborted: Box::pin(abort.clone().cancelled_owned()),
            all_read: Some(all_read),
        };
        let save = Self {
            finish: Some(finish),
            abort: abort.clone(),
            remaining_bytes: remaining_bytes.clone(),
            outcome,
        };
        let write = async move {
            let machine = tokio::select! {
                // The sender is dropped only with the save, which lives as long as this task.
                machine = finishing => machine.map_err(|_| SaveError::Aborted)?,
                // Resolves without a value when the stream is dropped.
                _ = &mut drained => return Err(SaveError::ReaderGone),
            };
            write_state(chunks, ram, shape, machine, remaining_bytes, drained).await
        };
        tokio::spawn(async move {
            let outcome = tokio::select! {
                biased;
                () = abort.cancelled() => Err(SaveError::Aborted),
                outcome = write => outcome,
            };
            ended().await;
            publish.send_replace(Some(outcome));
        });
        (save, stream)
    }

    /// Lets the task write all of the VM: RAM, and `machine`. [`Self::outcome`] then resolves with the
    /// result.
    pub(super) fn finish(&mut self, machine: MachineState) {
        if let Some(finish) = self.finish.take() {
            // Fails only if the save has just ended, which `outcome` reports.
            drop(finish.send(machine));
        }
    }

    /// Ends the save without a result. [`Self::outcome`] then resolves.
    pub(super) fn abort(&self) {
        self.abort.cancel();
    }

    /// Bytes of RAM that have not been scanned.
    pub(super) fn remaining_bytes(&self) -> u64 {
        self.remaining_bytes.load(Ordering::Relaxed)
    }

    /// Resolves when the save has ended.
    pub(super) fn outcome(&self) -> impl Future<Output = Outcome> + Send + use<> {
        let mut outcome = self.outcome.clone();
        async move {
            match outcome.wait_for(Option::is_some).await.as_deref() {
                Ok(Some(outcome)) => outcome.clone(),
                Ok(None) | Err(_) => Err(SaveError::Aborted),
            }
        }
    }
}

async fn write_state(
    chunks: mpsc::Sender<Result<Bytes, Status>>,
    ram: Arc<GuestRam>,
    shape: Shape,
    machine: MachineState,
    remaining_bytes: Arc<AtomicU64>,
    drained: oneshot::Receiver<()>,
) -> Outcome {
    let (fail, since) = (chunks.clone(), Instant::now());
    let written = spawn_blocking(move || {
        let mut out = Chunks { chunks, buffer: BytesMut::new() };
        let scanned = |bytes| remaining_bytes.store(shape.ram_bytes - bytes, Ordering::Relaxed);
        saved::write(&mut out, shape, &machine, ram.as_ref(), scanned)?;
        out.flush()
    });
    match written.await {
        Ok(Ok(())) => {}
        Ok(Err(error)) if error.kind() == io::ErrorKind::BrokenPipe => return Err(SaveError::ReaderGone),
        failed => {
            let why = match failed {
                Ok(Err(error)) => error.to_string(),
                Ok(Ok(())) | Err(_) => "the writer failed".to_owned(),
            };
            let error = SaveError::ReadRam(why);
            // Without this the stream would look complete. Fails only if the stream was closed.
            fail.send(Err(error.clone().into())).await.unwrap_or_default();
            return Err(error);
        }
    }
    drop(fail);
    drained.await.map_err(|_| SaveError::ReaderGone)?;
    info!(milliseconds = since.elapsed().as_millis(), "all of the VM was read");
    Ok(())
}

/// Cuts the data into chunks. BrokenPipe: the stream was closed.
struct Chunks {
    chunks: mpsc::Sender<Result<Bytes, Status>>,
    buffer: BytesMut,
}

impl Write for Chunks {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = bytes.len().min(CHUNK_BYTES - self.buffer.len());
        self.buffer.extend_from_slice(bytes.get(..taken).unwrap_or_default());
        if self.buffer.len() == CHUNK_BYTES {
            self.flush()?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let chunk = self.buffer.split().freeze();
        self.chunks.blocking_send(Ok(chunk)).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

/// The response stream of StartSave.
pub struct SaveStream {
    chunks: mpsc::Receiver<Result<Bytes, Status>>,
    aborted: Pin<Box<WaitForCancellationFutureOwned>>,
    all_read: Option<oneshot::Sender<()>>,
}

impl Stream for SaveStream {
    type Item = Result<StartSaveResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.all_read.is_none() {
            return Poll::Ready(None);
        }
        if self.aborted.as_mut().poll(context).is_ready() {
            self.all_read = None;
            self.chunks.close();
            return Poll::Ready(Some(Err(SaveError::Aborted.into())));
        }
        let next = std::task::ready!(self.chunks.poll_recv(context));
        if next.is_none()
            && let Some(all_read) = self.all_read.take()
        {
            // Fails only if the save has ended in another way.
            all_read.send(()).unwrap_or_default();
        }
        Poll::Ready(next.map(|chunk| chunk.map(|data| StartSaveResponse { data })))
    }
}
