//! What the source does to the VM: its VMM, and its devices. A function returns the future that carries an
//! effect out.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures::future::{BoxFuture, join_all};
use slackwater_handover::policy::Driver;
use slackwater_handover::source::Event;
use slackwater_handover::{Blob, Failure};
use slackwater_proto::node::Estimate as ReportedEstimate;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tracing::warn;

use super::{Signal, SourceAttempt};
use crate::attempt::device::EndDevice;
use crate::attempt::sending::{DeviceSender, send_vmm_state};
use crate::attempt::tasks::StreamGuard;
use crate::attempt::vmm_calls::{abort_save, source_failure, take_back};
use crate::host::clock::Clock;
use crate::journal::Role;
use crate::vfio::worker::DeviceHandle;
use crate::vmm::budget::{Copying, Estimate};
use crate::vmm::{RunState, Vmm, VmmError};

/// How long the way back waits for data descriptors to be closed.
const CLOSING: Duration = Duration::from_secs(1);

/// How long a VM that runs again may be kept from being reported by looks at its devices.
const LOOK: Duration = Duration::from_secs(1);

/// How long a process whose socket has closed may take to end.
const ENDING: Duration = Duration::from_secs(1);

impl SourceAttempt {
    /// Waits for the end of the VMM's process, follows a VMM that drives its devices, and watches for devices
    /// that hang.
    pub(super) fn watch_vm(&self) {
        let vmm = Arc::clone(&self.parts.vmm);
        self.tasks.run_until_end(async move {
            vmm.exited().await;
            Event::VmmExited
        });
        let seen = self.parts.vmm.watch_devices().map(UnboundedReceiverStream::new);
        self.tasks.forward(seen, Signal::DeviceSeen);
        for device in EndDevice::all(Role::Source, &self.parts.devices) {
            self.tasks.detach(device.report_hangs(self.tasks.signals()));
        }
    }

    /// Begins a save, and sends what it gives until the streams are stopped. A save that is being begun is
    /// not cut short: it can only be aborted after that.
    pub(super) fn start_save(
        &mut self,
        guard: StreamGuard,
    ) -> impl Future<Output = Option<Event>> + Send + use<> {
        self.save_started = true;
        let links = std::mem::take(&mut self.vmm_links);
        let (vmm, signals, budget) = (Arc::clone(&self.parts.vmm), self.tasks.signals(), self.parts.budget);
        async move {
            match vmm.start_save(false, budget).await {
                Ok(save) => {
                    signals.send(Event::SaveStarted);
                    guard.until_stopped(send_vmm_state(save, links)).await
                }
                Err(error) => Some(Event::Failed(source_failure(&error))),
            }
        }
    }

    /// Waits until the VMM is ready for the blackout, and reports what it expects of it. The future has the
    /// devices, which must be closed when their VMM has ended.
    pub(super) fn converge(&self) -> impl Future<Output = Event> + Send + use<> {
        let (reported, mut estimates) = mpsc::unbounded_channel::<Estimate>();
        let log = self.parts.log.clone();
        self.tasks.detach(async move {
            while let Some(Estimate { downtime, allowed }) = estimates.recv().await {
                let estimate = ReportedEstimate {
                    downtime_ns: nanoseconds(downtime),
                    allowed_ns: allowed.map_or(0, nanoseconds),
                };
                log.estimate(Clock::now(), estimate);
            }
        });
        let flow = self.flows.last().map(Arc::clone).unwrap_or_default();
        let copy = Copying {
            budget: self.parts.budget,
            devices: self.parts.devices.clone(),
            flow,
            estimates: reported,
        };
        self.call(move |vmm| vmm.converged(copy), Event::Converged, Event::Failed)
    }

    pub(super) fn finish_save(
        &self,
        guard: StreamGuard,
    ) -> impl Future<Output = Option<Event>> + Send + use<> {
        let vmm = Arc::clone(&self.parts.vmm);
        async move {
            Some(match guard.until_stopped(vmm.finish_save()).await? {
                Ok(()) => Event::SaveFinished,
                // What that means depends on what the destination has.
                Err(VmmError::Lost { .. }) if has_ended(vmm.as_ref()).await => Event::VmmExited,
                Err(error) => Event::Failed(source_failure(&error)),
            })
        }
    }

    pub(super) fn close_streams(&mut self) -> impl Future<Output = Event> + Send + use<> {
        let stopped = self.tasks.stop_streams();
        self.senders.clear();
        self.vmm_links.clear();
        let devices = self.parts.devices.clone();
        let vmm = self.save_started.then(|| Arc::clone(&self.parts.vmm));
        let save_open = Arc::clone(&self.save_open);
        save_open.store(self.save_started, Ordering::Relaxed);
        async move {
            stopped.await;
            let aborted = async {
                if let Some(vmm) = vmm
                    && let Err(error) = abort_save(vmm.as_ref(), &save_open).await
                {
                    // The rollback goes on: the devices do not wait for it. The VMM is asked again before it is
                    // to resume its VM.
                    warn!(%error, "the VMM did not abort its save");
                }
            };
            tokio::join!(aborted, close_data(devices));
            Event::StreamsClosed
        }
    }

    pub(super) fn device(&self, index: usize) -> Option<EndDevice> {
        EndDevice::at(Role::Source, &self.parts.devices, index)
    }

    /// Runs what an effect does to a device.
    pub(super) fn run_on<F>(&self, index: usize, effect: impl FnOnce(EndDevice) -> F)
    where
        F: Future<Output: Into<Signal>> + Send + 'static,
    {
        if let Some(device) = self.device(index) {
            self.tasks.run(effect(device));
        }
    }

    /// Runs what an effect does with the sender of a device's state, until the streams are stopped.
    pub(super) fn run_sender<F>(&mut self, index: usize, effect: impl FnOnce(Box<DeviceSender>) -> F)
    where
        F: Future<Output: Into<Signal>> + Send + 'static,
    {
        if let Some(sender) = self.senders.get_mut(index).and_then(Option::take) {
            self.tasks.run_stream(effect(sender));
        }
    }

    /// Lets the VM run on here. A VMM that drives its devices wakes them before the vCPUs, so their states are
    /// read after that.
    pub(super) fn take_back(&self) -> impl Future<Output = Event> + Send + use<> {
        let (vmm, signals) = (Arc::clone(&self.parts.vmm), self.tasks.signals());
        let devices = match vmm.driver() {
            Driver::Agent => Vec::new(),
            Driver::Vmm => EndDevice::all(Role::Source, &self.parts.devices),
        };
        let save_open = Arc::clone(&self.save_open);
        async move {
            let late = |failure| {
                signals.send(Signal::VmmSilent(failure));
            };
            match take_back(vmm.as_ref(), &save_open, late).await {
                Ok(state) if state != RunState::Running => {
                    warn!(pid = vmm.pid(), %state, "the VM stays as it was left here: it");
                    Event::Resumed
                }
                Ok(_) => {
                    let looks = devices.iter().map(|device| timeout(LOOK, device.look()));
                    for (look, device) in join_all(looks).await.into_iter().zip(&devices) {
                        match look {
                            Ok(Ok(seen)) => signals.send(Signal::DeviceRead(seen)),
                            Ok(Err(_)) => continue,
                            Err(_) => signals.send(device.no_look()),
                        };
                    }
                    Event::Resumed
                }
                Err(error) => {
                    if matches!(error, VmmError::Lost { .. }) && has_ended(vmm.as_ref()).await {
                        signals.send(Event::VmmExited);
                    }
                    Event::ResumeFailed(source_failure(&error))
                }
            }
        }
    }

    /// Calls the VMM: `done`, or what `failed` makes of the failure.
    pub(super) fn call<F>(
        &self,
        call: F,
        done: Event,
        failed: fn(Failure) -> Event,
    ) -> impl Future<Output = Event> + Send + use<F>
    where
        F: for<'a> FnOnce(&'a dyn Vmm) -> BoxFuture<'a, Result<(), VmmError>> + Send + 'static,
    {
        let (vmm, signals) = (Arc::clone(&self.parts.vmm), self.tasks.signals());
        async move {
            match call(vmm.as_ref()).await {
                Ok(()) => done,
                Err(error) => {
                    // A call breaks off because the process is ending: its end is the better reason.
                    if matches!(error, VmmError::Lost { .. }) && has_ended(vmm.as_ref()).await {
                        signals.send(Event::VmmExited);
                    }
                    failed(source_failure(&error))
                }
            }
        }
    }

    /// Gives back the devices, whose copy here is dead for good, and then the VM. The borrowed descriptors go
    /// first: a forgotten one would keep the devices bound after the end of their VMM.
    pub(super) fn release(&mut self) -> impl Future<Output = Event> + Send + use<> {
        self.senders.clear();
        let devices = EndDevice::all(Role::Source, &std::mem::take(&mut self.parts.devices));
        let release = std::mem::replace(&mut self.parts.release, Box::new(|| Box::pin(async {})));
        async move {
            EndDevice::give_back(devices).await;
            release().await;
            Event::Released
        }
    }
}

/// Closes the devices' data descriptors. A device that is in a call closes its own after that, and before
/// whatever it is asked for then, so it is not waited for.
async fn close_data(devices: Vec<DeviceHandle>) {
    let closings = devices.into_iter().map(|device| {
        tokio::spawn(async move {
            if let Err(error) = device.close_data().await {
                warn!(%error, "a device's data descriptor could not be closed");
            }
        })
    });
    let _ = timeout(CLOSING, join_all(closings)).await;
}

/// Sends a device's initial data.
pub(super) async fn pre_copy(index: usize, sender: Box<DeviceSender>) -> Signal {
    match sender.pre_copy().await {
        Ok(sender) => Signal::PreCopied(index, sender),
        Err(failure) => Signal::Event(Event::Failed(failure)),
    }
}

/// Sends a device's final data.
pub(super) async fn capture(index: usize, sender: Box<DeviceSender>) -> Event {
    match sender.capture().await {
        Ok(()) => Event::BlobSent(Blob::Device(index)),
        Err(failure) => Event::Failed(failure),
    }
}

/// Reads the state of a device that its VMM drives.
pub(super) async fn read_state(device: EndDevice) -> Signal {
    match device.look().await {
        Ok(seen) => Signal::DeviceRead(seen),
        Err(failure) => Signal::Event(Event::DeviceFailed(device.index, failure.found, failure.failure)),
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Whether a process whose socket has closed is gone, or is about to be.
async fn has_ended(vmm: &dyn Vmm) -> bool {
    timeout(ENDING, vmm.exited()).await.is_ok()
}
