//! Taking up a destination whose agent was killed: its devices are not there, and its program is not allowed.

use std::fs;

use slackwater_handover::destination::End;
use slackwater_proto::node::{MigrationRef, VmRef};

use super::super::take_up::take_up_all;
use super::super::take_up_source::tests::{LONG, Node, node, vm_json};
use super::*;
use crate::attempt::entry::{EndEntry, Ended, Features};
use crate::attempt::ledger::EndRecord;
use crate::journal::Role;
use crate::service::reason::ServiceReason;
use crate::service::registry::{LocalEnd, MAX_REMEMBERED_MIGRATIONS, MAX_UNACKNOWLEDGED};

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
    assert!(registry.take("5b", &VmRef::default(), ["no-such-device"]).is_err());
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

/// A wait for something that the registry tells of.
async fn until(node: &Node, what: &str, mut is_so: impl FnMut() -> bool) {
    let mut changes = node.resources.registry.changes();
    let seen = async {
        while !is_so() {
            changes.changed().await.unwrap();
        }
    };
    timeout(LONG, seen).await.unwrap_or_else(|_| panic!("{what}"));
}

#[tokio::test]
async fn a_vm_whose_end_is_not_durable_is_held_reported_and_not_acknowledged_until_it_is() {
    let node = node(|_| {});
    let entry = entry(&node, Record::Running, &vm_json("vmm.sock"));
    let (key, vm, reference) =
        (journal(&node, &entry), entries::vm_of(&entry), entries::reference_of(&entry));
    let registry = &node.resources.registry;
    let attempts = super::super::Attempts::new(node.resources.clone());
    registry.take("3f", &vm, ["no-such-device"]).unwrap();
    take_up(&node.resources, key.clone(), entry).await.unwrap();
    // Nothing has been written yet: all of it runs on this thread.
    node.resources.journal.fail_syncs(true);
    until(&node, "the end cannot be recorded", || registry.explanation("3f").is_some()).await;
    let held = registry.take("4a", &vm, []).unwrap_err().to_string();
    assert!(held.contains("the end of the migration cannot be put into"), "{held}");
    assert!(registry.held_device("no-such-device").is_some());
    let mut changes = node.resources.inventory.changes();
    let reported = async {
        loop {
            let report = node.resources.inventory.describe().await.unwrap();
            let blockers = report.vms.into_iter().next().map(|vm| vm.blockers).unwrap_or_default();
            if let Some(first) = blockers.into_iter().next() {
                return first;
            }
            changes.next().await;
        }
    };
    let first = timeout(LONG, reported).await.expect("it should be reported");
    assert_eq!(first.reason, "EndNotRecorded", "{first:?}");
    assert!(held.ends_with(&first.message), "{first:?}");
    let refused = attempts.acknowledge(&reference).await.unwrap_err();
    assert_eq!(refused.reason, Some(ServiceReason::EndNotRecorded.into()), "{refused:?}");

    node.resources.journal.fail_syncs(false);
    until(&node, "the VM is free", || registry.take("4a", &vm, ["no-such-device"]).is_ok()).await;
    attempts.acknowledge(&reference).await.unwrap();
    assert!(node.resources.journal.is_acknowledged(&key).unwrap());
}

#[tokio::test]
async fn a_source_that_has_ended_gives_nothing_back_before_that_is_durable() {
    let node = node(|_| {});
    let entry = node.entry(None);
    let (vm, reference) = (entries::vm_of(&entry), entries::reference_of(&entry));
    let key = Key::new("3f", Role::Source).unwrap();
    let ledger = crate::attempt::ledger::Ledger::new(Arc::clone(&node.resources.journal), key, entry);
    let log = crate::attempt::events::EventLog::new("node-a");
    node.resources.registry.take("3f", &vm, ["d"]).unwrap();
    node.resources.join_source(&reference, &crate::attempt::source::SourceRun::over(log, ledger));
    // Whatever it does, it does on this thread.
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    assert_eq!(node.resources.registry.holder_of_device("d").as_deref(), Some("3f"));
}

#[tokio::test]
async fn a_vm_that_runs_is_made_known_as_soon_as_its_directory_can_be_written() {
    let node = node(|_| {});
    let in_the_way = node.directory.join("vm.json");
    fs::create_dir(&in_the_way).unwrap();
    let entry = entry(&node, Record::Running, &vm_json("vmm.sock"));
    let key = journal(&node, &entry);
    take_up(&node.resources, key.clone(), entry).await.unwrap();
    let Some(LocalEnd::Destination(run, _)) = node.resources.registry.part("3f", 1) else {
        panic!("no destination")
    };
    let too_early = timeout(Duration::from_millis(50), run.ended()).await;
    assert!(too_early.is_err(), "it is not known: {too_early:?}");
    let content = node.resources.journal.read_one(&key).unwrap();
    assert_eq!(Entry::parse(&content).unwrap().ended, None, "the next agent makes it known");
    fs::remove_dir(&in_the_way).unwrap();
    assert_eq!(timeout(LONG, run.ended()).await.unwrap(), Some(End::Running));
    assert_eq!(fs::read_to_string(&in_the_way).unwrap(), vm_json("vmm.sock"));
}

#[tokio::test]
async fn a_journal_that_cannot_be_written_at_the_start_is_taken_up_when_it_can_be_and_its_vm_is_held() {
    let node = node(|_| {});
    let entry = entry(&node, Record::Running, &vm_json("vmm.sock"));
    let (key, vm) = (journal(&node, &entry), entries::vm_of(&entry));
    let registry = &node.resources.registry;
    node.resources.journal.fail_syncs(true);
    super::super::take_up::take_up(&node.resources, key, entry);
    until(&node, "it is said", || registry.explanation("3f").is_some()).await;
    let held = registry.take("4a", &vm, []).unwrap_err().to_string();
    assert!(held.contains("the journal cannot be written any more"), "{held}");
    assert!(registry.held_device("no-such-device").is_some());
    node.resources.journal.fail_syncs(false);
    until(&node, "it goes on", || registry.take("4a", &vm, []).is_ok()).await;
    assert!(node.directory.join("vm.json").is_file());
}

#[tokio::test]
async fn a_journal_that_cannot_be_read_at_the_start_is_taken_up_later_unless_its_vm_is_held_by_then() {
    for held_meanwhile in [false, true] {
        let node = node(|_| {});
        let entry = entry(&node, Record::Running, &vm_json("vmm.sock"));
        let (key, vm) = (journal(&node, &entry), entries::vm_of(&entry));
        let (file, aside) = (node.resources.journal.file(&key), node.directory.join("journal"));
        fs::rename(&file, &aside).unwrap();
        fs::create_dir(&file).unwrap();
        let registry = &node.resources.registry;
        take_up_all(&node.resources).await.unwrap();
        let refused = registry.usable_part("3f", 1).unwrap_err();
        assert_eq!(refused.reason, Some(ServiceReason::JournalUnreadable.into()), "{refused:?}");
        if held_meanwhile {
            registry.take("4a", &vm, []).unwrap();
        }
        fs::remove_dir(&file).unwrap();
        fs::rename(&aside, &file).unwrap();
        if held_meanwhile {
            let conflict = || matches!(registry.part("3f", 1), Some(LocalEnd::Conflicting(_)));
            until(&node, "it is held", conflict).await;
            let refused = registry.usable_part("3f", 1).unwrap_err();
            assert!(refused.message.contains("VM demo/counter is held by migration 4a"), "{refused:?}");
            assert!(!node.directory.join("vm.json").exists());
        } else {
            let taken_up = || matches!(registry.part("3f", 1), Some(LocalEnd::Destination(..)));
            until(&node, "it is taken up", taken_up).await;
        }
    }
}

#[tokio::test]
async fn a_twin_that_may_have_loaded_and_that_the_journal_does_not_name_is_held_and_not_given_back() {
    for record in [Record::Loaded, Record::Starting] {
        let node = node(|_| {});
        let entry = entry(&node, record, &vm_json("vmm.sock"));
        journal(&node, &entry);
        take_up_all(&node.resources).await.unwrap();
        let registry = &node.resources.registry;
        let held = || matches!(registry.part("3f", 1), Some(LocalEnd::Unreadable(_)));
        until(&node, "it is held", held).await;
        let refused = registry.take("4a", &entries::vm_of(&entry), []).unwrap_err().to_string();
        assert!(refused.contains("whether that lives is not known"), "{record:?}: {refused}");
        assert!(node.directory.exists(), "{record:?}");
    }
}

#[tokio::test]
async fn a_vm_that_runs_is_made_known_even_if_its_vmm_does_not_answer() {
    let node = node(|_| {});
    let mut entry = entry(&node, Record::Running, &vm_json("vmm.sock"));
    // It lives, and nothing listens.
    entry.vmm = node.entry(None).vmm;
    assert_eq!(end(&node, entry).await, End::Running);
}

/// An attempt that has ended at the source, for the registry.
fn over(node: &Node, id: &str) -> (MigrationRef, LocalEnd) {
    let entry = Entry { migration_id: id.to_owned(), ..node.entry(None) };
    let log = crate::attempt::events::EventLog::new("node-a");
    let run = crate::attempt::source::SourceRun::over(log, crate::attempt::ledger::Ledger::ended(&entry));
    (entries::reference_of(&entry), LocalEnd::Source(run))
}

/// Writes the journal of an attempt that has ended at the source.
fn ended_journal(node: &Node, id: &str) -> Key {
    let entry = Entry { migration_id: id.to_owned(), ended: Some(Ended::default()), ..node.entry(None) };
    let key = journal(node, &entry);
    node.resources.journal.reopen(&key).unwrap().finish(&serde_json::to_vec(&entry).unwrap()).unwrap();
    key
}

#[tokio::test]
async fn an_end_is_acknowledged_durably_by_the_operator_or_where_none_has_ever_called_by_the_agent() {
    for operator_epoch in [0, 3] {
        let node = node(|_| {});
        let key = ended_journal(&node, "3f");
        let resources = &node.resources;
        resources.registry.restore_epoch(operator_epoch);
        take_up_all(resources).await.unwrap();
        let reference = MigrationRef { operator_epoch, ..over(&node, "3f").0 };
        let (_, end) = tokio::sync::watch::channel(EndRecord::Durable);
        resources.give_back(&reference, Role::Source, end).await;
        assert_eq!(resources.journal.is_acknowledged(&key).unwrap(), operator_epoch == 0);
        let attempts = super::super::Attempts::new(resources.clone());
        if operator_epoch > 0 {
            assert_eq!(resources.registry.unacknowledged(), 1);
            resources.journal.fail_syncs(true);
            let refused = attempts.acknowledge(&reference).await.unwrap_err();
            assert_eq!(refused.reason, Some(slackwater_handover::Reason::JournalFailed), "{refused:?}");
            resources.journal.fail_syncs(false);
            attempts.acknowledge(&reference).await.unwrap();
            assert!(resources.journal.is_acknowledged(&key).unwrap());
        }
        assert_eq!(resources.registry.unacknowledged(), 0);
        let restarted = NodeResources { registry: Arc::default(), ..resources.clone() };
        take_up_all(&restarted).await.unwrap();
        assert!(restarted.registry.part("3f", 1).is_some());
        assert_eq!(restarted.registry.unacknowledged(), 0, "the journal says so");
    }
}

#[tokio::test]
async fn the_journal_of_the_oldest_acknowledged_end_is_removed_once_it_holds_nothing_any_more() {
    let node = node(|_| {});
    let (resources, key) = (&node.resources, ended_journal(&node, "old"));
    let registry = &resources.registry;
    let (oldest, part) = over(&node, "old");
    registry.take("old", &VmRef::default(), ["d"]).unwrap();
    registry.join(&oldest, part);
    resources.acknowledge(&oldest, Role::Source).await.unwrap();
    for number in 0..MAX_REMEMBERED_MIGRATIONS {
        let (reference, part) = over(&node, &number.to_string());
        registry.join(&reference, part);
        assert_eq!(registry.acknowledge(&reference.id, 1), [], "{number}");
    }
    assert!(resources.journal.is_acknowledged(&key).unwrap(), "it still holds a device");
    registry.give_back("old");
    let (last, part) = over(&node, "last");
    registry.join(&last, part);
    resources.acknowledge(&last, Role::Source).await.unwrap();
    assert!(registry.part("old", 1).is_none());
    assert!(resources.journal.read_all().unwrap().is_empty());
}

#[tokio::test]
async fn no_migration_begins_while_more_ends_are_not_acknowledged_than_are_remembered() {
    let node = node(|_| {});
    for number in 0..MAX_UNACKNOWLEDGED {
        node.resources.check_memory().unwrap();
        let (reference, part) = over(&node, &number.to_string());
        node.resources.registry.join(&reference, part);
    }
    let refused = node.resources.check_memory().unwrap_err();
    assert_eq!(refused.reason, Some(ServiceReason::EndsNotAcknowledged.into()), "{refused:?}");
    node.resources.acknowledge(&over(&node, "0").0, Role::Source).await.unwrap();
    node.resources.check_memory().unwrap();
}

#[tokio::test]
async fn the_user_of_a_twin_that_may_live_is_not_given_to_another() {
    let node = node(|_| {});
    let users = &node.resources.twin_users;
    let number = users.take("demo/counter", &node.directory).unwrap().number();
    // It lives, and nothing listens.
    let mut entry = Entry { vmm: node.entry(None).vmm, ..entry(&node, Record::Loaded, &vm_json("vmm.sock")) };
    let EndEntry::Destination { twin_user, .. } = &mut entry.end else { panic!("{entry:?}") };
    *twin_user = Some(number);
    let key = journal(&node, &entry);
    super::super::take_up::take_up(&node.resources, key, entry);
    let waits = || node.resources.registry.waits_for("3f").is_some();
    until(&node, "it is waited for", waits).await;
    assert_ne!(users.take("demo/counter", &node.directory).unwrap().number(), number);
}

#[tokio::test]
async fn a_reservation_whose_twin_lives_and_does_not_answer_is_given_back_all_the_same() {
    let node = node(|_| {});
    let mut entry = entry(&node, Record::Reserved, &vm_json("vmm.sock"));
    entry.vmm = node.entry(None).vmm;
    let end = end(&node, entry).await;
    assert!(matches!(end, End::Discarded(_)), "{end:?}");
}

#[tokio::test]
async fn a_vm_that_several_sources_hold_is_still_here() {
    let node = node(|_| {});
    for id in ["3f", "4a"] {
        journal(&node, &Entry { migration_id: id.to_owned(), ..node.entry(None) });
    }
    take_up_all(&node.resources).await.unwrap();
    let report = node.resources.inventory.describe().await.unwrap();
    let [vm] = report.vms.as_slice() else { panic!("the VM has vanished from {report:?}") };
    assert_eq!(vm.vm.as_ref(), Some(&entries::vm_of(&node.entry(None))));
}
