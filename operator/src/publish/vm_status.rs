//! The status of an AssignedVM: where the VM is, and whether it can be migrated, before a user tries.

use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use slackwater_api::condition::{CONTESTED, MIGRATABLE, READY};
use slackwater_api::{AssignedVMStatus, MigrationReference, PeerToPeer, VmDevice, VmState};

use super::count;
use crate::conditions::{self, Finding, Stamp, Status};
use crate::homes::judge::Home;
use crate::inventory::{self, Inventory, Node, Vm, VmKey, VmReport, Whereabouts, whereabouts};
use crate::plan::{OtherMigration, Refusal, check_movable};
use crate::reason::{self, REPORTED_ELSEWHERE};

/// What is known of a VM beside the reports that count.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Known<'a> {
    /// The node that has it.
    pub(super) home: Option<&'a Home>,
    /// Other nodes that report it, and are set aside for that.
    pub(super) set_aside: &'a [String],
}

/// What the status should be. `inventory` has the reports that count.
pub(super) fn vm_status(
    key: &VmKey,
    inventory: &Inventory,
    known: Known<'_>,
    migrations: &[Arc<OtherMigration>],
    previous: &AssignedVMStatus,
    stamp: Stamp,
) -> AssignedVMStatus {
    let mut status = match whereabouts(inventory, key) {
        Whereabouts::At(report) => describe(report),
        // There is no report, or no way to say which one is right: what was known last stays.
        Whereabouts::Several(_) | Whereabouts::Nowhere => previous.clone(),
    };
    status.conditions.clone_from(&previous.conditions);
    status.node_since = known.home.map(|home| Time(home.since));
    status.migration = migration_of(key, inventory, migrations);

    let ready = ready(key, inventory, previous);
    // Nothing more is known about a VM that cannot be seen.
    let migratable = match ready.status {
        Status::Unknown => ready.clone(),
        Status::True | Status::False => migratable(key, inventory, migrations),
    };
    conditions::set(&mut status.conditions, READY, &ready, stamp);
    conditions::set(&mut status.conditions, MIGRATABLE, &migratable, stamp);
    let was_contested = conditions::find(&previous.conditions, CONTESTED).is_some();
    if let Some(contested) = contested(key, known, was_contested) {
        conditions::set(&mut status.conditions, CONTESTED, &contested, stamp);
    }
    status
}

/// Whether another node reports the VM, too. `None`: that is not worth a condition.
fn contested(key: &VmKey, known: Known<'_>, before: bool) -> Option<Finding> {
    let Some(home) = known.home.filter(|_| !known.set_aside.is_empty()) else {
        let finding = || Finding::new(Status::False, "ReportedOnce", "No other node reports the VM.");
        return before.then(finding);
    };
    let node = &home.node;
    let message = format!(
        "VM {key} is known on {node}. {} reports a VM of this name, too, and that report is set aside. End the copy \
         that is not the VM. If the VM has moved without a VMMigration, it is taken over when the agent of {node} is \
         connected and does not report it any more, or when MigrationNode {node} is deleted.",
        listed(known.set_aside)
    );
    Some(Finding::new(Status::True, REPORTED_ELSEWHERE, message))
}

fn listed(nodes: &[String]) -> String {
    let shown = nodes.iter().take(5).cloned().collect::<Vec<_>>().join(", ");
    if nodes.len() > 5 { format!("{shown} and {} more", nodes.len() - 5) } else { shown }
}

fn ready(key: &VmKey, inventory: &Inventory, previous: &AssignedVMStatus) -> Finding {
    match whereabouts(inventory, key) {
        Whereabouts::At(report) => match report.node.not_ready_reason() {
            Some(error) => node_not_ready(report.name, &error),
            None => ready_at(report.name, report.vm),
        },
        Whereabouts::Several(nodes) => {
            let nodes = nodes.into_iter().map(str::to_owned).collect();
            let refusal = Refusal::ReportedTwice { vm: key.clone(), nodes };
            Finding::new(Status::False, refusal.reason(), refusal.to_string())
        }
        Whereabouts::Nowhere => {
            let node = previous.node_name.as_deref().unwrap_or("no node");
            match inventory.get(node).map(Node::not_ready_reason) {
                Some(Some(error)) => node_not_ready(node, &error),
                Some(None) => {
                    let message = format!("{node}, where the VM was last, does not have it any more.");
                    Finding::new(Status::False, reason::NOT_REPORTED, message)
                }
                None => {
                    let message =
                        format!("The VM was last on {node}, and there is no such MigrationNode any more.");
                    Finding::new(Status::Unknown, "NodeGone", message)
                }
            }
        }
    }
}

/// Ready, for a VM that one reachable node has.
fn ready_at(node: &str, vm: &Vm) -> Finding {
    match vm.state {
        inventory::VmState::Running => {
            Finding::new(Status::True, "Running", format!("The VM runs on {node}."))
        }
        inventory::VmState::Paused => {
            Finding::new(Status::True, "Paused", format!("The VM is paused on {node}."))
        }
        inventory::VmState::Unreachable => {
            let why = vm.unreachable_reason.trim_end_matches('.');
            let message = format!("Its VMM on {node} does not answer: {why}.");
            Finding::new(Status::False, "VMMUnreachable", message)
        }
        inventory::VmState::Unknown => {
            let message = format!("The agent of {node} does not say what the VM does.");
            Finding::new(Status::Unknown, "StateUnknown", message)
        }
    }
}

fn node_not_ready(node: &str, error: &str) -> Finding {
    let error = error.trim_end_matches('.');
    let message = format!("{node}, where the VM was last, does not answer: {error}.");
    Finding::new(Status::Unknown, reason::NODE_NOT_READY, message)
}

fn migratable(key: &VmKey, inventory: &Inventory, migrations: &[Arc<OtherMigration>]) -> Finding {
    match check_movable(key, PeerToPeer::Required, inventory, migrations) {
        Ok(()) => {
            Finding::new(Status::True, "NothingInTheWay", "Nothing that is known prevents a migration.")
        }
        Err(refusal) => Finding::new(Status::False, refusal.reason(), refusal.to_string()),
    }
}

fn migration_of(
    key: &VmKey,
    inventory: &Inventory,
    migrations: &[Arc<OtherMigration>],
) -> Option<MigrationReference> {
    if let Some(migration) = migrations.iter().find(|migration| migration.vm == *key) {
        let name = migration.name.rsplit('/').next().map(str::to_owned);
        return Some(MigrationReference { name, id: migration.id.clone() });
    }
    let id = crate::plan::held_by(key, inventory)?;
    Some(MigrationReference { name: None, id })
}

/// A status without conditions, as the node of the VM describes it.
fn describe(VmReport { name, node, vm }: VmReport<'_>) -> AssignedVMStatus {
    let device = |device_name: &String| {
        let known = node.report.as_ref().and_then(|report| report.devices.get(device_name));
        VmDevice {
            name: device_name.clone(),
            driver: known.map(|device| device.driver.clone()).unwrap_or_default(),
            model: known.map(|device| device.model.clone()).unwrap_or_default(),
            features: known.map(|device| device.features.known().to_vec()).unwrap_or_default(),
        }
    };
    AssignedVMStatus {
        node_name: Some(name.to_owned()),
        node_since: None,
        state: Some(match vm.state {
            inventory::VmState::Unknown => VmState::Unknown,
            inventory::VmState::Running => VmState::Running,
            inventory::VmState::Paused => VmState::Paused,
            inventory::VmState::Unreachable => VmState::Unreachable,
        }),
        vmm_kind: Some(vm.vmm_kind.clone()).filter(|kind| !kind.is_empty()),
        ram_bytes: Some(i64::try_from(vm.ram_bytes).unwrap_or(i64::MAX)),
        device_count: Some(count(vm.devices.len())),
        devices: vm.devices.iter().map(device).collect(),
        migration: None,
        conditions: Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use jiff::Timestamp;
    use slackwater_api::MigrationFeature;

    use super::*;
    use crate::inventory::{Blocker, Device, DeviceFeatures, Link, NodeReport};

    const STAMP: Stamp = Stamp { generation: None, now: Timestamp::UNIX_EPOCH };

    fn key() -> VmKey {
        VmKey { namespace: "demo".into(), name: "counter".into() }
    }

    fn vm() -> Vm {
        Vm { state: inventory::VmState::Running, devices: vec!["a1".into()], ..Default::default() }
    }

    fn node(vm: Option<Vm>) -> Node {
        let features = DeviceFeatures::Known(vec![MigrationFeature::StopCopy]);
        let device = Device { driver: "mtty".into(), model: "mtty-1".into(), features, ..Default::default() };
        let report = NodeReport {
            vms: vm.into_iter().map(|vm| (key(), vm)).collect(),
            devices: BTreeMap::from([("a1".to_owned(), device)]),
            ..Default::default()
        };
        Node { link: Link::Ready, report: Some(Arc::new(report)), ..Default::default() }
    }

    fn at(nodes: Vec<(&str, Node)>) -> Inventory {
        nodes.into_iter().map(|(name, node)| (name.to_owned(), node)).collect()
    }

    fn seen(status: &AssignedVMStatus, type_: &str) -> (String, String) {
        let condition = conditions::find(&status.conditions, type_).unwrap();
        (condition.status.clone(), condition.reason.clone())
    }

    fn fresh(inventory: &Inventory) -> AssignedVMStatus {
        vm_status(&key(), inventory, Known::default(), &[], &AssignedVMStatus::default(), STAMP)
    }

    #[test]
    fn a_vm_that_nothing_blocks_is_ready_and_migratable() {
        let status = fresh(&at(vec![("node-a", node(Some(vm())))]));
        assert_eq!(seen(&status, READY), ("True".into(), "Running".into()));
        assert_eq!(seen(&status, MIGRATABLE), ("True".into(), "NothingInTheWay".into()));
        assert_eq!(
            (status.node_name.as_deref(), status.devices[0].model.as_str()),
            (Some("node-a"), "mtty-1")
        );
    }

    #[test]
    fn a_blocker_is_shown_before_a_user_tries() {
        let blocker = Blocker {
            reason: "MemoryNotShared".into(),
            message: "x".into(),
            lifted_by_assume_isolated: false,
        };
        let status = fresh(&at(vec![("node-a", node(Some(Vm { blockers: vec![blocker], ..vm() })))]));
        assert_eq!(seen(&status, MIGRATABLE), ("False".into(), "MemoryNotShared".into()));
        assert_eq!(seen(&status, READY).0, "True");
    }

    #[test]
    fn a_vm_that_two_nodes_report_is_neither_ready_nor_migratable_and_stays_where_it_was_seen() {
        let before = fresh(&at(vec![("node-a", node(Some(vm())))]));
        let inventory = at(vec![("node-a", node(Some(vm()))), ("node-b", node(Some(vm())))]);
        let status = vm_status(&key(), &inventory, Known::default(), &[], &before, STAMP);
        assert_eq!(seen(&status, READY), ("False".into(), "VMReportedTwice".into()));
        assert_eq!(seen(&status, MIGRATABLE), ("False".into(), "VMReportedTwice".into()));
        assert_eq!(status.node_name.as_deref(), Some("node-a"));
    }

    #[test]
    fn a_vm_that_another_node_reports_too_says_so_with_both_nodes_and_stays_usable() {
        let inventory = at(vec![("node-a", node(Some(vm()))), ("node-b", node(None))]);
        let home = Home { node: "node-a".into(), since: Timestamp::UNIX_EPOCH, missing_since: None };
        let set_aside = ["node-b".to_owned()];
        let known = Known { home: Some(&home), set_aside: &set_aside };
        let status = vm_status(&key(), &inventory, known, &[], &AssignedVMStatus::default(), STAMP);
        assert_eq!(seen(&status, CONTESTED), ("True".into(), "ReportedElsewhere".into()));
        let message = &conditions::find(&status.conditions, CONTESTED).unwrap().message;
        assert!(message.starts_with("VM demo/counter is known on node-a. node-b reports a VM"), "{message}");
        assert_eq!(seen(&status, MIGRATABLE).0, "True");
        assert_eq!(status.node_since, Some(Time(Timestamp::UNIX_EPOCH)));
        let known = Known { home: Some(&home), set_aside: &[] };
        let status = vm_status(&key(), &inventory, known, &[], &status, STAMP);
        assert_eq!(seen(&status, CONTESTED), ("False".into(), "ReportedOnce".into()));
    }

    #[test]
    fn a_vm_of_a_silent_node_is_unknown_and_a_vm_that_left_its_node_is_not_reported() {
        let before = fresh(&at(vec![("node-a", node(Some(vm())))]));
        let mut silent = node(Some(vm()));
        silent.link = Link::Down { reason: "AgentUnreachable", error: "timeout".into() };
        let status = vm_status(&key(), &at(vec![("node-a", silent)]), Known::default(), &[], &before, STAMP);
        assert_eq!(seen(&status, READY), ("Unknown".into(), "NodeNotReady".into()));
        assert_eq!(seen(&status, MIGRATABLE).0, "Unknown");

        let status =
            vm_status(&key(), &at(vec![("node-a", node(None))]), Known::default(), &[], &before, STAMP);
        assert_eq!(seen(&status, READY), ("False".into(), reason::NOT_REPORTED.into()));
        let status = vm_status(&key(), &at(vec![]), Known::default(), &[], &before, STAMP);
        assert_eq!(seen(&status, READY), ("Unknown".into(), "NodeGone".into()));
    }

    #[test]
    fn a_migration_is_named_while_it_holds_the_vm() {
        let other = Arc::new(OtherMigration {
            name: "VMMigration demo/move".into(),
            id: "u-1".into(),
            vm: key(),
            target: "node-b".into(),
            target_devices: vec![],
        });
        let inventory = at(vec![("node-a", node(Some(vm())))]);
        let status =
            vm_status(&key(), &inventory, Known::default(), &[other], &AssignedVMStatus::default(), STAMP);
        assert_eq!(
            status.migration,
            Some(MigrationReference { name: Some("move".into()), id: "u-1".into() })
        );
        assert_eq!(seen(&status, MIGRATABLE).1, "MigrationInProgress");
    }
}
