//! Where a blob goes that arrives at the destination.

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;

use super::of_twin;
use crate::handover::{Failure, Reason};
use crate::transfer::incoming::Sink;
use crate::vfio::worker::DeviceHandle;
use crate::vmm::{Vmm, VmmError};

/// Pieces that wait for the twin.
const PIECES_IN_FLIGHT: usize = 2;

/// A device in RESUMING, or the twin.
#[derive(Debug)]
pub enum Receiver {
    /// The device takes each piece before the next is read from the wire.
    Device(DeviceHandle),
    /// The twin takes a stream.
    Twin {
        /// Pieces on their way to the twin; none any more once all have been given.
        pieces: Option<mpsc::Sender<Bytes>>,
        /// The twin's word on the whole.
        loaded: Option<JoinHandle<Result<(), VmmError>>>,
    },
}

impl Receiver {
    /// Begins a load at the twin.
    pub fn twin(vmm: std::sync::Arc<dyn Vmm>) -> Self {
        let (pieces, stream) = mpsc::channel(PIECES_IN_FLIGHT);
        let loaded = tokio::spawn(async move { vmm.start_load(Box::pin(ReceiverStream::new(stream))).await });
        Receiver::Twin { pieces: Some(pieces), loaded: Some(loaded) }
    }
}

/// The twin's word on what it was given; asked once.
async fn word(loaded: &mut Option<JoinHandle<Result<(), VmmError>>>) -> Result<(), Failure> {
    let failed = |why: String| Failure::new(Reason::VmmFailed, format!("at the destination, {why}"));
    match loaded.take() {
        Some(task) => match task.await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(of_twin(&error)),
            Err(error) => Err(failed(format!("loading the twin ended early: {error}"))),
        },
        None => Err(failed("the twin has already refused its state".to_owned())),
    }
}

impl Sink for Receiver {
    async fn write(&mut self, data: Bytes) -> Result<(), Failure> {
        match self {
            Receiver::Device(device) => device
                .write_data(data)
                .await
                .map_err(|error| Failure::new(Reason::DeviceFailed, format!("at the destination, {error}"))),
            Receiver::Twin { pieces: Some(sender), loaded } => {
                if sender.send(data).await.is_ok() {
                    return Ok(());
                }
                word(loaded).await?;
                Err(Failure::new(
                    Reason::VmmFailed,
                    "at the destination, the twin stopped taking its state before the end",
                ))
            }
            Receiver::Twin { pieces: None, .. } => {
                Err(Failure::new(Reason::VmmFailed, "more state after the end of the twin's state"))
            }
        }
    }

    async fn finish(&mut self) -> Result<(), Failure> {
        match self {
            // The driver says whether it takes the whole when the device leaves RESUMING.
            Receiver::Device(_) => Ok(()),
            Receiver::Twin { pieces, loaded } => {
                drop(pieces.take());
                word(loaded).await
            }
        }
    }
}
