//! Migrations that are aborted: by their user, by an agent, or because an agent does not answer.

use serde_json::json;
use slackwater_api::{MigrationPhase, Reservation};
use slackwater_proto::node::{JournalRecord, Outcome, Phase, ReleaseReason};
use slackwater_proto::tonic::Status;

use crate::fake_agent::{Call, FakeAgent};
use crate::world::{NAMESPACE, World, is, message};

async fn released(agent: &FakeAgent) -> ReleaseReason {
    agent
        .until_called("release", |call| if let Call::Release(r) = call { Some(r.reason()) } else { None })
        .await
}

#[tokio::test]
async fn deleting_the_object_before_the_commit_aborts_at_the_source_and_releases_at_the_target() {
    let world = World::start().await;
    let object = world.migrate("move-counter", |_| {}).await;
    world.a.until_joined(1).await;
    world.a.phase(Phase::Connected);
    world.a.phase(Phase::PreCopy);
    world.delete("move-counter").await;

    let why = world
        .a
        .until_called("abort", |call| if let Call::Abort(a) = call { Some(a.why.clone()) } else { None })
        .await;
    assert_eq!(why, "the VMMigration was deleted");
    assert_eq!(released(&world.b).await, ReleaseReason::AbortedAtSource);
    world.until_gone(&object).await;
    world.until_events(NAMESPACE, "move-counter", &["Accepted", "Aborting", "Failed"]).await;
    world.assert_nothing_was_forbidden();
}

#[tokio::test]
async fn deleting_the_object_after_the_commit_lets_it_finish_and_then_go() {
    let world = World::start().await;
    let object = world.migrate("move-counter", |_| {}).await;
    world.a.until_joined(1).await;
    world.a.script(|script| script.abort = Some(Status::failed_precondition("the migration is committed")));
    world.a.set_journal(JournalRecord::Committed);
    world.a.phase(Phase::Committed);
    world.delete("move-counter").await;
    let late = world.until("move-counter", "be too late", is("Succeeded", "Unknown/AbortTooLate")).await;
    assert!(
        message(&late, "Succeeded").contains("the migration is committed"),
        "{}",
        message(&late, "Succeeded")
    );
    assert!(late.metadata.deletion_timestamp.is_some());
    world.a.finish(Outcome::Succeeded, "", "");
    world.until_gone(&object).await;
    assert!(world.b.calls().iter().all(|call| !matches!(call, Call::Release(_))));
    world.assert_nothing_was_forbidden();
}

#[tokio::test]
async fn a_rollback_has_the_agents_message_and_releases_until_the_target_answers() {
    let mut world = World::start().await;
    world.migrate("move-counter", |_| {}).await;
    world.a.until_joined(1).await;
    world.a.phase(Phase::Capturing);
    world.until("move-counter", "be stopped", is("Stopped", "True")).await;
    world.b.stop();
    world.a.finish(Outcome::RolledBack, "TargetLost", "node-b has not been heard for 7 s");

    let failed = world.until("move-counter", "have failed", is("Succeeded", "False/TargetLost")).await;
    assert_eq!(
        message(&failed, "Succeeded"),
        "VM demo/counter runs on node-a again, with its devices. The migration was given up: \
         node-b has not been heard for 7 s."
    );
    world.until("move-counter", "say that it is releasing", is("Prepared", "Unknown/Releasing")).await;
    let now = world.until("move-counter", "not be stopped", is("Stopped", "False/GuestRuns")).await;
    assert_eq!(now.status.unwrap().reservation, Some(Reservation::ReleasingAbortedAtSource));

    world.b.start_again().await;
    assert_eq!(released(&world.b).await, ReleaseReason::AbortedAtSource);
    world.until("move-counter", "have released", is("Prepared", "False/Released")).await;
    world.assert_nothing_was_forbidden();
}

#[tokio::test]
async fn a_target_that_refuses_to_reserve_ends_it_with_the_source_never_asked() {
    let world = World::start().await;
    world.b.script(|script| {
        script.reserve = Some(Status::failed_precondition("device b2 was opened by process 4711 meanwhile"));
    });
    world.migrate("move-counter", |_| {}).await;
    let failed = world.until("move-counter", "have failed", is("Succeeded", "False/ReserveRefused")).await;
    assert_eq!(
        message(&failed, "Succeeded"),
        "node-b could not be made ready: device b2 was opened by process 4711 meanwhile. VM demo/counter runs on at \
         node-a; nothing was touched there."
    );
    assert_eq!(released(&world.b).await, ReleaseReason::NeverStarted);
    assert_eq!(world.a.calls(), []);
    world.assert_nothing_was_forbidden();
}

#[tokio::test]
async fn a_cancelled_migration_is_aborted_and_stays_as_a_record() {
    let world = World::start().await;
    world.migrate("move-counter", |spec| spec.attempts = 3).await;
    world.a.until_joined(1).await;
    world.a.phase(Phase::PreCopy);
    world.patch("move-counter", json!({"cancel": true})).await;
    let why = world
        .a
        .until_called("abort", |call| if let Call::Abort(a) = call { Some(a.why.clone()) } else { None })
        .await;
    assert_eq!(why, "spec.cancel was set to true");
    assert_eq!(released(&world.b).await, ReleaseReason::AbortedAtSource);
    let over = world.until("move-counter", "have released", is("Prepared", "False/Released")).await;
    assert!(is("Succeeded", "False/Aborted")(&over).unwrap(), "{over:#?}");
    let status = over.status.unwrap();
    assert_eq!((status.phase, status.attempt), (Some(MigrationPhase::RolledBack), Some(1)));

    // A cancel cannot be reverted, even if the API server accepts the change.
    world.patch("move-counter", json!({"cancel": false})).await;
    world.until("move-counter", "ignore that", is("Accepted", "True/SpecChangeIgnored")).await;

    // A migration that is cancelled before its start is not started.
    world.migrate("never", |spec| spec.cancel = true).await;
    let never = world.until("never", "be aborted", is("Succeeded", "False/Aborted")).await;
    assert_eq!(
        message(&never, "Succeeded"),
        "Before anything was asked of any agent, spec.cancel was set to true."
    );
    let reserved = world.b.calls().iter().filter(|call| matches!(call, Call::Reserve(_))).count();
    assert_eq!(reserved, 1);
    world.assert_nothing_was_forbidden();
}

#[tokio::test]
async fn a_cancel_after_the_commit_is_refused_because_the_point_of_no_return_has_passed() {
    let world = World::start().await;
    world.migrate("move-counter", |_| {}).await;
    world.a.until_joined(1).await;
    world.a.script(|script| script.abort = Some(Status::failed_precondition("the migration is committed")));
    world.a.set_journal(JournalRecord::Committed);
    world.a.phase(Phase::Committed);
    world.patch("move-counter", json!({"cancel": true})).await;
    let late = world.until("move-counter", "be too late", is("Succeeded", "Unknown/AbortTooLate")).await;
    let said = message(&late, "Succeeded");
    assert!(said.starts_with("The migration was cancelled too late"), "{said}");
    assert!(said.contains("the point of no return has passed"), "{said}");
    world.a.finish(Outcome::Succeeded, "", "");
    world.until("move-counter", "have succeeded", is("Succeeded", "True")).await;
    world.assert_nothing_was_forbidden();
}

#[tokio::test]
async fn an_abort_answered_by_a_source_that_does_not_know_the_migration_does_not_count() {
    let mut world = World::start().await;
    let object = world.migrate("move-counter", |_| {}).await;
    world.a.until_joined(1).await;
    world.a.phase(Phase::Committed);
    world.until("move-counter", "be committed", is("Committed", "True")).await;
    // The agent is restarted and has lost its journal; the target is loaded and waits.
    world.kill_operator().await;
    world.a.script(|script| script.migrate = Some(Status::failed_precondition("VM demo/counter is paused")));
    world.a.forget_events();
    world.a.set_journal(JournalRecord::Unspecified);
    world.b.set_journal(JournalRecord::Loaded);
    world.delete("move-counter").await;
    world.crash_and_restart_operator().await;
    world.a.until_called("abort", |call| matches!(call, Call::Abort(_)).then_some(())).await;
    let doubtful = world.until("move-counter", "be in doubt", is("InDoubt", "True/SourceForgot")).await;
    assert!(doubtful.metadata.deletion_timestamp.is_some());
    assert!(
        message(&doubtful, "InDoubt").contains("The object was deleted, and stays until this is settled")
    );
    assert!(world.b.calls().iter().all(|call| !matches!(call, Call::Release(_))));

    // The target started the VM after all.
    world.b.set_journal(JournalRecord::Running);
    world.until_gone(&object).await;
    world.b.assert_nothing_was_relayed();
    world.assert_nothing_was_forbidden();
}

#[tokio::test]
async fn a_lost_vm_is_reported_and_nothing_is_released() {
    let world = World::start().await;
    let object = world.migrate("lost", |spec| spec.attempts = 3).await;
    world.a.until_joined(1).await;
    world.a.phase(Phase::Committed);
    world.a.finish(Outcome::Lost, "StartFailed", "the twin has exited");
    let lost = world.until("lost", "be lost", is("Succeeded", "False/StartFailed")).await;
    assert_eq!(lost.status.unwrap().phase, Some(MigrationPhase::Lost));
    assert!(world.b.calls().iter().all(|call| !matches!(call, Call::Release(_))));
    world.delete("lost").await;
    world.until_gone(&object).await;
    world.assert_nothing_was_forbidden();
}
