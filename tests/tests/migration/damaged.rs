use slackwater_lab::cluster::{Cluster, LabVm};
use slackwater_lab::{LabConfig, NodeConfig};

use crate::assert_failed;

#[tokio::test(flavor = "multi_thread")]
async fn a_blob_that_is_damaged_in_transit_is_never_loaded_and_the_vm_continues_at_the_source() {
    let two = || ["mtty-1", "mtty-1"];
    let nodes = [NodeConfig::new("node-a", two()), NodeConfig::new("node-b", two())];
    let cluster = Cluster::start(nodes).await.unwrap();
    LabVm::counter(2).start(cluster.lab.node("node-a").unwrap()).await.unwrap();
    cluster.until_vm_at("node-a").await.unwrap();
    let cases = [
        ("blob.1=corrupt", "BlobRejected", vec!["device 1", "digest"]),
        ("blob.0=truncate", "BlobRejected", vec!["device 0", "59 bytes", "60"]),
        ("blob.1=reorder", "BlobRejected", vec!["device 1", "begins at byte 24"]),
        // Here the driver itself notices first.
        ("blob.0=extend", "DeviceFailed", vec!["5a1ac0de-0002-4000-8000-000000000000", "ENOMEM"]),
        ("blob.vmm=corrupt", "BlobRejected", vec!["RAM and machine state"]),
    ];
    for (number, (fault, reason, words)) in cases.into_iter().enumerate() {
        let name = format!("damaged-{number}");
        cluster.set_faults("node-a", fault).await.unwrap();
        let watching = cluster.watch("node-a", "node-b").await.unwrap();
        cluster.migrate(&name, "target: {nodeName: node-b}").await.unwrap();
        let migration = cluster.until_ended(&name).await.unwrap();
        println!("{fault}: {:?}", crate::condition(&migration, "Succeeded"));
        assert_failed(&migration, reason, &words);
        cluster.until_vm_at("node-a").await.unwrap();
        cluster.until_free("node-b", 2).await.unwrap();
        cluster.judge_rollback(&watching, &migration).await.unwrap();
    }
    // Without a fault it works again.
    cluster.set_faults("node-a", "").await.unwrap();
    cluster.migrate("undamaged", "target: {nodeName: node-b}").await.unwrap();
    let migration = cluster.until_ended("undamaged").await.unwrap();
    assert_eq!(crate::condition(&migration, "Succeeded").0, "True");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_of_another_type_is_refused_by_its_driver_with_its_error() {
    let nodes = [NodeConfig::new("node-a", ["mtty-1"]), NodeConfig::new("node-b", ["mtty-2"])];
    let cluster = Cluster::start_with(LabConfig::nodes(nodes), "ignore-device-model").await.unwrap();
    cluster.set_faults("node-b", "ignore-device-model=yes").await.unwrap();
    LabVm::counter(1).start(cluster.lab.node("node-a").unwrap()).await.unwrap();
    cluster.until_vm_at("node-a").await.unwrap();
    let watching = cluster.watch("node-a", "node-b").await.unwrap();
    cluster.migrate("mismatched", "target: {nodeName: node-b}").await.unwrap();
    let migration = cluster.until_ended("mismatched").await.unwrap();
    let (_, reason, message) = crate::condition(&migration, "Succeeded");
    println!("{reason}: {message}");
    assert_failed(&migration, &reason, &["5a1ac0de-0002-4000-8000-000000000000", "EFAULT"]);
    cluster.until_vm_at("node-a").await.unwrap();
    cluster.until_free("node-b", 1).await.unwrap();
    cluster.judge_rollback(&watching, &migration).await.unwrap();
}
