//! Where a blob goes that arrives at the destination.

use std::sync::Arc;

use bytes::Bytes;
use slackwater_handover::{Failure, Reason};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;

use super::of_twin;
use crate::transfer::channel::Channel;
use crate::transfer::incoming::Sink;
use crate::vfio::worker::DeviceHandle;
use crate::vmm::{LoadStream, Vmm, VmmError};

/// Pieces of each channel that wait for the twin.
const PIECES_IN_FLIGHT: usize = 2;

/// A device in RESUMING, or the twin.
#[derive(Debug)]
pub enum Receiver {
    /// The device takes each piece before the next is read from the wire.
    Device(DeviceHandle),
    /// The twin takes a stream, or several.
    Twin(TwinChannel),
}

/// A load that the twin has begun, and the channels that have not come yet.
#[derive(Debug)]
pub struct TwinLoad {
    waiting: Vec<Option<mpsc::Sender<Bytes>>>,
    loaded: Option<JoinHandle<Result<(), VmmError>>>,
    verified: Arc<watch::Sender<usize>>,
}

impl TwinLoad {
    /// Begins a load of so many channels.
    pub fn begin(vmm: Arc<dyn Vmm>, channels: usize) -> Self {
        let pairs = (0..channels).map(|_| {
            let (pieces, stream) = mpsc::channel(PIECES_IN_FLIGHT);
            (Some(pieces), Box::pin(ReceiverStream::new(stream)) as LoadStream)
        });
        let (waiting, streams): (Vec<_>, Vec<_>) = pairs.unzip();
        let loaded = tokio::spawn(async move { vmm.start_load(streams).await });
        Self { waiting, loaded: Some(loaded), verified: Arc::new(watch::Sender::new(0)) }
    }

    /// One of them, once. None if it has come before, or belongs to another number of channels.
    pub fn channel(&mut self, channel: Channel) -> Option<Receiver> {
        if channel.count() != self.waiting.len() {
            return None;
        }
        let pieces = self.waiting.get_mut(channel.number())?.take()?;
        let loaded = if channel.is_main() { self.loaded.take() } else { None };
        let others = self.waiting.len() - 1;
        let verified = Arc::clone(&self.verified);
        Some(Receiver::Twin(TwinChannel { pieces: Some(pieces), loaded, others, verified }))
    }
}

/// One channel of what a twin takes.
#[derive(Debug)]
pub struct TwinChannel {
    /// Pieces on their way to the twin; none any more once all have been given.
    pieces: Option<mpsc::Sender<Bytes>>,
    /// Of the main one: the twin's word on the whole.
    loaded: Option<JoinHandle<Result<(), VmmError>>>,
    others: usize,
    /// How many of the others have been verified. The whole is whole when all of them have: the main one ends after them.
    verified: Arc<watch::Sender<usize>>,
}

impl TwinChannel {
    async fn write(&mut self, data: Bytes) -> Result<(), Failure> {
        let failed = |why: &str| Failure::new(Reason::VmmFailed, format!("at the destination, {why}"));
        let pieces = self.pieces.as_ref().ok_or_else(|| failed("more state came after the end of it"))?;
        if pieces.send(data).await.is_ok() {
            return Ok(());
        }
        // The main channel tells the twin's own words.
        if self.loaded.is_some() {
            word(&mut self.loaded).await?;
        }
        Err(failed("the twin stopped taking its state before the end"))
    }

    async fn finish(&mut self) -> Result<(), Failure> {
        drop(self.pieces.take());
        if self.loaded.is_none() {
            self.verified.send_modify(|verified| *verified += 1);
            return Ok(());
        }
        let mut verified = self.verified.subscribe();
        // It is told by this one itself, too, so it cannot be gone.
        let _ = verified.wait_for(|verified| *verified >= self.others).await;
        word(&mut self.loaded).await
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
            Receiver::Twin(channel) => channel.write(data).await,
        }
    }

    async fn finish(&mut self) -> Result<(), Failure> {
        match self {
            // The driver says whether it takes the whole when the device leaves RESUMING.
            Receiver::Device(_) => Ok(()),
            Receiver::Twin(channel) => channel.finish().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::vmm::fake::{FakeVmm, SharedLog};

    /// The receivers of a load of three channels, the main one first, and the twin.
    fn load() -> (Vec<Receiver>, Arc<FakeVmm>) {
        let twin = Arc::new(FakeVmm::incoming("twin", SharedLog::default()));
        let mut load = TwinLoad::begin(Arc::clone(&twin) as Arc<dyn Vmm>, 3);
        let receivers = Channel::all(2).map(|channel| load.channel(channel).unwrap()).collect();
        assert!(Channel::all(2).all(|channel| load.channel(channel).is_none()), "each comes once");
        assert!(Channel::all(3).all(|channel| load.channel(channel).is_none()), "there are three");
        (receivers, twin)
    }

    #[tokio::test]
    async fn the_whole_has_come_when_each_channel_has_been_verified_and_no_sooner() {
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
    async fn a_channel_that_breaks_off_does_not_let_the_whole_pass_for_whole() {
        let (mut receivers, _twin) = load();
        let broken = receivers.pop().unwrap();
        receivers.pop().unwrap().finish().await.unwrap();
        // Its bytes end for the twin, too, which may well be content with that.
        drop(broken);
        let mut main = receivers.pop().unwrap();
        assert!(tokio::time::timeout(Duration::from_millis(50), main.finish()).await.is_err());
    }
}
