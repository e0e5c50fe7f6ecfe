//! The VMM of a VM: what the hand-over asks of it, whichever program it is.
//!
//! Order at the source: [`Vmm::start_save`], devices to pre-copy, [`Vmm::pause`], all devices quiesced and stopped and read back,
//! [`Vmm::finish_save`] while the devices' captures run. Order at the destination: [`Vmm::start_load`], [`Vmm::finish_load`], all
//! devices out of RESUMING, and, after the commit and with all devices RUNNING, [`Vmm::resume`].

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
use crate::host::clock::Clock;
use crate::host::vm::{VmmEntry, VmmKind};
use crate::vfio::borrow::VmmProcess;

pub mod budget;
pub mod contract;
#[cfg(any(test, feature = "faults"))]
pub mod fake;
pub mod gone;
pub mod qemu;
pub mod server;
#[cfg(test)]
mod stub;
pub mod twin;

/// RAM and machine state as the VMM gives them, in pieces of at most 1 MiB. Ends after the last piece; an error ends it, too.
pub type SaveStream = BoxStream<'static, Result<Bytes, VmmError>>;

/// A save: the main stream first. Only a VMM of QEMU's that was allowed more connections gives more than that one.
pub type SaveStreams = Vec<SaveStream>;

/// The same bytes in the same order, cut anywhere.
pub type LoadStream = BoxStream<'static, Bytes>;

/// Whether the VM runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RunState {
    /// Its vCPUs run.
    Running,
    /// Its vCPUs stand still.
    Paused,
    /// A twin that has not finished loading.
    Incoming,
}

/// Who can tell which guest pages the devices have written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DirtyTracking {
    /// Nobody: RAM can be copied only while the VM stands still.
    None,
    /// The devices.
    DeviceLog,
    /// The IOMMU.
    Iommu,
}

/// A device as its VMM sees it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct VmmDevice {
    /// PCI address or UUID on the host.
    pub name: String,
    /// Number of the VFIO device's descriptor in the VMM's process.
    pub descriptor: RawFd,
    /// Where the guest sees it, for people.
    pub guest_address: String,
}

/// What a VM consists of.
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
    /// Why the VMM would refuse a migration now, in its own words.
    pub blocked: Vec<String>,
}

/// A VMM that drives its devices has taken one to another state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceSeen {
    /// In the VM's order.
    pub index: usize,
    /// The state that it says.
    pub state: MigrationState,
    /// When it was heard of.
    pub at: Clock,
}

/// Why a VMM did not do what it was asked.
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
        /// What is wrong with it, and what would be right.
        reason: String,
    },
    /// The VMM answered with an error.
    #[error("the VMM refused {call}: {message}")]
    Refused {
        /// Which call.
        call: &'static str,
        /// Its code.
        code: Code,
        /// Its words.
        message: String,
    },
    /// The connection broke, mostly because its process has ended.
    #[error("the VMM was lost during {call}: {message}")]
    Lost {
        /// Which call.
        call: &'static str,
        /// What was seen.
        message: String,
    },
    /// No answer in time.
    #[error("the VMM did not answer {call} within {} ms", limit.as_millis())]
    Deadline {
        /// Which call.
        call: &'static str,
        /// How long it had.
        limit: Duration,
    },
    /// The blackout would take longer than the budget allows.
    #[error(transparent)]
    BudgetExceeded(BudgetExceeded),
    /// An answer that means nothing.
    #[error("the VMM's answer to {call} is not valid: {reason}")]
    Answer {
        /// Which call.
        call: &'static str,
        /// What is wrong with it.
        reason: String,
    },
}

/// A VMM that runs a VM, or was started to take one over.
///
/// Each call has its own deadline, and returns when what it names has happened, not when it has been asked for.
#[async_trait]
pub trait Vmm: Send + Sync {
    /// What the VM consists of. Any time.
    async fn describe(&self) -> Result<Description, VmmError>;

    /// Whether the VM runs. Asked in the blackout: by a VMM that has a shorter way to say it than to describe itself, in that way.
    async fn run_state(&self) -> Result<RunState, VmmError> {
        self.describe().await.map(|description| description.run_state)
    }

    /// Begins a save. With `live`, RAM flows while the guest runs; refused if nobody tracks the devices' writes.
    /// The stream has no deadline: it lasts as long as RAM and the wire need.
    /// A VMM that does not drive its devices is stopped before it copies, and leaves the budget aside.
    async fn start_save(&self, live: bool, budget: Budget) -> Result<SaveStreams, VmmError>;

    /// Returns when no vCPU runs and nothing in the VMM touches a device. It stays so until [`Vmm::resume`].
    async fn pause(&self) -> Result<(), VmmError>;

    /// Lets the save end: the remaining RAM and the machine state. Only when every device has been read back as stopped.
    /// Returns when the stream's last byte has been given.
    async fn finish_save(&self) -> Result<(), VmmError>;

    /// Ends a save without a result. The VM stays as it is, paused if it was paused.
    async fn abort_save(&self) -> Result<(), VmmError>;

    /// At a twin: takes what [`Vmm::start_save`] gave. As many streams, in the same order. Returns when all have
    /// ended and all of it has been understood. No deadline.
    async fn start_load(&self, state: Vec<LoadStream>) -> Result<(), VmmError>;

    /// At a twin: puts everything in place. The devices stand in RESUMING and are not touched.
    async fn finish_load(&self) -> Result<(), VmmError>;

    /// Lets the vCPUs run. The devices are RUNNING before it is called, unless the VMM drives them: it wakes them then, and a VM
    /// that runs already is left as it is.
    async fn resume(&self) -> Result<(), VmmError>;

    /// Ends the VMM: it answers and then exits.
    async fn quit(&self) -> Result<(), VmmError>;

    /// Who issues the state changes of its devices during a migration.
    fn driver(&self) -> Driver {
        Driver::Agent
    }

    /// Returns when what is left to save is little enough for the blackout, after [`Vmm::start_save`]. A VMM that drives its devices
    /// has then stopped its vCPUs and its devices, too, and waits for [`Vmm::finish_save`].
    ///
    /// It fails by [`VmmError::BudgetExceeded`] when the blackout would be too long for the budget, and the migration is to be given
    /// up then. No deadline.
    async fn converged(&self, _copy: Copying) -> Result<(), VmmError> {
        Ok(())
    }

    /// Tells from now on where the VMM takes its devices, as far as it says so; None if it does not drive them. Taken once.
    fn watch_devices(&self) -> Option<mpsc::UnboundedReceiver<DeviceSeen>> {
        None
    }

    /// What a twin says while it loads to the VMM that saves; None if it says nothing. Taken once.
    fn take_replies(&self) -> Option<mpsc::Receiver<Bytes>> {
        None
    }

    /// Hands what the twin says to the VMM that saves.
    fn reply(&self, _said: Bytes) -> Result<(), VmmError> {
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

    /// Finds out what a destination's VMM must be able to do; [`LocalVmm::facts`] has it then. It may take seconds.
    async fn learn(&self) {}

    /// What [`LocalVmm::learn`] has found; None before, and of a VMM that is not compared.
    fn facts(&self) -> Option<Facts> {
        None
    }

    /// Why the VMM would refuse a migration now; None of one that never does, and need not be asked again.
    async fn blocked(&self) -> Result<Option<Vec<String>>, VmmError> {
        Ok(None)
    }

    /// Ends the VMM: asks it to quit, and kills its process if it has not ended in time. Returns when it has ended.
    async fn end(&self) -> Result<(), VmmError>;
}

/// Connects to the VMM that serves a VM's socket.
///
/// # Errors
/// [`VmmError::Trust`] if the socket or who serves it may not be trusted, [`VmmError::Connect`] if nobody serves it,
/// [`VmmError::Deadline`] if nobody takes the connection.
pub async fn connect(
    vmm: &VmmEntry,
    socket: &Path,
    deadlines: Deadlines,
) -> Result<Arc<dyn LocalVmm>, VmmError> {
    Ok(match vmm.kind {
        VmmKind::Contract => Arc::new(ContractVmm::connect(socket, deadlines).await?),
        VmmKind::Qemu => Arc::new(QemuVmm::connect(socket, &vmm.devices, deadlines).await?),
    })
}
