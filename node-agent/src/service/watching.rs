//! What becomes of a VMM that the inventory knows, with no event to tell of it.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use tracing::{debug, info};

use super::inventory::Inventory;
use crate::vmm::LocalVmm;

/// Between two questions whether the VMM would refuse a migration: QEMU tells of no change.
const ASK_EVERY: Duration = Duration::from_secs(3);
/// After so long a VMM that could not tell what it is may try again.
const LEARN_AGAIN: Duration = Duration::from_secs(60);

/// Lets the VMM tell what it is, asks it now and then what blocks a migration, and forgets it when its process has ended.
pub(super) fn start(inventory: Weak<Inventory>, socket: PathBuf, vmm: Arc<dyn LocalVmm>) {
    tokio::spawn(async move {
        tokio::select! {
            () = vmm.exited() => {}
            () = ask(&inventory, &socket, &vmm) => vmm.exited().await,
        }
        if let Some(inventory) = inventory.upgrade() {
            inventory.forget(&socket, &vmm).await;
            inventory.look_again();
        }
    });
}

/// Returns when there is nothing more to ask, or somebody else is asked in its place.
async fn ask(inventory: &Weak<Inventory>, socket: &Path, vmm: &Arc<dyn LocalVmm>) {
    let mut asked = learn(inventory, vmm).await;
    loop {
        tokio::time::sleep(ASK_EVERY).await;
        let Some(inventory) = inventory.upgrade() else { return };
        // Its monitor serves one client at a time.
        if inventory.last_blocked(socket, vmm).await.is_none() {
            return;
        }
        match vmm.blocked().await {
            Ok(Some(now)) => {
                // Somebody else may have looked since, and told what was in the way then.
                if inventory.last_blocked(socket, vmm).await.is_some_and(|last| last != now) {
                    info!(pid = vmm.pid(), blocked = ?now, "what blocks a migration has changed");
                    inventory.look_again();
                }
            }
            Ok(None) => return,
            Err(error) => {
                debug!(pid = vmm.pid(), %error, "the VMM does not tell what blocks a migration");
                inventory.look_again();
            }
        }
        if vmm.facts().is_none() && asked.elapsed() >= LEARN_AGAIN {
            asked = learn(&Arc::downgrade(&inventory), vmm).await;
        }
    }
}

/// When it was asked.
async fn learn(inventory: &Weak<Inventory>, vmm: &Arc<dyn LocalVmm>) -> Instant {
    vmm.learn().await;
    if vmm.facts().is_some()
        && let Some(inventory) = inventory.upgrade()
    {
        inventory.look_again();
    }
    Instant::now()
}
