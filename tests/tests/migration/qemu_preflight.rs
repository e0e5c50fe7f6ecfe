//! The reasons for which a migration of a QEMU VM would fail are reported before it starts, and before
//! anything is touched.

use std::time::Duration;

use serde_json::json;
use slackwater_api::AssignedVM;
use slackwater_api::condition::MIGRATABLE;
use slackwater_lab::cluster::{Cluster, NAMESPACE, QEMU_PROGRAM, QemuVm, has_condition};
use slackwater_lab::witness;
use slackwater_lab::{LabConfig, Node, NodeConfig};

use crate::{assert_failed, condition};

/// Pretends to be another version of QEMU.
const OTHER_QEMU: &str = "slackwater-lab-other-qemu";
const RULES: &str = "/etc/other-qemu";
const DISK: &str = slackwater_lab::guests::counter::DISK;

fn nodes(vm: &QemuVm, without: &[&str]) -> LabConfig {
    let one = NodeConfig::new("node-a", ["mtty-1"]);
    let mut other = NodeConfig::new("node-b", ["mtty-1"]);
    other.without_cpu_features = without.iter().map(|feature| (*feature).to_owned()).collect();
    let mut config = vm.in_nodes(LabConfig::nodes([one, other])).unwrap();
    config.image = config.image.with_program(OTHER_QEMU).unwrap();
    config
}

/// A cluster whose VM runs at node-a, and whose agent has described its QEMU.
async fn start(vm: QemuVm, without: &[&str]) -> Cluster {
    let mut cluster = Cluster::start_with(nodes(&vm, without), "").await.unwrap();
    cluster.start_qemu(vm, "node-a").await.unwrap();
    cluster.until_vm_at("node-a").await.unwrap();
    let line = cluster.until_agent_says("node-a", "QEMU has told what it is", Duration::from_secs(60)).await;
    println!("{}", line.unwrap());
    cluster
}

/// Migrates to node-b, which refuses with this reason and these words. The VM continues, and nothing is left
/// of a twin.
async fn refused(cluster: &Cluster, name: &str, reason: &str, words: &[&str]) -> String {
    let there = cluster.lab.node("node-b").unwrap();
    let watch = witness::watch(there).await.unwrap();
    let before = cluster.guest("node-a").await.unwrap();
    // There is no comparison until the source's agent has reported to the operator.
    until_described(cluster).await;
    until_reported(cluster, name).await;
    cluster.migrate(name, "target: {nodeName: node-b}").await.unwrap();
    let migration = cluster.until_ended(name).await.unwrap();
    assert_failed(&migration, reason, words);
    let (status, actual, message) = condition(&migration, "Prepared");
    assert_eq!((status.as_str(), actual.as_str()), ("False", reason), "{message}");
    println!("{message}");
    cluster.until_vm_at("node-a").await.unwrap();
    cluster.continues_at("node-a", &before).await.unwrap();
    nothing_runs(there).await;
    cluster.until_free("node-b", 1).await.unwrap();
    let trace = watch.testimony(there).await.unwrap();
    let touched: Vec<_> = trace.devices.iter().filter(|(_, seen)| !seen.changes.is_empty()).collect();
    assert!(touched.is_empty(), "{touched:#?}");
    message
}

async fn until_described(cluster: &Cluster) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
    loop {
        let described = cluster.describe("node-a").await.unwrap();
        if described.vms.iter().any(|vm| vm.qemu.is_some()) {
            return;
        }
        assert!(tokio::time::Instant::now() < deadline, "{:#?}", described.vms);
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Waits until the operator has a report of node-a that was made after this call: it shows a VM that is
/// announced now. Nothing listens on the socket of that VM.
pub(crate) async fn until_reported(cluster: &Cluster, name: &str) {
    let node = cluster.lab.node("node-a").unwrap();
    let marker = QemuVm { name: format!("before-{name}"), ..cluster.qemu().unwrap().clone() };
    node.shell(&format!("mkdir -p -m 700 {}", marker.directory())).await.unwrap();
    marker.publish(node).await.unwrap();
    let api = kube::Api::namespaced(cluster.client.clone(), NAMESPACE);
    let reported = |vm: &AssignedVM| Some(vm.status.is_some());
    cluster.until(api, &marker.name, "be reported", reported).await.unwrap();
    node.shell(&format!("rm -rf {}", marker.directory())).await.unwrap();
}

async fn nothing_runs(node: &Node) {
    let look = "pidof qemu-system-x86_64 real-qemu; \
                ls -d /sys/fs/cgroup/slackwater/*/ /run/slackwater/probe 2>/dev/null; true";
    assert_eq!(node.shell(look).await.unwrap(), "", "something is left on {}", node.name());
}

/// Replaces node-b's QEMU by one with other answers.
async fn replace_qemu(cluster: &Cluster, rules: &str) {
    let node = cluster.lab.node("node-b").unwrap();
    node.put(RULES, 0o600, rules.as_bytes()).await.unwrap();
    let install = format!(
        "[ -e /bin/real-qemu ] || mv {QEMU_PROGRAM} /bin/real-qemu; cp /bin/{OTHER_QEMU} {QEMU_PROGRAM}"
    );
    node.shell(&install).await.unwrap();
}

async fn until_migratable(cluster: &Cluster, wanted: &'static str) -> AssignedVM {
    let api = kube::Api::namespaced(cluster.client.clone(), NAMESPACE);
    let is = move |vm: &AssignedVM| has_condition(&vm.status.as_ref()?.conditions, MIGRATABLE, wanted);
    cluster.until(api, cluster.vm_name(), wanted, is).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_targets_qemu_lacks_is_reported_before_the_twin_is_started() {
    let cluster = start(QemuVm::counter(1).with_second_monitor(), &[]).await;
    let (here, there) = (cluster.lab.node("node-a").unwrap(), cluster.lab.node("node-b").unwrap());

    here.shell("mkdir -p /var/tmp /tmp/vvfat").await.unwrap();
    let disk = json!({"driver": "vvfat", "dir": "/tmp/vvfat", "node-name": "blocker", "rw": true});
    cluster.qemu().unwrap().execute(here, "blockdev-add", disk).await.unwrap();
    let vm = until_migratable(&cluster, "False/MigrationBlocked").await;
    let conditions = vm.status.unwrap().conditions;
    let message = &conditions.iter().find(|condition| condition.type_ == MIGRATABLE).unwrap().message;
    println!("{message}");
    assert!(
        message.contains("The vvfat (rw) format used by node 'blocker' does not support live migration"),
        "{message}"
    );
    cluster.qemu().unwrap().execute(here, "blockdev-del", json!({"node-name": "blocker"})).await.unwrap();
    until_migratable(&cluster, "True").await;

    there.shell(&format!("mv {DISK} {DISK}.away")).await.unwrap();
    let file = format!("names {DISK}, which is not there");
    refused(&cluster, "no-file", "FileMissing", &["twin.args[", &file]).await;

    replace_qemu(&cluster, "\"major\": 10\t\"major\": 9\n").await;
    let words = ["2 things are in the way", "is QEMU 9.0.2 there", "under QEMU 10.0.2", "FileMissing", &file];
    refused(&cluster, "older", "QEMUOlder", &words).await;
    there.shell(&format!("mv {DISK}.away {DISK}")).await.unwrap();

    replace_qemu(&cluster, "\"pc-i440fx-10.0\"\t\"pc-i440fx-9.9\"\n").await;
    let words = ["machine type is pc-i440fx-10.0", "the newest of its kind there is pc-i440fx-9.9"];
    refused(&cluster, "no-machine", "MachineTypeUnknown", &words).await;

    there.shell(&format!("mv /bin/real-qemu {QEMU_PROGRAM}")).await.unwrap();
    cluster.migrate("at-last", "target: {nodeName: node-b}").await.unwrap();
    let migration = cluster.until_ended("at-last").await.unwrap();
    let status = migration.status.unwrap();
    assert_eq!(has_condition(&status.conditions, "Succeeded", "True"), Some(true), "{status:#?}");
    for line in cluster.agent_log("node-b").await.lines().filter(|line| line.contains("said what it can do"))
    {
        println!("{line}");
    }
    cluster.nothing_was_forbidden().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_does_not_move_to_a_cpu_that_lacks_its_features() {
    let cluster = start(QemuVm::counter(1), &["aes", "movbe"]).await;
    let words = ["the guest sees 2 CPU features that cannot be had there under kvm: aes, movbe."];
    refused(&cluster, "lacking", "CPUFeaturesMissing", &words).await;
    cluster.nothing_was_forbidden().unwrap();
}
