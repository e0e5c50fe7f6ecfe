//! Migrations that are given up: by their user, by an agent, or because one cannot be asked.

use slackwater_api::Reservation;
use slackwater_proto::node::{Outcome, Phase, ReleaseReason};
use slackwater_proto::tonic::Status;

use crate::fake_agent::{Call, FakeAgent};
use crate::world::{NAMESPACE, World, is, message};

async fn released(agent: &FakeAgent) -> ReleaseReason {
    agent.called("release", |call| if let Call::Release(r) = call { Some(r.reason()) } else { None }).await
}

#[tokio::test]
async fn deleting_the_object_before_the_commit_aborts_at_the_source_and_releases_at_the_target() {
    let world = World::start().await;
    let object = world.migrate("move-counter", |_| {}).await;
    world.a.joined(1).await;
    world.a.phase(Phase::Connected);
    world.a.phase(Phase::PreCopy);
    world.delete("move-counter").await;

    let why = world
        .a
        .called("abort", |call| if let Call::Abort(a) = call { Some(a.why.clone()) } else { None })
        .await;
    assert_eq!(why, "the VMMigration was deleted");
    assert_eq!(released(&world.b).await, ReleaseReason::AbortedAtSource);
    world.is_gone(&object).await;
    world.told(NAMESPACE, "move-counter", &["Accepted", "Prepared", "Aborting", "Failed"]).await;
    world.assert_nothing_was_forbidden();
}

#[tokio::test]
async fn deleting_the_object_after_the_commit_lets_it_finish_and_then_go() {
    let world = World::start().await;
    let object = world.migrate("move-counter", |_| {}).await;
    world.a.joined(1).await;
    world.a.script(|script| script.abort = Some(Status::failed_precondition("the migration is committed")));
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
    world.is_gone(&object).await;
    assert!(world.b.calls().iter().all(|call| !matches!(call, Call::Release(_))));
    world.assert_nothing_was_forbidden();
}

#[tokio::test]
async fn a_rollback_carries_the_agents_words_and_releases_until_the_target_answers() {
    let mut world = World::start().await;
    world.migrate("move-counter", |_| {}).await;
    world.a.joined(1).await;
    world.a.phase(Phase::Capturing);
    world.until("move-counter", "be stopped", is("Stopped", "True")).await;
    world.b.stop();
    world.a.finish(Outcome::RolledBack, "TargetLost", "node-b has not been heard for 7 s");

    let failed = world.until("move-counter", "have failed", is("Succeeded", "False/TargetLost")).await;
    assert_eq!(
        message(&failed, "Succeeded"),
        "The migration was given up: node-b has not been heard for 7 s. VM demo/counter runs on node-a again, with its \
         devices."
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
async fn what_is_in_doubt_or_lost_is_said_and_nothing_is_given_back() {
    let world = World::start().await;
    world.migrate("doubtful", |_| {}).await;
    world.a.joined(1).await;
    world.a.phase(Phase::Committed);
    world.a.finish(Outcome::InDoubt, "", "the link to node-b is down");
    let doubtful = world.until("doubtful", "be in doubt", is("Succeeded", "Unknown/InDoubt")).await;
    assert!(message(&doubtful, "Succeeded").contains("the link to node-b is down"));
    assert!(doubtful.status.as_ref().unwrap().completion_time.is_none());

    world.migrate("again", |_| {}).await;
    let refused = world.until("again", "be refused", is("Accepted", "False/MigrationInProgress")).await;
    assert!(message(&refused, "Accepted").contains("VMMigration demo/doubtful"));
    assert!(world.b.calls().iter().all(|call| !matches!(call, Call::Release(_))));

    // The object is a record; its deletion is the user's to decide.
    world.delete("doubtful").await;
    world.is_gone(&doubtful).await;
    world.assert_nothing_was_forbidden();
}
