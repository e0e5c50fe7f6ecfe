//! What the destination has to do with the twin: its VMM, and its devices.

use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use futures::{Stream, StreamExt};
use slackwater_handover::destination::Event;
use slackwater_handover::state::MigrationState;
use slackwater_handover::{Failure, Reason};
use slackwater_proto::transfer::DeviceStep;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::{ReceiverStream, UnboundedReceiverStream};
use tracing::{debug, warn};

use super::{Shell, Signal, Twin};
use crate::attempt::{Seen, VmmCall, look, of_twin, refused, traced};
use crate::vfio::error::DeviceError;
use crate::vfio::worker::DeviceHandle;

/// What the devices' lines may take of a VM that runs already.
const LINES: Duration = Duration::from_secs(1);

impl Shell {
    pub(super) fn start_twin(&self) {
        let (site, signals) = (Arc::clone(&self.parts.site), self.signals.clone());
        tokio::spawn(async move {
            let signal = match site.start_twin().await {
                Ok(twin) => Signal::TwinReady(twin),
                Err(failure) => Signal::Event(Event::Failed(failure)),
            };
            let _ = signals.send(signal);
        });
    }

    pub(super) fn watch_twin(&mut self, twin: &Twin) {
        self.seen = Seen::new(&twin.devices);
        forward(twin.vmm.watch_devices().map(UnboundedReceiverStream::new), &self.signals, Signal::Seen);
        forward(twin.vmm.take_replies().map(ReceiverStream::new), &self.signals, Signal::Reply);
        let (vmm, signals) = (Arc::clone(&twin.vmm), self.signals.clone());
        tokio::spawn(async move {
            tokio::select! {
                () = vmm.exited() => {
                    let _ = signals.send(Signal::Event(Event::Failed(twin_ended())));
                }
                () = signals.closed() => {}
            }
        });
    }

    pub(super) fn set_state(&mut self, index: usize, to: MigrationState) {
        let Some(device) = self.twin.as_ref().and_then(|twin| twin.devices.get(index)).cloned() else {
            return;
        };
        let signals = self.signals.clone();
        tokio::spawn(async move {
            let event = match device.set_state(to).await {
                Ok(reached) => {
                    let (at, change) = traced(device.name(), &reached);
                    let step = DeviceStep {
                        at: Some(at.into()),
                        device: change.device,
                        from: change.from,
                        to: change.to,
                        took_ns: change.took_ns,
                    };
                    let _ = signals.send(Signal::Step(step));
                    Event::DeviceReached(index, reached.to)
                }
                Err(error) => {
                    let (found, failure) = refused("destination", &error);
                    Event::DeviceFailed(index, found, failure)
                }
            };
            let _ = signals.send(Signal::Event(event));
        });
    }

    /// The driver of a device that the twin has loaded says here whether it takes its state, while it is not too late. QEMU itself
    /// would reset a device that refuses, and say that it runs.
    pub(super) fn check(&self, index: usize) {
        let Some(device) = self.twin.as_ref().and_then(|twin| twin.devices.get(index)).cloned() else {
            return;
        };
        let signals = self.signals.clone();
        tokio::spawn(async move {
            let event = match check(index, &device, &signals).await {
                Ok(()) => Event::DeviceReached(index, MigrationState::Stop),
                Err((found, failure)) => {
                    let message = format!("at the destination, {}", failure.message);
                    Event::DeviceFailed(index, found, Failure::new(failure.reason, message))
                }
            };
            let _ = signals.send(Signal::Event(event));
        });
    }

    /// A VMM that drives its devices wakes them before its vCPUs: where it got them is read back, for the trace. The VM runs.
    pub(super) fn resume_and_look(&self) {
        let Some(twin) = &self.twin else { return };
        let (vmm, devices, signals) = (Arc::clone(&twin.vmm), twin.devices.clone(), self.signals.clone());
        tokio::spawn(async move {
            let event = match vmm.resume().await {
                Ok(()) => {
                    // The VM runs: nothing of this is worth waiting for.
                    let released = join_all(devices.iter().map(release_line));
                    if timeout(LINES, released).await.is_err() {
                        warn!("the VM runs, but a device's INTx could not be signalled within {LINES:?}");
                    }
                    for (index, device) in devices.iter().enumerate() {
                        if let Ok(seen) = look(index, device).await {
                            if seen.state != MigrationState::Running {
                                warn!(device = device.name(), state = %seen.state, "the VM runs, but a device of it does not");
                            }
                            let _ = signals.send(Signal::Seen(seen));
                        }
                    }
                    Event::Resumed
                }
                Err(error) => Event::Failed(of_twin(&error)),
            };
            let _ = signals.send(Signal::Event(event));
        });
    }

    pub(super) fn call(&self, call: VmmCall, done: Event) {
        let Some(vmm) = self.twin.as_ref().map(|twin| Arc::clone(&twin.vmm)) else { return };
        let signals = self.signals.clone();
        tokio::spawn(async move {
            let event = match call(vmm.as_ref()).await {
                Ok(()) => done,
                Err(error) => Event::Failed(of_twin(&error)),
            };
            let _ = signals.send(Signal::Event(event));
        });
    }

    /// A device that holds part of a foreign state is reset before the twin lets go of it: its state would outlive the twin.
    pub(super) fn discard(&mut self) {
        self.streams.cancel();
        self.stream_tasks.close();
        let (twin, site, signals, tasks) =
            (self.twin.take(), Arc::clone(&self.parts.site), self.signals.clone(), self.stream_tasks.clone());
        tokio::spawn(async move {
            tasks.wait().await;
            for device in twin.into_iter().flat_map(|twin| twin.devices) {
                if let Err(error) = device.reset().await {
                    warn!(%error, "a device that is given back could not be reset");
                }
                device.release().await;
            }
            site.discard().await;
            let _ = signals.send(Signal::Event(Event::Discarded));
        });
    }
}

/// Passes on what the twin tells by itself.
fn forward<T: Send + 'static>(
    told: Option<impl Stream<Item = T> + Send + Unpin + 'static>,
    signals: &mpsc::UnboundedSender<Signal>,
    signal: fn(T) -> Signal,
) {
    let Some(mut told) = told else { return };
    let signals = signals.clone();
    tokio::spawn(async move {
        while let Some(item) = told.next().await {
            if signals.send(signal(item)).is_err() {
                return;
            }
        }
    });
}

/// QEMU restores a level-triggered interrupt line as it stood, but not that it is the one to lower it: a line that a device held when
/// the VM stopped would interrupt the guest without an end. One interrupt more has QEMU take it up again. A guest takes one that has no
/// cause for what it is.
async fn release_line(device: &DeviceHandle) {
    match device.trigger_intx().await {
        Ok(true) => debug!(device = device.name(), "its INTx was signalled once"),
        // Or the VM has ended meanwhile, and its devices are being let go.
        Ok(false) | Err(DeviceError::WorkerEnded { .. }) => {}
        Err(error) => warn!(%error, "the VM runs, but its guest may be held up by an interrupt line"),
    }
}

/// From RESUMING to STOP. One that stands anywhere else was never given a state, or has been reset since.
async fn check(
    index: usize,
    device: &DeviceHandle,
    signals: &mpsc::UnboundedSender<Signal>,
) -> Result<(), (Option<MigrationState>, Failure)> {
    let seen = look(index, device).await.map_err(|failure| (None, failure))?;
    let _ = signals.send(Signal::Seen(seen));
    if seen.state != MigrationState::Resuming {
        let message = format!(
            "device {} was read back in {} and not in RESUMING: the twin has not loaded its state",
            device.name(),
            seen.state.name()
        );
        return Err((Some(seen.state), Failure::new(Reason::DeviceFailed, message)));
    }
    device
        .set_state(MigrationState::Stop)
        .await
        .map_err(|error| (error.found(), Failure::new(Reason::DeviceFailed, error.to_string())))?;
    let _ = signals.send(Signal::Seen(look(index, device).await.map_err(|failure| (None, failure))?));
    Ok(())
}

fn twin_ended() -> Failure {
    Failure::new(Reason::TwinFailed, "the twin's process ended")
}
