//! Attacks by a twin's arguments, and by a QEMU that was taken over after its VM had landed, on a lab. Run by
//! `make test-attacks`. More of them, without a lab, are beside the sandbox (`process/sandbox/attack_tests.rs`
//! and `vmm/qemu/attack_tests.rs` of the agent).

use serde_json::{Value, json};
use slackwater_lab::cluster::{Cluster, QemuVm};
use slackwater_lab::{LabConfig, NodeConfig};

use crate::assert_failed;
use crate::qemu_faults::with_twin;
use crate::qemu_preflight::until_reported;

const TO_B: &str = "target: {nodeName: node-b}";
/// No attack makes this file on node-b.
const ATTACKED: &str = "/tmp/attacked";

async fn start(vm: &QemuVm) -> Cluster {
    let node = |name| NodeConfig::new(name, ["mtty-1", "mtty-1"]);
    let config = vm.in_nodes(LabConfig::nodes([node("node-a"), node("node-b")])).unwrap();
    let mut cluster = Cluster::start_with(config, "").await.unwrap();
    cluster.start_qemu(vm.clone(), "node-a").await.unwrap();
    cluster.until_vm_at("node-a").await.unwrap();
    cluster
}

async fn nothing_was_reached(cluster: &Cluster, attack: &str) {
    let look = format!("ls {ATTACKED}* 2>/dev/null; true");
    let found = cluster.lab.node("node-b").unwrap().shell(&look).await.unwrap();
    assert_eq!(found, "", "{attack} has reached node-b");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a lab for minutes: make test-attacks"]
async fn attack_by_arguments_is_refused_by_name_or_by_the_sandbox_and_reaches_nothing() {
    let cluster = start(&QemuVm::counter(1)).await;
    let refused: [(&str, &[&str], &str); 13] = [
        (
            "command",
            &["-netdev", "user,id=n,guestfwd=tcp:10.0.2.9:1-cmd:touch /tmp/attacked"],
            "no other program",
        ),
        ("disk", &["-drive", "if=none,id=x,format=raw,file=/dev/kmsg"], "which the twin cannot use"),
        ("secret", &["-drive", "if=none,id=x,format=raw,file=/etc/slackwater/tls.key"], "not shown to twins"),
        ("journal", &["-chardev", "file,id=x,path=/var/lib/slackwater/state/x"], "in no folder"),
        ("written", &["-chardev", "file,id=x,path=/tmp/attacked"], "in no folder"),
        ("other-vm", &["-chardev", "socket,id=x,path=/run/slackwater/vms/demo.x/qmp.sock"], "in no folder"),
        ("device", &["-device", "vfio-pci,host=00:03.0"], "is not reserved for it"),
        ("incoming", &["-incoming", "exec:touch /tmp/attacked"], "only `defer` is right"),
        ("pid-file", &["-pidfile", "/tmp/attacked"], "in no folder"),
        ("daemon", &["-daemonize"], "follows the process"),
        ("no-sandbox", &["-sandbox", "off"], "adds it itself"),
        ("other-user", &["-runas", "root"], "user of its own"),
        ("tap", &["-netdev", "tap,id=n,script=/bin/sh"], "not /dev/net/tun"),
    ];
    for (name, more, words) in refused {
        with_twin(&cluster, |args: &mut Vec<Value>| args.extend(more.iter().map(|word| json!(word)))).await;
        until_reported(&cluster, name).await;
        cluster.migrate(name, TO_B).await.unwrap();
        let migration = cluster.until_ended(name).await.unwrap();
        println!("{name}: {:?}", crate::condition(&migration, "Succeeded"));
        let reason = if words.contains("shown") || words.contains("cannot use") {
            "FileMissing"
        } else {
            "ArgumentRefused"
        };
        assert_failed(&migration, reason, &[words]);
        nothing_was_reached(&cluster, name).await;
        cluster.until_vm_at("node-a").await.unwrap();
    }
    // What preflight does not see, the sandbox stops.
    let unseen: [(&str, &[&str]); 1] = [
        // QEMU would print each line that is no event, and the agent quotes its log.
        ("by-events", &["-trace", "events=/etc/slackwater/tls.key"]),
    ];
    for (name, more) in unseen {
        with_twin(&cluster, |args: &mut Vec<Value>| args.extend(more.iter().map(|word| json!(word)))).await;
        until_reported(&cluster, name).await;
        cluster.migrate(name, TO_B).await.unwrap();
        let migration = cluster.until_ended(name).await.unwrap();
        println!("{name}: {:?}", crate::condition(&migration, "Succeeded"));
        assert_failed(&migration, "TwinFailed", &[]);
        let (_, _, message) = crate::condition(&migration, "Succeeded");
        assert!(!message.contains("PRIVATE KEY"), "{message}");
        nothing_was_reached(&cluster, name).await;
        cluster.until_vm_at("node-a").await.unwrap();
    }
    with_twin(&cluster, |_| {}).await;
    cluster.migrate("repaired", TO_B).await.unwrap();
    cluster.until_ended("repaired").await.unwrap();
    cluster.until_vm_at("node-b").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a lab for a minute: make test-attacks"]
async fn attack_by_a_qemu_that_was_taken_over_reaches_nothing_of_the_node() {
    let vm = QemuVm::counter(1).with_second_monitor();
    let cluster = start(&vm).await;
    cluster.migrate("landing", TO_B).await.unwrap();
    cluster.until_ended("landing").await.unwrap();
    cluster.until_vm_at("node-b").await.unwrap();
    let node = cluster.lab.node("node-b").unwrap();
    let look = "p=$(pidof qemu-system-x86_64); \
                grep -E '^(Uid|CapEff|CapBnd|NoNewPrivs|Seccomp):' /proc/$p/status; ls /proc/$p/root /proc/$p/root/dev";
    let seen = node.shell(look).await.unwrap();
    println!("{seen}");
    let words: Vec<&str> = seen.split_whitespace().collect();
    let after = |word: &str| words.iter().skip_while(|found| **found != word).nth(1).copied();
    assert_ne!(after("Uid:"), Some("0"));
    for set in ["CapEff:", "CapBnd:"] {
        assert_eq!(after(set), Some("0000000000000000"), "{set}");
    }
    assert_eq!((after("NoNewPrivs:"), after("Seccomp:")), (Some("1"), Some("2")));
    for hidden in ["etc", "init", "modules", "mem", "kmsg", "tmp", "sda"] {
        assert!(!words.contains(&hidden), "{hidden} is there");
    }
    let attacks = [
        ("pmemsave", json!({"val": 0, "size": 16, "filename": ATTACKED})),
        ("chardev-add", json!({"id": "x", "backend": {"type": "file", "data": {"out": ATTACKED}}})),
        ("blockdev-add", json!({"driver": "file", "node-name": "x", "filename": "/etc/slackwater/tls.key"})),
        ("migrate", json!({"uri": format!("exec:touch {ATTACKED}")})),
    ];
    for (command, arguments) in attacks {
        let answer = vm.execute(node, command, arguments).await;
        println!("{command}: {answer:?}");
        nothing_was_reached(&cluster, command).await;
    }
}
