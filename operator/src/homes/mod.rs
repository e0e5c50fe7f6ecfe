//! Which node is known to have which VM, and which reports are set aside for that.
//!
//! [`judge`] decides (pure). The known nodes are in the operator's memory, and in the AssignedVMs for the next
//! operator.

pub mod judge;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use jiff::Timestamp;
use kube::ResourceExt;
use parking_lot::Mutex;
use slackwater_api::condition::SUCCEEDED;
use slackwater_api::{AssignedVM, VMMigration};
use tokio::sync::watch;

use crate::conditions::{self, Status};
use crate::inventory::{Inventory, VmKey};
use judge::{Home, Move, judge};

/// For each node the VMs whose report by it is set aside, with the node that is known to have each.
pub type SetAside = BTreeMap<String, BTreeMap<VmKey, String>>;

/// What is known about all VMs.
#[derive(Default)]
pub struct Homes {
    known: Mutex<BTreeMap<VmKey, Home>>,
    /// What earlier operators have known has been taken over.
    restored: watch::Sender<bool>,
    set_aside: watch::Sender<Arc<SetAside>>,
}

/// The agents' reports, as far as they count.
pub struct View {
    /// Without reports that are set aside.
    pub inventory: Inventory,
    /// Where each VM is known to be.
    pub homes: BTreeMap<VmKey, Home>,
    /// Which nodes' reports are set aside, by VM.
    pub set_aside: BTreeMap<VmKey, Vec<String>>,
}

impl Homes {
    /// Takes over what an earlier operator has known.
    pub fn restore<'a>(&self, vms: impl Iterator<Item = &'a AssignedVM>, now: Timestamp) {
        let mut known = self.known.lock();
        for vm in vms {
            let Some(status) = &vm.status else { continue };
            let (Some(node), key) = (status.node_name.clone(), key_of(vm)) else { continue };
            // Version 0.1.0 did not write it.
            let since = status.node_since.as_ref().map_or(now, |since| since.0);
            known.entry(key).or_insert(Home { node, since, missing_since: None });
        }
        drop(known);
        self.restored.send_replace(true);
    }

    /// Returns when what earlier operators have known has been taken over.
    pub async fn restored(&self) {
        // The sender lives as long as this.
        self.restored.subscribe().wait_for(|restored| *restored).await.ok();
    }

    /// Judges all reports, and remembers who is known. `settled`: every agent has reported or failed once.
    pub fn look(&self, inventory: &Inventory, moves: &[Move], settled: bool, now: Timestamp) -> View {
        let mut known = self.known.lock();
        let reported = inventory.values().filter_map(|node| node.report.as_ref());
        let vms: BTreeSet<VmKey> =
            reported.flat_map(|report| report.vms.keys()).chain(known.keys()).cloned().collect();
        let mut view =
            View { inventory: inventory.clone(), homes: BTreeMap::new(), set_aside: BTreeMap::new() };
        for vm in vms {
            let judged = judge(&vm, known.get(&vm), inventory, moves, settled, now);
            let Some(home) = judged.home else {
                known.remove(&vm);
                continue;
            };
            for (name, node) in &mut view.inventory {
                if *name != home.node
                    && let Some(report) = &mut node.report
                {
                    report.vms.remove(&vm);
                }
            }
            if !judged.set_aside.is_empty() {
                view.set_aside.insert(vm.clone(), judged.set_aside);
            }
            known.insert(vm.clone(), home.clone());
            view.homes.insert(vm, home);
        }
        view
    }

    /// A VM is gone: whoever reports the name next has it.
    pub fn forget(&self, vm: &VmKey) {
        self.known.lock().remove(vm);
    }

    /// Makes known which reports are set aside.
    pub fn publish(&self, view: &View) {
        let mut by_node = SetAside::new();
        for (vm, nodes) in &view.set_aside {
            let home = view.homes.get(vm).map(|home| home.node.clone()).unwrap_or_default();
            for node in nodes {
                by_node.entry(node.clone()).or_default().insert(vm.clone(), home.clone());
            }
        }
        self.set_aside.send_if_modified(|known| {
            let modified = **known != by_node;
            if modified {
                *known = Arc::new(by_node);
            }
            modified
        });
    }

    /// Which reports are set aside, now and at each change.
    pub fn set_aside(&self) -> watch::Receiver<Arc<SetAside>> {
        self.set_aside.subscribe()
    }
}

fn key_of(vm: &AssignedVM) -> VmKey {
    VmKey { namespace: vm.namespace().unwrap_or_default(), name: vm.name_any() }
}

/// Our own migrations, as their statuses say: those under way, and those that have succeeded.
pub fn moves<'a>(migrations: impl Iterator<Item = &'a VMMigration>) -> Vec<Move> {
    migrations.filter_map(move_of).collect()
}

fn move_of(migration: &VMMigration) -> Option<Move> {
    let status = migration.status.as_ref()?;
    let succeeded = match &status.completion_time {
        None => None,
        Some(time) if conditions::is(&status.conditions, SUCCEEDED, Status::True) => Some(time.0),
        Some(_) => return None,
    };
    Some(Move {
        id: migration.uid()?,
        vm: VmKey {
            namespace: migration.namespace()?,
            name: status.observed_spec.as_ref()?.vm_ref.name.clone(),
        },
        source: status.source_node.clone()?,
        target: status.target_node.clone()?,
        succeeded,
    })
}
