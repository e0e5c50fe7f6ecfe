//! Agents that accept a call and never answer: what they hold up, and for how long.

use slackwater_api::MigrationNode;

use crate::fake_agent::Call;
use crate::world::{World, condition, is, message};

fn silent(node: &MigrationNode) -> Option<bool> {
    condition(&node.status.as_ref()?.conditions, "Ready", "False/AgentSilent")
}

#[tokio::test]
async fn an_agent_that_never_reports_holds_up_no_plan_and_is_shown_as_silent() {
    let mut world = World::start().await;
    world.b.stop();
    world.b.script(|script| script.silent = true);
    world.b.start_again().await;
    // An operator that knows nothing yet plans when every agent has reported or failed once.
    world.crash_and_restart_operator().await;
    world.migrate("move-counter", |_| {}).await;
    let refused = world.until("move-counter", "be refused", is("Accepted", "False/TargetNotReady")).await;
    let words = "it is connected and has reported nothing within 10 s";
    assert!(message(&refused, "Accepted").contains(words), "{}", message(&refused, "Accepted"));
    world.node("node-b", "be shown as silent", silent).await;

    world.b.stop();
    world.b.script(|script| script.silent = false);
    world.b.start_again().await;
    let ready = |node: &MigrationNode| condition(&node.status.as_ref()?.conditions, "Ready", "True");
    world.node("node-b", "be Ready again", ready).await;
    world.assert_nothing_was_forbidden();
}

#[tokio::test]
async fn a_migration_whose_target_never_answers_reserve_can_be_cancelled_at_once() {
    let world = World::start().await;
    world.b.script(|script| script.reserve_hangs = true);
    world.migrate("move-counter", |_| {}).await;
    world.b.until_called("reserve", |call| matches!(call, Call::Reserve(_)).then_some(())).await;
    world.patch("move-counter", serde_json::json!({"cancel": true})).await;
    world.until("move-counter", "have been given up", is("Succeeded", "False/Aborted")).await;
    world.b.until_called("release", |call| matches!(call, Call::Release(_)).then_some(())).await;
    assert!(!world.a.calls().iter().any(|call| matches!(call, Call::Migrate(_))), "{:#?}", world.a.calls());
    world.assert_nothing_was_forbidden();
}
