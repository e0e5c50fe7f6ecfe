//! Taking up a destination whose agent was killed: its devices are not there, and its program is not allowed.

use std::fs;

use slackwater_handover::destination::End;

use super::super::take_up::take_up_all;
use super::super::take_up_source::tests::{LONG, Node, node, vm_json};
use super::*;
use crate::attempt::entry::{EndEntry, Features};
use crate::attempt::ledger::EndRecord;
use crate::journal::Role;
use crate::service::reason::ServiceReason;
use crate::service::registry::LocalEnd;

/// An attempt at this record, with a device that this machine does not have.
fn entry(node: &Node, record: Record, vm_json: &str) -> Entry {
    let pair = Pair {
        source: "a0".to_owned(),
        target: "no-such-device".to_owned(),
        driver: "mtty".to_owned(),
        model: "mtty-1".to_owned(),
        features: Features::default(),
    };
    let end = EndEntry::Destination {
        source_node: "node-b".to_owned(),
        vm_json: vm_json.to_owned(),
        claim: Vec::new(),
        silence_timeout_ms: 60_000,
        twin_user: None,
    };
    Entry { record, devices: vec![pair], end, vmm: None, ..node.entry(None) }
}

fn journal(node: &Node, entry: &Entry) -> Key {
    let role = match entry.end {
        EndEntry::Source { .. } => Role::Source,
        EndEntry::Destination { .. } => Role::Destination,
    };
    let key = Key::new(&entry.migration_id, role).unwrap();
    node.resources.journal.create(&key, &serde_json::to_vec(entry).unwrap()).unwrap();
    key
}

/// Takes the journal up, and waits for the end.
async fn end(node: &Node, entry: Entry) -> End {
    let key = journal(node, &entry);
    take_up(&node.resources, key, entry).await.unwrap();
    let Some(LocalEnd::Destination(run, _)) = node.resources.registry.part("3f", 1) else {
        panic!("no destination")
    };
    let ended = async {
        let end = run.ended().await.unwrap();
        run.end_record().wait_for(|end| *end == EndRecord::Durable).await.unwrap();
        end
    };
    timeout(LONG, ended).await.expect("it should not take that long")
}

#[tokio::test]
async fn a_reservation_is_given_back_without_its_devices_its_program_and_even_its_vm_json() {
    for vm_json in [&vm_json("vmm.sock"), "{", ""] {
        let node = node(|_| {});
        let end = end(&node, entry(&node, Record::Reserved, vm_json)).await;
        assert!(matches!(end, End::Discarded(_)), "{vm_json}: {end:?}");
        assert!(!node.directory.exists(), "{vm_json}: its folder is cleared away");
    }
}

#[tokio::test]
async fn a_whole_copy_whose_twin_is_gone_is_given_back_without_its_devices_and_its_program() {
    let node = node(|_| {});
    let mut entry = entry(&node, Record::Loaded, &vm_json("vmm.sock"));
    entry.vmm = node.entry(None).vmm;
    entry.vmm.as_mut().unwrap().start_ticks -= 1;
    let end = end(&node, entry).await;
    assert!(matches!(end, End::Discarded(_)), "{end:?}");
}

#[tokio::test]
async fn a_vm_that_runs_and_that_nobody_knows_is_made_known() {
    let node = node(|_| {});
    let text = vm_json("vmm.sock");
    assert_eq!(end(&node, entry(&node, Record::Running, &text)).await, End::Running);
    assert_eq!(fs::read_to_string(node.directory.join("vm.json")).unwrap(), text);
}

#[tokio::test]
async fn several_open_journals_of_one_vm_are_all_held_and_name_each_other() {
    let node = node(|_| {});
    let one = entry(&node, Record::Reserved, &vm_json("vmm.sock"));
    let other = Entry { migration_id: "4a".to_owned(), record: Record::Committed, ..node.entry(None) };
    journal(&node, &one);
    journal(&node, &other);
    take_up_all(&node.resources).await.unwrap();
    let registry = &node.resources.registry;
    for id in ["3f", "4a"] {
        let refused = registry.usable_part(id, 1).unwrap_err();
        assert_eq!(refused.reason, Some(ServiceReason::JournalsConflict.into()), "{refused:?}");
        assert!(
            refused.message.contains("journal/3f.destination (its last record is Reserved)"),
            "{refused:?}"
        );
        assert!(refused.message.contains("journal/4a.source (its last record is Committed)"), "{refused:?}");
    }
    let vm = entries::vm_of(&one);
    let held = registry.take("5b", &vm, []).unwrap_err().to_string();
    assert!(held.contains("several open journals are about VM demo/counter"), "{held}");
    assert!(registry.take("5b", &slackwater_proto::node::VmRef::default(), ["no-such-device"]).is_err());
    for (key, content) in node.resources.journal.read_all().unwrap() {
        assert_eq!(Entry::parse(&content.unwrap()).unwrap().ended, None, "{key}");
    }
}

#[tokio::test]
async fn what_an_attempt_held_is_free_when_its_end_is_durable_and_not_before() {
    let node = node(|_| {});
    let (resources, vm) = (node.resources.clone(), entries::vm_of(&node.entry(None)));
    let reference = entries::reference_of(&node.entry(None));
    resources.registry.take("3f", &vm, ["d"]).unwrap();
    let (recorded, end) = tokio::sync::watch::channel(EndRecord::Open);
    let mut changes = resources.registry.changes();
    let freed = tokio::spawn({
        let resources = resources.clone();
        async move { resources.give_back(&reference, Role::Source, end).await }
    });
    recorded.send_replace(EndRecord::Failing("no space for 3f.source".to_owned()));
    timeout(LONG, async {
        while resources.registry.explanation("3f").is_none() {
            changes.changed().await.unwrap();
        }
    })
    .await
    .unwrap();
    let held = resources.registry.take("4a", &vm, []).unwrap_err();
    assert_eq!(held.to_string(), "VM demo/counter is held by migration 3f: no space for 3f.source");
    assert!(resources.registry.held_device("d").is_some());
    recorded.send_replace(EndRecord::Durable);
    timeout(LONG, freed).await.unwrap().unwrap();
    resources.registry.take("4a", &vm, ["d"]).unwrap();
    assert_eq!(resources.registry.explanation("3f"), None);
}
