//! Two operators, one leader, and the epochs in their calls to the agents.

use kube::api::{DeleteParams, PostParams};
use slackwater_api::MigrationNode;
use slackwater_proto::node::{JournalRecord, Outcome, Phase};

use crate::fake_agent::Call;
use crate::world::{World, condition, is};

fn epochs(calls: &[Call]) -> Vec<u64> {
    let epoch = |call: &Call| {
        let migration = match call {
            Call::Reserve(request) => &request.migration,
            Call::Migrate(request) => &request.migration,
            Call::Abort(request) => &request.migration,
            Call::Release(request) => &request.migration,
            Call::Resolve(request) => &request.migration,
        };
        Some(migration.as_ref()?.operator_epoch)
    };
    calls.iter().filter_map(epoch).collect()
}

#[tokio::test]
async fn when_the_leader_is_killed_the_second_takes_over_and_calls_with_a_higher_epoch() {
    let mut world = World::start().await;
    let second = world.start_another_operator("second");
    world.migrate("move-counter", |_| {}).await;
    world.a.until_joined(1).await;
    world.a.phase(Phase::PreCopy);
    world.until("move-counter", "be prepared", is("Prepared", "True")).await;
    world.wait_for_log("second", "waiting for the Lease").await;

    world.kill_operator().await;
    world.a.until_joined(2).await;
    world.a.set_journal(JournalRecord::Committed);
    world.a.phase(Phase::Committed);
    world.a.phase(Phase::Started);
    world.a.finish(Outcome::Succeeded, "", "");
    world.until("move-counter", "have succeeded", is("Succeeded", "True")).await;
    assert_eq!(epochs(&world.a.calls()), [1, 2]);
    let log = world.log_of("second");
    assert!(log.contains("leads; waiting for the Lease") && log.contains("this operator leads"), "{log}");
    assert_eq!(world.b.calls().len(), 1, "{:#?}", world.b.calls());
    world.assert_nothing_was_forbidden();
    drop(second);
}

#[tokio::test]
async fn a_stopped_operator_releases_the_lease_and_one_that_loses_it_ends_with_an_error() {
    let mut world = World::start().await;
    let held = world.leases().get("slackwater-operator").await.unwrap().spec.unwrap();
    assert_eq!((held.lease_transitions, held.lease_duration_seconds), (Some(0), Some(3)));
    world.stop_operator().await;
    let free = world.leases().get("slackwater-operator").await.unwrap().spec.unwrap();
    assert_eq!(free.holder_identity.unwrap_or_default(), "");

    world.crash_and_restart_operator().await;
    world.wait_for_log("operator", "epoch=2").await;
    // Another holder takes the Lease by force.
    loop {
        let mut lease = world.leases().get("slackwater-operator").await.unwrap();
        lease.spec.as_mut().unwrap().holder_identity = Some("another-operator".into());
        if world.leases().replace("slackwater-operator", &PostParams::default(), &lease).await.is_ok() {
            break;
        }
    }
    assert_eq!(world.operator_ended().await, Some(1));
    let log = world.log();
    assert!(
        log.contains("the leadership is lost") && log.contains("is held by another-operator now"),
        "{log}"
    );
    world.assert_nothing_was_forbidden();
}

#[tokio::test]
async fn an_operator_whose_lease_was_deleted_raises_its_epoch_above_what_the_agents_know() {
    let mut world = World::start().await;
    world.a.script(|script| script.known_epoch = 41);
    world.b.script(|script| script.known_epoch = 7);
    world.migrate("move-counter", |_| {}).await;
    world.a.until_joined(1).await;
    world.a.finish(Outcome::Succeeded, "", "");
    world.until("move-counter", "have succeeded", is("Succeeded", "True")).await;
    assert_eq!(epochs(&world.b.calls()), [9]);
    assert_eq!(epochs(&world.a.calls()), [43]);
    let held = world.leases().get("slackwater-operator").await.unwrap().spec.unwrap();
    assert_eq!(held.lease_transitions, Some(42));

    // A Lease that is deleted under its leader is written again, with a count that continues.
    world.leases().delete("slackwater-operator", &DeleteParams::default()).await.unwrap();
    world.lease("be written again", |lease| Some(lease.spec.as_ref()?.lease_transitions? == 42)).await;
    world.kill_operator().await;
    world.assert_nothing_was_forbidden();
}

#[tokio::test]
async fn an_agent_that_knows_a_far_epoch_is_set_aside_alone_until_an_administrator_accepts_or_forgets_it() {
    let mut world = World::start().await;
    let far =
        |node: &MigrationNode| condition(&node.status.as_ref()?.conditions, "Ready", "False/EpochTooHigh");
    let ready = |node: &MigrationNode| condition(&node.status.as_ref()?.conditions, "Ready", "True");
    // As after a Lease that was restored from an old backup.
    world.b.script(|script| script.known_epoch = 5000);
    world.migrate("first", |_| {}).await;
    world.until("first", "be rolled back", is("Succeeded", "False/EpochTooHigh")).await;
    let words = world.node("node-b", "be set aside", far).await.status.unwrap().conditions[0].message.clone();
    for part in ["epoch 5000", "this operator has 1", "spec.acceptEpochUpTo of this MigrationNode to 5000"] {
        assert!(words.contains(part), "{words}");
    }
    let transitions =
        async || world.leases().get("slackwater-operator").await.unwrap().spec.unwrap().lease_transitions;
    assert_eq!(transitions().await, Some(0));
    // No other agent is affected, and neither is the VM.
    world.node("node-a", "be Ready", ready).await;
    world
        .vm("counter", "be Migratable", |vm| condition(&vm.status.as_ref()?.conditions, "Migratable", "True"))
        .await;
    world.migrate("second", |_| {}).await;
    world.until("second", "be refused", is("Accepted", "False/TargetNotReady")).await;

    let plane = world.lab.control_plane().unwrap();
    let accept = async |epoch: &str| {
        let patch = format!("{{\"spec\":{{\"acceptEpochUpTo\":{epoch}}}}}");
        plane.kubectl(&["patch", "mignode", "node-b", "--type=merge", "-p", &patch]).await
    };
    let refused = accept("2147483648").await.unwrap_err().to_string();
    assert!(refused.contains("acceptEpochUpTo"), "{refused}");
    accept("5000").await.unwrap();
    world.node("node-b", "be Ready again", ready).await;
    world.migrate("third", |_| {}).await;
    world.a.until_joined(1).await;
    world.a.finish(Outcome::Succeeded, "", "");
    world.until("third", "have succeeded", is("Succeeded", "True")).await;
    assert_eq!(epochs(&world.b.calls()), [5002]);
    assert_eq!(transitions().await, Some(5001));

    // The end of what a Lease can count: nothing but the agent itself can be put right.
    world.b.script(|script| script.known_epoch = 2_147_483_646);
    // The operator learns it from this one's Reserve, or has learnt it from its last call for the third.
    world.migrate("fourth", |_| {}).await;
    let words = world.node("node-b", "be set aside", far).await.status.unwrap().conditions[0].message.clone();
    assert!(words.contains("epoch 2147483646") && words.contains("forget-epoch"), "{words}");
    assert!(!words.contains("set spec.acceptEpochUpTo"), "{words}");
    assert_eq!(transitions().await, Some(5001));
    world.b.stop();
    world.b.script(|script| script.known_epoch = 0);
    world.b.start_again().await;
    world.node("node-b", "be Ready again", ready).await;
    world.assert_nothing_was_forbidden();
}

#[tokio::test]
async fn a_leader_that_cannot_renew_ends_before_another_may_begin() {
    let mut world = World::start().await;
    world.lab.control_plane().unwrap().freeze_api_server().unwrap();
    assert_eq!(world.operator_ended().await, Some(1));
    assert!(world.log().contains("could not be renewed within 2000 ms"), "{}", world.log());
    world.lab.control_plane().unwrap().thaw_api_server().unwrap();
    let left = world.leases().get("slackwater-operator").await.unwrap().spec.unwrap();
    assert_eq!(left.lease_transitions, Some(0));
    world.crash_and_restart_operator().await;
    world.wait_for_log("operator", "epoch=2").await;
    world.assert_nothing_was_forbidden();
}
