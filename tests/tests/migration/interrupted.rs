use slackwater_api::VMMigration;
use slackwater_lab::NodeConfig;
use slackwater_lab::cluster::{Cluster, LabVm, has_condition};

use crate::assert_failed;

const STALL: &str = "blob.vmm=stall";

/// A migration that is held at slack water, with RAM in transit, while the fault is set.
pub(crate) async fn stalled(cluster: &Cluster, name: &str, fields: &str) -> VMMigration {
    cluster.set_faults("node-a", STALL).await.unwrap();
    cluster.migrate(name, &format!("target: {{nodeName: node-b}}, {fields}")).await.unwrap();
    let stopped =
        |migration: &VMMigration| has_condition(&migration.status.as_ref()?.conditions, "Stopped", "True");
    cluster.until(cluster.migrations(), name, "be Stopped", stopped).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_migration_that_is_interrupted_before_its_commit_leaves_the_vm_running_at_the_source() {
    let two = || ["mtty-1", "mtty-1"];
    let nodes = [NodeConfig::new("node-a", two()), NodeConfig::new("node-b", two())];
    let cluster = Cluster::start(nodes).await.unwrap();
    LabVm::counter(2).start(cluster.lab.node("node-a").unwrap()).await.unwrap();
    cluster.until_vm_at("node-a").await.unwrap();

    // The link is cut while state is moving.
    let watching = cluster.watch("node-a", "node-b").await.unwrap();
    stalled(&cluster, "cut", "").await;
    cluster.lab.cut_link("node-b").await.unwrap();
    let migration = cluster.until_ended("cut").await.unwrap();
    assert_failed(&migration, "PeerLost", &["node-b"]);
    cluster.until_vm_at("node-a").await.unwrap();
    cluster.until_free("node-b", 2).await.unwrap();
    cluster.judge_rollback(&watching, &migration).await.unwrap();

    // With the link still cut, nothing is touched.
    cluster.set_faults("node-a", "").await.unwrap();
    cluster.migrate("unreachable", "target: {nodeName: node-b}").await.unwrap();
    let migration = cluster.until_ended("unreachable").await.unwrap();
    assert_failed(&migration, "TargetUnreachable", &["node-b"]);
    cluster.until_free("node-b", 2).await.unwrap();
    cluster.lab.restore_link("node-b").await.unwrap();
    cluster.until_vm_at("node-a").await.unwrap();

    // It is not committed in time; and meanwhile, the same VM is not migrated a second time.
    let watching = cluster.watch("node-a", "node-b").await.unwrap();
    stalled(&cluster, "slow", "preCommitTimeout: 20s").await;
    cluster.migrate("second", "target: {nodeName: node-b}").await.unwrap();
    let second = cluster.until_ended("second").await.unwrap();
    let (status, reason, message) = crate::condition(&second, "Accepted");
    assert_eq!((status.as_str(), reason.as_str()), ("False", "MigrationInProgress"), "{message}");
    assert!(message.contains("slow"), "{message}");
    let migration = cluster.until_ended("slow").await.unwrap();
    assert_failed(&migration, "TimedOut", &["20s", "preCommitTimeout"]);
    cluster.until_vm_at("node-a").await.unwrap();
    cluster.until_free("node-b", 2).await.unwrap();
    cluster.judge_rollback(&watching, &migration).await.unwrap();

    // Deleting the object aborts the migration.
    let before = cluster.guest("node-a").await.unwrap();
    stalled(&cluster, "deleted", "").await;
    cluster.delete("deleted").await.unwrap();
    cluster.until_vm_at("node-a").await.unwrap();
    cluster.until_free("node-b", 2).await.unwrap();
    cluster.continues_at("node-a", &before).await.unwrap();
    cluster.nothing_was_forbidden().unwrap();
}
