//! Taking up the source's end of an attempt.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use slackwater_handover::policy::{StopPlan, stop_plan};
use slackwater_proto::transfer::Attempt;
use tracing::warn;

use super::entries;
use super::journalled_vmm::{self, FoundVmm, Route};
use super::release::VmRemains;
use super::reopen::{TakeUpError, reopen, restarted};
use super::resources::NodeResources;
use crate::attempt::entry::{EndEntry, Entry, Marks, Process};
use crate::attempt::events::EventLog;
use crate::attempt::link::Peer;
use crate::attempt::source::{Recovered, SourceParts, SourceRun};
use crate::host::node::boot_id;
use crate::host::vms;
use crate::journal::Key;
use crate::process::cgroup::Cgroup;
use crate::vfio::worker::DeviceHandle;
use crate::vmm::Vmm;
use crate::vmm::budget::Budget;
use crate::vmm::gone::GoneVmm;

/// An attempt without a limit of its own: what is left of it before the commit is the rollback.
const NO_LIMIT: Duration = Duration::from_secs(24 * 3600);

/// Finds the VM, and goes on. Does nothing for the journal of a destination.
pub(super) async fn take_up(node: &NodeResources, key: Key, entry: Entry) -> Result<(), TakeUpError> {
    let EndEntry::Source { target_node, target_address, cgroup, marks } = &entry.end else { return Ok(()) };
    let ledger = reopen(node, &key, &entry).await?;
    let known = node.inventory.vm(&entries::vm_of(&entry)).and_then(|vm| vm.vm.ok());
    let found = match &known {
        Some(known) => journalled_vmm::find(&Route::Vm(known), node, entry.vmm.as_ref()).await,
        None => None,
    };
    let directory = vms::directory_of(&node.config.run_dir, &entry.namespace, &entry.name);
    let remains = VmRemains {
        cgroup: cgroup.as_ref().and_then(|name| Cgroup::with_name(&node.config.cgroup_root, name).ok()),
        socket: known.map(|known| known.socket).unwrap_or_else(|| directory.join("vmm.sock")),
        directory,
    };
    let peer = Peer {
        credentials: Arc::clone(&node.credentials),
        node: target_node.clone(),
        address: target_address.clone(),
        attempt: Attempt { migration_id: entry.migration_id.clone(), attempt: entry.attempt },
    };
    let same_boot = entry.vmm.as_ref().is_some_and(is_of_this_boot);
    let recovered = |found, vmm_gone| Recovered {
        record: entry.record,
        found,
        failure: entry.failure().unwrap_or_else(restarted),
        vmm_gone,
        marks: if same_boot { *marks } else { Marks::default() },
    };
    let log = EventLog::new(&node.config.node);
    let parts = match found {
        Some(FoundVmm { vmm, devices, states }) => {
            let features: Vec<_> = devices.iter().map(DeviceHandle::features).collect();
            SourceParts {
                peer,
                release: remains.release(Arc::clone(&vmm), node, &entry.migration_id),
                vmm: vmm as Arc<dyn Vmm>,
                devices,
                plan: stop_plan(&features, entry.peer_to_peer()).unwrap_or(StopPlan::QuiesceFirst),
                features,
                ledger,
                recovered: Some(recovered(states, false)),
                pre_commit_timeout: NO_LIMIT,
                budget: Budget::default(),
                log,
            }
        }
        None => {
            warn!(migration = entry.migration_id, "the VMM's process is gone");
            SourceParts {
                peer,
                release: remains.clear_away(node),
                vmm: Arc::new(GoneVmm),
                devices: Vec::new(),
                features: Vec::new(),
                plan: StopPlan::Alone,
                ledger,
                recovered: Some(recovered(Vec::new(), true)),
                pre_commit_timeout: NO_LIMIT,
                budget: Budget::default(),
                log,
            }
        }
    };
    node.join_source(&entries::reference_of(&entry), &SourceRun::start(parts));
    Ok(())
}

/// Times of CLOCK_MONOTONIC from another boot mean nothing.
fn is_of_this_boot(process: &Process) -> bool {
    boot_id(Path::new("/proc")).is_ok_and(|now| now == process.boot_id)
}
