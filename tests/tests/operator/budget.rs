//! The downtime budget: how it reaches the source, and how the source's estimates are shown.

use slackwater_proto::node::{OnBudgetExceeded, Outcome, Phase};

use crate::fake_agent::Call;
use crate::world::{NAMESPACE, World, is, message};

#[tokio::test]
async fn the_source_gets_the_budget_and_its_estimate_is_shown_with_one_event() {
    let world = World::start().await;
    world
        .migrate("move-counter", |spec| {
            spec.downtime_budget = "250ms".into();
            spec.on_budget_exceeded = slackwater_api::OnBudgetExceeded::Proceed;
        })
        .await;
    let asked = world
        .a
        .until_called("migrate", |call| if let Call::Migrate(m) = call { Some(m.clone()) } else { None })
        .await;
    assert_eq!((asked.downtime_budget_ms, asked.on_budget_exceeded()), (250, OnBudgetExceeded::Proceed));
    world.a.until_joined(1).await;
    world.a.phase(Phase::Connected);
    world.a.phase(Phase::PreCopy);
    world.a.estimate(412, 0);
    let shown = |downtime: &'static str| {
        move |m: &slackwater_api::VMMigration| {
            Some(m.status.as_ref()?.estimate.as_ref()?.downtime == downtime)
        }
    };
    let copying = world.until("move-counter", "show what is expected", shown("412ms")).await;
    assert_eq!(copying.status.unwrap().estimate.unwrap().allowed, None);

    world.a.estimate(500, 1000);
    let raised = world.until("move-counter", "show what is allowed", shown("500ms")).await;
    let said = message(&raised, "Succeeded");
    assert!(
        said.contains("spec.downtimeBudget is 250ms") && said.contains("up to 1s is allowed now"),
        "{said}"
    );

    // All events are sent again.
    world.a.break_streams();
    world.a.until_joined(2).await;
    world.a.estimate(600, 1000);
    let again = world.until("move-counter", "show the latest", shown("600ms")).await;
    assert_eq!(again.status.unwrap().estimate.unwrap().allowed.as_deref(), Some("1s"));
    world.a.finish(Outcome::RolledBack, "BudgetExceeded", "the guest would stand still for about 600ms");
    world.until("move-counter", "have ended", is("Succeeded", "False/BudgetExceeded")).await;
    world.until_events(NAMESPACE, "move-counter", &["Accepted", "BudgetExceeded", "Failed"]).await;
    world.assert_nothing_was_forbidden();
}
