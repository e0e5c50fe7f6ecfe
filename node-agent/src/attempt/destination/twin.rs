//! What the destination does to the twin: its VMM, and its devices. A function returns the future that
//! carries an effect out.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use slackwater_handover::destination::Event;
use slackwater_handover::policy::Driver;
use slackwater_handover::state::MigrationState;
use slackwater_handover::{Failure, Reason};
use tokio::time::timeout;
use tokio_stream::wrappers::{ReceiverStream, UnboundedReceiverStream};
use tracing::{debug, warn};

use super::{DestinationAttempt, Signal, Twin};
use crate::attempt::device::{DeviceFailure, DeviceOutcome, EndDevice, LastStates};
use crate::attempt::tasks::Signals;
use crate::attempt::vmm_calls::{VmmCall, confirm, resume, twin_failure};
use crate::journal::Role;
use crate::vfio::error::DeviceError;
use crate::vfio::worker::DeviceHandle;

/// How long the signals on the devices' interrupt lines may take. The VM runs already.
const LINES: Duration = Duration::from_secs(1);

/// How long a look at a device may take then, and before the start. One that hangs is named by its watch.
const LOOK: Duration = Duration::from_secs(1);

impl DestinationAttempt {
    pub(super) fn start_twin(&self) -> impl Future<Output = Signal> + Send + use<> {
        let site = Arc::clone(&self.parts.site);
        async move {
            match site.start_twin().await {
                Ok(twin) => Signal::TwinReady(twin),
                Err(failure) => Signal::Event(Event::Failed(failure)),
            }
        }
    }

    /// Waits for the end of the twin's process, follows what the twin reports by itself, and watches for
    /// devices that hang.
    pub(super) fn watch_twin(&mut self, twin: &Twin) {
        self.last_states = LastStates::running(&twin.devices);
        self.tasks.forward(twin.vmm.watch_devices().map(UnboundedReceiverStream::new), Signal::DeviceSeen);
        self.tasks.forward(twin.vmm.take_replies().map(ReceiverStream::new), Signal::Reply);
        for device in EndDevice::all(Role::Destination, &twin.devices) {
            self.tasks.detach(device.report_hangs(self.tasks.signals()));
        }
        let vmm = Arc::clone(&twin.vmm);
        self.tasks.run_until_end(async move {
            vmm.exited().await;
            Event::Failed(Failure::new(Reason::TwinFailed, "the twin's process ended"))
        });
    }

    /// Runs what an effect does to a device of the twin.
    pub(super) fn run_on<F>(&self, index: usize, effect: impl FnOnce(EndDevice) -> F)
    where
        F: Future<Output: Into<Signal>> + Send + 'static,
    {
        let twin = self.twin.as_ref();
        if let Some(device) = twin.and_then(|twin| EndDevice::at(Role::Destination, &twin.devices, index)) {
            self.tasks.run(effect(device));
        }
    }

    /// Runs what an effect asks of the twin's VMM.
    pub(super) fn run_call(&self, call: VmmCall, done: Event) {
        let Some(twin) = &self.twin else { return };
        let vmm = Arc::clone(&twin.vmm);
        self.tasks.run(async move {
            match call(vmm.as_ref()).await {
                Ok(()) => done,
                Err(error) => Event::Failed(twin_failure(&error)),
            }
        });
    }

    /// Asks the twin for a sign of life, and looks whether its devices still hold what they were given. From
    /// STARTING on there is only forward, and the source still has the VM.
    pub(super) fn confirm_twin(&self) {
        let Some(twin) = &self.twin else { return };
        let vmm = Arc::clone(&twin.vmm);
        let devices = EndDevice::all(Role::Destination, &twin.devices);
        self.tasks.run(async move {
            let looks = join_all(devices.iter().map(holds_its_state));
            let (lives, looks) = tokio::join!(confirm(vmm.as_ref()), looks);
            match (lives, looks.into_iter().find_map(Result::err)) {
                (Err(error), _) => Event::Failed(twin_failure(&error)),
                (Ok(()), Some(failure)) => Event::Failed(failure),
                (Ok(()), None) => Event::TwinConfirmed,
            }
        });
    }

    /// Resumes the VM. A VMM that drives its devices wakes them before the vCPUs, so their states are read
    /// after that, for the trace.
    pub(super) fn resume(&self) {
        let Some(twin) = &self.twin else { return };
        let (vmm, signals) = (Arc::clone(&twin.vmm), self.tasks.signals());
        let devices = match self.parts.driver {
            Driver::Agent => Vec::new(),
            Driver::Vmm => EndDevice::all(Role::Destination, &twin.devices),
        };
        self.tasks.run(async move {
            let late = |failure| {
                signals.send(Signal::TwinSilent(failure));
            };
            match resume(vmm.as_ref(), late).await {
                Ok(()) => {
                    look_after_resume(&devices, &signals).await;
                    Event::Resumed
                }
                Err(error) => Event::Failed(twin_failure(&error)),
            }
        });
    }

    /// Gives everything back. A device that holds part of the VM's state is reset before the twin closes it:
    /// the state would outlive the twin.
    pub(super) fn discard(&mut self) -> impl Future<Output = Event> + Send + use<> {
        let stopped = self.tasks.stop_streams();
        let (twin, site) = (self.twin.take(), Arc::clone(&self.parts.site));
        async move {
            stopped.await;
            let devices = twin.map(|twin| EndDevice::all(Role::Destination, &twin.devices));
            EndDevice::give_back(devices.unwrap_or_default()).await;
            site.discard().await;
            Event::Discarded
        }
    }
}

/// Whether a device that has loaded its state is where it was left.
async fn holds_its_state(device: &EndDevice) -> Result<(), Failure> {
    match timeout(LOOK, device.look()).await {
        Ok(Ok(seen)) if seen.state != MigrationState::Stop => {
            Err(device.astray(MigrationState::Stop, seen.state))
        }
        Ok(Err(error)) => Err(error.failure),
        Ok(Ok(_)) | Err(_) => Ok(()),
    }
}

/// Signals each device's interrupt line, and reports its state. The VM runs: no failure of these matters to
/// the machine.
async fn look_after_resume(devices: &[EndDevice], signals: &Signals<Signal>) {
    let released = join_all(devices.iter().map(|device| release_line(&device.handle)));
    if timeout(LINES, released).await.is_err() {
        warn!("the VM runs, but a device's INTx could not be signalled within {LINES:?}");
    }
    let looks = join_all(devices.iter().map(|device| timeout(LOOK, device.look())));
    for (look, device) in looks.await.into_iter().zip(devices) {
        let device = device.handle.name();
        match look {
            Ok(Ok(seen)) => {
                if seen.state != MigrationState::Running {
                    warn!(device, state = %seen.state, "the VM runs, but a device of it does not");
                }
                signals.send(Signal::DeviceSeen(seen));
            }
            Ok(Err(_)) => {}
            Err(_) => warn!(device, "the VM runs, but a device of it does not answer a look within {LOOK:?}"),
        }
    }
}

/// QEMU restores the level of an interrupt line, but forgets that it is the one to lower it: a line that a
/// device held when the VM stopped would interrupt the guest for ever. One more interrupt makes QEMU take the
/// line over again. To the guest it is a spurious one, which every guest tolerates.
async fn release_line(device: &DeviceHandle) {
    match device.trigger_intx().await {
        Ok(true) => debug!(device = device.name(), "its INTx was signalled once"),
        // Or the VM has ended meanwhile, and its devices are being closed.
        Ok(false) | Err(DeviceError::WorkerEnded { .. }) => {}
        Err(error) => warn!(%error, "the VM runs, but its guest may be held up by an interrupt line"),
    }
}

/// Takes a device that the twin has loaded from RESUMING to STOP: its driver reports whether it accepts its
/// state, while it is not too late. QEMU itself would reset a device that refuses, and report that it runs.
pub(super) async fn check(device: EndDevice, signals: Signals<Signal>) -> DeviceOutcome {
    let result = resuming_to_stop(&device, &signals).await;
    DeviceOutcome { index: device.index, result: result.map(|()| MigrationState::Stop) }
}

/// A device in another state than RESUMING was never given a state, or has been reset since.
async fn resuming_to_stop(device: &EndDevice, signals: &Signals<Signal>) -> Result<(), DeviceFailure> {
    let seen = device.look().await?;
    signals.send(Signal::DeviceSeen(seen));
    if seen.state != MigrationState::Resuming {
        let failure = device.failure(format_args!(
            "device {} was read back in {} and not in RESUMING: the twin has not loaded its state, or it has \
             been reset since",
            device.handle.name(),
            seen.state.name()
        ));
        return Err(DeviceFailure { found: Some(seen.state), failure });
    }
    // What the look after it finds is traced.
    device.clone().set_state(MigrationState::Resuming, MigrationState::Stop, |_| {}).await.result?;
    signals.send(Signal::DeviceSeen(device.look().await?));
    Ok(())
}
