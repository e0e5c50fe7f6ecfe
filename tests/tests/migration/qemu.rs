use slackwater_tests::cluster::{Cluster, QemuVm, has_condition};
use slackwater_tests::lab::{LabConfig, NodeConfig};
use slackwater_tests::witness::PeerToPeer;

/// Two nodes with two devices each, and room for a VM of QEMU's.
fn nodes(vm: &QemuVm) -> LabConfig {
    let node = |name| NodeConfig::new(name, ["mtty-1", "mtty-1"]);
    vm.in_nodes(LabConfig::nodes([node("node-a"), node("node-b")])).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_of_qemus_moves_with_its_devices_and_back_again_and_its_count_goes_on() {
    let vm = QemuVm::counter(2).with_migration_events();
    let mut cluster = Cluster::start_with(nodes(&vm), "").await.unwrap();
    cluster.start_qemu(vm, "node-a").await.unwrap();
    cluster.until_vm_at("node-a").await.unwrap();
    for (name, from, to) in [("there", "node-a", "node-b"), ("back", "node-b", "node-a")] {
        let watching = cluster.watch(from, to).await.unwrap();
        cluster.migrate(name, &format!("target: {{nodeName: {to}}}")).await.unwrap();
        let migration = cluster.until_ended(name).await.unwrap();
        let status = migration.status.clone().unwrap();
        println!("{}", serde_json::to_string_pretty(&status).unwrap());
        for type_ in ["Accepted", "Prepared", "Stopped", "Committed", "Succeeded"] {
            assert_eq!(has_condition(&status.conditions, type_, "True"), Some(true), "{type_}: {status:#?}");
        }
        cluster.until_vm_at(to).await.unwrap();
        cluster.until_free(from, 2).await.unwrap();
        let verdict = cluster.judge_success(&watching, &migration, PeerToPeer::Required).await.unwrap();
        println!("{verdict}");
    }
    cluster.nothing_was_forbidden().unwrap();
}
