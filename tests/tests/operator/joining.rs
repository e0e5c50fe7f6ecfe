//! Streams that break and operators that crash: a migration continues at the agents, and is joined again, not
//! started again.

use slackwater_api::{MigrationPhase, Reservation};
use slackwater_proto::node::{JournalRecord, MigrateRequest, Outcome, Phase};
use slackwater_proto::tonic::Status;

use crate::fake_agent::Call;
use crate::world::{NAMESPACE, World, is, message};

#[tokio::test]
async fn a_broken_stream_is_joined_again_and_a_restarted_operator_joins_by_the_status() {
    let mut world = World::start().await;
    world.migrate("move-counter", |_| {}).await;
    world.a.until_joined(1).await;
    world.a.phase(Phase::Connected);
    world.a.phase(Phase::PreCopy);
    world
        .until("move-counter", "be copying", |m| Some(m.status.as_ref()?.phase? == MigrationPhase::Copying))
        .await;

    world.a.break_streams();
    world.a.until_joined(2).await;
    world.a.phase(Phase::Capturing);
    let stopped = world.until("move-counter", "be stopped", is("Stopped", "True")).await;

    // A crash may lose an event that was not posted yet; this test does not check that.
    world.until_events(NAMESPACE, "move-counter", &["Accepted"]).await;
    world.crash_and_restart_operator().await;
    world.a.until_joined(3).await;
    world.a.phase(Phase::Committed);
    world.a.phase(Phase::Started);
    world.a.finish(Outcome::Succeeded, "", "");
    let done = world.until("move-counter", "have succeeded", is("Succeeded", "True")).await;

    let status = done.status.unwrap();
    assert_eq!((status.attempt, status.start_time), (Some(1), stopped.status.unwrap().start_time));
    let phases: Vec<_> = status.timeline.iter().map(|entry| entry.phase.as_str()).collect();
    assert_eq!(phases, ["CONNECTED", "PRE_COPY", "CAPTURING", "COMMITTED", "STARTED"]);
    let asked: Vec<_> = world
        .a
        .calls()
        .into_iter()
        .filter_map(|call| if let Call::Migrate(m) = call { Some(m) } else { None })
        .collect();
    let epochs: Vec<_> = asked.iter().map(|asked| asked.migration.as_ref().unwrap().operator_epoch).collect();
    assert_eq!(epochs, [1, 1, 2]);
    let content = |request: &MigrateRequest| MigrateRequest { migration: None, ..request.clone() };
    assert!(asked.iter().all(|again| content(again) == content(&asked[0])), "{asked:#?}");
    let reserved = world.b.calls().iter().filter(|call| matches!(call, Call::Reserve(_))).count();
    assert_eq!(reserved, 1);
    world.until_events(NAMESPACE, "move-counter", &["Accepted", "Succeeded"]).await;
    world.assert_nothing_was_forbidden();
}

#[tokio::test]
async fn an_operator_that_finds_its_migration_deleted_after_a_crash_aborts_it() {
    let mut world = World::start().await;
    let object = world.migrate("move-counter", |_| {}).await;
    world.a.until_joined(1).await;
    world.until("move-counter", "be prepared", is("Prepared", "True")).await;
    // The abort fails at first, and the operator crashes before the next try.
    world.a.script(|script| {
        script.abort = Some(Status::unavailable("busy"));
        script.migrate = Some(Status::unavailable("busy"));
    });
    world.delete("move-counter").await;
    world.a.until_called("abort", |call| matches!(call, Call::Abort(_)).then_some(())).await;
    world.crash_and_restart_operator().await;
    world.a.script(|script| script.abort = None);
    world.until_gone(&object).await;
    assert!(world.b.calls().iter().any(|call| matches!(call, Call::Release(_))));
    world.assert_nothing_was_forbidden();
}

#[tokio::test]
async fn a_source_that_has_forgotten_the_migration_leaves_it_in_doubt_with_a_reason() {
    let world = World::start().await;
    world.migrate("move-counter", |_| {}).await;
    world.a.until_joined(1).await;
    world.a.phase(Phase::PreCopy);
    world
        .until("move-counter", "be copying", |m| Some(m.status.as_ref()?.phase? == MigrationPhase::Copying))
        .await;
    world.a.script(|script| script.migrate = Some(Status::not_found("there is no VM demo/counter here")));
    world.a.set_journal(JournalRecord::Unspecified);
    world.a.break_streams();
    let doubtful = world.until("move-counter", "be in doubt", is("InDoubt", "True/SourceForgot")).await;
    let said = message(&doubtful, "InDoubt");
    assert!(said.contains("node-a had begun") && said.contains("Look where VM demo/counter runs"), "{said}");
    assert!(is("Succeeded", "Unknown/SourceForgot")(&doubtful).unwrap());
    assert_eq!(doubtful.status.unwrap().reservation, Some(Reservation::Held));

    // Its state directory is restored.
    world.a.script(|script| script.migrate = None);
    world.a.set_journal(JournalRecord::Saving);
    world.until("move-counter", "continue", is("InDoubt", "False/Settled")).await;
    world.a.finish(Outcome::RolledBack, "AgentRestarted", "the agent was restarted before the commit");
    world.until("move-counter", "have ended", is("Succeeded", "False/AgentRestarted")).await;
    world.assert_nothing_was_forbidden();
}

#[tokio::test]
async fn a_restarted_source_reports_less_and_the_status_keeps_what_it_has() {
    let mut world = World::start().await;
    world.migrate("move-counter", |_| {}).await;
    world.a.until_joined(1).await;
    for phase in [Phase::Connected, Phase::PreCopy, Phase::Capturing, Phase::Committed] {
        world.a.phase(phase);
    }
    let committed =
        world.until("move-counter", "be committed", is("Committed", "True")).await.status.unwrap();
    world.a.stop();
    world.a.forget_events();
    world.a.set_journal(JournalRecord::Committed);
    world.b.set_journal(JournalRecord::Starting);
    world.a.start_again().await;
    world.a.until_joined(2).await;
    world.a.phase(Phase::Started);
    world.a.finish(Outcome::Succeeded, "", "");
    let done = world.until("move-counter", "have succeeded", is("Succeeded", "True")).await.status.unwrap();
    let phases: Vec<_> = done.timeline.iter().map(|entry| entry.phase.as_str()).collect();
    assert_eq!(phases, ["CONNECTED", "PRE_COPY", "CAPTURING", "COMMITTED", "STARTED"]);
    assert_eq!(done.timeline[..4], committed.timeline[..]);
    assert_eq!(done.start_time, committed.start_time);
    world.a.assert_nothing_was_relayed();
    world.assert_nothing_was_forbidden();
}
