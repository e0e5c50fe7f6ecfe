//! The destination's half of a blob: from the wire to a device or the twin. [`sending`](super::sending) is
//! the other half.

use std::fmt::Display;
use std::sync::Arc;

use bytes::Bytes;
use slackwater_handover::{Failure, Reason};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;

use super::device::EndDevice;
use super::vmm_calls::twin_failure;
use crate::transfer::channel::Channel;
use crate::transfer::incoming::Sink;
use crate::vmm::{LoadStream, Vmm, VmmError};

/// Pieces of each channel that wait for the twin.
const PIECES_IN_FLIGHT: usize = 2;

/// Takes a blob, or a channel of one.
#[derive(Debug)]
pub(super) enum BlobReceiver {
    /// A device's state.
    Device(DeviceReceiver),
    /// A channel of the VMM's own state.
    Vmm(VmmReceiver),
}

/// Takes a device's state: each piece is written before the next is read from the wire.
#[derive(Debug)]
pub(super) struct DeviceReceiver {
    device: EndDevice,
}

impl DeviceReceiver {
    /// The device is in RESUMING.
    pub(super) fn new(device: EndDevice) -> Self {
        Self { device }
    }
}

/// The load of the VMM's own state, with the channels that have not come yet.
#[derive(Debug)]
pub(super) struct VmmLoad {
    waiting: Vec<Option<mpsc::Sender<Bytes>>>,
    loaded: Option<JoinHandle<Result<(), VmmError>>>,
    verified: Arc<watch::Sender<usize>>,
}

impl VmmLoad {
    /// Has the twin begin a load of so many channels.
    pub(super) fn begin(vmm: Arc<dyn Vmm>, channels: usize) -> Self {
        let pairs = (0..channels).map(|_| {
            let (pieces, stream) = mpsc::channel(PIECES_IN_FLIGHT);
            (Some(pieces), Box::pin(ReceiverStream::new(stream)) as LoadStream)
        });
        let (waiting, streams): (Vec<_>, Vec<_>) = pairs.unzip();
        let loaded = tokio::spawn(async move { vmm.start_load(streams).await });
        Self { waiting, loaded: Some(loaded), verified: Arc::new(watch::Sender::new(0)) }
    }

    /// The receiver of a channel, once. None if it has come before, or counts another number of channels.
    pub(super) fn channel(&mut self, channel: Channel) -> Option<VmmReceiver> {
        if channel.count() != self.waiting.len() {
            return None;
        }
        let pieces = self.waiting.get_mut(channel.number())?.take()?;
        let loaded = if channel.is_main() { self.loaded.take() } else { None };
        let others = self.waiting.len() - 1;
        let verified = Arc::clone(&self.verified);
        Some(VmmReceiver { pieces: Some(pieces), loaded, others, verified })
    }
}

/// Takes a channel of the VMM's own state.
#[derive(Debug)]
pub(super) struct VmmReceiver {
    /// To the twin. None when all pieces have been given.
    pieces: Option<mpsc::Sender<Bytes>>,
    /// Of the main channel: the twin's answer to the whole state.
    loaded: Option<JoinHandle<Result<(), VmmError>>>,
    others: usize,
    /// How many of the other channels have been verified. The main one ends after them: then the whole state
    /// has been verified.
    verified: Arc<watch::Sender<usize>>,
}

impl Sink for DeviceReceiver {
    async fn write(&mut self, data: Bytes) -> Result<(), Failure> {
        self.device.handle.write_data(data).await.map_err(|error| self.device.failure(error))
    }

    async fn finish(&mut self) -> Result<(), Failure> {
        // The driver reports whether it accepts the whole when the device leaves RESUMING.
        Ok(())
    }
}

impl Sink for VmmReceiver {
    async fn write(&mut self, data: Bytes) -> Result<(), Failure> {
        let pieces = self.pieces.as_ref().ok_or_else(|| vmm_failed("more state came after the end of it"))?;
        if pieces.send(data).await.is_ok() {
            return Ok(());
        }
        // On the main channel the twin's own words are the better reason.
        if self.loaded.is_some() {
            twin_answer(&mut self.loaded).await?;
        }
        Err(vmm_failed("the twin stopped taking its state before the end"))
    }

    async fn finish(&mut self) -> Result<(), Failure> {
        drop(self.pieces.take());
        if self.loaded.is_none() {
            self.verified.send_modify(|verified| *verified += 1);
            return Ok(());
        }
        let mut verified = self.verified.subscribe();
        // This receiver has a sender, too, so the channel stays open.
        let _ = verified.wait_for(|verified| *verified >= self.others).await;
        twin_answer(&mut self.loaded).await
    }
}

/// The twin's answer to its whole state; it answers once.
async fn twin_answer(loaded: &mut Option<JoinHandle<Result<(), VmmError>>>) -> Result<(), Failure> {
    match loaded.take() {
        Some(task) => match task.await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(twin_failure(&error)),
            Err(error) => Err(vmm_failed(format_args!("loading the twin ended early: {error}"))),
        },
        None => Err(vmm_failed("the twin has already refused its state")),
    }
}

fn vmm_failed(why: impl Display) -> Failure {
    Failure::new(Reason::VmmFailed, format!("at the destination, {why}"))
}

impl Sink for BlobReceiver {
    async fn write(&mut self, data: Bytes) -> Result<(), Failure> {
        match self {
            Self::Device(receiver) => receiver.write(data).await,
            Self::Vmm(receiver) => receiver.write(data).await,
        }
    }

    async fn finish(&mut self) -> Result<(), Failure> {
        match self {
            Self::Device(receiver) => receiver.finish().await,
            Self::Vmm(receiver) => receiver.finish().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::vmm::fake::{FakeVmm, SharedLog};

    /// The receivers of a load of three channels, the main one first, and the twin.
    fn load() -> (Vec<VmmReceiver>, Arc<FakeVmm>) {
        let twin = Arc::new(FakeVmm::incoming("twin", SharedLog::default()));
        let mut load = VmmLoad::begin(Arc::clone(&twin) as Arc<dyn Vmm>, 3);
        let receivers = Channel::all(2).map(|channel| load.channel(channel).unwrap()).collect();
        assert!(Channel::all(2).all(|channel| load.channel(channel).is_none()), "each comes once");
        assert!(Channel::all(3).all(|channel| load.channel(channel).is_none()), "there are three");
        (receivers, twin)
    }

    #[tokio::test]
    async fn the_state_is_whole_when_each_channel_has_been_verified_and_no_sooner() {
        let (mut receivers, twin) = load();
        for (receiver, piece) in receivers.iter_mut().zip(["ma", "on", "e"]) {
            receiver.write(Bytes::from_static(piece.as_bytes())).await.unwrap();
        }
        let mut others = receivers.split_off(1);
        let mut main = receivers.pop().unwrap();
        let mut main = tokio::spawn(async move { main.finish().await });
        let mut last = others.pop().unwrap();
        for mut other in others {
            other.finish().await.unwrap();
        }
        let early = tokio::time::timeout(Duration::from_millis(50), &mut main).await;
        assert!(early.is_err(), "one channel has not been verified");
        last.finish().await.unwrap();
        main.await.unwrap().unwrap();
        assert_eq!(twin.loaded().unwrap(), "maone");
    }

    #[tokio::test]
    async fn a_state_with_a_broken_channel_never_counts_as_whole() {
        let (mut receivers, _twin) = load();
        let broken = receivers.pop().unwrap();
        receivers.pop().unwrap().finish().await.unwrap();
        // Its bytes end for the twin, too, which may well be content with that.
        drop(broken);
        let mut main = receivers.pop().unwrap();
        assert!(tokio::time::timeout(Duration::from_millis(50), main.finish()).await.is_err());
    }
}
