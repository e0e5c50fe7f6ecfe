//! The node's VMMs that have answered: a connection to each, so that not every look connects anew, and what
//! each said last.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use slackwater_handover::policy::Driver;
use tokio::sync::watch;

use super::connections::Connections;
use crate::host::vm::VmmEntry;
use crate::vmm::contract::Deadlines;
use crate::vmm::{self, Description, LocalVmm, VmmError};

/// How long it may take to notice that a process has exited.
const EXIT_NOTICE: Duration = Duration::from_millis(50);

/// VMMs by socket.
pub(super) struct Vmms {
    connections: Connections<Answering>,
    deadlines: Deadlines,
    changed: watch::Sender<u64>,
}

/// A VMM that has answered.
struct Answering {
    vmm: Arc<dyn LocalVmm>,
    /// What it said last against a migration.
    blocked: Vec<String>,
}

/// A VMM that answers now.
pub(super) struct Answer {
    /// The VMM.
    pub(super) vmm: Arc<dyn LocalVmm>,
    /// What it says of itself.
    pub(super) description: Description,
    /// It was not connected before.
    pub(super) is_new: bool,
}

impl Vmms {
    /// None yet.
    pub(super) fn new(deadlines: Deadlines) -> Self {
        Self { connections: Connections::default(), deadlines, changed: watch::Sender::new(0) }
    }

    /// Changes whenever a VMM is different from what it was at the last look.
    pub(super) fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Something is different from what it was at the last look.
    pub(super) fn look_again(&self) {
        self.changed.send_modify(|count| *count += 1);
    }

    /// The VMM on a VM's socket, and what it says of itself now. `folder` is the VM's own.
    ///
    /// # Errors
    /// If it does not answer.
    pub(super) async fn ask(
        &self,
        entry: &VmmEntry,
        socket: &Path,
        folder: &Path,
    ) -> Result<Answer, VmmError> {
        let slot = self.connections.slot(socket);
        let mut known = slot.lock().await;
        if let Some(Answering { vmm, blocked }) = known.as_mut() {
            match vmm.describe().await {
                Ok(description) => {
                    blocked.clone_from(&description.blocked);
                    return Ok(Answer { vmm: Arc::clone(vmm), description, is_new: false });
                }
                // A monitor serves one client at a time. So as long as its QEMU lives, this is the client,
                // and it reconnects by itself.
                Err(error) if vmm.driver() == Driver::Vmm && lives(vmm.as_ref()).await => return Err(error),
                // Another VMM may serve the socket by now.
                Err(_) => *known = None,
            }
        }
        let vmm = vmm::connect(entry, socket, folder, self.deadlines).await?;
        let description = vmm.describe().await?;
        *known = Some(Answering { vmm: Arc::clone(&vmm), blocked: description.blocked.clone() });
        Ok(Answer { vmm, description, is_new: true })
    }

    /// What the VMM said last against a migration, as every caller has heard. None if this socket has another
    /// VMM now.
    pub(super) async fn last_blocked(&self, socket: &Path, vmm: &Arc<dyn LocalVmm>) -> Option<Vec<String>> {
        let slot = self.connections.slot(socket);
        let known = slot.lock().await;
        let known = known.as_ref().filter(|known| Arc::ptr_eq(&known.vmm, vmm))?;
        Some(known.blocked.clone())
    }

    /// Its process has exited.
    pub(super) async fn forget(&self, socket: &Path, vmm: &Arc<dyn LocalVmm>) {
        let slot = self.connections.slot(socket);
        let mut known = slot.lock().await;
        if known.as_ref().is_some_and(|known| Arc::ptr_eq(&known.vmm, vmm)) {
            *known = None;
        }
    }
}

/// Whether its process has not exited.
async fn lives(vmm: &dyn LocalVmm) -> bool {
    tokio::time::timeout(EXIT_NOTICE, vmm.exited()).await.is_err()
}
