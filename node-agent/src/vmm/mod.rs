//! The VMM of a VM: the calls that the hand-over makes to it, whichever program it is.
//!
//! Order at the source: [`Vmm::start_save`], devices to pre-copy, [`Vmm::pause`], all devices quiesced and
//! stopped and read back, [`Vmm::finish_save`] while the devices' captures run. Order at the destination:
//! [`Vmm::start_load`], [`Vmm::finish_load`], all devices out of RESUMING, and, after the commit and with all
//! devices RUNNING, [`Vmm::resume`].

use std::os::fd::RawFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::stream::BoxStream;
use slackwater_handover::policy::Driver;
use slackwater_handover::state::MigrationState;
use slackwater_proto::channel::ConnectError;
use slackwater_proto::tonic::{Code, async_trait};
use tokio::sync::mpsc;

use self::budget::{Budget, BudgetExceeded, Copying};
use self::contract::{ContractVmm, Deadlines};
use self::qemu::QemuVmm;
use self::qemu::preflight::Facts;
use self::stopped::Stopped;
use crate::host::clock::Clock;
use crate::host::vm::{VmmEntry, VmmKind};
use crate::vfio::borrow::VmmProcess;

pub mod budget;
pub mod confinement;
pub mod contract;
#[cfg(any(test, feature = "faults"))]
pub mod fake;
pub mod gone;
pub mod qemu;
pub mod server;
pub mod stopped;
#[cfg(test)]
pub(crate) mod stub;
pub mod twin;

/// RAM and machine state as the VMM gives them, in pieces of at most 1 MiB. Ends after the last piece; an
/// error ends it, too.
pub type SaveStream = BoxStream<'static, Result<Bytes, VmmError>>;

/// A save: the main stream first. Only a QEMU that may use more connections gives more streams.
pub type SaveStreams = Vec<SaveStream>;

/// The same bytes in the same order, cut anywhere.
pub type LoadStream = BoxStream<'static, Bytes>;

/// Whether the VM runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RunState {
    /// Its vCPUs run.
    Running,
    /// Its vCPUs are stopped.
    Paused,
    /// A twin that has not finished loading.
    Incoming,
    /// It does not run for another reason.
    Stopped(Stopped),
}

/// Who tracks the guest pages that the devices write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DirtyTracking {
    /// None: RAM can be copied only while the VM is paused.
    None,
    /// The devices.
    DeviceLog,
    /// The IOMMU.
    Iommu,
}

/// A device of a VM, as its VMM describes it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct VmmDevice {
    /// PCI address or UUID on the host.
    pub name: String,
    /// Number of the VFIO device's descriptor in the VMM's process.
    pub descriptor: RawFd,
    /// Its address in the guest, for messages.
    pub guest_address: String,
}

/// A VM as its VMM describes it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Description {
    /// Whether it runs.
    pub run_state: RunState,
    /// Its devices, in the order that a twin's must have, too.
    pub devices: Vec<VmmDevice>,
    /// Bytes of guest RAM.
    pub ram_bytes: u64,
    /// Who tracks the devices' writes.
    pub dirty_tracking: DirtyTracking,
    /// Program and version, for logs.
    pub vmm: String,
    /// The VMM's own reasons to refuse a migration now.
    pub blocked: Vec<String>,
}

/// A VMM that drives its devices has taken one to another state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceSeen {
    /// In the VM's order.
    pub index: usize,
    /// The state that the VMM reports.
    pub state: MigrationState,
    /// When the report arrived.
    pub at: Clock,
}

/// A call to a VMM has failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VmmError {
    /// No connection to its socket.
    #[error("the VMM cannot be reached: {0}")]
    Connect(ConnectError),
    /// The socket is not one that the agent may trust.
    #[error("the VMM's socket {path} is refused: {reason}")]
    Trust {
        /// The socket.
        path: String,
        /// What is wrong, and what would be right.
        reason: String,
    },
    /// The VMM answered with an error.
    #[error("the VMM refused {call}: {message}")]
    Refused {
        /// The call.
        call: &'static str,
        /// Its code.
        code: Code,
        /// Its message.
        message: String,
    },
    /// The connection broke, mostly because its process has ended.
    #[error("the VMM was lost during {call}: {message}")]
    Lost {
        /// The call.
        call: &'static str,
        /// What happened.
        message: String,
    },
    /// No answer in time.
    #[error("the VMM did not answer {call} within {} ms", limit.as_millis())]
    Deadline {
        /// The call.
        call: &'static str,
        /// How long it had.
        limit: Duration,
    },
    /// The blackout would take longer than the budget allows.
    #[error(transparent)]
    BudgetExceeded(BudgetExceeded),
    /// Its guest, or its owner, has stopped the VM. It stays as it is.
    #[error("the VM {state}. It was running when its migration began, and stays as it is now")]
    VmStopped {
        /// What it does now.
        state: RunState,
    },
    /// An answer that is not valid.
    #[error("the VMM's answer to {call} is not valid: {reason}")]
    Answer {
        /// The call.
        call: &'static str,
        /// What is wrong with it.
        reason: String,
    },
}

/// A VMM that runs a VM, or was started to take one over.
///
/// Each call has its own deadline, and returns when its effect has happened, not when it was requested.
#[async_trait]
pub trait Vmm: Send + Sync {
    /// Describes the VM. At any time.
    async fn describe(&self) -> Result<Description, VmmError>;

    /// Whether the VM runs. Called in the blackout, so a VMM with a shorter way than [`Vmm::describe`] uses
    /// that.
    async fn run_state(&self) -> Result<RunState, VmmError> {
        self.describe().await.map(|description| description.run_state)
    }

    /// Begins a save. With `live`, RAM flows while the guest runs; refused if the devices' writes are not
    /// tracked. The stream has no deadline: it lasts as long as RAM and the wire need. A VMM that does not
    /// drive its devices is stopped before it copies, and ignores the budget.
    async fn start_save(&self, live: bool, budget: Budget) -> Result<SaveStreams, VmmError>;

    /// Returns when no vCPU runs and nothing in the VMM accesses a device, until [`Vmm::resume`].
    async fn pause(&self) -> Result<(), VmmError>;

    /// Completes the save: the remaining RAM and the machine state. Only when every device has been read back
    /// as stopped. Returns when the stream's last byte has been given.
    async fn finish_save(&self) -> Result<(), VmmError>;

    /// Ends a save without a result. The VM stays as it is, paused if it was paused.
    async fn abort_save(&self) -> Result<(), VmmError>;

    /// At a twin: takes what [`Vmm::start_save`] gave. As many streams, in the same order. Returns when all
    /// have ended and all of it has been parsed. No deadline.
    async fn start_load(&self, state: Vec<LoadStream>) -> Result<(), VmmError>;

    /// At a twin: puts everything in place. The devices are in RESUMING and are not touched.
    async fn finish_load(&self) -> Result<(), VmmError>;

    /// Lets the vCPUs run. The devices are RUNNING before it is called, unless the VMM drives them: it starts
    /// them then, and leaves a VM that runs already as it is. An error other than a refusal says nothing about
    /// the VM: as long as the process lives, the next call connects again.
    async fn resume(&self) -> Result<(), VmmError>;

    /// Lets the VM run on where it was, as [`Vmm::resume`], unless it has been stopped there by its guest or
    /// another client since: that stays as it is. The state that it is in.
    async fn take_back(&self) -> Result<RunState, VmmError> {
        self.resume().await.map(|()| RunState::Running)
    }

    /// Asks the VMM to exit: it answers first.
    async fn quit(&self) -> Result<(), VmmError>;

    /// Which side issues the state changes of its devices during a migration.
    fn driver(&self) -> Driver {
        Driver::Agent
    }

    /// Returns when what is left to save is little enough for the blackout, after [`Vmm::start_save`]. A VMM
    /// that drives its devices has then stopped its vCPUs and its devices, too, and waits for
    /// [`Vmm::finish_save`].
    ///
    /// [`VmmError::BudgetExceeded`] if the blackout would be too long for the budget: the migration must be
    /// given up. No deadline.
    async fn converged(&self, _copy: Copying) -> Result<(), VmmError> {
        Ok(())
    }

    /// The state changes of its devices from now on, as far as the VMM reports them; None if it does not
    /// drive them. Taken once.
    fn watch_devices(&self) -> Option<mpsc::UnboundedReceiver<DeviceSeen>> {
        None
    }

    /// The replies of a loading twin to the VMM that saves; None if it sends none. Taken once.
    fn take_replies(&self) -> Option<mpsc::Receiver<Bytes>> {
        None
    }

    /// Passes a reply of the twin to the VMM that saves.
    fn reply(&self, _reply: Bytes) -> Result<(), VmmError> {
        Ok(())
    }

    /// The VMM's process id in the agent's pid namespace.
    fn pid(&self) -> u32;

    /// Returns when the VMM's process has ended.
    async fn exited(&self);
}

/// A VMM in a process of this node, whose devices can be borrowed.
#[async_trait]
pub trait LocalVmm: Vmm + std::fmt::Debug {
    /// Its process.
    fn process(&self) -> &VmmProcess;

    /// Collects what a destination's VMM must be able to do, for [`LocalVmm::facts`]. It may take seconds.
    async fn learn(&self) {}

    /// The result of [`LocalVmm::learn`]; None before, and for a VMM that is not compared.
    fn facts(&self) -> Option<Facts> {
        None
    }

    /// The VMM's reasons to refuse a migration now; None if it never refuses, and need not be asked again.
    async fn blocked(&self) -> Result<Option<Vec<String>>, VmmError> {
        Ok(None)
    }

    /// Ends the VMM: asks it to quit, and kills its process if it has not ended in time. Returns when it has
    /// ended.
    async fn end(&self) -> Result<(), VmmError>;
}

/// Connects to the VMM that serves a VM's socket. `folder` is the VM's own.
///
/// # Errors
/// [`VmmError::Trust`] if the socket or its server may not be trusted, [`VmmError::Connect`] if no process
/// serves it, [`VmmError::Deadline`] if no process accepts the connection.
pub async fn connect(
    vmm: &VmmEntry,
    socket: &Path,
    folder: &Path,
    deadlines: Deadlines,
) -> Result<Arc<dyn LocalVmm>, VmmError> {
    Ok(match vmm.kind {
        VmmKind::Contract => Arc::new(ContractVmm::connect(socket, deadlines).await?),
        VmmKind::Qemu => Arc::new(QemuVmm::connect(socket, folder, &vmm.devices, deadlines).await?),
    })
}
