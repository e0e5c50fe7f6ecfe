//! Agents that report a VM of a name that another node has.

use kube::api::{DeleteParams, PostParams};
use kube::{Api, ResourceExt};
use slackwater_api::{AssignedVM, MigrationNode, PeerToPeer};
use slackwater_proto::node::{Outcome, Phase};

use crate::fake_agent::vm;
use crate::world::{NAMESPACE, World, condition, is, message};

fn vm_has(
    type_: &'static str,
    wanted: &'static str,
) -> impl Fn(&AssignedVM) -> Option<bool> + Send + 'static {
    move |vm| condition(&vm.status.as_ref()?.conditions, type_, wanted)
}

fn node_has(
    type_: &'static str,
    wanted: &'static str,
) -> impl Fn(&MigrationNode) -> Option<bool> + Send + 'static {
    move |node| condition(&node.status.as_ref()?.conditions, type_, wanted)
}

fn on(node: &'static str) -> impl Fn(&AssignedVM) -> Option<bool> + Send + 'static {
    move |vm| Some(vm.status.as_ref()?.node_name.as_deref()? == node)
}

fn words(conditions: &[k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition], type_: &str) -> String {
    conditions.iter().find(|condition| condition.type_ == type_).unwrap().message.clone()
}

#[tokio::test]
async fn a_newcomer_that_reports_a_known_vm_is_set_aside_and_the_vm_stays_usable() {
    let mut world = World::start().await;
    world.b.describe(|node| {
        let mut copy = vm(NAMESPACE, "counter", &["b1"]);
        // Neither can it keep the VM from being migrated.
        copy.migration_id = "somebody-elses".into();
        node.vms = vec![copy];
    });
    let contested = world.vm("counter", "be contested", vm_has("Contested", "True/ReportedElsewhere")).await;
    let status = contested.status.unwrap();
    assert_eq!(status.node_name.as_deref(), Some("node-a"));
    assert!(condition(&status.conditions, "Migratable", "True").unwrap(), "{status:#?}");
    let text = words(&status.conditions, "Contested");
    assert!(text.contains("known on node-a. node-b reports"), "{text}");
    let node = world.node("node-b", "say so", node_has("ReportAccepted", "False/VMNameTaken")).await;
    let text = words(&node.status.unwrap().conditions, "ReportAccepted");
    assert!(text.contains("demo/counter (known on node-a)"), "{text}");
    world.until_events(NAMESPACE, "counter", &["ReportedElsewhere"]).await;
    world.until_events("kube-system", "node-b", &["VMNameTaken"]).await;

    // The next operator knows as much, even if the newcomer answers first and the known agent does not.
    world.a.stop();
    world.crash_and_restart_operator().await;
    let silent = world.vm("counter", "be unknown", vm_has("Ready", "Unknown/NodeNotReady")).await;
    assert_eq!(silent.status.unwrap().node_name.as_deref(), Some("node-a"));
    world.a.start_again().await;
    world.vm("counter", "be Ready again", vm_has("Ready", "True")).await;

    world.migrate("move-counter", |_| {}).await;
    world.a.until_joined(1).await;
    world.a.phase(Phase::PreCopy);
    world.a.finish(Outcome::RolledBack, "PeerLost", "the link broke");
    world.until("move-counter", "be rolled back", is("Succeeded", "False/PeerLost")).await;

    // It passes on when its connected agent does not report it any more.
    world.a.describe(|node| node.vms.clear());
    world.vm("counter", "be on node-b", on("node-b")).await;
    world.vm("counter", "not be contested", vm_has("Contested", "False/ReportedOnce")).await;
    world.node("node-b", "have its report used", node_has("ReportAccepted", "True")).await;
    world.assert_nothing_was_forbidden();
}

#[tokio::test]
async fn a_vm_passes_on_by_a_migrations_end_and_with_a_deleted_node_and_two_at_once_have_the_same_right() {
    let mut world = World::start().await;
    world.migrate("move-counter", |_| {}).await;
    world.a.until_joined(1).await;
    // The source is lost before its agent can say that the VM has gone.
    world.b.describe(|node| node.vms = vec![vm(NAMESPACE, "counter", &["b1", "b2"])]);
    world.a.finish(Outcome::Succeeded, "", "");
    world.until("move-counter", "have succeeded", is("Succeeded", "True")).await;
    world.vm("counter", "be on node-b", on("node-b")).await;
    world.vm("counter", "have its old report set aside", vm_has("Contested", "True/ReportedElsewhere")).await;

    let nodes: Api<MigrationNode> = Api::all(world.client.clone());
    let deleted = nodes.get("node-b").await.unwrap();
    nodes.delete("node-b", &DeleteParams::default()).await.unwrap();
    world.vm("counter", "be on node-a", on("node-a")).await;
    nodes
        .create(&PostParams::default(), &MigrationNode::new(&deleted.name_any(), deleted.spec))
        .await
        .unwrap();
    world.vm("counter", "be contested", vm_has("Contested", "True/ReportedElsewhere")).await;

    world.kill_operator().await;
    for agent in [&world.a, &world.b] {
        agent.describe(|node| node.vms = vec![vm(NAMESPACE, "new", &[])]);
    }
    world.crash_and_restart_operator().await;
    world.vm("new", "be reported twice", vm_has("Ready", "False/VMReportedTwice")).await;
    world
        .migrate("two-of-them", |spec| {
            spec.vm_ref.name = "new".into();
            spec.peer_to_peer = PeerToPeer::AssumeIsolated;
        })
        .await;
    let refused = world.until("two-of-them", "be refused", is("Accepted", "False/VMReportedTwice")).await;
    assert!(message(&refused, "Accepted").contains("node-a, node-b"), "{}", message(&refused, "Accepted"));
    world.assert_nothing_was_forbidden();
}
