//! What the agents report, shown as MigrationNodes and AssignedVMs.

use kube::runtime::conditions::is_deleted;
use kube::runtime::wait::await_condition;
use kube::{Api, ResourceExt};
use slackwater_api::{AssignedVM, MigrationNode};
use slackwater_proto::node::Blocker;
use std::time::Duration;

use crate::fake_agent::vm;
use crate::world::{NAMESPACE, World, condition};

fn ready(wanted: &'static str) -> impl Fn(&MigrationNode) -> Option<bool> + Send + 'static {
    move |node| condition(&node.status.as_ref()?.conditions, "Ready", wanted)
}

fn vm_has(
    type_: &'static str,
    wanted: &'static str,
) -> impl Fn(&AssignedVM) -> Option<bool> + Send + 'static {
    move |vm| condition(&vm.status.as_ref()?.conditions, type_, wanted)
}

#[tokio::test]
async fn nodes_and_vms_are_shown_with_their_blockers_and_removed_when_gone() {
    let mut world = World::start().await;
    let node = world.node("node-a", "be Ready", ready("True")).await.status.unwrap();
    assert_eq!((node.agent_version.as_deref(), node.boot_id.as_deref()), (Some("0.1.0-fake"), Some("b00t")));
    assert_eq!((node.device_count, node.free_device_count, node.vm_count), (Some(2), Some(0), Some(1)));
    assert_eq!(node.devices[0].holder.as_deref(), Some("VM demo/counter"));

    world.a.describe(|node| {
        node.vms[0].blockers = vec![Blocker {
            reason: "VmmTooOld".into(),
            message: "its VMM does not know FinishLoad; upgrade it".into(),
            lifted_by_assume_isolated: false,
        }];
    });
    let blocked = world.vm("counter", "report its blocker", vm_has("Migratable", "False/VmmTooOld")).await;
    let status = blocked.status.clone().unwrap();
    assert_eq!((status.device_count, status.ram_bytes), (Some(2), Some(64 << 20)));
    assert!(status.conditions.iter().any(|c| c.message.contains("upgrade it")));

    // Another server answers at the address, or none.
    world.b.stop();
    let down = world.node("node-b", "not be Ready", ready("False/AgentUnreachable")).await;
    let message = down.status.unwrap().conditions[0].message.clone();
    assert!(message.starts_with("The agent does not answer: "), "{message}");
    world.b.start_again().await;
    world.node("node-b", "be Ready again", ready("True")).await;

    // A VM whose namespace is not there yet.
    world.b.describe(|node| node.vms = vec![vm("later", "early", &[])]);
    let note = world.until_events("kube-system", "node-b", &["NamespaceMissing"]).await.concat();
    assert!(note.contains("VM later/early cannot be shown") && note.contains("\"later\""), "{note}");
    world.lab.control_plane().unwrap().kubectl(&["create", "namespace", "later"]).await.unwrap();
    let later: Api<AssignedVM> = Api::namespaced(world.client.clone(), "later");
    let early =
        await_condition(later, "early", |vm: Option<&AssignedVM>| vm.is_some_and(|vm| vm.status.is_some()));
    tokio::time::timeout(Duration::from_secs(30), early)
        .await
        .unwrap_or_else(|_| panic!("{}", world.log()))
        .unwrap();

    // A VM that has ended.
    world.a.describe(|node| node.vms.clear());
    world.vm("counter", "report that it is gone", vm_has("Ready", "False/NotReported")).await;
    let vms: Api<AssignedVM> = Api::namespaced(world.client.clone(), NAMESPACE);
    let uid = blocked.uid().unwrap();
    let gone = await_condition(vms, "counter", is_deleted(&uid));
    tokio::time::timeout(Duration::from_secs(30), gone)
        .await
        .unwrap_or_else(|_| panic!("{}", world.log()))
        .unwrap();
    world.assert_nothing_was_forbidden();
}

#[tokio::test]
async fn an_agent_that_claims_another_node_is_rejected() {
    let world = World::start().await;
    world.b.describe(|node| node.node = "node-c".into());
    let down = world.node("node-b", "not be Ready", ready("False/AgentUnreachable")).await;
    let message = down.status.unwrap().conditions[0].message.clone();
    assert!(message.contains("the agent says that it is node \"node-c\""), "{message}");
    world.assert_nothing_was_forbidden();
}
