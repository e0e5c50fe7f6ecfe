//! The source's half of a blob: from a device or the VMM to the wire. One read's buffer at a time, never
//! copied. [`receiving`](super::receiving) is the other half.

use std::time::Duration;

use futures::StreamExt;
use futures::future::try_join_all;
use slackwater_handover::source::Event;
use slackwater_handover::state::MigrationState;
use slackwater_handover::{Blob, Failure, Reason};
use slackwater_proto::channel::{is_lost, words};
use slackwater_proto::tonic::{Code, Status};
use tracing::{info, warn};

use super::device::EndDevice;
use super::link::BlobLink;
use super::rounds::{Round, Rounds};
use crate::transfer::CHUNK_MAX_BYTES;
use crate::transfer::outgoing::{Receipt, StreamEnded};
use crate::vfio::device::DataRead;
use crate::vmm::{SaveStream, SaveStreams};

/// Between two looks at initial data that is not ready.
const NOT_READY_YET: Duration = Duration::from_millis(10);

/// Sends a device's state: from its data descriptor to the destination.
#[derive(Debug)]
pub(super) struct DeviceSender {
    device: EndDevice,
    link: BlobLink,
}

impl DeviceSender {
    /// Nothing is read yet.
    pub(super) fn new(device: EndDevice, link: BlobLink) -> Self {
        Self { device, link }
    }

    /// Sends what the device gives in PRE_COPY, until none of its initial data is left
    /// (include/uapi/linux/vfio.h: leave PRE_COPY only when initial_bytes is 0), and what has changed since in
    /// rounds, as [`Rounds`] decides. The question how much is left also makes mlx5 begin an incremental save.
    pub(super) async fn pre_copy(mut self: Box<Self>) -> Result<Box<Self>, Failure> {
        let mut rounds = Rounds::default();
        loop {
            let left = match self.device.handle.precopy_info().await {
                Ok(left) => left,
                Err(error) => return Err(self.device.failed_in(MigrationState::PreCopy, error).await),
            };
            match rounds.next(left) {
                Round::Read => {}
                Round::Done => return Ok(self),
                Round::GivesUp { dirty_bytes } => {
                    info!(
                        device = self.device.handle.name(),
                        dirty_bytes,
                        rounds = rounds.rounds(),
                        "the device changes its state as fast as it is sent: the rest goes in the blackout"
                    );
                    return Ok(self);
                }
            }
            match self.read(MigrationState::PreCopy).await? {
                DataRead::Data(data) => {
                    rounds.sent(data.len());
                    if self.link.outgoing.send(data).await.is_err() {
                        return Err(stream_ended(self.link.blob, self.link.receipt).await);
                    }
                }
                // Initial data that is not ready yet: not every driver implements poll on the data descriptor.
                DataRead::Drained if left.initial_bytes > 0 => tokio::time::sleep(NOT_READY_YET).await,
                DataRead::Drained | DataRead::End => rounds.drained(),
            }
        }
    }

    /// Sends the final data to its end, and waits until the destination has verified the whole blob.
    pub(super) async fn capture(mut self) -> Result<(), Failure> {
        loop {
            match self.read(MigrationState::StopCopy).await? {
                DataRead::Data(data) => {
                    if self.link.outgoing.send(data).await.is_err() {
                        return Err(stream_ended(self.link.blob, self.link.receipt).await);
                    }
                }
                DataRead::End => {
                    self.check_empty().await?;
                    break;
                }
                // A temporary end has no place in STOP_COPY: to take it for the end could cut the state
                // short.
                DataRead::Drained => {
                    return Err(self.device.failure(format_args!(
                        "{}: the driver says in STOP_COPY that there is nothing for now (ENOMSG), \
                         which is neither data nor the end",
                        self.device.handle.name()
                    )));
                }
            }
        }
        finish(self.link).await
    }

    /// A driver may have nothing to give: a device without state is taken over as it is, and reported. One
    /// that has said that there is something is not believed.
    async fn check_empty(&self) -> Result<(), Failure> {
        if self.link.flow.bytes() > 0 {
            return Ok(());
        }
        let device = self.device.handle.name();
        match self.device.handle.estimate_bytes().await {
            Ok(Some(bytes)) if bytes > 0 => Err(self.device.failure(format_args!(
                "{device}: the driver reckons with {bytes} bytes of state, and has given 0 bytes of it in \
                 STOP_COPY"
            ))),
            Ok(estimate) => {
                warn!(device, ?estimate, "the device has given no state: its twin begins as after a reset");
                Ok(())
            }
            Err(error) => Err(self.device.failure(error)),
        }
    }

    async fn read(&self, left_in: MigrationState) -> Result<DataRead, Failure> {
        match self.device.handle.read_data(CHUNK_MAX_BYTES).await {
            Ok(read) => Ok(read),
            Err(error) => Err(self.device.failed_in(left_in, error).await),
        }
    }
}

/// Sends what the VMM gives to its end, and waits until the destination has verified the whole of it.
pub(super) async fn send_vmm_state(save: SaveStreams, links: Vec<BlobLink>) -> Event {
    if save.len() != links.len() {
        let message =
            format!("the VMM gives its state in {} streams, and {} were asked for", save.len(), links.len());
        return Event::Failed(Failure::new(Reason::VmmFailed, message));
    }
    match try_join_all(save.into_iter().zip(links).map(|(stream, link)| send(stream, link))).await {
        Ok(_) => Event::BlobSent(Blob::Vmm),
        Err(failure) => Event::Failed(failure),
    }
}

async fn send(mut stream: SaveStream, mut link: BlobLink) -> Result<(), Failure> {
    while let Some(data) = stream.next().await {
        match data {
            Ok(data) => {
                if link.outgoing.send(data).await.is_err() {
                    return Err(stream_ended(link.blob, link.receipt).await);
                }
            }
            Err(error) => return Err(Failure::new(Reason::VmmFailed, error.to_string())),
        }
    }
    finish(link).await
}

async fn finish(link: BlobLink) -> Result<(), Failure> {
    let BlobLink { blob, outgoing, receipt, .. } = link;
    match outgoing.finish().await {
        Ok(_) => match receipt.verified().await {
            Ok(()) => Ok(()),
            Err(status) => Err(rejection(blob, &status).await),
        },
        Err(StreamEnded) => Err(stream_ended(blob, receipt).await),
    }
}

/// The stream ended while there was more to send: why, in the destination's words.
async fn stream_ended(blob: Blob, receipt: Receipt) -> Failure {
    match receipt.verified().await {
        Ok(()) => Failure::new(Reason::BlobRejected, format!("the destination stopped taking {blob}")),
        Err(status) => rejection(blob, &status).await,
    }
}

/// What the destination's answer to a blob means.
async fn rejection(blob: Blob, status: &Status) -> Failure {
    let reason = match (status.code(), blob) {
        // The destination has given up. The hand-over's stream says why, better than anything that is known
        // here.
        (Code::Aborted, _) => std::future::pending().await,
        _ if is_lost(status) => Reason::PeerLost,
        (Code::DataLoss, _) => Reason::BlobRejected,
        (Code::FailedPrecondition, Blob::Device(_)) => Reason::DeviceFailed,
        (Code::FailedPrecondition, Blob::Vmm) => Reason::VmmFailed,
        _ => Reason::TargetFailed,
    };
    Failure::new(reason, format!("sending {blob}: {}", words(status)))
}
