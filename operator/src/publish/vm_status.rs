//! The status of an AssignedVM: where the VM is, and whether it can be migrated, before anyone tries.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use slackwater_api::condition::{MIGRATABLE, READY};
use slackwater_api::{AssignedVMStatus, MigrationReference, PeerToPeer, VmDevice, VmState};

use super::count;
use crate::conditions::{self, Stamp, Status};
use crate::inventory::{self, Inventory, Node, Vm, VmKey, Whereabouts, whereabouts};
use crate::plan::{OtherMigration, Refusal, check_movable};

/// What the status should be.
pub(super) fn vm_status(
    key: &VmKey,
    inventory: &Inventory,
    migrations: &[OtherMigration],
    previous: &AssignedVMStatus,
    stamp: Stamp,
) -> AssignedVMStatus {
    let mut status = match whereabouts(inventory, key) {
        Whereabouts::At { name, node, vm } => described(name, node, vm),
        // Nobody can say which report is right, or there is none: what was known last stays.
        Whereabouts::Several(_) | Whereabouts::Nowhere => previous.clone(),
    };
    status.conditions.clone_from(&previous.conditions);
    status.migration = migration_of(key, inventory, migrations);

    let (ready, reason, message) = ready(key, inventory, previous);
    set(&mut status.conditions, READY, ready, &reason, &message, stamp);
    // Of a VM that cannot be seen nobody knows more than that.
    let (migratable, reason, message) = match ready {
        Status::Unknown => (Status::Unknown, reason, message),
        Status::True | Status::False => migratable(key, inventory, migrations),
    };
    set(&mut status.conditions, MIGRATABLE, migratable, &reason, &message, stamp);
    status
}

fn set(
    conditions: &mut Vec<Condition>,
    type_: &str,
    status: Status,
    reason: &str,
    message: &str,
    stamp: Stamp,
) {
    conditions::set(conditions, type_, status, reason, message, stamp);
}

fn ready(key: &VmKey, inventory: &Inventory, previous: &AssignedVMStatus) -> (Status, String, String) {
    let said = |status, reason: &str, message| (status, reason.to_owned(), message);
    match whereabouts(inventory, key) {
        Whereabouts::At { name, node, vm } => match node.not_ready_reason() {
            Some(error) => {
                let message = format!(
                    "{name}, where the VM was last, does not answer: {}.",
                    error.trim_end_matches('.')
                );
                said(Status::Unknown, "NodeNotReady", message)
            }
            None => match vm.state {
                inventory::VmState::Running => {
                    said(Status::True, "Running", format!("The VM runs on {name}."))
                }
                inventory::VmState::Paused => {
                    said(Status::True, "Paused", format!("The VM is paused on {name}."))
                }
                inventory::VmState::Unreachable => {
                    let message = format!(
                        "Its VMM on {name} does not answer: {}.",
                        vm.unreachable_reason.trim_end_matches('.')
                    );
                    said(Status::False, "VMMUnreachable", message)
                }
                inventory::VmState::Unknown => said(
                    Status::Unknown,
                    "StateUnknown",
                    format!("The agent of {name} does not say what the VM does."),
                ),
            },
        },
        Whereabouts::Several(nodes) => {
            let nodes = nodes.into_iter().map(str::to_owned).collect();
            let refusal = Refusal::ReportedTwice { vm: key.clone(), nodes };
            said(Status::False, refusal.reason(), refusal.to_string())
        }
        Whereabouts::Nowhere => {
            let node = previous.node_name.as_deref().unwrap_or("no node");
            match inventory.get(node).map(Node::not_ready_reason) {
                Some(Some(error)) => {
                    let message = format!(
                        "{node}, where the VM was last, does not answer: {}.",
                        error.trim_end_matches('.')
                    );
                    said(Status::Unknown, "NodeNotReady", message)
                }
                Some(None) => said(
                    Status::False,
                    NOT_REPORTED,
                    format!("{node}, where the VM was last, has it no more."),
                ),
                None => {
                    let message =
                        format!("The VM was last on {node}, and there is no such MigrationNode any more.");
                    said(Status::Unknown, "NodeGone", message)
                }
            }
        }
    }
}

/// The reason of Ready=False for a VM that its node does not have any more.
pub(super) const NOT_REPORTED: &str = "NotReported";

fn migratable(key: &VmKey, inventory: &Inventory, migrations: &[OtherMigration]) -> (Status, String, String) {
    match check_movable(key, PeerToPeer::Required, inventory, migrations) {
        Ok(()) => (
            Status::True,
            "NothingInTheWay".to_owned(),
            "Nothing that is known stands in the way.".to_owned(),
        ),
        Err(refusal) => (Status::False, refusal.reason().to_owned(), refusal.to_string()),
    }
}

fn migration_of(
    key: &VmKey,
    inventory: &Inventory,
    migrations: &[OtherMigration],
) -> Option<MigrationReference> {
    if let Some(migration) = migrations.iter().find(|migration| migration.vm == *key) {
        let name = migration.name.rsplit('/').next().map(str::to_owned);
        return Some(MigrationReference { name, id: migration.id.clone() });
    }
    let id = crate::plan::held_by(key, inventory)?;
    Some(MigrationReference { name: None, id })
}

fn described(name: &str, node: &Node, vm: &Vm) -> AssignedVMStatus {
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
        Node { address: String::new(), peer_address: String::new(), link: Link::Ready, report: Some(report) }
    }

    fn at(nodes: Vec<(&str, Node)>) -> Inventory {
        nodes.into_iter().map(|(name, node)| (name.to_owned(), node)).collect()
    }

    fn seen(status: &AssignedVMStatus, type_: &str) -> (String, String) {
        let condition = conditions::find(&status.conditions, type_).unwrap();
        (condition.status.clone(), condition.reason.clone())
    }

    fn fresh(inventory: &Inventory) -> AssignedVMStatus {
        vm_status(&key(), inventory, &[], &AssignedVMStatus::default(), STAMP)
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
    fn a_blocker_is_shown_before_anyone_tries() {
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
        let status = vm_status(&key(), &inventory, &[], &before, STAMP);
        assert_eq!(seen(&status, READY), ("False".into(), "VMReportedTwice".into()));
        assert_eq!(seen(&status, MIGRATABLE), ("False".into(), "VMReportedTwice".into()));
        assert_eq!(status.node_name.as_deref(), Some("node-a"));
    }

    #[test]
    fn a_vm_of_a_silent_node_is_unknown_and_one_that_its_node_has_no_more_is_not_reported() {
        let before = fresh(&at(vec![("node-a", node(Some(vm())))]));
        let mut silent = node(Some(vm()));
        silent.link = Link::Down { error: "timeout".into() };
        let status = vm_status(&key(), &at(vec![("node-a", silent)]), &[], &before, STAMP);
        assert_eq!(seen(&status, READY), ("Unknown".into(), "NodeNotReady".into()));
        assert_eq!(seen(&status, MIGRATABLE).0, "Unknown");

        let status = vm_status(&key(), &at(vec![("node-a", node(None))]), &[], &before, STAMP);
        assert_eq!(seen(&status, READY), ("False".into(), NOT_REPORTED.into()));
        let status = vm_status(&key(), &at(vec![]), &[], &before, STAMP);
        assert_eq!(seen(&status, READY), ("Unknown".into(), "NodeGone".into()));
    }

    #[test]
    fn a_migration_is_named_while_it_holds_the_vm() {
        let other = OtherMigration {
            name: "VMMigration demo/move".into(),
            id: "u-1".into(),
            vm: key(),
            target: "node-b".into(),
            target_devices: vec![],
        };
        let inventory = at(vec![("node-a", node(Some(vm())))]);
        let status = vm_status(&key(), &inventory, &[other], &AssignedVMStatus::default(), STAMP);
        assert_eq!(
            status.migration,
            Some(MigrationReference { name: Some("move".into()), id: "u-1".into() })
        );
        assert_eq!(seen(&status, MIGRATABLE).1, "MigrationInProgress");
    }
}
