//! Taking up the source's end of an attempt.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use slackwater_handover::Failure;
use slackwater_handover::failure::{MESSAGE_MAX_BYTES, cut};
use slackwater_handover::policy::{StopPlan, stop_plan};
use slackwater_proto::node::VmRef;
use tracing::warn;

use super::entries;
use super::journalled_vmm::{self, Connection, FoundVmm, Route};
use super::release::VmRemains;
use super::reopen::{TakeUpError, reopen, restarted};
use super::resources::NodeResources;
use crate::attempt::entry::{EndEntry, Entry, Marks, Process};
use crate::attempt::events::EventLog;
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
    let (EndEntry::Source { cgroup, marks, monitor, .. }, Some(peer)) = (&entry.end, node.peer_of(&entry))
    else {
        return Ok(());
    };
    let ledger = reopen(node, &key, &entry).await?;
    let process = entry.vmm.as_ref().ok_or(TakeUpError::NoProcess)?;
    let vm = entries::vm_of(&entry);
    let directory = vms::directory_of(&node.config.run_dir, &entry.namespace, &entry.name);
    let route = || match monitor {
        Some(monitor) => Ok(Route {
            vmm: monitor.vmm(),
            socket: monitor.socket.clone(),
            folder: directory.clone(),
            connection: Connection::Inventory,
        }),
        None => by_vm_json(node, &vm),
    };
    let found = journalled_vmm::find(route, node, &entry.migration_id, process).await;
    let remains = VmRemains {
        cgroup: cgroup.as_ref().and_then(|name| Cgroup::with_name(&node.config.cgroup_root, name).ok()),
        socket: route().map_or_else(|_| directory.join("vmm.sock"), |route| route.socket),
        directory: directory.clone(),
    };
    let same_boot = entry.vmm.as_ref().is_some_and(is_of_this_boot);
    let recovered = |found, vmm_gone| Recovered {
        record: entry.record,
        found,
        failure: why(node, &vm, &entry),
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

/// The way to the VMM that the VM's vm.json names: for a journal of an agent that did not write it down.
fn by_vm_json(node: &NodeResources, vm: &VmRef) -> Result<Route, String> {
    let missing = |why: &dyn std::fmt::Display| {
        format!("the journal does not say where it listens, and the VM's vm.json cannot be used: {why}")
    };
    let entry = node.inventory.vm(vm).ok_or_else(|| missing(&"it is missing"))?;
    let known = entry.vm.map_err(|why| missing(&why))?;
    Ok(Route {
        vmm: known.json.vmm,
        socket: known.socket,
        folder: known.directory,
        connection: Connection::Inventory,
    })
}

/// Why the attempt is given up, if it is. The vm.json is its owner's file: an agent neither needs it for the
/// way back nor writes it again, but without it the VM runs unseen.
fn why(node: &NodeResources, vm: &VmRef, entry: &Entry) -> Failure {
    let failure = entry.failure().unwrap_or_else(restarted);
    let missing = match node.inventory.vm(vm).map(|found| found.vm) {
        Some(Ok(_)) => return failure,
        Some(Err(why)) => format!("cannot be used ({why})"),
        None => "is missing".to_owned(),
    };
    let told =
        format!("; the VM's vm.json {missing}: until its owner restores it, the VM cannot be migrated");
    if failure.message.contains(&told) {
        return failure;
    }
    // What is said last must not be what is cut.
    let first = cut(&failure.message, MESSAGE_MAX_BYTES.saturating_sub(told.len()));
    Failure::new(failure.reason, first + &told)
}

/// Times of CLOCK_MONOTONIC from another boot mean nothing.
fn is_of_this_boot(process: &Process) -> bool {
    boot_id(Path::new("/proc")).is_ok_and(|now| now == process.boot_id)
}

#[cfg(test)]
#[path = "take_up_tests.rs"]
pub(super) mod tests;
