//! The source's node dies for good before the commit: the migration ends when it is certain that the target
//! never starts the VM, and the status claims nothing about the source.

use std::time::Duration;

use slackwater_api::MigrationPhase;
use slackwater_proto::node::{JournalRecord, JournalState, Phase};
use slackwater_proto::tonic::Status;

use crate::fake_agent::journal_state;
use crate::world::{SOURCE_PATIENCE, World, is, message};

/// A migration that copies, with a source that does not answer any more.
async fn copying_and_lost(journal: &str) -> World {
    let mut world = World::start().await;
    world.b.script(|script| script.journal_id = journal.to_owned());
    world.migrate("move-counter", |spec| spec.attempts = 3).await;
    world.a.until_joined(1).await;
    world.a.phase(Phase::PreCopy);
    world
        .until("move-counter", "copy", |object| {
            Some(object.status.as_ref()?.phase? == MigrationPhase::Copying)
        })
        .await;
    world.a.stop();
    world
}

#[tokio::test]
async fn a_source_that_is_lost_ends_the_migration_when_the_target_never_starts_the_vm() {
    let mut world = copying_and_lost("journal-1").await;
    world.b.set_journal(JournalRecord::Discarded);
    let lost = world.until("move-counter", "have failed", is("Succeeded", "False/SourceLost")).await;
    let said = message(&lost, "Succeeded");
    for words in
        ["node-b never started VM demo/counter, and never will", "Whether the VM runs on node-a is not known"]
    {
        assert!(said.contains(words), "{said}");
    }
    let status = lost.status.unwrap();
    assert_eq!(status.phase, Some(MigrationPhase::SourceLost));
    assert_eq!(status.target_journal.as_deref(), Some("journal-1"));
    assert!(status.completion_time.is_some() && status.next_attempt_time.is_none());
    world.b.until_acknowledged(&lost.metadata.uid.unwrap(), 1).await;

    // It is back, had committed, and waits for the target's word: it hears that although the migration has
    // ended.
    world.a.script(|script| {
        script.journal = journal_state(JournalRecord::Committed);
        let mut open = Status::failed_precondition("it has not ended here");
        open.metadata_mut().insert("slackwater-reason", "EndNotRecorded".parse().unwrap());
        script.acknowledge = Some(open);
    });
    world.a.start_again().await;
    world.a.until_relayed(JournalRecord::Discarded).await;
    // The VM's name is free for another migration.
    world.migrate("again", |_| {}).await;
    world.until("again", "be accepted", is("Accepted", "True")).await;
    world.assert_nothing_was_forbidden();
}

#[tokio::test]
async fn a_journal_that_was_begun_anew_proves_nothing_and_a_deleted_migration_ends_without_its_source() {
    let world = copying_and_lost("journal-1").await;
    // Its state directory was lost: the VM may run there.
    world.b.script(|script| script.journal_id = "journal-2".to_owned());
    tokio::time::sleep(SOURCE_PATIENCE + Duration::from_secs(3)).await;
    let open = world.migrations().get("move-counter").await.unwrap();
    assert_eq!(open.status.as_ref().unwrap().completion_time, None);
    world.delete("move-counter").await;
    tokio::time::sleep(SOURCE_PATIENCE).await;
    assert!(world.migrations().get_opt("move-counter").await.unwrap().is_some());

    world.b.script(|script| {
        script.journal_id = "journal-1".to_owned();
        script.journal = JournalState::default();
    });
    world.until_gone(&open).await;
    world.assert_nothing_was_forbidden();
}
