use std::path::PathBuf;

use super::*;
use crate::vfio::fake::Gate;
use crate::vmm::confinement::Confinement;

/// More than anything takes that does not wait for a device.
const SOON: Duration = Duration::from_secs(40);

fn device(name: &str) -> Device {
    Device {
        name: name.to_owned(),
        sysfs: PathBuf::from("/sys/bus/pci/devices").join(name),
        cdev: PathBuf::from("/dev/vfio/devices/none"),
        group: None,
        driver: "mlx5_vfio_pci".to_owned(),
        model: "15b3:101e".to_owned(),
    }
}

/// A node on which the question what a device advertises never returns for the devices of this name.
fn node(hangs: &'static str, gate: &Gate) -> (Arc<Inventory>, tempfile::TempDir) {
    let run_dir = tempfile::tempdir().unwrap();
    let config = NodeConfig {
        node: "node-a".to_owned(),
        run_dir: run_dir.path().to_owned(),
        cgroup_root: PathBuf::from("/sys/fs/cgroup"),
        twin_programs: Vec::new(),
        confinement: Confinement::default(),
        twin_start_limit: SOON,
        deadlines: crate::vmm::contract::Deadlines::default(),
        migration_bandwidth_bytes_per_second: 1,
        migration_channels: 0,
    };
    let vms = VmWatch::start(run_dir.path()).unwrap();
    let mut inventory = Inventory::new(config, Arc::default(), vms);
    let gate = gate.clone();
    inventory.asking = Asking::with(4, Duration::from_secs(2));
    inventory.probe = Arc::new(move |device| {
        if device.name == hangs {
            gate.pass();
        }
        Ok(Features::ALL)
    });
    (Arc::new(inventory), run_dir)
}

#[tokio::test]
async fn a_free_device_that_hangs_is_set_aside_by_name_and_no_other_waits_for_it() {
    let gate = Gate::new();
    let (node, _run_dir) = node("a", &gate);
    let describe = |name: &'static str| {
        let node = Arc::clone(&node);
        async move { node.describe_device(&device(name), String::new()).await }
    };
    let (hung, other) =
        tokio::time::timeout(SOON, async { tokio::join!(describe("a"), describe("b")) }).await.unwrap();
    assert!(!hung.free && hung.holder.contains("device a hangs"), "{hung:?}");
    assert!(hung.holder.contains("opening it"), "{hung:?}");
    assert!(other.free && other.features.is_some(), "{other:?}");
    // A reservation has the answer at once.
    let refused = node.features(&device("a"), true).await.unwrap_err();
    assert!(matches!(*refused, FeaturesError::NoAnswer(_)), "{refused}");

    let mut changes = node.changes();
    assert!(changes.next().await);
    gate.open();
    assert!(tokio::time::timeout(SOON, changes.next()).await.unwrap(), "Watch reports it anew");
    let back = describe("a").await;
    assert!(back.free && back.features.is_some(), "{back:?}");
}

#[tokio::test]
async fn a_borrowed_device_that_hangs_is_named_as_long_as_it_does() {
    let (gate, shut) = (Gate::new(), Gate::new());
    let (node, _run_dir) = node("none", &gate);
    let handle = crate::vfio::worker::DeviceHandle::serve_impatiently(
        Box::new(crate::vfio::fake::FakeDevice::new("a").hang_in_state(1, &shut)),
        Duration::from_millis(50),
    )
    .unwrap();
    node.borrowed().add(&handle);
    assert!(node.describe_device(&device("a"), String::new()).await.free);
    // The call outlives the one who made it.
    let left = tokio::spawn(async move { handle.state().await });
    shut.reached().await;
    tokio::time::timeout(Duration::from_millis(100), left).await.unwrap_err();
    let hung = node.describe_device(&device("a"), "process 9 (slackwater-agent)".to_owned()).await;
    assert!(hung.holder.starts_with("process 9 (slackwater-agent); device a hangs"), "{hung:?}");
    assert!(hung.holder.contains("reading its state"), "{hung:?}");
    shut.open();
    let free = async {
        while !node.describe_device(&device("a"), String::new()).await.free {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(SOON, free).await.unwrap();
}

#[test]
fn a_device_that_nobody_is_seen_to_hold_is_not_free_while_a_process_cannot_be_read() {
    let proc = tempfile::tempdir().unwrap();
    let free = Holders::look(proc.path()).unwrap();
    assert_eq!(holder_among(&free, &device("a")), "");
    assert!(require_no_holder(&device("a"), &free).is_ok());
    std::fs::create_dir(proc.path().join("9")).unwrap();
    std::fs::write(proc.path().join("9/fd"), "").unwrap();
    let unread = Holders::look(proc.path()).unwrap();
    let told = holder_among(&unread, &device("a"));
    assert!(told.starts_with("not known: the agent cannot read what process 9 has open"), "{told}");
    let refused = require_no_holder(&device("a"), &unread).unwrap_err();
    assert!(matches!(refused, NotFreeError::NotKnown { .. }), "{refused}");
}

#[tokio::test]
async fn a_device_that_has_hung_is_reported_anew_when_it_has_been_closed_after_all() {
    let (gate, shut) = (Gate::new(), Gate::new());
    let (node, _run_dir) = node("none", &gate);
    let handle = crate::vfio::worker::DeviceHandle::serve_impatiently(
        Box::new(crate::vfio::fake::FakeDevice::new("a").hang_in_state(1, &shut)),
        Duration::from_millis(50),
    )
    .unwrap();
    node.borrowed().add(&handle);
    let mut changes = node.changes();
    assert!(changes.next().await);
    // It is given back while it hangs, and nobody waits for that.
    let given_back = tokio::spawn(async move {
        let _ = handle.state().await;
        handle.release().await;
    });
    shut.reached().await;
    let nothing = tokio::time::timeout(Duration::from_millis(100), changes.next()).await;
    assert!(nothing.is_err(), "nothing has changed");
    shut.open();
    assert!(tokio::time::timeout(SOON, changes.next()).await.unwrap(), "Watch reports it anew");
    assert!(node.describe_device(&device("a"), String::new()).await.free);
    given_back.await.unwrap();
}
