//! A migration that is tried again.

use slackwater_api::MigrationPhase;
use slackwater_proto::node::{Outcome, Phase};
use slackwater_proto::tonic::Status;

use crate::fake_agent::Call;
use crate::world::{NAMESPACE, World, is};

fn attempts(calls: &[Call]) -> Vec<u32> {
    let attempt = |call: &Call| match call {
        Call::Reserve(request) => Some(request.migration.as_ref()?.attempt),
        _ => None,
    };
    calls.iter().filter_map(attempt).collect()
}

#[tokio::test]
async fn an_attempt_that_fails_is_followed_by_another_with_a_new_number_until_one_succeeds() {
    let mut world = World::start().await;
    world.b.script(|script| {
        script.reserve = Some(Status::failed_precondition("device b2 is held by process 9"))
    });
    world.migrate("move-counter", |spec| spec.attempts = 3).await;
    let waiting = world
        .until("move-counter", "wait for the next attempt", |m| {
            Some(m.status.as_ref()?.next_attempt_time.is_some())
        })
        .await;
    let status = waiting.status.as_ref().unwrap();
    assert!(is("Succeeded", "Unknown/AttemptFailed")(&waiting).unwrap());
    assert_eq!((status.phase, status.attempt), (Some(MigrationPhase::Retrying), Some(1)));
    assert_eq!((status.attempts[0].attempt, status.attempts[0].reason.as_str()), (1, "ReserveRefused"));

    // Meanwhile the VM is claimed, and a restarted operator knows when to continue.
    world.migrate("another", |_| {}).await;
    world.until("another", "be refused", is("Accepted", "False/MigrationInProgress")).await;
    world.until_events(NAMESPACE, "move-counter", &["Accepted", "AttemptFailed"]).await;
    world.crash_and_restart_operator().await;
    world.b.script(|script| script.reserve = None);

    world.a.until_joined(1).await;
    world.a.phase(Phase::Capturing);
    let second = world.until("move-counter", "be stopped", is("Stopped", "True")).await.status.unwrap();
    assert_eq!((second.attempt, second.timeline.len()), (Some(2), 1));
    world.a.finish(Outcome::RolledBack, "BlobRejected", "EIO");
    world.until("move-counter", "have failed twice", |m| Some(m.status.as_ref()?.attempts.len() == 2)).await;
    world.a.forget_events();

    world.a.until_joined(2).await;
    world.a.phase(Phase::Committed);
    world.a.finish(Outcome::Succeeded, "", "");
    let done = world.until("move-counter", "have succeeded", is("Succeeded", "True")).await.status.unwrap();
    let ended: Vec<_> = done.attempts.iter().map(|ended| (ended.attempt, ended.reason.as_str())).collect();
    assert_eq!(ended, [(1, "ReserveRefused"), (2, "BlobRejected"), (3, "VMRunsAtTarget")]);
    assert_eq!(attempts(&world.b.calls()), [1, 2, 3]);
    let phases: Vec<_> = done.timeline.iter().map(|entry| entry.phase.as_str()).collect();
    assert_eq!(phases, ["COMMITTED"]);
    let wanted = ["Accepted", "AttemptFailed", "NextAttempt", "AttemptFailed", "NextAttempt", "Succeeded"];
    world.until_events(NAMESPACE, "move-counter", &wanted).await;
    world.assert_nothing_was_forbidden();
}
