//! What becomes of a VMM while no event reports it.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use tracing::{debug, info};

use super::vmms::Vmms;
use crate::vmm::LocalVmm;

/// Between two questions whether the VMM would refuse a migration: QEMU reports no change.
const ASK_EVERY: Duration = Duration::from_secs(3);
/// After this time a VMM that could not say what it is may try again.
const LEARN_AGAIN: Duration = Duration::from_secs(60);

/// Lets the VMM say what it is, asks it now and then what blocks a migration, and forgets it when its process
/// has exited.
pub(super) fn start(vmms: Weak<Vmms>, socket: PathBuf, vmm: Arc<dyn LocalVmm>) {
    tokio::spawn(async move {
        tokio::select! {
            () = vmm.exited() => {}
            () = ask(&vmms, &socket, &vmm) => vmm.exited().await,
        }
        if let Some(vmms) = vmms.upgrade() {
            vmms.forget(&socket, &vmm).await;
            vmms.look_again();
        }
    });
}

/// Returns when there is nothing more to ask, or another VMM has taken its place.
async fn ask(vmms: &Weak<Vmms>, socket: &Path, vmm: &Arc<dyn LocalVmm>) {
    let mut asked = learn(vmms, vmm).await;
    loop {
        tokio::time::sleep(ASK_EVERY).await;
        let Some(vmms) = vmms.upgrade() else { return };
        // Its monitor serves one client at a time.
        if vmms.last_blocked(socket, vmm).await.is_none() {
            return;
        }
        match vmm.blocked().await {
            Ok(Some(now)) => {
                // The inventory may have asked since, and reported what blocked a migration then.
                if vmms.last_blocked(socket, vmm).await.is_some_and(|last| last != now) {
                    info!(pid = vmm.pid(), blocked = ?now, "what blocks a migration has changed");
                    vmms.look_again();
                }
            }
            Ok(None) => return,
            Err(error) => {
                debug!(pid = vmm.pid(), %error, "the VMM does not say what blocks a migration");
                vmms.look_again();
            }
        }
        if vmm.facts().is_none() && asked.elapsed() >= LEARN_AGAIN {
            asked = learn(&Arc::downgrade(&vmms), vmm).await;
        }
    }
}

/// When it was asked.
async fn learn(vmms: &Weak<Vmms>, vmm: &Arc<dyn LocalVmm>) -> Instant {
    vmm.learn().await;
    if vmm.facts().is_some()
        && let Some(vmms) = vmms.upgrade()
    {
        vmms.look_again();
    }
    Instant::now()
}
