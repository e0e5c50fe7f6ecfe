//! Whether a VM runs is not known at first: its VMM's agent has restarted without its vm.json, or the VMM does
//! not answer.

use std::time::Duration;

use rustix::process::Signal;
use slackwater_api::VMMigration;
use slackwater_lab::NodeConfig;
use slackwater_lab::cluster::{Cluster, LabVm};
use slackwater_lab::witness::PeerToPeer;

use crate::assert_failed;
use crate::interrupted::stalled;

const VM_JSON: &str = "/run/slackwater/vms/demo.counter/vm.json";

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_is_neither_lost_without_its_vm_json_nor_by_a_twin_that_stands_still() {
    let two = || ["mtty-1", "mtty-1"];
    let nodes = [NodeConfig::new("node-a", two()), NodeConfig::new("node-b", two())];
    let cluster = Cluster::start(nodes).await.unwrap();
    let [a, b] = ["node-a", "node-b"].map(|name| cluster.lab.node(name).unwrap());
    LabVm::counter(2).start(a).await.unwrap();
    cluster.until_vm_at("node-a").await.unwrap();

    // Its agent is killed while state is moving, and finds no vm.json, or one of something else.
    let vm_json = a.get(VM_JSON).await.unwrap();
    for (name, command, words) in
        [("removed", "rm", "is missing"), ("edited", "printf '{\"namespace\": 7}' >", "cannot be used")]
    {
        let watching = cluster.watch("node-a", "node-b").await.unwrap();
        let before = cluster.guest("node-a").await.unwrap();
        stalled(&cluster, name, "").await;
        cluster.kill_agent("node-a").await.unwrap();
        a.shell(&format!("{command} {VM_JSON}")).await.unwrap();
        cluster.set_faults("node-a", "").await.unwrap();
        cluster.restart_agent("node-a").await.unwrap();
        let migration = cluster.until_ended(name).await.unwrap();
        assert_failed(&migration, "AgentRestarted", &["vm.json", words]);
        cluster.continues_at("node-a", &before).await.unwrap();
        a.put(VM_JSON, 0o644, &vm_json).await.unwrap();
        cluster.until_vm_at("node-a").await.unwrap();
        cluster.until_free("node-b", 2).await.unwrap();
        cluster.judge_rollback(&watching, &migration).await.unwrap();
    }

    // The twin stands still when it is to run the VM.
    let before = cluster.guest("node-a").await.unwrap();
    let watching = cluster.watch("node-a", "node-b").await.unwrap();
    cluster.set_faults("node-b", "halt.destination=starting still\n").await.unwrap();
    cluster.migrate("still", "target: {nodeName: node-b}").await.unwrap();
    cluster.until_agent_says("node-b", "halted at starting still", Duration::from_secs(60)).await.unwrap();
    let [twin] = cluster.vmms("node-b").await.unwrap()[..] else { panic!("one twin") };
    b.signal(twin, Signal::STOP).await.unwrap();
    cluster.set_faults("node-b", "").await.unwrap();
    let doubted = |migration: &VMMigration| {
        let doubts = &migration.status.as_ref()?.conditions;
        Some(doubts.iter().any(|condition| {
            let doubt = condition.type_ == "InDoubt" && condition.status == "True";
            doubt && condition.reason == "VMMFailed"
        }))
    };
    let doubtful = cluster.until(cluster.migrations(), "still", "be InDoubt", doubted).await.unwrap();
    let (_, _, message) = crate::condition(&doubtful, "InDoubt");
    assert!(message.contains(&format!("process {twin} lives")), "{message}");
    b.signal(twin, Signal::CONT).await.unwrap();
    let migration = cluster.until_ended("still").await.unwrap();
    let (status, _, message) = crate::condition(&migration, "Succeeded");
    assert_eq!(status, "True", "{message}");
    cluster.until_vm_at("node-b").await.unwrap();
    cluster.continues_at("node-b", &before).await.unwrap();
    cluster.judge_success(&watching, &migration, PeerToPeer::Required).await.unwrap();
    cluster.nothing_was_forbidden().unwrap();
}
