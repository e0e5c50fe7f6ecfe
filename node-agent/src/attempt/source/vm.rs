//! What the source has to do with the VM: its VMM, and its devices.

use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use slackwater_handover::source::Event;
use slackwater_handover::state::MigrationState;
use slackwater_handover::{Blob, Failure, Reason};
use slackwater_proto::node::Estimate as ToldEstimate;
use tokio::sync::mpsc;
use tracing::warn;

use super::{Shell, Signal};
use crate::attempt::pump::{self};
use crate::attempt::{look, refused, traced};
use crate::host::clock::Clock;
use crate::vmm::budget::{Copying, Estimate};
use crate::vmm::{Vmm, VmmError};

/// How long a process whose socket has closed may take to be gone.
const ENDING: Duration = Duration::from_secs(1);

impl Shell {
    pub(super) fn watch_vmm(&self) {
        let (vmm, signals) = (Arc::clone(&self.parts.vmm), self.signals.clone());
        tokio::spawn(async move {
            tokio::select! {
                () = vmm.exited() => {
                    let _ = signals.send(Signal::Event(Event::VmmExited));
                }
                () = signals.closed() => {}
            }
        });
    }

    pub(super) fn watch_devices(&self) {
        let Some(mut seen) = self.parts.vmm.watch_devices() else { return };
        let signals = self.signals.clone();
        tokio::spawn(async move {
            while let Some(seen) = seen.recv().await {
                if signals.send(Signal::Seen(seen)).is_err() {
                    return;
                }
            }
        });
    }

    pub(super) fn start_save(&mut self) {
        self.save_started = true;
        let links = std::mem::take(&mut self.vmm_links);
        let (vmm, signals, streams) =
            (Arc::clone(&self.parts.vmm), self.signals.clone(), self.streams.clone());
        let budget = self.parts.budget;
        self.stream_tasks.spawn(async move {
            let event = match vmm.start_save(false, budget).await {
                Ok(save) => {
                    let _ = signals.send(Signal::Event(Event::SaveStarted));
                    tokio::select! {
                        sent = pump::vmm(save, links) => sent,
                        () = streams.cancelled() => return,
                    }
                }
                Err(error) => Event::Failed(Failure::new(Reason::VmmFailed, error.to_string())),
            };
            let _ = signals.send(Signal::Event(event));
        });
    }

    pub(super) fn converge(&self) {
        let (tell, mut told) = mpsc::unbounded_channel::<Estimate>();
        let log = self.parts.log.clone();
        tokio::spawn(async move {
            while let Some(Estimate { downtime, allowed }) = told.recv().await {
                let estimate = ToldEstimate {
                    downtime_ns: nanoseconds(downtime),
                    allowed_ns: allowed.map_or(0, nanoseconds),
                };
                log.estimate(Clock::now(), estimate);
            }
        });
        let flow = self.flows.last().map(Arc::clone).unwrap_or_default();
        let copy = Copying { budget: self.parts.budget, devices: self.parts.devices.clone(), flow, tell };
        let outcome = self.outcome(move |vmm| vmm.converged(copy), Event::Converged, Event::Failed);
        let (signals, streams) = (self.signals.clone(), self.streams.clone());
        // It has the devices, which must be closed when their VMM is gone.
        self.stream_tasks.spawn(async move {
            tokio::select! {
                event = outcome => {
                    let _ = signals.send(Signal::Event(event));
                }
                () = streams.cancelled() => {}
            }
        });
    }

    pub(super) fn finish_save(&self) {
        let (vmm, signals, streams) =
            (Arc::clone(&self.parts.vmm), self.signals.clone(), self.streams.clone());
        self.stream_tasks.spawn(async move {
            let answer = tokio::select! {
                answer = vmm.finish_save() => answer,
                () = streams.cancelled() => return,
            };
            let event = match answer {
                Ok(()) => Event::SaveFinished,
                // What that means depends on what the destination has.
                Err(VmmError::Lost { .. }) if has_ended(vmm.as_ref()).await => Event::VmmExited,
                Err(error) => Event::Failed(Failure::new(Reason::VmmFailed, error.to_string())),
            };
            let _ = signals.send(Signal::Event(event));
        });
    }

    pub(super) fn close_streams(&mut self) {
        self.streams.cancel();
        self.stream_tasks.close();
        self.pumps.clear();
        self.vmm_links.clear();
        let (tasks, devices, signals) =
            (self.stream_tasks.clone(), self.parts.devices.clone(), self.signals.clone());
        let vmm = self.save_started.then(|| Arc::clone(&self.parts.vmm));
        tokio::spawn(async move {
            tasks.wait().await;
            for device in &devices {
                if let Err(error) = device.close_data().await {
                    warn!(%error, "a device's data descriptor could not be closed");
                }
            }
            if let Some(vmm) = vmm
                && let Err(error) = vmm.abort_save().await
            {
                // The rollback goes on: if the VMM cannot resume either, it says so then.
                warn!(%error, "the VMM did not abort its save");
            }
            let _ = signals.send(Signal::Event(Event::StreamsClosed));
        });
    }

    pub(super) fn set_state(&self, index: usize, to: MigrationState) {
        let Some(device) = self.parts.devices.get(index).cloned() else { return };
        let (signals, log) = (self.signals.clone(), self.parts.log.clone());
        tokio::spawn(async move {
            let event = match device.set_state(to).await {
                Ok(reached) => {
                    let (at, change) = traced(device.name(), &reached);
                    log.device(at, change);
                    Event::DeviceReached(index, reached.to)
                }
                Err(error) => {
                    let (found, failure) = refused("source", &error);
                    Event::DeviceFailed(index, found, failure)
                }
            };
            let _ = signals.send(Signal::Event(event));
        });
    }

    pub(super) fn read_state(&self, index: usize) {
        let Some(device) = self.parts.devices.get(index).cloned() else { return };
        let signals = self.signals.clone();
        tokio::spawn(async move {
            let signal = match look(index, &device).await {
                Ok(seen) => Signal::Looked(seen),
                Err(failure) => {
                    let message = format!("at the source, {}", failure.message);
                    Signal::Event(Event::DeviceFailed(index, None, Failure::new(failure.reason, message)))
                }
            };
            let _ = signals.send(signal);
        });
    }

    /// A VMM that drives its devices wakes them before its vCPUs: where it got them is read back.
    pub(super) fn resume_and_look(&self) {
        let (vmm, devices, signals) =
            (Arc::clone(&self.parts.vmm), self.parts.devices.clone(), self.signals.clone());
        tokio::spawn(async move {
            let event = match vmm.resume().await {
                Ok(()) => {
                    for (index, device) in devices.iter().enumerate() {
                        if let Ok(seen) = look(index, device).await {
                            let _ = signals.send(Signal::Looked(seen));
                        }
                    }
                    Event::Resumed
                }
                Err(error) => Event::ResumeFailed(Failure::new(Reason::VmmFailed, error.to_string())),
            };
            let _ = signals.send(Signal::Event(event));
        });
    }

    pub(super) fn reset(&self, index: usize) {
        let Some(device) = self.parts.devices.get(index).cloned() else { return };
        let signals = self.signals.clone();
        warn!(device = device.name(), "resetting a device that cannot be brought back otherwise");
        tokio::spawn(async move {
            let event = match device.reset().await {
                Ok(()) => Event::DeviceReached(index, MigrationState::Running),
                Err(error) => Event::DeviceFailed(
                    index,
                    None,
                    Failure::new(Reason::DeviceFailed, format!("at the source, {error}")),
                ),
            };
            let _ = signals.send(Signal::Event(event));
        });
    }

    pub(super) fn pre_copy(&mut self, index: usize) {
        let Some(pump) = self.pumps.get_mut(index).and_then(Option::take) else { return };
        let (signals, streams) = (self.signals.clone(), self.streams.clone());
        self.stream_tasks.spawn(async move {
            let drained = tokio::select! {
                drained = pump.pre_copy() => drained,
                () = streams.cancelled() => return,
            };
            let _ = signals.send(match drained {
                Ok(pump) => Signal::PreCopied(index, pump),
                Err(failure) => Signal::Event(Event::Failed(failure)),
            });
        });
    }

    pub(super) fn capture(&mut self, index: usize) {
        let Some(pump) = self.pumps.get_mut(index).and_then(Option::take) else { return };
        let (signals, streams) = (self.signals.clone(), self.streams.clone());
        self.stream_tasks.spawn(async move {
            let event = tokio::select! {
                sent = pump.capture() => match sent {
                    Ok(()) => Event::BlobSent(Blob::Device(index)),
                    Err(failure) => Event::Failed(failure),
                },
                () = streams.cancelled() => return,
            };
            let _ = signals.send(Signal::Event(event));
        });
    }

    pub(super) fn call<F>(&self, call: F, done: Event, failed: fn(Failure) -> Event)
    where
        F: for<'a> FnOnce(&'a dyn Vmm) -> BoxFuture<'a, Result<(), VmmError>> + Send + 'static,
    {
        let (outcome, signals) = (self.outcome(call, done, failed), self.signals.clone());
        tokio::spawn(async move {
            let _ = signals.send(Signal::Event(outcome.await));
        });
    }

    /// What becomes of a call to the VMM.
    pub(super) fn outcome<F>(
        &self,
        call: F,
        done: Event,
        failed: fn(Failure) -> Event,
    ) -> impl Future<Output = Event> + Send + use<F>
    where
        F: for<'a> FnOnce(&'a dyn Vmm) -> BoxFuture<'a, Result<(), VmmError>> + Send + 'static,
    {
        let (vmm, signals) = (Arc::clone(&self.parts.vmm), self.signals.clone());
        async move {
            match call(vmm.as_ref()).await {
                Ok(()) => done,
                Err(error) => {
                    // A call breaks off because the process is ending: that it has ended is the better reason.
                    if matches!(error, VmmError::Lost { .. }) && has_ended(vmm.as_ref()).await {
                        let _ = signals.send(Signal::Event(Event::VmmExited));
                    }
                    let reason = match error {
                        VmmError::BudgetExceeded(_) => Reason::BudgetExceeded,
                        _ => Reason::VmmFailed,
                    };
                    failed(Failure::new(reason, error.to_string()))
                }
            }
        }
    }

    /// The borrowed descriptors go first: a forgotten one would keep the devices bound after their VMM's end.
    pub(super) fn release(&mut self) {
        self.pumps.clear();
        let devices = std::mem::take(&mut self.parts.devices);
        let release = std::mem::replace(&mut self.parts.release, Box::new(|| Box::pin(async {})));
        let signals = self.signals.clone();
        tokio::spawn(async move {
            for device in devices {
                // The copy here is dead for good; and some drivers keep its state past the last close, for whoever opens the
                // device next.
                if let Err(error) = device.reset().await {
                    warn!(%error, "a device that is given back could not be reset");
                }
                device.release().await;
            }
            release().await;
            let _ = signals.send(Signal::Event(Event::Released));
        });
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Whether a process whose socket has closed is gone, or is about to be.
async fn has_ended(vmm: &dyn Vmm) -> bool {
    tokio::time::timeout(ENDING, vmm.exited()).await.is_ok()
}
