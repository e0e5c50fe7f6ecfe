use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::api::Api;
use serde_json::{Value, json};
use slackwater_api::{AssignedVM, MigrationPhase, VMMigration};
use slackwater_lab::cluster::{Cluster, NAMESPACE, QemuVm, TIMEOUT, Watching, has_condition};
use slackwater_lab::witness::{PeerToPeer, Waking, quiesced_together, woke_together};
use slackwater_lab::{LabConfig, NodeConfig};

use crate::assert_failed;

const TO_B: &str = "target: {nodeName: node-b}";

/// Two nodes with two devices each, and a QEMU VM on the first.
async fn start(vm: &QemuVm) -> Cluster {
    let node = |name| NodeConfig::new(name, ["mtty-1", "mtty-1"]);
    let config = vm.in_nodes(LabConfig::nodes([node("node-a"), node("node-b")])).unwrap();
    let mut cluster = Cluster::start_with(config, "").await.unwrap();
    cluster.start_qemu(vm.clone(), "node-a").await.unwrap();
    cluster.until_vm_at("node-a").await.unwrap();
    cluster
}

fn succeeded(conditions: &[Condition]) -> bool {
    has_condition(conditions, "Succeeded", "True") == Some(true)
}

/// The VM moves, and the kernels' traces show that the invariants hold.
async fn moves(cluster: &Cluster, name: &str, from: &str, to: &str) {
    cluster.until_free(to, 2).await.unwrap();
    let watching = cluster.watch(from, to).await.unwrap();
    cluster.migrate(name, &format!("target: {{nodeName: {to}}}")).await.unwrap();
    let migration = cluster.until_ended(name).await.unwrap();
    let conditions = migration.status.clone().unwrap().conditions;
    assert!(succeeded(&conditions), "{name}: {conditions:#?}");
    cluster.until_vm_at(to).await.unwrap();
    let verdict = cluster.judge_success(&watching, &migration, PeerToPeer::Required).await.unwrap();
    println!("{name}:\n{verdict}");
}

/// Cancels a migration, and waits until the operator asks its source to abort.
async fn cancel(cluster: &Cluster, name: &str) {
    cluster.patch_spec(name, json!({"cancel": true})).await.unwrap();
    let aborting = |migration: &VMMigration| {
        has_condition(&migration.status.as_ref()?.conditions, "Succeeded", "Unknown/Aborting")
    };
    let seen = cluster.until(cluster.migrations(), name, "being aborted", aborting);
    // If it was not halted, it may have ended by then.
    let ended = cluster.until_ended(name);
    tokio::select! { seen = seen => drop(seen.unwrap()), ended = ended => drop(ended.unwrap()) }
}

/// Asserts that it was cancelled: the VM continues at the source, and nothing is left of the twin.
async fn was_cancelled(cluster: &Cluster, name: &str, watching: &Watching) -> VMMigration {
    let migration = cluster.until_ended(name).await.unwrap();
    assert_failed(&migration, "Aborted", &["cancel"]);
    assert_eq!(migration.status.as_ref().unwrap().phase, Some(MigrationPhase::RolledBack));
    cluster.until_vm_at("node-a").await.unwrap();
    cluster.until_free("node-b", 2).await.unwrap();
    assert!(cluster.vmms("node-b").await.unwrap().is_empty(), "a twin is left");
    cluster.judge_rollback(watching, &migration).await.unwrap();
    migration
}

/// Bytes per second. At this rate any state exceeds a budget of 1 ms.
const NARROW: &str = "1000";

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_migration_of_a_qemu_vm_leaves_it_running_before_and_at_the_gate() {
    let cluster = start(&QemuVm::counter(2).with_migration_events()).await;

    // At the gate: QEMU has stopped the VM, and waits for its agent.
    for phase in ["pausing", "capturing"] {
        let name = format!("at-{phase}");
        let watching = cluster.watch("node-a", "node-b").await.unwrap();
        cluster.set_faults("node-a", &format!("halt.source={phase} {name}\n")).await.unwrap();
        cluster.migrate(&name, TO_B).await.unwrap();
        cluster.until_agent_says("node-a", &format!("halted at {phase} {name}"), TIMEOUT).await.unwrap();
        let answer = cluster.qemu().unwrap().report(cluster.lab.node("node-a").unwrap()).await.unwrap();
        cancel(&cluster, &name).await;
        // A halted agent does not report that it has received the call.
        tokio::time::sleep(std::time::Duration::from_secs(2)).await;
        let later = cluster.qemu().unwrap().report(cluster.lab.node("node-a").unwrap()).await.unwrap();
        assert_eq!(later.count, answer.count, "the guest ran while its devices were held at the gate");
        cluster.set_faults("node-a", "").await.unwrap();
        was_cancelled(&cluster, &name, &watching).await;
    }

    // While the guest runs and its memory is copied, again and again.
    cluster.kill_agent("node-a").await.unwrap();
    cluster.restart_agent_with("node-a", &["--migration-bandwidth", NARROW]).await.unwrap();
    cluster.until_vm_at("node-a").await.unwrap();
    let watching = cluster.watch("node-a", "node-b").await.unwrap();
    let fields = format!("{TO_B}, downtimeBudget: 1ms, onBudgetExceeded: Proceed");
    cluster.migrate("in-pre-copy", &fields).await.unwrap();
    let estimated = |migration: &VMMigration| Some(migration.status.as_ref()?.estimate.is_some());
    cluster.until(cluster.migrations(), "in-pre-copy", "an estimate", estimated).await.unwrap();
    cancel(&cluster, "in-pre-copy").await;
    let migration = was_cancelled(&cluster, "in-pre-copy", &watching).await;
    let status = migration.status.unwrap();
    assert!(
        status.timeline.iter().all(|entry| entry.phase != "PAUSING"),
        "the guest was stopped: {status:#?}"
    );

    // A cancelled migration may be repeated.
    cluster.kill_agent("node-a").await.unwrap();
    cluster.restart_agent("node-a").await.unwrap();
    cluster.until_vm_at("node-a").await.unwrap();
    moves(&cluster, "after-all", "node-a", "node-b").await;
    cluster.nothing_was_forbidden().unwrap();
}

/// Changes the arguments of the VM's twin, as its administrator would in `vm.json`.
pub(crate) async fn with_twin(cluster: &Cluster, change: impl Fn(&mut Vec<Value>)) {
    let (vm, node) = (cluster.qemu().unwrap(), cluster.lab.node("node-a").unwrap());
    let path = format!("{}/vm.json", vm.directory());
    vm.publish(node).await.unwrap();
    let mut json: Value = serde_json::from_slice(&node.get(&path).await.unwrap()).unwrap();
    change(json.pointer_mut("/twin/args").unwrap().as_array_mut().unwrap());
    node.put(&format!("{path}.new"), 0o600, &serde_json::to_vec(&json).unwrap()).await.unwrap();
    node.shell(&format!("mv {path}.new {path}")).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_twin_that_qemu_cannot_start_is_reported_with_qemus_error_and_nothing_is_touched() {
    let cluster = start(&QemuVm::counter(2).with_migration_events()).await;
    let add = |more: &'static [&'static str]| {
        move |args: &mut Vec<Value>| args.extend(more.iter().map(|word| json!(word)))
    };
    let other_device = |args: &mut Vec<Value>| {
        for arg in args.iter_mut() {
            let text = arg
                .as_str()
                .unwrap_or_default()
                .replace("{device.1.sysfs}", "/sys/bus/mdev/devices/{device.1.name}x");
            *arg = json!(text);
        }
    };
    type Change = Box<dyn Fn(&mut Vec<Value>)>;
    let cases: [(&str, Change, &str, &[&str]); 2] = [
        ("unknown-option", Box::new(add(&["-tea-time"])), "TwinFailed", &["-tea-time: invalid option"]),
        ("other-device", Box::new(other_device), "ArgumentRefused", &["vfio-pci", "is not reserved for it"]),
    ];
    for (name, change, reason, words) in cases {
        with_twin(&cluster, change).await;
        let watching = cluster.watch("node-a", "node-b").await.unwrap();
        cluster.migrate(name, TO_B).await.unwrap();
        let migration = cluster.until_ended(name).await.unwrap();
        println!("{name}: {:?}", crate::condition(&migration, "Succeeded"));
        assert_failed(&migration, reason, words);
        assert!(cluster.vmms("node-b").await.unwrap().is_empty(), "{name}: a process is left");
        cluster.until_free("node-b", 2).await.unwrap();
        cluster.until_vm_at("node-a").await.unwrap();
        cluster.continues_at("node-a", &watching.before).await.unwrap();
        let (source, target) = cluster.traces(&watching).await.unwrap();
        let touched = source.devices.values().any(|device| !device.changes.is_empty());
        assert!(!touched, "{name}: {:#?}", source.devices);
        // Opening a free device may reset it.
        let driven =
            target.devices.values().flat_map(|device| &device.changes).any(|change| change.from.is_some());
        assert!(!driven, "{name}: {:#?}", target.devices);
        let left = cluster.lab.node("node-b").unwrap().shell("ls /run/slackwater/vms").await.unwrap();
        assert_eq!(left, "", "{name}: a directory is left");
    }
    with_twin(&cluster, |_| {}).await;
    moves(&cluster, "repaired", "node-a", "node-b").await;
    cluster.nothing_was_forbidden().unwrap();
}

/// The peak memory of a process in a node in KiB, by its kernel.
async fn peak_kib(cluster: &Cluster, node: &str, program: &str) -> u64 {
    let command = format!("grep VmHWM /proc/$(pidof {program} | cut -d ' ' -f 1)/status");
    let line = cluster.lab.node(node).unwrap().shell(&command).await.unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// How much the agent's memory may grow from two endless lines, of which it reads 4 MiB each: some 30 MiB, as
/// a growing buffer exists twice for a moment.
const GROWTH_KIB: u64 = 64 << 10;

#[tokio::test(flavor = "multi_thread")]
async fn garbage_on_a_monitors_socket_is_reported_and_disturbs_no_other_vm() {
    let vm = QemuVm::counter(2).with_migration_events();
    let cluster = start(&vm).await;
    let node = cluster.lab.node("node-a").unwrap();
    let cases = [
        ("garbage", "a line is not a JSON object"),
        ("endless", "a line has more than 4194304 bytes"),
        ("greeted-endless", "a line has more than 4194304 bytes"),
        ("silent", "nothing was said within 5000 ms"),
    ];
    let before_kib = peak_kib(&cluster, "node-a", "slackwater-node-agent").await;
    let mut babblers = Vec::new();
    for (what, words) in cases {
        let odd = QemuVm { name: what.to_owned(), ..vm.clone() };
        node.shell(&format!("mkdir -p -m 700 {}", odd.directory())).await.unwrap();
        let command = ["slackwater-lab-node", "babble", &odd.socket(), what];
        let pid = node.spawn(&format!("babble-{what}"), &command, &[]).await.unwrap();
        node.wait_line(&format!("babble-{what}"), "babbling", TIMEOUT).await.unwrap();
        odd.publish(node).await.unwrap();
        let reports = move |vm: &AssignedVM| {
            let conditions = &vm.status.as_ref()?.conditions;
            let condition = conditions.iter().find(|condition| condition.type_ == "Migratable")?;
            Some(condition.status == "False" && condition.message.contains(words))
        };
        let api: Api<AssignedVM> = Api::namespaced(cluster.client.clone(), NAMESPACE);
        let said = cluster.until(api, what, &format!("say {words:?}"), reports).await.unwrap();
        println!("{what}: {:#?}", said.status.unwrap().conditions);
        babblers.push((odd, pid));
    }
    // All continue to send garbage, and the agent connects again and again.
    moves(&cluster, "undisturbed", "node-a", "node-b").await;
    let after_kib = peak_kib(&cluster, "node-a", "slackwater-node-agent").await;
    println!("the agent's peak: {before_kib} KiB before, {after_kib} KiB after");
    assert!(after_kib < before_kib + GROWTH_KIB, "from {before_kib} KiB to {after_kib} KiB");

    // When a real QEMU replaces one, it is served.
    let mut good = None;
    for (odd, pid) in babblers {
        node.kill(pid).await.unwrap();
        if good.is_none() {
            node.shell(&format!("rm -f {} {}/vm.json", odd.socket(), odd.directory())).await.unwrap();
            odd.start(node).await.unwrap();
            good = Some(odd);
        }
    }
    let good = good.unwrap().name;
    let served = |vm: &AssignedVM| has_condition(&vm.status.as_ref()?.conditions, "Migratable", "True");
    let api: Api<AssignedVM> = Api::namespaced(cluster.client.clone(), NAMESPACE);
    cluster.until(api, &good, "be migratable", served).await.unwrap();
    cluster.nothing_was_forbidden().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_qemu_vm_with_devices_by_group_moves_both_ways_and_so_does_an_emulated_one() {
    let mut cluster = start(&QemuVm::counter(2).by_group()).await;
    moves(&cluster, "group-there", "node-a", "node-b").await;
    moves(&cluster, "group-back", "node-b", "node-a").await;

    cluster.kill_vmm("node-a").await.unwrap();
    cluster.qemu().unwrap().forget(cluster.lab.node("node-a").unwrap()).await.unwrap();
    cluster.until_free("node-a", 2).await.unwrap();
    cluster.start_qemu(QemuVm::counter(2).emulated(), "node-a").await.unwrap();
    cluster.until_vm_at("node-a").await.unwrap();
    for (name, from, to) in [("emulated-there", "node-a", "node-b"), ("emulated-back", "node-b", "node-a")] {
        cluster.until_free(to, 2).await.unwrap();
        let watching = cluster.watch(from, to).await.unwrap();
        cluster.migrate(name, &format!("target: {{nodeName: {to}}}")).await.unwrap();
        let conditions = cluster.until_ended(name).await.unwrap().status.unwrap().conditions;
        assert!(succeeded(&conditions), "{name}: {conditions:#?}");
        cluster.until_vm_at(to).await.unwrap();
        cluster.continues_at(to, &watching.before).await.unwrap();
        // The kernel does not see an emulated vCPU, but it sees the devices.
        let (source, target) = cluster.traces(&watching).await.unwrap();
        quiesced_together(&source, PeerToPeer::Required).unwrap();
        woke_together(&target, Waking::AfterLoad, PeerToPeer::Required).unwrap();
    }
    cluster.nothing_was_forbidden().unwrap();
}
