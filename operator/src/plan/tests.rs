use std::collections::BTreeMap;

use proptest::prelude::*;
use slackwater_api::{MigrationFeature, PeerToPeer};

use super::matching::assign;
use super::*;
use crate::inventory::{Device, Link, NodeReport, VmState};

const ALL: &[MigrationFeature] =
    &[MigrationFeature::StopCopy, MigrationFeature::P2p, MigrationFeature::PreCopy];
const STOP_COPY: &[MigrationFeature] = &[MigrationFeature::StopCopy];

fn key(name: &str) -> VmKey {
    VmKey { namespace: "demo".into(), name: name.into() }
}

fn device(model: &str, features: &[MigrationFeature], holder: &str) -> Device {
    Device {
        driver: "mtty".into(),
        model: model.into(),
        features: DeviceFeatures::Known(features.to_vec()),
        free: holder.is_empty(),
        holder: holder.into(),
    }
}

fn node(devices: Vec<(&str, Device)>) -> Node {
    let devices = devices.into_iter().map(|(name, device)| (name.to_owned(), device)).collect();
    let report = NodeReport { devices, ..Default::default() };
    Node {
        address: "10.0.0.9:7000".into(),
        peer_address: "10.0.0.9:7443".into(),
        link: Link::Ready,
        report: Some(Arc::new(report)),
        ..Default::default()
    }
}

fn with_vm(mut node: Node, name: &str, vm: Vm) -> Node {
    Arc::make_mut(node.report.as_mut().unwrap()).vms.insert(key(name), vm);
    node
}

fn running(devices: &[&str]) -> Vm {
    Vm {
        state: VmState::Running,
        devices: devices.iter().map(|d| (*d).to_owned()).collect(),
        ..Default::default()
    }
}

/// node-a runs demo/counter on two devices; node-b has two free ones.
fn two_nodes() -> Inventory {
    let held = || device("mtty-1", ALL, "VM demo/counter");
    let a = with_vm(node(vec![("a1", held()), ("a2", held())]), "counter", running(&["a1", "a2"]));
    let b = node(vec![("b1", device("mtty-1", ALL, "")), ("b2", device("mtty-1", ALL, ""))]);
    BTreeMap::from([("node-a".to_owned(), a), ("node-b".to_owned(), b)])
}

fn request() -> Request {
    Request { vm: key("counter"), target: Some("node-b".into()), peer_to_peer: PeerToPeer::Required }
}

fn refused(request: &Request, inventory: &Inventory, others: &[Arc<OtherMigration>]) -> (String, String) {
    let refusal = plan(request, inventory, others, Checks::default()).unwrap_err();
    (refusal.reason().to_owned(), refusal.to_string())
}

#[track_caller]
fn assert_refused(request: &Request, inventory: &Inventory, reason: &str, message: &str) {
    assert_eq!(refused(request, inventory, &[]), (reason.to_owned(), message.to_owned()));
}

fn targets(plan: &Plan) -> Vec<&str> {
    plan.devices.iter().map(|pair| pair.target.as_str()).collect()
}

#[test]
fn devices_are_paired_in_the_order_of_the_vm() {
    let plan = plan(&request(), &two_nodes(), &[], Checks::default()).unwrap();
    assert_eq!((plan.source.as_str(), plan.target.as_str()), ("node-a", "node-b"));
    assert_eq!(plan.target_address, "10.0.0.9:7443");
    assert_eq!(targets(&plan), ["b1", "b2"]);
    assert_eq!(plan.devices[1].source, "a2");
    assert_eq!(plan.devices[1].features, ALL);
}

#[test]
fn without_a_target_the_planner_takes_the_first_fitting_node_by_name() {
    let mut inventory = two_nodes();
    let b = inventory.remove("node-b").unwrap();
    inventory.insert("node-d".into(), b.clone());
    inventory.insert("node-c".into(), b);
    inventory.insert("node-b".into(), node(vec![("b1", device("mtty-1", ALL, ""))]));
    let plan = plan(&Request { target: None, ..request() }, &inventory, &[], Checks::default()).unwrap();
    assert_eq!(plan.target, "node-c");
}

#[test]
fn a_vm_that_no_node_reports_is_refused_with_the_vms_that_may_be_meant() {
    let request = Request { vm: key("conter"), ..request() };
    let mut inventory = two_nodes();
    assert_refused(
        &request,
        &inventory,
        "VMNotFound",
        "No node reports a VM demo/conter. Reported are: demo/counter. `kubectl get assignedvms -A` lists all of them.",
    );
    inventory.get_mut("node-b").unwrap().link =
        Link::Down { reason: "AgentUnreachable", error: "connection refused".into() };
    assert!(refused(&request, &inventory, &[]).1.contains("Not asked, since not Ready: node-b."));
    assert_refused(
        &request,
        &Inventory::new(),
        "VMNotFound",
        "No node reports a VM demo/conter. There is no MigrationNode; create one for each host with an agent.",
    );
}

#[test]
fn a_vm_that_two_nodes_report_is_never_moved() {
    let mut inventory = two_nodes();
    let b = inventory.remove("node-b").unwrap();
    inventory.insert("node-b".into(), with_vm(b, "counter", running(&[])));
    let (reason, message) = refused(&request(), &inventory, &[]);
    assert_eq!(reason, "VMReportedTwice");
    assert!(
        message.starts_with("VM demo/counter is reported by several nodes: node-a, node-b."),
        "{message}"
    );
}

#[test]
fn a_vm_in_the_middle_of_a_hand_over_is_being_migrated_and_not_reported_twice() {
    let mut inventory = two_nodes();
    let held = Vm { state: VmState::Paused, migration_id: "u-1".into(), ..running(&["a1", "a2"]) };
    let a = inventory.remove("node-a").unwrap();
    inventory.insert("node-a".into(), with_vm(a, "counter", held));
    let b = inventory.remove("node-b").unwrap();
    inventory.insert("node-b".into(), with_vm(b, "counter", running(&[])));
    assert_refused(
        &request(),
        &inventory,
        "MigrationInProgress",
        "VM demo/counter is already being migrated by id u-1. Wait until it has ended, or delete it to give it up.",
    );
}

#[test]
fn a_migration_that_holds_a_vm_and_does_not_go_on_says_why() {
    let mut inventory = two_nodes();
    let blocker = |reason: &str| Blocker {
        reason: reason.into(),
        message: "the end of the migration cannot be put into /state/journal/u-1.source: cannot sync it"
            .into(),
        lifted_by_assume_isolated: false,
    };
    let blockers = vec![blocker("DeviceNotMigratable"), blocker("EndNotRecorded")];
    let held = Vm { migration_id: "u-1".into(), blockers, ..running(&["a1", "a2"]) };
    let a = inventory.remove("node-a").unwrap();
    inventory.insert("node-a".into(), with_vm(a, "counter", held));
    let (reason, message) = refused(&request(), &inventory, &[]);
    assert_eq!(reason, "EndNotRecorded");
    assert!(message.contains("/state/journal/u-1.source"), "{message}");
}

#[test]
fn a_second_migration_of_the_same_vm_is_refused_with_the_name_of_the_first() {
    let other = Arc::new(OtherMigration {
        name: "VMMigration demo/first".into(),
        id: "u-1".into(),
        vm: key("counter"),
        target: "node-b".into(),
        target_devices: vec![],
    });
    let (reason, message) = refused(&request(), &two_nodes(), &[other]);
    assert_eq!(reason, "MigrationInProgress");
    assert!(message.contains("by VMMigration demo/first."), "{message}");
}

#[test]
fn a_source_that_does_not_answer_is_named_with_its_error() {
    let mut inventory = two_nodes();
    inventory.get_mut("node-a").unwrap().link =
        Link::Down { reason: "AgentUnreachable", error: "connection refused".into() };
    assert_refused(
        &request(),
        &inventory,
        "SourceNotReady",
        "VM demo/counter was last seen on node-a, and that node is not Ready: connection refused. Bring its agent back \
         first.",
    );
}

#[test]
fn a_vm_with_blockers_is_refused_with_all_of_them() {
    let mut inventory = two_nodes();
    let blocker = |reason: &str, message: &str, lifted_by_assume_isolated| Blocker {
        reason: reason.into(),
        message: message.into(),
        lifted_by_assume_isolated,
    };
    let vm = |blockers| Vm { blockers, ..running(&["a1", "a2"]) };
    let p2p = blocker("PeerToPeerUnsupported", "device a1 has no P2P", true);
    let hugepages = blocker("MemoryNotShared", "its RAM is not in a memfd.", false);
    let a = inventory.remove("node-a").unwrap();
    inventory.insert("node-a".into(), with_vm(a.clone(), "counter", vm(vec![p2p.clone(), hugepages])));
    assert_refused(
        &request(),
        &inventory,
        "PeerToPeerUnsupported",
        "VM demo/counter on node-a cannot be migrated: device a1 has no P2P; its RAM is not in a memfd.",
    );
    let isolated = Request { peer_to_peer: PeerToPeer::AssumeIsolated, ..request() };
    assert_eq!(refused(&isolated, &inventory, &[]).0, "MemoryNotShared");

    inventory.insert("node-a".into(), with_vm(a, "counter", vm(vec![p2p])));
    assert!(refused(&request(), &inventory, &[]).1.ends_with("spec.peerToPeer: AssumeIsolated."));
    assert!(plan(&isolated, &inventory, &[], Checks::default()).is_ok());
}

#[test]
fn several_devices_without_p2p_are_refused_unless_stated_to_be_isolated_and_one_alone_is_allowed() {
    let held = || device("mtty-1", STOP_COPY, "VM demo/counter");
    let mut inventory = two_nodes();
    let both = with_vm(node(vec![("a1", held()), ("a2", held())]), "counter", running(&["a1", "a2"]));
    inventory.insert("node-a".into(), both);
    assert_refused(
        &request(),
        &inventory,
        "PeerToPeerUnsupported",
        "VM demo/counter has several devices, and these cannot be quiesced before they are stopped, since \
         their drivers do not support P2P: a1 (mtty), a2 (mtty). If its devices never talk to each other, \
         state so by spec.peerToPeer: AssumeIsolated.",
    );
    let isolated = Request { peer_to_peer: PeerToPeer::AssumeIsolated, ..request() };
    assert!(plan(&isolated, &inventory, &[], Checks::default()).is_ok());

    inventory.insert("node-a".into(), with_vm(node(vec![("a1", held())]), "counter", running(&["a1"])));
    assert!(plan(&request(), &inventory, &[], Checks::default()).is_ok());
}

#[test]
fn a_device_without_migration_support_or_with_unreadable_features_is_refused_by_name() {
    let mut inventory = two_nodes();
    let plain = with_vm(node(vec![("a1", device("mtty-1", &[], "x"))]), "counter", running(&["a1"]));
    inventory.insert("node-a".into(), plain);
    assert_refused(
        &request(),
        &inventory,
        "DeviceNotMigratable",
        "VM demo/counter on node-a cannot be migrated: device a1 (mtty) has no migration support: its driver does not \
         advertise STOP_COPY.",
    );
    let unreadable = Device {
        features: DeviceFeatures::Unknown { reason: "permission denied".into() },
        ..device("mtty-1", &[], "x")
    };
    inventory.insert("node-a".into(), with_vm(node(vec![("a1", unreadable)]), "counter", running(&["a1"])));
    assert_eq!(refused(&request(), &inventory, &[]).0, "DeviceFeaturesUnknown");
    inventory.insert("node-a".into(), with_vm(node(vec![]), "counter", running(&["a1"])));
    assert_eq!(refused(&request(), &inventory, &[]).0, "DeviceUnknown");
}

#[test]
fn a_target_that_is_unknown_or_the_source_or_silent_is_refused() {
    let to = |target: &str| Request { target: Some(target.into()), ..request() };
    let mut inventory = two_nodes();
    assert_refused(
        &to("node-z"),
        &inventory,
        "TargetNotFound",
        "There is no MigrationNode \"node-z\". There are: node-b.",
    );
    assert_refused(
        &to("node-a"),
        &inventory,
        "TargetIsSource",
        "VM demo/counter is on node-a already. Name another node in spec.target.nodeName, or leave it out.",
    );
    inventory.get_mut("node-b").unwrap().link =
        Link::Down { reason: "AgentUnreachable", error: "no route to host".into() };
    assert_refused(
        &to("node-b"),
        &inventory,
        "TargetNotReady",
        "The target node-b is not Ready: no route to host. Bring its agent back, or name another node.",
    );
}

#[test]
fn a_target_with_one_device_too_few_is_refused_with_the_count_and_the_other_holder() {
    let mut inventory = two_nodes();
    let b = node(vec![("b1", device("mtty-1", ALL, "")), ("b2", device("mtty-1", ALL, "VM demo/other"))]);
    inventory.insert("node-b".into(), b);
    assert_refused(
        &request(),
        &inventory,
        "NoMatchingDevices",
        "The devices of VM demo/counter have no match: node-b has 1 free mtty-1 (driver mtty), 2 needed, not \
         free there: b2: VM demo/other. Free the devices, or name another node.",
    );
}

#[test]
fn another_model_does_not_match_unless_a_test_says_so() {
    let mut inventory = two_nodes();
    let b = node(vec![("b1", device("mtty-2", ALL, "")), ("b2", device("mtty-2", ALL, ""))]);
    inventory.insert("node-b".into(), b);
    assert_refused(
        &request(),
        &inventory,
        "NoMatchingDevices",
        "The devices of VM demo/counter have no match: node-b has no free mtty-1 (driver mtty), 2 needed, \
         free there of other models: 2 mtty-2. Free the devices, or name another node.",
    );
    let plan = plan(&request(), &inventory, &[], Checks { device_model: false }).unwrap();
    assert_eq!(targets(&plan), ["b1", "b2"]);
    assert_eq!(plan.devices[0].model, "mtty-1");
}

#[test]
fn a_target_device_must_have_every_feature_of_its_source() {
    let mut inventory = two_nodes();
    let b = node(vec![("b1", device("mtty-1", STOP_COPY, "")), ("b2", device("mtty-1", ALL, ""))]);
    inventory.insert("node-b".into(), b);
    let (reason, message) = refused(&request(), &inventory, &[]);
    assert_eq!(reason, "NoMatchingDevices");
    assert!(message.contains("2 free mtty-1 (driver mtty), 2 needed, but b1 lacks P2P."), "{message}");
}

#[test]
fn devices_that_another_migration_was_given_are_not_given_again() {
    let other = Arc::new(OtherMigration {
        name: "demo/first".into(),
        id: "u-1".into(),
        vm: key("another"),
        target: "node-b".into(),
        target_devices: vec!["b1".into()],
    });
    let (reason, message) = refused(&request(), &two_nodes(), &[other]);
    assert_eq!(reason, "NoMatchingDevices");
    assert!(
        message.contains("1 free") && message.contains("b1: planned for VMMigration demo/first"),
        "{message}"
    );
}

#[test]
fn without_any_fitting_node_the_refusal_says_what_each_node_lacks() {
    let mut inventory = two_nodes();
    inventory.insert("node-b".into(), node(vec![]));
    let mut c = node(vec![]);
    c.link = Link::Connecting;
    inventory.insert("node-c".into(), c);
    let anywhere = Request { target: None, ..request() };
    assert_refused(
        &anywhere,
        &inventory,
        "NoSuitableNode",
        "No node has free devices that match those of VM demo/counter: node-b has no free mtty-1 (driver mtty), 2 \
         needed; node-c is not Ready: its agent has not answered yet.",
    );
    inventory.retain(|name, _| name == "node-a");
    assert_eq!(refused(&anywhere, &inventory, &[]).0, "NoSuitableNode");
}

#[test]
fn the_first_fitting_device_is_left_to_the_device_that_needs_it() {
    assert_eq!(assign(&[vec![0, 1], vec![0]]), [Some(1), Some(0)]);
    assert_eq!(assign(&[vec![0], vec![0]]), [Some(0), None]);
}

/// The largest number of lefts that can be matched, by trying everything.
fn largest(edges: &[Vec<usize>], used: &mut Vec<usize>) -> usize {
    let Some((first, rest)) = edges.split_first() else { return 0 };
    let mut best = largest(rest, used);
    for &right in first {
        if !used.contains(&right) {
            used.push(right);
            best = best.max(1 + largest(rest, used));
            used.pop();
        }
    }
    best
}

proptest! {
    #[test]
    fn a_pairing_is_as_large_as_any_could_be_and_gives_no_device_twice(
        edges in prop::collection::vec(prop::collection::vec(0usize..6, 0..5), 0..6),
    ) {
        let assigned = assign(&edges);
        let given: Vec<usize> = assigned.iter().flatten().copied().collect();
        let mut once = given.clone();
        once.sort_unstable();
        once.dedup();
        prop_assert_eq!(once.len(), given.len());
        for (left, right) in assigned.iter().enumerate() {
            prop_assert!(right.is_none_or(|right| edges[left].contains(&right)));
        }
        prop_assert_eq!(given.len(), largest(&edges, &mut Vec::new()));
    }
}
