use slackwater_lab::NodeConfig;
use slackwater_lab::cluster::{Cluster, LabVm, has_condition};
use slackwater_lab::witness::PeerToPeer;

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_moves_with_its_devices_and_back_and_continues_to_count() {
    let two = || ["mtty-1", "mtty-1"];
    // With a CPU for each device's thread.
    let nodes = ["node-a", "node-b"].map(|name| NodeConfig { cpus: 2, ..NodeConfig::new(name, two()) });
    let cluster = Cluster::start(nodes).await.unwrap();
    LabVm::counter(2).start(cluster.lab.node("node-a").unwrap()).await.unwrap();
    cluster.until_vm_at("node-a").await.unwrap();

    // The migration back names no target: exactly one node fits.
    let directions =
        [("there", "node-a", "node-b", "target: {nodeName: node-b}"), ("back", "node-b", "node-a", "")];
    for (name, from, to, fields) in directions {
        let watching = cluster.watch(from, to).await.unwrap();
        cluster.migrate(name, fields).await.unwrap();
        let migration = cluster.until_ended(name).await.unwrap();
        let status = migration.status.clone().unwrap();
        for type_ in ["Accepted", "Prepared", "Stopped", "Committed", "Succeeded"] {
            assert_eq!(has_condition(&status.conditions, type_, "True"), Some(true), "{type_}: {status:#?}");
        }
        assert_eq!((status.source_node.as_deref(), status.target_node.as_deref()), (Some(from), Some(to)));
        let bytes = status.bytes.unwrap();
        assert_eq!(bytes.devices, 120, "two devices of 60 bytes each");
        assert!(bytes.vmm > 0);
        assert_eq!(status.devices.len(), 2);
        for device in &status.devices {
            let states: Vec<_> = device.states.iter().map(|step| (&*step.node, &*step.state)).collect();
            let expected = [
                (to, "RESUMING"),
                (from, "PRE_COPY"),
                (from, "PRE_COPY_P2P"),
                (from, "STOP_COPY"),
                (to, "STOP"),
                (to, "RUNNING_P2P"),
                (to, "RUNNING"),
            ];
            assert_eq!(states, expected, "the timeline is in order");
        }
        cluster.until_vm_at(to).await.unwrap();
        cluster.until_free(from, 2).await.unwrap();
        let verdict = cluster.judge_success(&watching, &migration, PeerToPeer::Required).await.unwrap();
        assert_eq!(verdict.agreed, 14, "seven changes of each device, as the kernels saw them");
        let reasons = cluster.event_reasons(name).await.unwrap();
        assert!(reasons.contains(&"Succeeded".to_owned()), "{reasons:?}");
    }
    cluster.nothing_was_forbidden().unwrap();
}
