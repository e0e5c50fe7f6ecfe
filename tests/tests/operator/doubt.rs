//! Doubts that two agents cannot settle between themselves: the operator asks both, relays records, reports
//! what it waits for, and accepts an administrator's statement.

use serde_json::json;
use slackwater_api::MigrationPhase;
use slackwater_proto::node::{JournalRecord, JournalState, Outcome, Phase};
use slackwater_proto::tonic::Status;

use crate::fake_agent::Call;
use crate::world::{NAMESPACE, World, is, message};

/// A migration that the source has committed, with a target that is cut off.
async fn committed_and_cut_off() -> World {
    let mut world = World::start().await;
    world.migrate("move-counter", |_| {}).await;
    world.a.until_joined(1).await;
    world.a.set_journal(JournalRecord::Committed);
    world.a.phase(Phase::Capturing);
    world.a.phase(Phase::Committed);
    world.b.stop();
    world.a.doubt("PeerLost", "node-b has not been heard for 7 s");
    world.until("move-counter", "be in doubt", is("InDoubt", "True/TargetUnreachable")).await;
    world
}

#[tokio::test]
async fn a_lost_target_leaves_it_in_doubt_until_it_is_back_and_then_it_continues_by_itself() {
    let mut world = committed_and_cut_off().await;
    let doubtful =
        world.until("move-counter", "be in doubt", is("Succeeded", "Unknown/TargetUnreachable")).await;
    let said = message(&doubtful, "InDoubt");
    for words in [
        "VM demo/counter is kept paused at node-a",
        "Bring node-b back, or its link",
        "`spec.resolve: {runOn: Source, destinationNeverStarted: true, justification: ",
    ] {
        assert!(said.contains(words), "{said}");
    }
    let status = doubtful.status.unwrap();
    assert_eq!((status.phase, &status.completion_time), (Some(MigrationPhase::InDoubt), &None));
    let plane = world.lab.control_plane().unwrap();
    println!("{}", plane.kubectl(&["get", "vmmig", "-n", NAMESPACE, "-o", "wide"]).await.unwrap());

    // A restarted operator still finds it in doubt.
    world.until_events(NAMESPACE, "move-counter", &["Accepted", "InDoubt", "InDoubt"]).await;
    world.crash_and_restart_operator().await;
    world.a.until_joined(2).await;

    // The target is back, and waits: COMMITTED is relayed. Then it has started: RUNNING is relayed.
    world.b.set_journal(JournalRecord::Loaded);
    world.b.start_again().await;
    let relayed = world.b.until_relayed(JournalRecord::Committed).await;
    assert_eq!(relayed.stated_because, "");
    world.until("move-counter", "not be in doubt", is("InDoubt", "False/Settled")).await;
    world.b.set_journal(JournalRecord::Running);
    world.a.until_relayed(JournalRecord::Running).await;
    world.a.phase(Phase::Started);
    world.a.finish(Outcome::Succeeded, "", "");
    let done = world.until("move-counter", "have succeeded", is("Succeeded", "True")).await;
    assert!(is("InDoubt", "False/Settled")(&done).unwrap());
    world
        .until_events(
            NAMESPACE,
            "move-counter",
            &["Accepted", "InDoubt", "InDoubt", "DoubtSettled", "Succeeded"],
        )
        .await;
    world.assert_nothing_was_forbidden();
}

#[tokio::test]
async fn a_target_that_discarded_is_relayed_and_the_vm_goes_back() {
    let mut world = committed_and_cut_off().await;
    world.b.script(|script| {
        script.journal = JournalState {
            record: JournalRecord::Discarded.into(),
            ended: true,
            reason: "TwinExited".into(),
            message: "the twin has exited".into(),
            ..Default::default()
        };
    });
    world.b.start_again().await;
    let relayed = world.a.until_relayed(JournalRecord::Discarded).await;
    assert_eq!((relayed.reason.as_str(), relayed.message.as_str()), ("TwinExited", "the twin has exited"));
    world.a.phase(Phase::RollingBack);
    world.a.finish(Outcome::RolledBack, "TwinExited", "the twin has exited");
    world.until("move-counter", "be rolled back", is("Succeeded", "False/TwinExited")).await;
    world.b.assert_nothing_was_relayed();
    world.assert_nothing_was_forbidden();
}

#[tokio::test]
async fn an_administrators_statement_for_the_source_is_relayed_with_its_justification_and_recorded() {
    let world = committed_and_cut_off().await;
    world
        .patch(
            "move-counter",
            json!({"resolve": {
                "runOn": "Source", "destinationNeverStarted": true, "justification": "node-b was powered off at 12:04"
            }}),
        )
        .await;
    let relayed = world.a.until_relayed(JournalRecord::Discarded).await;
    assert_eq!(relayed.stated_because, "node-b was powered off at 12:04");
    world.until("move-counter", "have accepted it", is("ResolveAccepted", "True/Stated")).await;

    // A decision cannot be changed.
    world.patch("move-counter", json!({"resolve": {"justification": "on second thoughts"}})).await;
    world.until("move-counter", "ignore that", is("Accepted", "True/SpecChangeIgnored")).await;

    world.a.script(|script| {
        script.journal.record = JournalRecord::Aborted.into();
        script.journal.ended = true;
    });
    world.a.phase(Phase::RollingBack);
    world.a.phase(Phase::RolledBack);
    world.a.finish(
        Outcome::RolledBack,
        "TargetFailed",
        "an administrator states that node-b never started the VM",
    );
    let over = world.until("move-counter", "be rolled back", is("Succeeded", "False/TargetFailed")).await;
    assert!(is("InDoubt", "False/Settled")(&over).unwrap());
    let events = world.events("move-counter").await;
    let accepted = events.iter().find(|(reason, _)| reason == "ResolveAccepted").unwrap();
    assert!(accepted.1.contains("node-b was powered off at 12:04"), "{accepted:?}");
    world.assert_nothing_was_forbidden();
}

#[tokio::test]
async fn a_resolve_that_does_not_fit_or_lacks_a_statement_is_refused_with_a_reason_and_changes_nothing() {
    let world = World::start().await;
    world.migrate("move-counter", |_| {}).await;
    world.a.until_joined(1).await;
    let why = "the node was powered off at noon";
    let resolve = |run_on: &str, never_started: bool, justification: &str| {
        json!({"resolve": {
            "runOn": run_on, "destinationNeverStarted": never_started, "sourceNeverResumes": false,
            "justification": justification
        }})
    };
    // Not in doubt.
    world.a.phase(Phase::PreCopy);
    world.patch("move-counter", resolve("Source", true, why)).await;
    let refused = world.until("move-counter", "refuse it", is("ResolveAccepted", "False/NotInDoubt")).await;
    assert!(message(&refused, "ResolveAccepted").contains("not in doubt"));
    assert_eq!(refused.status.unwrap().phase, Some(MigrationPhase::Copying));

    // The target waits. The source has not reported a commit, and does not answer.
    world.b.set_journal(JournalRecord::Loaded);
    world.a.script(|script| {
        script.resolve = Some(Status::unavailable("busy"));
        script.migrate = Some(Status::unavailable("busy"));
    });
    world.a.break_streams();
    let doubtful = world.until("move-counter", "be in doubt", is("InDoubt", "True/SourceUnreachable")).await;
    let said = message(&doubtful, "InDoubt");
    assert!(said.contains("{runOn: Destination, sourceNeverResumes: true, justification: "), "{said}");
    // A refused resolve is not kept for later.
    assert!(is("ResolveAccepted", "False/NotInDoubt")(&doubtful).unwrap());

    world.patch("move-counter", resolve("Source", true, "the node was powered off at one")).await;
    world.until("move-counter", "refuse it", is("ResolveAccepted", "False/DoesNotFit")).await;
    world.patch("move-counter", resolve("Destination", false, why)).await;
    let refused =
        world.until("move-counter", "refuse it", is("ResolveAccepted", "False/StatementMissing")).await;
    assert!(message(&refused, "ResolveAccepted").contains("sourceNeverResumes: true"));
    world.patch("move-counter", resolve("Destination", false, "      why?      ")).await;
    world.until("move-counter", "refuse it", is("ResolveAccepted", "False/JustificationMissing")).await;
    world.b.assert_nothing_was_relayed();
    let warned = world.events("move-counter").await;
    assert_eq!(warned.iter().filter(|(reason, _)| reason == "ResolveRefused").count(), 4, "{warned:?}");

    // What the schema forbids does not reach the operator.
    let plane = world.lab.control_plane().unwrap();
    let short = "{\"spec\":{\"resolve\":{\"runOn\":\"Source\",\"justification\":\"short\"}}}";
    let error = plane
        .kubectl(&["patch", "vmmig", "move-counter", "-n", NAMESPACE, "--type=merge", "-p", short])
        .await
        .unwrap_err()
        .to_string();
    assert!(error.contains("justification"), "{error}");

    // A complete resolve is carried out.
    world.patch("move-counter", json!({"resolve": {"sourceNeverResumes": true, "justification": why}})).await;
    let relayed = world.b.until_relayed(JournalRecord::Committed).await;
    assert_eq!(relayed.stated_because, why);
    world.b.set_journal(JournalRecord::Running);
    world.until("move-counter", "not be in doubt", is("InDoubt", "False/Settled")).await;
    world.a.assert_nothing_was_relayed();
    world.assert_nothing_was_forbidden();
}

#[tokio::test]
async fn a_deleted_migration_that_is_in_doubt_stays_until_it_is_settled() {
    let mut world = committed_and_cut_off().await;
    world.a.script(|script| script.abort = Some(Status::failed_precondition("the migration is committed")));
    let object = world.migrations().get("move-counter").await.unwrap();
    world.delete("move-counter").await;
    let stays = |migration: &slackwater_api::VMMigration| {
        Some(
            message(migration, "InDoubt").contains("The object was deleted, and stays until this is settled"),
        )
    };
    world.until("move-counter", "report that it stays", stays).await;
    world.migrate("again", |_| {}).await;
    world.until("again", "be refused", is("Accepted", "False/MigrationInProgress")).await;

    world.b.set_journal(JournalRecord::Running);
    world.b.start_again().await;
    world.a.until_relayed(JournalRecord::Running).await;
    world.a.finish(Outcome::Succeeded, "", "");
    world.until_gone(&object).await;
    assert!(world.b.calls().iter().all(|call| !matches!(call, Call::Release(_))));
    world.assert_nothing_was_forbidden();
}

#[tokio::test]
async fn a_journal_that_cannot_be_written_is_a_doubt_with_the_agents_message_until_the_next_phase() {
    let world = World::start().await;
    world.migrate("move-counter", |_| {}).await;
    world.a.until_joined(1).await;
    world.a.set_journal(JournalRecord::Saving);
    world.a.phase(Phase::Capturing);
    world.a.doubt("JournalFailed", "writing /var/lib/slackwater/1.json failed: no space left on device");
    let doubtful = world.until("move-counter", "be in doubt", is("InDoubt", "True/JournalFailed")).await;
    assert!(message(&doubtful, "InDoubt").contains("no space left on device"));
    world.a.phase(Phase::RollingBack);
    world.until("move-counter", "continue", is("InDoubt", "False/Settled")).await;
    world.a.finish(Outcome::RolledBack, "JournalFailed", "no space left on device");
    world.until("move-counter", "have failed", is("Succeeded", "False/JournalFailed")).await;
    world.assert_nothing_was_forbidden();
}

#[tokio::test]
async fn a_journal_that_cannot_be_read_is_a_doubt_that_names_the_file_at_any_phase_and_at_either_end() {
    let world = World::start().await;
    world.migrate("move-counter", |_| {}).await;
    world.a.until_joined(1).await;
    world.a.phase(Phase::PreCopy);
    world
        .until("move-counter", "be copying", |m| Some(m.status.as_ref()?.phase? == MigrationPhase::Copying))
        .await;
    let unreadable =
        |file: &str| Some(Status::failed_precondition(format!("{file} cannot be read: its CRC is wrong")));
    world.a.script(|script| {
        script.migrate = unreadable("source.journal");
        script.resolve = unreadable("source.journal");
    });
    world.a.break_streams();
    let doubtful =
        world.until("move-counter", "be in doubt", is("InDoubt", "True/SourceJournalUnreadable")).await;
    assert!(message(&doubtful, "InDoubt").contains("source.journal cannot be read: its CRC is wrong"));

    // It is restored, and the source continues; then the destination's is found damaged.
    world.b.script(|script| script.resolve = unreadable("target.journal"));
    world.a.script(|script| {
        script.migrate = None;
        script.resolve = None;
    });
    world.a.set_journal(JournalRecord::Committed);
    world.a.phase(Phase::Committed);
    world.a.doubt("PeerLost", "node-b has not been heard for 7 s");
    let doubtful =
        world.until("move-counter", "be in doubt", is("InDoubt", "True/TargetJournalUnreadable")).await;
    assert!(message(&doubtful, "InDoubt").contains("target.journal cannot be read: its CRC is wrong"));
    world.b.script(|script| script.resolve = None);
    world.b.set_journal(JournalRecord::Running);
    world.a.until_relayed(JournalRecord::Running).await;
    world.a.finish(Outcome::Succeeded, "", "");
    world.until("move-counter", "have succeeded", is("Succeeded", "True")).await;
    world.b.assert_nothing_was_relayed();
    world.assert_nothing_was_forbidden();
}

#[tokio::test]
async fn a_migration_in_doubt_whose_finalizer_is_removed_is_forgotten_and_the_vm_can_be_migrated_again() {
    let world = committed_and_cut_off().await;
    world.a.script(|script| script.abort = Some(Status::failed_precondition("the migration is committed")));
    let object = world.migrations().get("move-counter").await.unwrap();
    world.delete("move-counter").await;
    let stays = |migration: &slackwater_api::VMMigration| {
        Some(message(migration, "InDoubt").contains("Removing its finalizer by hand"))
    };
    world.until("move-counter", "report how to remove it", stays).await;
    let none = "{\"metadata\":{\"finalizers\":null}}";
    let plane = world.lab.control_plane().unwrap();
    plane
        .kubectl(&["patch", "vmmig", "move-counter", "-n", NAMESPACE, "--type=merge", "-p", none])
        .await
        .unwrap();
    world.until_gone(&object).await;
    world.wait_for_log("operator", "it is forgotten").await;
    world.migrate("again", |_| {}).await;
    let judged =
        world.until("again", "be judged", |m| Some(m.status.as_ref()?.completion_time.is_some())).await;
    assert!(!is("Accepted", "False/MigrationInProgress")(&judged).unwrap(), "{judged:#?}");
    world.assert_nothing_was_forbidden();
}
