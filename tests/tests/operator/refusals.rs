//! An impossible migration is refused before any call to an agent.

use slackwater_api::Target;
use slackwater_proto::node::Outcome;

use crate::fake_agent::{Call, device};
use crate::world::{NAMESPACE, World, condition, is, message};

#[tokio::test]
async fn an_impossible_spec_is_refused_with_a_reason_and_no_agent_is_called() {
    let world = World::start().await;
    let refused = async |name: &'static str, reason: &'static str, words: &str| {
        let object = world.until(name, "be refused", is("Accepted", reason)).await;
        assert!(message(&object, "Accepted").contains(words), "{}", message(&object, "Accepted"));
        assert_eq!(message(&object, "Accepted"), message(&object, "Succeeded"));
        assert!(object.status.as_ref().unwrap().completion_time.is_some());
        assert!(object.metadata.finalizers.is_none(), "no agent was called for it, so it may be deleted");
        world.until_events(NAMESPACE, name, &["Refused"]).await;
    };

    world.migrate("unknown-vm", |spec| spec.vm_ref.name = "conter".into()).await;
    refused("unknown-vm", "False/VMNotFound", "Reported are: demo/counter").await;

    world.migrate("to-itself", |spec| spec.target = Some(Target { node_name: "node-a".into() })).await;
    refused("to-itself", "False/TargetIsSource", "VM demo/counter is on node-a already").await;

    world.migrate("to-nowhere", |spec| spec.target = Some(Target { node_name: "node-z".into() })).await;
    refused("to-nowhere", "False/TargetNotFound", "There is no MigrationNode \"node-z\". There are: node-b.")
        .await;

    world.migrate("too-hasty", |spec| spec.pre_commit_timeout = "10ms".into()).await;
    refused("too-hasty", "False/InvalidSpec", "spec.preCommitTimeout is 10ms; it must be from 1s to 24h")
        .await;

    world.migrate("too-strict", |spec| spec.downtime_budget = "2m".into()).await;
    refused("too-strict", "False/InvalidSpec", "spec.downtimeBudget is 2m; it must be from 1ms to 60s").await;

    world.b.describe(|node| node.devices[1] = device("b2", "mtty-1", "process 4711 (qemu-system-x86)"));
    let one_free = |node: &slackwater_api::MigrationNode| Some(node.status.as_ref()?.free_device_count? == 1);
    world.node("node-b", "have one free device", one_free).await;
    world.migrate("too-few", |_| {}).await;
    let words = "node-b has 1 free mtty-1 (driver mtty), 2 needed, not free there: b2: process 4711 (qemu-system-x86)";
    refused("too-few", "False/NoMatchingDevices", words).await;

    world.b.describe(|node| node.devices[1] = device("b2", "mtty-2", ""));
    let two_free = |node: &slackwater_api::MigrationNode| Some(node.status.as_ref()?.free_device_count? == 2);
    world.node("node-b", "have two free devices", two_free).await;
    world.migrate("other-model", |spec| spec.target = None).await;
    refused("other-model", "False/NoSuitableNode", "free there of other models: 1 mtty-2").await;

    world.a.describe(|node| {
        for device in &mut node.devices {
            device.features.as_mut().unwrap().p2p = false;
        }
    });
    let not_migratable = |vm: &slackwater_api::AssignedVM| {
        condition(&vm.status.as_ref()?.conditions, "Migratable", "False/PeerToPeerUnsupported")
    };
    world.vm("counter", "report before a migration that it lacks P2P", not_migratable).await;
    world.migrate("no-p2p", |_| {}).await;
    refused("no-p2p", "False/PeerToPeerUnsupported", "a1 (mtty), a2 (mtty)").await;

    assert_eq!((world.a.calls(), world.b.calls()), (vec![], vec![]));
    world.assert_nothing_was_forbidden();
}

#[tokio::test]
async fn the_same_vm_is_never_migrated_twice_at_once() {
    let world = World::start().await;
    // At the same time, so that neither is in the other's snapshot.
    tokio::join!(world.migrate("first", |_| {}), world.migrate("second", |_| {}));
    world.a.until_joined(1).await;
    let both = ["first", "second"];
    let judged = async |name: &'static str| {
        let judged = world
            .until(name, "be judged", |m| {
                Some(is("Accepted", "True")(m)? || is("Accepted", "False/MigrationInProgress")(m)?)
            })
            .await;
        is("Accepted", "True")(&judged).unwrap()
    };
    let accepted = [judged(both[0]).await, judged(both[1]).await];
    assert_eq!(accepted.iter().filter(|accepted| **accepted).count(), 1, "{accepted:?}");
    let (winner, loser) = if accepted[0] { (both[0], both[1]) } else { (both[1], both[0]) };
    let refused = world.until(loser, "be refused", is("Accepted", "False/MigrationInProgress")).await;
    let words = format!("already being migrated by VMMigration demo/{winner}");
    assert!(message(&refused, "Accepted").contains(&words), "{}", message(&refused, "Accepted"));

    world.a.finish(Outcome::RolledBack, "BlobRejected", "device b2 did not take its state");
    world.until(winner, "have failed", is("Succeeded", "False/BlobRejected")).await;
    let reserved = world.b.calls().iter().filter(|call| matches!(call, Call::Reserve(_))).count();
    assert_eq!(reserved, 1);
    world.assert_nothing_was_forbidden();
}

#[tokio::test]
async fn the_api_server_refuses_what_the_schema_forbids_and_a_changed_spec_is_ignored_with_a_message() {
    let world = World::start().await;
    let plane = world.lab.control_plane().unwrap();
    for (field, value) in [
        ("preCommitTimeout", "\"5 minutes\""),
        ("peerToPeer", "\"Never\""),
        ("vmRef", "{\"kind\": \"Pod\", \"name\": \"x\"}"),
    ] {
        let spec = format!("{{\"vmRef\": {{\"name\": \"counter\"}}, \"{field}\": {value}}}");
        let manifest = format!(
            "{{\"apiVersion\": \"slackwater.dev/v1alpha1\", \"kind\": \"VMMigration\", \
             \"metadata\": {{\"name\": \"bad\", \"namespace\": \"demo\"}}, \"spec\": {spec}}}"
        );
        let path = world.folder().join("bad.json");
        std::fs::write(&path, manifest).unwrap();
        let error = plane.kubectl(&["create", "-f", path.to_str().unwrap()]).await.unwrap_err().to_string();
        assert!(error.contains(field), "{error}");
    }

    world.migrate("changed", |_| {}).await;
    world.a.until_joined(1).await;
    plane
        .kubectl(&[
            "patch",
            "vmmig",
            "changed",
            "-n",
            NAMESPACE,
            "--type=merge",
            "-p",
            "{\"spec\":{\"preCommitTimeout\":\"1h\"}}",
        ])
        .await
        .unwrap();
    let changed = world
        .until("changed", "report that the change is ignored", is("Accepted", "True/SpecChangeIgnored"))
        .await;
    assert!(message(&changed, "Accepted").starts_with("spec.preCommitTimeout was changed afterwards"));
    assert_eq!(changed.status.unwrap().observed_spec.unwrap().pre_commit_timeout, "5m");
    world.a.finish(Outcome::Succeeded, "", "");
    world.until("changed", "have succeeded all the same", is("Succeeded", "True")).await;
    world.assert_nothing_was_forbidden();
}
