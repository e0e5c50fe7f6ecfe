use slackwater_api::VMMigration;
use slackwater_lab::NodeConfig;
use slackwater_lab::cluster::{Cluster, LabVm, NAMESPACE};
use slackwater_lab::witness;

use crate::condition;

/// Waits for a refusal and checks its reason and its message.
async fn refused(cluster: &Cluster, name: &str, reason: &str, words: &[&str]) -> VMMigration {
    let migration = cluster.until_ended(name).await.unwrap();
    let (status, actual, message) = condition(&migration, "Accepted");
    assert_eq!((status.as_str(), actual.as_str()), ("False", reason), "{message}");
    for word in words {
        assert!(message.contains(word), "{message:?} does not say {word:?}");
    }
    migration
}

#[tokio::test(flavor = "multi_thread")]
async fn an_impossible_migration_is_refused_with_a_reason_before_any_device_is_touched() {
    let nodes = [
        NodeConfig::new("node-a", ["mtty-1", "mtty-1"]),
        NodeConfig::new("node-b", ["mtty-1"]),
        NodeConfig::new("node-c", ["mtty-2", "mtty-2"]),
    ];
    let cluster = Cluster::start(nodes).await.unwrap();
    LabVm::counter(2).start(cluster.lab.node("node-a").unwrap()).await.unwrap();
    cluster.until_vm_at("node-a").await.unwrap();
    let mut watches = Vec::new();
    for node in cluster.lab.nodes() {
        watches.push((node, witness::watch(node).await.unwrap()));
    }
    let before = cluster.guest("node-a").await.unwrap();

    let unknown = format!(
        "apiVersion: slackwater.dev/v1alpha1\nkind: VMMigration\nmetadata: {{name: unknown, namespace: {NAMESPACE}}}\n\
         spec: {{vmRef: {{kind: AssignedVM, name: unknown}}}}\n"
    );
    cluster.apply("unknown", &unknown).await.unwrap();
    refused(&cluster, "unknown", "VMNotFound", &["unknown", "counter"]).await;
    let cases = [
        ("to-itself", "target: {nodeName: node-a}", "TargetIsSource", vec!["node-a"]),
        (
            "too-few",
            "target: {nodeName: node-b}",
            "NoMatchingDevices",
            vec!["node-b", "1 free", "mtty-1", "2"],
        ),
        ("other-type", "target: {nodeName: node-c}", "NoMatchingDevices", vec!["node-c", "mtty-2", "mtty-1"]),
        ("nowhere", "target: {nodeName: node-z}", "TargetNotFound", vec!["node-z"]),
        ("anywhere", "", "NoSuitableNode", vec!["node-b", "node-c"]),
    ];
    for (name, fields, reason, words) in cases {
        cluster.migrate(name, fields).await.unwrap();
        refused(&cluster, name, reason, &words).await;
    }
    let bad = cluster.migrate("no-time", "preCommitTimeout: soon").await;
    match bad {
        // An API server that validates this with the schema refuses it.
        Err(error) => assert!(format!("{error:#}").contains("preCommitTimeout"), "{error:#}"),
        Ok(()) => {
            refused(&cluster, "no-time", "InvalidSpec", &["preCommitTimeout", "soon", "5m"]).await;
        }
    }

    cluster.continues_at("node-a", &before).await.unwrap();
    for (node, watch) in watches {
        let trace = watch.testimony(node).await.unwrap();
        let touched: Vec<_> = trace.devices.iter().filter(|(_, seen)| !seen.changes.is_empty()).collect();
        assert!(touched.is_empty(), "{}: {touched:#?}", node.name());
    }
    cluster.nothing_was_forbidden().unwrap();
}
