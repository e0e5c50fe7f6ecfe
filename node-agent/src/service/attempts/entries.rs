//! What was asked for as a journal's entry, and back. Pure.

use slackwater_handover::Record;
use slackwater_handover::policy::PeerToPeer;
use slackwater_proto::node::{
    DevicePair, MigrateRequest, MigrationRef, PeerToPeer as WirePeerToPeer, ReserveRequest, VmRef,
};
use slackwater_proto::refusal::Refusal;

use crate::attempt::entry::{EndEntry, Entry, Marks, Monitor, Pair};
use crate::journal::{Key, Role};
use crate::process::cgroup::Cgroup;
use crate::service::reason::ServiceReason;
use crate::vfio::borrow::ProcessIdentity;

/// The name of an attempt's journal.
pub(super) fn key(migration_id: &str, role: Role) -> Result<Key, Refusal> {
    Key::new(migration_id, role)
        .map_err(|error| Refusal::invalid_argument(ServiceReason::InvalidRequest, error.to_string()))
}

fn entry(
    reference: &MigrationRef,
    vm: &VmRef,
    policy: PeerToPeer,
    devices: &[DevicePair],
    record: Record,
    end: EndEntry,
) -> Entry {
    Entry {
        migration_id: reference.id.clone(),
        attempt: reference.attempt,
        record,
        ended: None,
        failure: None,
        stated_because: None,
        recorded_unix_ns: 0,
        namespace: vm.namespace.clone(),
        name: vm.name.clone(),
        vmm: None,
        assume_isolated: policy == PeerToPeer::AssumeIsolated,
        devices: devices.iter().map(Pair::from).collect(),
        end,
    }
}

/// The first entry of the source.
pub(super) fn source(
    reference: &MigrationRef,
    vm: &VmRef,
    given: &MigrateRequest,
    policy: PeerToPeer,
    vmm: &ProcessIdentity,
    cgroup: Option<&Cgroup>,
    monitor: Monitor,
) -> Entry {
    let end = EndEntry::Source {
        target_node: given.target_node.clone(),
        target_address: given.target_address.clone(),
        cgroup: cgroup.map(|cgroup| cgroup.name().to_owned()),
        marks: Marks::default(),
        monitor: Some(monitor),
    };
    let vmm = Some(vmm.into());
    Entry { vmm, ..entry(reference, vm, policy, &given.devices, Record::Saving, end) }
}

/// The first entry of the destination.
pub(super) fn destination(
    reference: &MigrationRef,
    vm: &VmRef,
    given: &ReserveRequest,
    policy: PeerToPeer,
    twin_user: u32,
) -> Entry {
    let end = EndEntry::Destination {
        source_node: given.source_node.clone(),
        vm_json: given.vm_json.clone(),
        claim: given.claim.to_vec(),
        silence_timeout_ms: given.silence_timeout_ms,
        twin_user: Some(twin_user),
    };
    entry(reference, vm, policy, &given.devices, Record::Reserved, end)
}

/// Refuses an attempt whose later records might not fit into its journal.
pub(super) fn check_room(first: &Entry) -> Result<(), Refusal> {
    first
        .check_room()
        .map_err(|error| Refusal::precondition(ServiceReason::InvalidRequest, error.to_string()))
}

/// Which attempt an entry is of. Which operator asked does not matter any more.
pub(super) fn reference_of(entry: &Entry) -> MigrationRef {
    MigrationRef { id: entry.migration_id.clone(), attempt: entry.attempt, operator_epoch: 0 }
}

/// The VM of an entry.
pub(super) fn vm_of(entry: &Entry) -> VmRef {
    VmRef { namespace: entry.namespace.clone(), name: entry.name.clone() }
}

/// The user that a destination's twin runs as; None for one that an older agent has started.
pub(super) fn twin_user_of(entry: &Entry) -> Option<u32> {
    match entry.end {
        EndEntry::Destination { twin_user, .. } => twin_user,
        EndEntry::Source { .. } => None,
    }
}

/// The devices of this node that an entry is about.
pub(super) fn local_devices(entry: &Entry) -> impl Iterator<Item = &str> {
    entry.devices.iter().map(|pair| match entry.end {
        EndEntry::Source { .. } => pair.source.as_str(),
        EndEntry::Destination { .. } => pair.target.as_str(),
    })
}

/// The reservation of a destination's entry; None for a source's.
pub(super) fn reservation_of(entry: &Entry) -> Option<ReserveRequest> {
    let EndEntry::Destination { source_node, vm_json, claim, silence_timeout_ms, .. } = &entry.end else {
        return None;
    };
    let policy =
        if entry.assume_isolated { WirePeerToPeer::AssumeIsolated } else { WirePeerToPeer::Required };
    Some(ReserveRequest {
        migration: Some(reference_of(entry)),
        vm: Some(vm_of(entry)),
        source_node: source_node.clone(),
        vm_json: vm_json.clone(),
        devices: entry.devices.iter().map(DevicePair::from).collect(),
        peer_to_peer: policy.into(),
        silence_timeout_ms: *silence_timeout_ms,
        claim: claim.clone().into(),
        // Preflight has used it before this was journalled.
        qemu: None,
    })
}

#[cfg(test)]
mod tests {
    use slackwater_proto::node::MigrationFeatures;

    use super::*;

    #[test]
    fn a_reservation_is_read_back_as_it_was_asked_for() {
        let vm = VmRef { namespace: "demo".to_owned(), name: "counter".to_owned() };
        let reference = MigrationRef { id: "3f".to_owned(), attempt: 2, operator_epoch: 0 };
        let features = MigrationFeatures { stop_copy: true, p2p: false, pre_copy: true };
        let pair = DevicePair {
            source: "a".to_owned(),
            target: "b".to_owned(),
            driver: "mtty".to_owned(),
            model: "mtty-1".to_owned(),
            features: Some(features),
        };
        let asked = ReserveRequest {
            migration: Some(reference.clone()),
            vm: Some(vm.clone()),
            source_node: "node-a".to_owned(),
            vm_json: "{}".to_owned(),
            devices: vec![pair],
            peer_to_peer: WirePeerToPeer::AssumeIsolated.into(),
            silence_timeout_ms: 9,
            claim: vec![1, 2].into(),
            qemu: None,
        };
        let entry = destination(&reference, &vm, &asked, PeerToPeer::AssumeIsolated, 7);
        let text = serde_json::to_string(&entry).unwrap();
        let read = serde_json::from_str(&text).unwrap();
        assert_eq!(reservation_of(&read), Some(asked));
        assert_eq!(twin_user_of(&read), Some(7));
        let older = serde_json::from_str(&text.replace(r#","twin_user":7"#, "")).unwrap();
        assert_eq!(twin_user_of(&older), None, "of an agent that has started its twins as root");
    }
}
