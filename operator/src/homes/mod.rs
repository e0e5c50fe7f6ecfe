//! Which node is known to have which VM, and which reports are set aside for that.
//!
//! [`judge`] decides (pure). The known nodes are in the operator's memory, and in the AssignedVMs for the next
//! operator.

pub mod judge;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;

use jiff::Timestamp;
use kube::ResourceExt;
use parking_lot::Mutex;
use slackwater_api::condition::SUCCEEDED;
use slackwater_api::{AssignedVM, VMMigration};
use tokio::sync::watch;

use crate::conditions::{self, Status};
use crate::inventory::{Inventory, VmKey, reports_of};
use crate::moment::Moment;
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

/// The agents' reports of one VM, as far as they count.
pub struct Sight {
    /// All nodes, without the reports of this VM that do not count.
    pub inventory: Arc<Inventory>,
    /// The node that is known to have the VM.
    pub home: Option<Home>,
    /// The nodes whose reports are set aside.
    pub set_aside: Vec<String>,
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

    /// Judges the reports of a VM, and remembers who is known. `settled`: every agent has reported or failed
    /// once. `moves`: our own migrations of it.
    pub fn look(
        &self,
        vm: &VmKey,
        mut inventory: Arc<Inventory>,
        moves: &[Move],
        settled: bool,
        now: Moment,
    ) -> Sight {
        let mut known = self.known.lock();
        let judged = judge(vm, known.get(vm), &inventory, moves, settled, now);
        let Some(home) = judged.home else {
            known.remove(vm);
            return Sight { inventory, home: None, set_aside: Vec::new() };
        };
        known.insert(vm.clone(), home.clone());
        drop(known);
        let others = reports_of(&inventory, vm).into_iter().map(|report| report.name.to_owned());
        let others: Vec<String> = others.filter(|name| *name != home.node).collect();
        if !others.is_empty() {
            let inventory = Arc::make_mut(&mut inventory);
            for name in &others {
                if let Some(report) = inventory.get_mut(name).and_then(|node| node.report.as_mut()) {
                    Arc::make_mut(report).vms.remove(vm);
                }
            }
        }
        Sight { inventory, home: Some(home), set_aside: judged.set_aside }
    }

    /// All VMs whose node is known.
    pub fn known_vms(&self) -> Vec<VmKey> {
        self.known.lock().keys().cloned().collect()
    }

    /// A VM is gone: whoever reports the name next has it.
    pub fn forget(&self, vm: &VmKey) {
        self.known.lock().remove(vm);
    }

    /// Makes known which reports of a VM are set aside.
    pub fn publish(&self, vm: &VmKey, sight: &Sight) {
        let home = sight.home.as_ref().map(|home| home.node.as_str()).unwrap_or_default();
        self.set_aside.send_if_modified(|known| {
            let was = known.iter().filter(|(_, vms)| vms.contains_key(vm));
            let was: Vec<String> = was.map(|(node, _)| node.clone()).collect();
            let is_known =
                |node: &String| known.get(node).and_then(|vms| vms.get(vm)).is_some_and(|at| at == home);
            if was.len() == sight.set_aside.len() && sight.set_aside.iter().all(is_known) {
                return false;
            }
            let known = Arc::make_mut(known);
            for node in was {
                if let Some(vms) = known.get_mut(&node) {
                    vms.remove(vm);
                }
            }
            for node in &sight.set_aside {
                known.entry(node.clone()).or_default().insert(vm.clone(), home.to_owned());
            }
            known.retain(|_, vms| !vms.is_empty());
            true
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

/// What a VMMigration belongs to in [`Observed`](crate::cluster::Observed): its VM, as it was accepted.
pub fn group_of_move(migration: &VMMigration) -> Option<String> {
    let spec = migration.status.as_ref()?.observed_spec.as_ref()?;
    let vm = VmKey { namespace: migration.namespace()?, name: spec.vm_ref.name.clone() };
    Some(vm.to_string())
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
