//! The lab itself: its nodes, its link, its control plane and its witness work as the other tests assume.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test fails by panicking, in its own functions, too"
)]

use std::{
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use slackwater_lab::{
    Image, Lab, LabConfig, Node, NodeConfig,
    cluster::QemuVm,
    guests::{Report, lines::check_disk},
    host::workspace_program,
    node::protocol::Ending,
    witness::{self, PeerToPeer, State, Waking},
};

const TIMEOUT: Duration = Duration::from_secs(10);

/// How long a node may take to come up, scaled by the load of this machine.
fn boot_limit() -> Duration {
    let load = std::fs::read_to_string("/proc/loadavg").unwrap();
    let load: f64 = load.split_whitespace().next().unwrap().parse().unwrap();
    let cpus = std::thread::available_parallelism().unwrap().get() as f64;
    Duration::from_secs(10).mul_f64((load / cpus).max(1.0))
}

#[tokio::test]
async fn two_nodes_come_up_in_ten_seconds_each_with_its_devices_and_a_link_that_can_be_cut() {
    let begin = Instant::now();
    let lab = Lab::start(LabConfig::nodes([
        NodeConfig::new("node-a", ["mtty-1", "mtty-2"]),
        NodeConfig::new("node-b", ["mtty-1"]),
    ]))
    .await
    .unwrap();
    let (a, b) = (lab.node("node-a").unwrap(), lab.node("node-b").unwrap());
    println!("two nodes up after {:?}", begin.elapsed());
    assert!(begin.elapsed() < 2 * boot_limit(), "up after {:?} only", begin.elapsed());

    assert_eq!(a.devices().len(), 2);
    for (device, kind) in a.devices().iter().zip(["mtty-1", "mtty-2"]) {
        let link = a.shell(&format!("readlink /sys/bus/mdev/devices/{device}/mdev_type")).await.unwrap();
        assert!(link.trim().ends_with(kind), "{device} is {link}");
        a.shell(&format!("ls /sys/bus/mdev/devices/{device}/vfio-dev/vfio*")).await.unwrap();
    }
    assert_eq!(b.shell("ls /dev/vfio/devices").await.unwrap().lines().count(), 1);
    b.shell("test -c /dev/kvm && test -c /dev/iommu").await.unwrap();
    assert_eq!(b.get_text("/proc/sys/kernel/hostname").await.unwrap().trim(), "node-b");

    let ping = |limit: u32| ["ping".to_owned(), "-c1".into(), format!("-W{limit}"), "10.77.0.2".into()];
    let reaches_b = async |limit: u32| {
        let words = ping(limit);
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        a.exec(&words).await.unwrap().ending == Some(Ending::Status(0))
    };
    assert!(reaches_b(5).await);
    lab.cut_link("node-b").await.unwrap();
    assert!(!reaches_b(1).await, "a cut link carries nothing");
    assert_eq!(b.shell("echo here").await.unwrap(), "here\n", "the lab still reaches a node that is cut off");
    lab.restore_link("node-b").await.unwrap();
    assert!(reaches_b(5).await);

    let clock = a.clock().await.unwrap();
    println!("clock of node-a: {clock:?}");
    assert!(clock.error_ns < 50_000_000, "the clock is known only to {} ns", clock.error_ns);
}

#[tokio::test]
async fn programs_in_a_node_are_run_followed_and_killed() {
    let lab = Lab::start(LabConfig::nodes([NodeConfig::new("node-a", ["mtty-1"])])).await.unwrap();
    let node = lab.node("node-a").unwrap();

    let executed = node.exec_for(&["sh", "-c", "cat; echo wrong >&2; exit 3"], b"in", TIMEOUT).await.unwrap();
    assert_eq!((executed.stdout.as_slice(), executed.stderr.as_slice()), (&b"in"[..], &b"wrong\n"[..]));
    assert_eq!(executed.ending, Some(Ending::Status(3)));
    assert!(executed.success().unwrap_err().to_string().contains("wrong"));
    let too_long = node.exec_for(&["sh", "-c", "sleep 1000 & wait"], b"", Duration::from_millis(300)).await;
    assert_eq!(too_long.unwrap().ending, None);
    let missing = node.exec(&["no-such-program"]).await.unwrap_err().to_string();
    assert!(missing.contains("no-such-program"), "{missing}");

    let content: Vec<u8> = (0..3_000_000_u32).map(|n| (n % 251) as u8).collect();
    node.put("/var/lib/some/where", 0o640, &content).await.unwrap();
    assert!(node.get("/var/lib/some/where").await.unwrap() == content);
    assert_eq!(node.shell("stat -c %a /var/lib/some/where").await.unwrap(), "640\n");

    let pid = node.spawn("short", &["sh", "-c", "echo $WORD; exit 5"], &[("WORD", "spoken")]).await.unwrap();
    assert_eq!(node.wait(pid, TIMEOUT).await.unwrap(), Some(Ending::Status(5)));
    node.wait_line("short", "spoken", TIMEOUT).await.unwrap();
    assert!(node.wait_line("short", "unspoken", TIMEOUT).await.is_err());
    assert_eq!(node.get_text("/var/log/short.log").await.unwrap(), "spoken\n");

    let script = "setsid sleep 1000 & echo child=$!; sleep 1000";
    let pid = node.spawn("long", &["sh", "-c", script], &[]).await.unwrap();
    let line = node.wait_line("long", "child=", TIMEOUT).await.unwrap();
    let child: u32 = line.split_once('=').unwrap().1.trim().parse().unwrap();
    assert_eq!(node.get_text(&format!("/proc/{child}/cgroup")).await.unwrap(), "0::/lab/long\n");
    assert_eq!(node.wait(child, Duration::from_millis(100)).await.unwrap(), None);
    node.kill_group("long").await.unwrap();
    assert_eq!(node.wait(pid, TIMEOUT).await.unwrap(), Some(Ending::Signal(9)));
    assert_eq!(node.wait(child, TIMEOUT).await.unwrap(), Some(Ending::Unknown), "its child is dead, too");

    let console = std::fs::read_to_string(node.console()).unwrap();
    assert!(console.contains("short: spoken"), "{console}");
}

#[test]
fn no_program_survives_a_killed_lab() {
    let mut lab = Command::new(workspace_program("slackwater-lab").unwrap())
        .args(["--node", "node-a", "--stay"])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(lab.stderr.take().unwrap()).lines();
    let up = lines.next().unwrap().unwrap();
    let folder = PathBuf::from(up.rsplit_once(' ').unwrap().1);
    let machines = machines_of(&folder);
    assert_eq!(machines.len(), 1, "the QEMU of {} was not found", folder.display());
    // Opened while it lives, since its number may be reused later.
    let machine = rustix::process::Pid::from_raw(machines[0]).unwrap();
    let machine = rustix::process::pidfd_open(machine, rustix::process::PidfdFlags::empty()).unwrap();
    lab.kill().unwrap();
    lab.wait().unwrap();
    let mut descriptors = [rustix::event::PollFd::new(&machine, rustix::event::PollFlags::IN)];
    let limit = rustix::event::Timespec { tv_sec: 10, tv_nsec: 0 };
    assert_eq!(rustix::event::poll(&mut descriptors, Some(&limit)).unwrap(), 1, "QEMU lives on");
    assert!(folder.exists(), "a killed lab cannot remove it");
    drop(tokio::runtime::Runtime::new().unwrap().block_on(Lab::start(LabConfig::default())).unwrap());
    assert!(!folder.exists(), "the next lab removes it");
}

/// The QEMU processes whose arguments name this folder.
fn machines_of(folder: &Path) -> Vec<i32> {
    let folder = folder.to_str().unwrap();
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let ours = |pid: &i32| {
        let arguments = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        arguments.starts_with(b"qemu") && String::from_utf8_lossy(&arguments).contains(folder)
    };
    processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(ours).collect()
}

#[tokio::test]
async fn a_control_plane_serves_kubectl_helm_and_an_account_with_the_rights_that_a_chart_gave_it() {
    let begin = Instant::now();
    let lab = Lab::start(LabConfig::default().with_control_plane()).await.unwrap();
    println!("control plane up after {:?}", begin.elapsed());
    let plane = lab.control_plane().unwrap();
    let namespaces = plane.kubectl(&["get", "namespaces", "-o", "name"]).await.unwrap();
    assert!(namespaces.contains("namespace/default"), "{namespaces}");
    let refused = plane.kubectl(&["get", "no-such-things"]).await.unwrap_err().to_string();
    assert!(refused.contains("no-such-things"), "{refused}");

    let chart = write_chart(lab.folder());
    plane.helm_install("probe", &chart, "probe-system", &[("account", "reader")]).await.unwrap();
    assert!(plane.helm(&["list", "--namespace", "probe-system"]).await.unwrap().contains("deployed"));

    let kubeconfig = plane.service_account_kubeconfig("probe-system", "reader").await.unwrap();
    let kubeconfig = kubeconfig.to_str().unwrap();
    let as_reader = async |arguments: &[&str]| {
        let mut all = vec!["--kubeconfig", kubeconfig];
        all.extend(arguments);
        plane.kubectl(&all).await
    };
    as_reader(&["get", "configmaps"]).await.unwrap();
    let forbidden = as_reader(&["get", "secrets"]).await.unwrap_err().to_string();
    assert!(forbidden.contains("forbidden"), "{forbidden}");

    let account = "system:serviceaccount:probe-system:reader";
    let events: Vec<_> = plane.audit().unwrap().into_iter().filter(|event| event.user == account).collect();
    let status = |resource: &str| {
        events
            .iter()
            .find(|event| event.resource == resource && event.verb == "list")
            .map(|event| event.status)
    };
    assert_eq!((status("configmaps"), status("secrets")), (Some(200), Some(403)), "{events:?}");
}

/// A chart with an account that may read config maps.
fn write_chart(folder: &Path) -> PathBuf {
    let chart = folder.join("probe");
    std::fs::create_dir_all(chart.join("templates")).unwrap();
    std::fs::write(chart.join("Chart.yaml"), "apiVersion: v2\nname: probe\nversion: 0.1.0\n").unwrap();
    let account = r#"
apiVersion: v1
kind: ServiceAccount
metadata: {name: "{{ .Values.account }}"}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: "{{ .Values.account }}"}
rules: [{apiGroups: [""], resources: [configmaps], verbs: [list]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: "{{ .Values.account }}"}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: "{{ .Values.account }}"}
subjects: [{kind: ServiceAccount, name: "{{ .Values.account }}", namespace: "{{ .Release.Namespace }}"}]
"#;
    std::fs::write(chart.join("templates/account.yaml"), account).unwrap();
    chart
}

/// A QEMU VM in a node, with the node's devices. QMP input is `/tmp/qmp`, QMP output is its log.
async fn spawn_qemu(node: &Node, more: &str) {
    let devices: String = node
        .devices()
        .iter()
        .map(|device| format!(" -device vfio-pci,sysfsdev=/sys/bus/mdev/devices/{device},iommufd=iommufd0"))
        .collect();
    let script = format!(
        "exec 3<>/tmp/qmp; exec qemu-system-x86_64 -nodefaults -no-user-config -display none \
         -machine pc,accel=kvm -cpu host -m 32 -object iommufd,id=iommufd0{devices} -qmp stdio {more} <&3"
    );
    node.shell("mkfifo /tmp/qmp").await.unwrap();
    node.spawn("qemu", &["sh", "-c", &script], &[]).await.unwrap();
    qmp(node, "qmp_capabilities", "{}").await;
    node.wait_line("qemu", r#"{"return": {}}"#, Duration::from_secs(60)).await.unwrap();
}

async fn qmp(node: &Node, command: &str, arguments: &str) {
    let line = format!("{{\"execute\": \"{command}\", \"arguments\": {arguments}}}");
    node.shell(&format!("echo '{line}' >/tmp/qmp")).await.unwrap();
}

/// QEMU alone migrates devices in a known order, which the witness must see.
#[tokio::test]
async fn the_witness_sees_a_qemu_vm_move_and_which_invariants_it_breaks() {
    let node = |name: &str| NodeConfig { memory_mib: 768, ..NodeConfig::new(name, ["mtty-1", "mtty-1"]) };
    let config = LabConfig::nodes([node("node-a"), node("node-b")]);
    let image = Image::default().with_qemu().unwrap();
    let lab = Lab::start(LabConfig { image, ..config }).await.unwrap();
    let (a, b) = (lab.node("node-a").unwrap(), lab.node("node-b").unwrap());
    let (watch_a, watch_b) = (witness::watch(a).await.unwrap(), witness::watch(b).await.unwrap());

    let missing = watch_a.testimony(a).await.unwrap().of_devices(a.devices()).unwrap_err().to_string();
    assert!(missing.contains("saw nothing"), "{missing}");

    tokio::join!(spawn_qemu(a, ""), spawn_qemu(b, "-incoming tcp:10.77.0.2:4444"));
    qmp(a, "migrate", r#"{"uri": "tcp:10.77.0.2:4444"}"#).await;
    b.wait_line("qemu", r#""event": "RESUME""#, Duration::from_secs(60)).await.unwrap();
    // Wait for its end, so that the witness has everything that happens at S after the stop.
    qmp(a, "quit", "{}").await;
    a.wait_line("qemu", r#""event": "SHUTDOWN""#, Duration::from_secs(60)).await.unwrap();

    let source = watch_a.testimony(a).await.unwrap().of_devices(a.devices()).unwrap();
    let destination = watch_b.testimony(b).await.unwrap().of_devices(b.devices()).unwrap();
    println!("clock of node-a: error {} ns, drift {} ns", source.clock.error_ns(), source.clock.drift_ns());
    println!("vCPU runs: {} at S, {} at D", source.vcpus.runs.len(), destination.vcpus.runs.len());
    for trace in [&source, &destination] {
        for device in trace.devices.keys() {
            let path: Vec<&str> = trace.states_of(device).iter().map(|(state, _)| state.name()).collect();
            println!("{} {device}: {}", trace.node, path.join(" "));
        }
    }

    println!("I1: {:?}", witness::one_runner(&source, &destination).unwrap());
    assert!(witness::one_runner(&destination, &source).is_err());
    assert!(witness::never_ran(&destination).is_err());
    witness::quiesced_together(&source, PeerToPeer::Required).unwrap();
    assert!(
        witness::captured_at_slack_water(&source).unwrap() >= 2,
        "one read of final data for each device"
    );
    // At the destination QEMU moves one device after the other from RESUMING through STOP to RUNNING_P2P.
    let broken = witness::woke_together(&destination, Waking::AfterLoad, PeerToPeer::Required).unwrap_err();
    println!("as expected of QEMU: {broken}");
    assert!(broken.what.contains("RESUMING, not loaded"), "{broken}");
    for device in b.devices() {
        assert_eq!(destination.final_state(device), Some(State::Running));
        let written: u64 = destination.devices[device].accesses.iter().map(|access| access.bytes).sum();
        assert_eq!(written, 60, "mtty's state has 60 bytes");
    }
}

/// Enough rounds to see that a guest continues to count: 20 rounds are 0.4 s.
const ROUNDS: u64 = 20;

/// 32,768 lines of the Linux guest, more than ten minutes.
const SHARED_DISK_MIB: u32 = 16;

async fn lab_for(vm: &QemuVm) -> Lab {
    let node = |name: &str| NodeConfig {
        memory_mib: vm.node_memory_mib(),
        ..NodeConfig::new(name, vec!["mtty-1"; vm.devices])
    };
    let image = vm.in_image(Image::default()).unwrap();
    let config = LabConfig::nodes([node("node-a"), node("node-b")]);
    let shared_disk_mib = vm.shared_disk.then_some(SHARED_DISK_MIB);
    Lab::start(LabConfig { image, shared_disk_mib, ..config }).await.unwrap()
}

/// The VM counts at `a`, is migrated by hand, and continues to count at `b` with nothing lost.
async fn continues_to_count(vm: &QemuVm, a: &Node, b: &Node) {
    let begin = Instant::now();
    vm.start(a).await.unwrap();
    println!("{} with {:?}, {:?}: counts after {:?}", vm.name, vm.accelerator, vm.access, begin.elapsed());
    let counted = vm.report(a).await.unwrap();
    vm.until_counted(a, counted.count + ROUNDS).await.unwrap();

    vm.await_migration(b).await.unwrap();
    let begin = Instant::now();
    vm.migrate(a, b).await.unwrap();
    println!("moved after {:?}", begin.elapsed());
    let stopped = vm.report(a).await.unwrap();
    assert!(vm.report(b).await.is_err(), "it is stopped still");
    vm.execute(b, "cont", serde_json::json!({})).await.unwrap();
    let moved = vm.until_counted(b, stopped.count + ROUNDS).await.unwrap();
    assert_eq!((moved.errors, moved.devices), (0, vm.devices));
    // A line may have begun on one node and ended on the other: together they are complete.
    let said = vm.said(a).await.unwrap() + &vm.said(b).await.unwrap();
    let (said, _unfinished) = said.rsplit_once('\n').unwrap();
    let counts: Vec<u64> =
        said.lines().map(|line| Report::last_of(&format!("{line}\n")).unwrap().count).collect();
    let expected: Vec<u64> = (1..=counts.len() as u64).map(|report| 8 * report).collect();
    assert_eq!(counts, expected, "no line of the guest is lost or repeated");
    assert_eq!(vm.report(a).await.unwrap(), stopped, "the source does not count any more");
}

#[tokio::test]
async fn a_qemu_vm_counts_in_a_node_and_continues_in_another() {
    let vm = QemuVm::counter(2);
    let lab = lab_for(&vm).await;
    let (a, b) = (lab.node("node-a").unwrap(), lab.node("node-b").unwrap());
    continues_to_count(&vm, a, b).await;
    let known = a.get_text(&format!("{}/vm.json", vm.directory())).await.unwrap();
    assert!(known.contains("{device.1.sysfs}"), "{known}");
    assert_eq!(a.shell(&format!("stat -c %a {}", vm.socket())).await.unwrap(), "700\n");

    for node in [a, b] {
        vm.kill(node).await.unwrap();
        vm.forget(node).await.unwrap();
    }
    let vm = vm.emulated().by_group().with_migration_events();
    continues_to_count(&vm, b, a).await;
    assert!(spoil_register(&vm, a).await.errors > 0, "it notices a change that it has not made");
}

/// Writes to the first card's scratch register, and returns the guest's next report.
async fn spoil_register(vm: &QemuVm, node: &Node) -> Report {
    let monitor = async |line: &str| {
        let arguments = serde_json::json!({ "command-line": line });
        vm.execute(node, "human-monitor-command", arguments).await.unwrap().as_str().unwrap().to_owned()
    };
    let cards = monitor("info pci").await;
    let (_, card) = cards.split_once("PCI device 4348:3253").unwrap();
    let (_, port) = card.split_once("I/O at 0x").unwrap();
    let port = u16::from_str_radix(port.split_once(' ').unwrap().0, 16).unwrap() + 7;
    let spoiled = vm.report(node).await.unwrap();
    // Any value is wrong for all but one in 256 rounds.
    monitor(&format!("o/b {port:#x} 0x5a")).await;
    monitor(&format!("o/b {port:#x} 0xa5")).await;
    vm.until_counted(node, spoiled.count + 2 * 8).await.unwrap()
}

#[tokio::test]
async fn a_linux_in_a_qemu_vm_continues_to_use_its_serial_ports_and_its_disk() {
    let vm = QemuVm::linux(2).with_shared_disk();
    let lab = lab_for(&vm).await;
    let (a, b) = (lab.node("node-a").unwrap(), lab.node("node-b").unwrap());
    continues_to_count(&vm, a, b).await;
    let report = vm.report(b).await.unwrap();
    // The writer is killed, and the disk is consistent.
    vm.kill(b).await.unwrap();
    let written = check_disk(&std::fs::read(lab.shared_disk().unwrap()).unwrap()).unwrap();
    println!("{written} lines on the disk");
    assert!(written >= report.count, "{written} lines of {report:?} are on the disk");
}
