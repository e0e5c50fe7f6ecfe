use slackwater_lab::cluster::{Cluster, QemuVm, has_condition};
use slackwater_lab::guests::lines::check_disk;
use slackwater_lab::witness::PeerToPeer;
use slackwater_lab::{LabConfig, NodeConfig};

/// Two nodes with two devices each, and memory for a QEMU VM.
fn nodes(vm: &QemuVm) -> LabConfig {
    let node = |name| NodeConfig::new(name, ["mtty-1", "mtty-1"]);
    vm.in_nodes(LabConfig::nodes([node("node-a"), node("node-b")])).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_qemu_vm_moves_with_its_devices_and_back_and_continues_to_count() {
    let vm = QemuVm::counter(2).with_migration_events().by_descriptor();
    let mut cluster = Cluster::start_with(nodes(&vm), "").await.unwrap();
    // It returns over several streams.
    cluster.kill_agent("node-b").await.unwrap();
    cluster.restart_agent_with("node-b", &["--migration-channels", "2"]).await.unwrap();
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
    for (node, channels) in [("node-b", 1), ("node-a", 3)] {
        let log = cluster.agent_log(node).await;
        let verified = log.lines().filter(|line| line.contains("blob=Vmm") && line.contains("verified"));
        assert_eq!(verified.count(), channels, "streams that came to {node}");
    }
    cluster.nothing_was_forbidden().unwrap();
}

/// Bytes per second. At this rate the final state of the devices, 36 bytes each, exceeds a budget of 1 ms.
const NARROW: &str = "1000";

#[tokio::test(flavor = "multi_thread")]
async fn a_budget_that_cannot_be_met_aborts_the_migration_or_is_exceeded_as_its_user_wants() {
    let vm = QemuVm::counter(2).with_migration_events();
    let mut cluster = Cluster::start_with(nodes(&vm), "").await.unwrap();
    cluster.kill_agent("node-a").await.unwrap();
    cluster.restart_agent_with("node-a", &["--migration-bandwidth", NARROW]).await.unwrap();
    cluster.start_qemu(vm, "node-a").await.unwrap();
    cluster.until_vm_at("node-a").await.unwrap();
    let before = cluster.guest("node-a").await.unwrap();

    cluster.migrate("careful", "target: {nodeName: node-b}, downtimeBudget: 1ms").await.unwrap();
    let status = cluster.until_ended("careful").await.unwrap().status.unwrap();
    println!("{}", serde_json::to_string_pretty(&status).unwrap());
    let given_up = has_condition(&status.conditions, "Succeeded", "False/BudgetExceeded");
    assert_eq!(given_up, Some(true), "{status:#?}");
    let message = &status.conditions.iter().find(|c| c.type_ == "Succeeded").unwrap().message;
    assert!(message.contains("its downtimeBudget is 1ms"), "{message}");
    let estimate = status.estimate.clone().unwrap();
    assert_eq!(estimate.allowed, None, "{estimate:?}");
    assert!(
        status.timeline.iter().all(|entry| entry.phase != "PAUSING"),
        "the guest was stopped: {status:#?}"
    );
    cluster.until_vm_at("node-a").await.unwrap();
    cluster.until_free("node-b", 2).await.unwrap();
    let after = cluster.guest("node-a").await.unwrap();
    assert!(after.count > before.count && after.errors == 0, "{before:?} {after:?}");

    let fields = "target: {nodeName: node-b}, downtimeBudget: 1ms, onBudgetExceeded: Proceed";
    let watching = cluster.watch("node-a", "node-b").await.unwrap();
    cluster.migrate("bold", fields).await.unwrap();
    let migration = cluster.until_ended("bold").await.unwrap();
    let status = migration.status.clone().unwrap();
    println!("{}", serde_json::to_string_pretty(&status).unwrap());
    assert_eq!(has_condition(&status.conditions, "Succeeded", "True"), Some(true), "{status:#?}");
    assert!(status.estimate.clone().unwrap().allowed.is_some(), "{status:#?}");
    let reasons = cluster.event_reasons("bold").await.unwrap();
    assert!(reasons.iter().any(|reason| reason == "BudgetExceeded"), "{reasons:?}");
    cluster.until_vm_at("node-b").await.unwrap();
    println!("{}", cluster.judge_success(&watching, &migration, PeerToPeer::Required).await.unwrap());
    cluster.nothing_was_forbidden().unwrap();
}

/// How many migrations the Linux guest has.
const MIGRATIONS: &str = "SLACKWATER_LINUX_MIGRATIONS";
const TEN: u32 = 10;
const DISK_MIB: u32 = 16;

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes minutes: make linux-guest"]
async fn a_linux_loses_nothing_on_its_serial_ports_and_its_shared_disk_however_often_it_moves() {
    let migrations = std::env::var(MIGRATIONS).map_or(TEN, |number| number.parse().unwrap());
    let vm = QemuVm::linux(2).with_shared_disk().with_second_monitor();
    let config = nodes(&vm).with_shared_disk(DISK_MIB);
    let mut cluster = Cluster::start_with(config, "").await.unwrap();
    cluster.start_qemu(vm, "node-a").await.unwrap();
    cluster.until_vm_at("node-a").await.unwrap();
    let (mut from, mut to) = ("node-a", "node-b");
    let mut counted = 0;
    for number in 1..=migrations {
        let name = format!("linux-{number}");
        let watching = cluster.watch(from, to).await.unwrap();
        cluster.migrate(&name, &format!("target: {{nodeName: {to}}}, downtimeBudget: 5s")).await.unwrap();
        let status = cluster.until_ended(&name).await.unwrap().status.unwrap();
        assert_eq!(has_condition(&status.conditions, "Succeeded", "True"), Some(true), "{status:#?}");
        let after = cluster.continues_at(to, &watching.before).await.unwrap();
        assert_eq!(after.errors, 0, "{after:?}");
        println!("{number}: from {from} to {to}, {} lines, timings {:?}", after.count, status.timings);
        counted = after.count;
        cluster.until_vm_at(to).await.unwrap();
        (from, to) = (to, from);
    }
    // The writer is killed, and the disk is consistent.
    cluster.kill_vmm(from).await.unwrap();
    let disk = std::fs::read(cluster.lab.shared_disk().unwrap()).unwrap();
    let written = check_disk(&disk).unwrap();
    println!("{written} lines on the disk");
    assert!(written >= counted, "{written} lines are on the disk, and the guest has counted {counted}");
}
