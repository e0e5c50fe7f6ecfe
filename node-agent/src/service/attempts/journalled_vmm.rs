//! Finding the VMM that a journal names, and its devices.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use slackwater_handover::state::MigrationState;
use tracing::warn;

use super::resources::NodeResources;
use crate::attempt::entry::Process;
use crate::host::vm::VmmEntry;
use crate::host::vms::KnownVm;
use crate::service::borrowing::{self, BorrowDeviceError};
use crate::vfio::borrow::VmmProcess;
use crate::vfio::worker::DeviceHandle;
use crate::vmm::{self, Description, LocalVmm, VmmError};

/// Between two tries to reach a VMM whose process lives, or its devices.
const RETRY_PAUSE: Duration = Duration::from_secs(1);

/// A VMM that was found again.
pub(super) struct FoundVmm {
    /// The VMM.
    pub(super) vmm: Arc<dyn LocalVmm>,
    /// Its devices, borrowed from it, in the VM's order.
    pub(super) devices: Vec<DeviceHandle>,
    /// The state in which each device was read back; None where it could not be.
    pub(super) states: Vec<Option<MigrationState>>,
}

/// How a VMM is reached.
pub(super) enum Route<'a> {
    /// A VM's, over the inventory's connection: a monitor serves one client at a time.
    Vm(&'a KnownVm),
    /// A twin's, which the inventory does not know.
    Twin(&'a VmmEntry, &'a Path),
}

/// Why a VMM that lives cannot be used yet.
#[derive(Debug, thiserror::Error)]
enum ReachError {
    /// It does not answer.
    #[error(transparent)]
    Vmm(#[from] VmmError),
    /// Another process answers.
    #[error("{} is served by process {pid}, not by {journalled}", socket.display())]
    OtherProcess { socket: PathBuf, pid: u32, journalled: u32 },
    /// Its devices cannot be borrowed.
    #[error(transparent)]
    Borrow(#[from] BorrowDeviceError),
}

impl Route<'_> {
    fn socket(&self) -> &Path {
        match self {
            Self::Vm(vm) => &vm.socket,
            Self::Twin(_, socket) => socket,
        }
    }

    async fn reach(&self, node: &NodeResources) -> Result<(Arc<dyn LocalVmm>, Description), VmmError> {
        match self {
            Self::Vm(vm) => node.inventory.vmm(vm).await,
            Self::Twin(entry, socket) => {
                let vmm =
                    vmm::connect(entry, socket, socket.parent().unwrap_or(socket), node.config.deadlines)
                        .await?;
                let description = vmm.describe().await?;
                Ok((vmm, description))
            }
        }
    }
}

/// The VMM that was journalled, with its devices as they are read back; None if its process has exited. As
/// long as the process lives, this waits for its answer.
pub(super) async fn find(
    route: &Route<'_>,
    node: &NodeResources,
    journalled: Option<&Process>,
) -> Option<FoundVmm> {
    let journalled = journalled?;
    let mut warned = false;
    loop {
        let lives = VmmProcess::open(journalled.pid).is_ok_and(|process| journalled.is(process.identity()));
        if !lives {
            return None;
        }
        match borrow(route, node, journalled).await {
            Ok(found) => return Some(found),
            Err(error) => {
                if !std::mem::replace(&mut warned, true) {
                    warn!(pid = journalled.pid, why = %error, "the VMM lives, and cannot be used yet; trying again");
                }
                tokio::time::sleep(RETRY_PAUSE).await;
            }
        }
    }
}

async fn borrow(
    route: &Route<'_>,
    node: &NodeResources,
    journalled: &Process,
) -> Result<FoundVmm, ReachError> {
    let (vmm, description) = route.reach(node).await?;
    if !journalled.is(vmm.process().identity()) {
        let socket = route.socket().to_owned();
        return Err(ReachError::OtherProcess { socket, pid: vmm.pid(), journalled: journalled.pid });
    }
    let devices = borrowing::devices(&vmm, &description, node.inventory.borrowed()).await?;
    let mut states = Vec::with_capacity(devices.len());
    for device in &devices {
        states.push(device.state().await.ok());
    }
    Ok(FoundVmm { vmm, devices, states })
}
