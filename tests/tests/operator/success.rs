//! A migration that goes well.

use slackwater_api::{MigrationPhase, Reservation};
use slackwater_proto::node::{Outcome, PeerToPeer, Phase, VmState};

use crate::fake_agent::{Call, device, vm};
use crate::world::{NAMESPACE, World, condition, is, message};

#[tokio::test]
async fn an_applied_migration_is_planned_prepared_committed_and_shown_with_its_timeline() {
    let world = World::start().await;
    let (a, b) = (&world.a, &world.b);
    let object = world.migrate("move-counter", |_| {}).await;

    let reserve = b
        .until_called("reserve", |call| if let Call::Reserve(r) = call { Some(r.clone()) } else { None })
        .await;
    let migrate = a
        .until_called("migrate", |call| if let Call::Migrate(m) = call { Some(m.clone()) } else { None })
        .await;
    let reference = reserve.migration.clone().unwrap();
    assert_eq!((Some(reference.id.clone()), reference.attempt), (object.metadata.uid.clone(), 1));
    assert_eq!(
        (reserve.source_node.as_str(), reserve.vm_json.as_str()),
        ("node-a", "{\"name\": \"counter\"}")
    );
    assert_eq!(reserve.peer_to_peer(), PeerToPeer::Required);
    assert_eq!(migrate.migration, reserve.migration);
    assert_eq!(
        (migrate.target_node.as_str(), migrate.target_address.as_str()),
        ("node-b", b.address.as_str())
    );
    assert_eq!(migrate.devices, reserve.devices);
    let pairs: Vec<_> =
        migrate.devices.iter().map(|pair| (pair.source.as_str(), pair.target.as_str())).collect();
    assert_eq!(pairs, [("a1", "b1"), ("a2", "b2")]);
    assert_eq!(migrate.pre_commit_timeout_ms, 300_000);

    // The status has the plan before the agents are called.
    let asked = world.until("move-counter", "Prepared", is("Prepared", "True")).await;
    let status = asked.status.unwrap();
    assert_eq!((status.attempt, status.reservation), (Some(1), Some(Reservation::Held)));
    assert_eq!(asked.metadata.finalizers.unwrap(), ["slackwater.dev/migration"]);
    world.vm("counter", "show its migration", |vm| Some(vm.status.as_ref()?.migration.is_some())).await;

    a.phase(Phase::Connected);
    a.phase(Phase::PreCopy);
    a.device_state("node-a", "a1", 6);
    world
        .until("move-counter", "Copying", |m| Some(m.status.as_ref()?.phase? == MigrationPhase::Copying))
        .await;
    for phase in [Phase::Pausing, Phase::Quiescing, Phase::Stopping] {
        a.phase(phase);
    }
    a.device_state("node-a", "a1", 3);
    // What it says of a node that has no part in it is nothing.
    a.phase_of("node-z", Phase::Committed);
    a.phase(Phase::Capturing);
    let stopped = world.until("move-counter", "Stopped", is("Stopped", "True")).await;
    assert_ne!(is("Committed", "True")(&stopped), Some(true), "{:#?}", stopped.status);
    a.device_state("node-b", "b1", 1);
    a.phase(Phase::Loaded);
    a.phase(Phase::Committed);
    world.until("move-counter", "Committed", is("Committed", "True")).await;
    // The source reports the VM until it is released, and so does the target already.
    a.describe(|node| {
        for vm in &mut node.vms {
            vm.state = VmState::Paused.into();
            vm.migration_id.clone_from(&reference.id);
        }
    });
    b.describe(|node| {
        node.vms = vec![vm(NAMESPACE, "counter", &["b1", "b2"])];
        node.devices = ["b1", "b2"].map(|name| device(name, "mtty-1", "VM demo/counter")).to_vec();
    });
    a.phase(Phase::Starting);
    a.phase(Phase::Started);
    a.describe(|node| {
        node.vms.clear();
        node.devices = ["a1", "a2"].map(|name| device(name, "mtty-1", "")).to_vec();
    });
    a.phase(Phase::Released);
    a.finish(Outcome::Succeeded, "", "");

    let done = world.until("move-counter", "Succeeded", is("Succeeded", "True/VMRunsAtTarget")).await;
    assert_eq!(
        message(&done, "Succeeded"),
        "VM demo/counter runs on node-b. The guest stood still for 87.412ms at most."
    );
    let status = done.status.unwrap();
    assert_eq!(status.phase, Some(MigrationPhase::Succeeded));
    let bytes = status.bytes.unwrap();
    assert_eq!((bytes.devices, bytes.vmm), (121, 64 << 20));
    let first = &status.devices[0];
    assert_eq!((first.source.as_str(), first.target.as_str(), first.bytes), ("a1", "b1", Some(60)));
    let states: Vec<_> = first.states.iter().map(|s| (s.node.as_str(), s.state.as_str())).collect();
    assert_eq!(states, [("node-a", "PRE_COPY"), ("node-a", "STOP_COPY"), ("node-b", "STOP")]);
    assert_eq!(status.timeline.len(), 11);
    assert_eq!(status.timeline[5].phase, "CAPTURING");

    let moved = |vm: &slackwater_api::AssignedVM| {
        let status = vm.status.as_ref()?;
        let ready = condition(&status.conditions, "Ready", "True/Running")?;
        Some(status.node_name.as_deref() == Some("node-b") && status.migration.is_none() && ready)
    };
    world.vm("counter", "run on node-b", moved).await;

    let plane = world.lab.control_plane().unwrap();
    let table = plane.kubectl(&["get", "vmmig,avm,mignode", "-n", NAMESPACE]).await.unwrap();
    println!("{table}");
    let row: Vec<&str> =
        table.lines().find(|line| line.contains("move-counter")).unwrap().split_whitespace().collect();
    assert_eq!(row[1..6], ["counter", "node-a", "node-b", "Succeeded", "87.412ms"]);
    world.until_events(NAMESPACE, "move-counter", &["Accepted", "Succeeded"]).await;
    assert!(b.calls().iter().all(|call| !matches!(call, Call::Release(_))), "{:?}", b.calls());

    // Both may forget it now.
    for agent in [a, b] {
        agent.until_acknowledged(&reference.id, 1).await;
    }
    // Without a finalizer the object can be deleted, also without an operator.
    world
        .until("move-counter", "lose its finalizer", |m| {
            Some(m.metadata.finalizers.as_ref().is_none_or(Vec::is_empty))
        })
        .await;
    world.assert_nothing_was_forbidden();
}
