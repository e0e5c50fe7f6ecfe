//! What the destination hears from the source's agent: its decisions, and the blobs.

use std::sync::Arc;

use slackwater_handover::destination::{Destination, Event};
use slackwater_handover::{Blob, Failure, Reason};
use slackwater_proto::channel::words;
use slackwater_proto::refusal::Refusal;
use slackwater_proto::tonic::{Code, Status, Streaming};
use slackwater_proto::transfer::{HandoverRequest, handover_request};

use super::{DestinationAttempt, Signal};
use crate::attempt::device::EndDevice;
use crate::attempt::receiving::{BlobReceiver, DeviceReceiver, VmmLoad};
use crate::attempt::tasks::{Signals, StreamGuard};
use crate::journal::Role;
use crate::transfer::channel::Channel;
use crate::transfer::incoming::ReceiveError;

/// A blob, or a channel of one, that may arrive now.
pub(super) struct OpenBlob {
    pub(super) receiver: BlobReceiver,
    /// Held until the blob's last byte has been handed on, or the blob has been given up.
    pub(super) guard: StreamGuard,
}

impl DestinationAttempt {
    /// Opens what takes a blob.
    ///
    /// # Errors
    /// FAILED_PRECONDITION if no blob is expected now, INVALID_ARGUMENT if the VM has no such device,
    /// ALREADY_EXISTS if it has been sent.
    pub(super) fn open_blob(
        &mut self,
        blob: Blob,
        channel: Channel,
        machine: &Destination,
    ) -> Result<OpenBlob, Status> {
        let twin = self.twin.as_ref().filter(|_| machine.takes_blobs());
        let twin = twin.ok_or_else(|| {
            let phase = machine.phase();
            let message = format!("no blob is taken now: the destination is in {phase:?}");
            Refusal::precondition(Reason::BlobRejected, message)
        })?;
        let receiver = match blob {
            Blob::Device(index) => {
                let devices = twin.devices.len();
                let device = EndDevice::at(Role::Destination, &twin.devices, index).ok_or_else(|| {
                    let message = format!("blob.device is {index}; the VM has {devices} devices");
                    Refusal::invalid_argument(Reason::BlobRejected, message)
                })?;
                if !self.opened.insert(index) {
                    return Err(already_exists(format!("{blob} has been sent in this attempt already")));
                }
                BlobReceiver::Device(DeviceReceiver::new(device))
            }
            Blob::Vmm => {
                let vmm = &twin.vmm;
                let load = self.load.get_or_insert_with(|| VmmLoad::begin(Arc::clone(vmm), channel.count()));
                let receiver = load.channel(channel).ok_or_else(|| {
                    let (number, count) = (channel.number(), channel.count());
                    already_exists(format!(
                        "channel {number} of {count} of the VMM's state has been sent in this attempt already, \
                         or its other channels were of another number"
                    ))
                })?;
                BlobReceiver::Vmm(receiver)
            }
        };
        Ok(OpenBlob { receiver, guard: self.tasks.stream_guard() })
    }
}

fn already_exists(message: String) -> Status {
    Refusal::new(Code::AlreadyExists, Reason::BlobRejected, message).into()
}

/// Passes on the source's decisions, until its stream or the attempt ends.
pub(super) async fn receive_decisions(mut requests: Streaming<HandoverRequest>, signals: Signals<Signal>) {
    loop {
        let message = tokio::select! {
            message = requests.message() => message,
            () = signals.closed() => return,
        };
        let event = match message {
            Ok(Some(HandoverRequest { message: Some(handover_request::Message::Commit(_)) })) => {
                Event::CommitReceived
            }
            Ok(Some(HandoverRequest { message: Some(handover_request::Message::Abort(abort)) })) => {
                let message = format!("the source keeps the VM: {}", abort.why);
                Event::AbortReceived(Failure::new(Reason::Released, message))
            }
            Ok(Some(_)) => continue,
            Ok(None) => {
                let message = "the source ended the hand-over's stream";
                Event::PeerLost(Failure::new(Reason::PeerLost, message))
            }
            Err(status) => {
                let message = format!("the source was lost: {}", words(&status));
                Event::PeerLost(Failure::new(Reason::PeerLost, message))
            }
        };
        let lost = matches!(event, Event::PeerLost(_));
        if !signals.send(event) || lost {
            return;
        }
    }
}

/// Why a blob did not arrive: the failure for the machine, and the answer for the source.
pub(super) fn describe_loss(blob: Blob, error: ReceiveError) -> (Failure, Status) {
    let (code, failure) = match error {
        // The hand-over's stream says why the twin has ended, with the end of its log.
        ReceiveError::Sink(failure) if failure.reason == Reason::TwinFailed => (Code::Aborted, failure),
        ReceiveError::Sink(failure) => (Code::FailedPrecondition, failure),
        ReceiveError::Broken { .. } | ReceiveError::GivenUp { .. } => {
            (Code::DataLoss, Failure::new(Reason::PeerLost, format!("{blob}: {error}")))
        }
        ReceiveError::Mismatch(_) | ReceiveError::Order(_) => {
            let message = format!("{blob} did not arrive as it was sent: {error}");
            (Code::DataLoss, Failure::new(Reason::BlobRejected, message))
        }
    };
    let Failure { reason, message } = failure.clone();
    (failure, Refusal::new(code, reason, message).into())
}
