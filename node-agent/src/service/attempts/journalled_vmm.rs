//! Finding the VMM that a journal names, and its devices.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use slackwater_handover::state::MigrationState;
use tracing::{info, warn};

use super::resources::NodeResources;
use crate::attempt::entry::Process;
use crate::host::vm::VmmEntry;
use crate::service::borrowing::{self, BorrowDeviceError};
use crate::vfio::liveness::Liveness;
use crate::vfio::worker::DeviceHandle;
use crate::vmm::{self, Description, LocalVmm, VmmError};

/// Between two tries to reach a VMM whose process lives, or its devices, or to learn whether it lives.
const RETRY_PAUSE: Duration = Duration::from_secs(1);

/// So many times a device is asked for its state.
const READS: usize = 10;

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
pub(super) struct Route {
    /// Its protocol and devices.
    pub(super) vmm: VmmEntry,
    /// The absolute path of its socket.
    pub(super) socket: PathBuf,
    /// The VM's own folder.
    pub(super) folder: PathBuf,
    /// Whose connection is used.
    pub(super) connection: Connection,
}

/// Whose connection to a VMM is used.
pub(super) enum Connection {
    /// The inventory's, for a VM: a monitor serves one client at a time.
    Inventory,
    /// One of its own, for a twin, which the inventory does not know.
    Own,
}

/// Why a VMM that lives cannot be used yet.
#[derive(Debug, thiserror::Error)]
enum ReachError {
    /// Where it listens is not known.
    #[error("{0}")]
    NoRoute(String),
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

impl Route {
    async fn reach(&self, node: &NodeResources) -> Result<(Arc<dyn LocalVmm>, Description), VmmError> {
        match self.connection {
            Connection::Inventory => node.inventory.vmm_at(&self.vmm, &self.socket, &self.folder).await,
            Connection::Own => {
                let vmm = vmm::connect(&self.vmm, &self.socket, &self.folder, node.config.deadlines).await?;
                let description = vmm.describe().await?;
                Ok((vmm, description))
            }
        }
    }
}

/// The VMM that was journalled, with its devices as they are read back; None if its process has ended for
/// certain. As long as the process lives, or that is not known, this waits, and the node's answers about the
/// migration say for what. `route` is asked before each try; its error says why there is none.
pub(super) async fn find(
    route: impl Fn() -> Result<Route, String>,
    node: &NodeResources,
    migration_id: &str,
    journalled: &Process,
) -> Option<FoundVmm> {
    let identity = journalled.into();
    let reach = || {
        let (route, node, journalled) =
            (route().map_err(ReachError::NoRoute), node.clone(), journalled.clone());
        async move { borrow(&route?, &node, &journalled).await }
    };
    let waits = |why: &str| {
        warn!(migration = migration_id, why, "the VM is held; trying again");
        node.registry.waits(migration_id, why.to_owned());
    };
    settle(journalled.pid, RETRY_PAUSE, || Liveness::of(&identity), reach, waits).await
}

/// Tries until the process is reached or gone. `waits` hears each new reason why neither is so.
async fn settle<T, E: std::fmt::Display, F: Future<Output = Result<T, E>>>(
    pid: u32,
    pause: Duration,
    look: impl Fn() -> Liveness,
    reach: impl Fn() -> F,
    waits: impl Fn(&str),
) -> Option<T> {
    let mut last = None;
    loop {
        let why = match look() {
            Liveness::Gone => return None,
            Liveness::NotKnown(why) => format!("whether the VMM's process {pid} lives is not known: {why}"),
            Liveness::Alive => match reach().await {
                Ok(found) => {
                    if last.is_some() {
                        info!(pid, "the VMM can be used again");
                    }
                    return Some(found);
                }
                Err(error) => format!("the VMM's process {pid} lives, and cannot be used yet: {error}"),
            },
        };
        if last.as_ref() != Some(&why) {
            waits(&why);
            last = Some(why);
        }
        tokio::time::sleep(pause).await;
    }
}

async fn borrow(route: &Route, node: &NodeResources, journalled: &Process) -> Result<FoundVmm, ReachError> {
    let (vmm, description) = route.reach(node).await?;
    if !journalled.is(vmm.process().identity()) {
        let socket = Path::to_owned(&route.socket);
        return Err(ReachError::OtherProcess { socket, pid: vmm.pid(), journalled: journalled.pid });
    }
    let devices = borrowing::devices(&vmm, &description, node.inventory.borrowed()).await?;
    let mut states = Vec::with_capacity(devices.len());
    for device in &devices {
        states.push(read_back(device, RETRY_PAUSE).await);
    }
    Ok(FoundVmm { vmm, devices, states })
}

/// The state of a device. Whatever follows depends on it, so one that hangs is waited for, by name. One that
/// cannot be read is asked again before it counts as broken: a rollback resets it then, and its state is lost.
async fn read_back(device: &DeviceHandle, pause: Duration) -> Option<MigrationState> {
    for left in (0..READS).rev() {
        let state = device.state();
        tokio::pin!(state);
        let read = match device.watch().unless_it_hangs(&mut state).await {
            Ok(read) => read,
            Err(hang) => {
                warn!(%hang, "what an earlier agent began waits for a device");
                state.await
            }
        };
        match read {
            Ok(state) => return Some(state),
            Err(error) if left == 0 => warn!(%error, "the device counts as broken"),
            Err(error) => {
                warn!(%error, left, "the device is asked again");
                tokio::time::sleep(pause).await;
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};

    use rustix::io::Errno;

    use super::*;
    use crate::vfio::fake::FakeDevice;

    #[tokio::test]
    async fn a_device_that_cannot_be_read_at_once_is_asked_again_and_counts_as_broken_only_after_that() {
        for (failures, read) in [(READS - 1, Some(MigrationState::Running)), (READS, None)] {
            let device = Box::new(FakeDevice::new("vf0").refuse_state(Errno::IO, failures));
            let device = DeviceHandle::serve(device).unwrap();
            assert_eq!(read_back(&device, Duration::from_millis(1)).await, read, "{failures} failures");
        }
    }

    /// What [`settle`] makes of these looks, one after the other, and what it has said meanwhile.
    async fn settled(
        looks: &[Liveness],
        reach: impl Fn() -> Result<(), &'static str>,
    ) -> (bool, Vec<String>) {
        let (next, said) = (Cell::new(0), RefCell::new(Vec::new()));
        let look = || looks[next.replace(next.get() + 1).min(looks.len() - 1)].clone();
        let found = settle(
            9,
            Duration::from_millis(1),
            look,
            || std::future::ready(reach()),
            |why| said.borrow_mut().push(why.to_owned()),
        )
        .await;
        (found.is_some(), said.into_inner())
    }

    fn not_known() -> Liveness {
        Liveness::NotKnown("opening process 9: Too many open files (EMFILE)".to_owned())
    }

    #[tokio::test]
    async fn what_is_not_known_is_waited_for_and_said_once_and_never_counts_as_gone() {
        let looks = [not_known(), not_known(), Liveness::Alive];
        let (found, said) = settled(&looks, || Ok(())).await;
        assert!(found);
        assert_eq!(
            said,
            [
                "whether the VMM's process 9 lives is not known: opening process 9: Too many open files (EMFILE)"
            ]
        );
        let (found, said) = settled(&[not_known(), Liveness::Gone], || Ok(())).await;
        assert_eq!((found, said.len()), (false, 1));
    }

    #[tokio::test]
    async fn a_vmm_that_lives_and_is_not_reached_is_tried_again_until_it_is_or_its_process_ends() {
        let tries = Cell::new(0);
        let third = || if tries.replace(tries.get() + 1) == 2 { Ok(()) } else { Err("nothing listens") };
        let (found, said) = settled(&[Liveness::Alive], third).await;
        assert_eq!((found, tries.get()), (true, 3));
        assert_eq!(said, ["the VMM's process 9 lives, and cannot be used yet: nothing listens"]);
        let (found, _) = settled(&[Liveness::Alive, Liveness::Gone], || Err("nothing listens")).await;
        assert!(!found);
    }
}
