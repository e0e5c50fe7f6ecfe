//! The lab's VMM on a real KVM with real VFIO devices. The walk itself (src/bin/slackwater-vmm-walk) runs in a node of the lab,
//! as an agent would; this starts it there and judges what it printed.

use std::time::Duration;

use serde_json::Value;
use slackwater_tests::lab::{Lab, LabConfig, NodeConfig};
use slackwater_tests::vmm::guest::Report;

#[tokio::test]
async fn a_vm_counts_pauses_saves_loads_and_finds_out_what_was_lost() {
    let mut config = LabConfig::nodes([NodeConfig::new("node-a", ["mtty-1"; 4])]);
    config.image.programs.push(env!("CARGO_BIN_EXE_slackwater-vmm-walk").into());
    let lab = Lab::start(config).await.unwrap();
    let node = lab.node("node-a").unwrap();
    let mut argv = vec!["slackwater-vmm-walk"];
    argv.extend(node.devices().iter().map(String::as_str));
    let executed = node.exec_for(&argv, b"", Duration::from_secs(240)).await.unwrap();
    let lines = executed.stdout.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    let lines: Vec<Value> = lines.map(|line| serde_json::from_slice(line).unwrap()).collect();
    let failed: Vec<_> = lines.iter().filter(|line| line["ok"] != true).collect();
    assert!(failed.is_empty(), "{failed:#?}");
    assert_eq!(lines.len(), 9, "{:?}", String::from_utf8_lossy(&executed.stderr));
    executed.success().unwrap();
}

#[tokio::test]
async fn what_a_guest_counted_is_read_by_the_pid_of_its_vmm() {
    let lab = Lab::start(LabConfig::nodes([NodeConfig::new("node-a", ["mtty-1", "mtty-2"])])).await.unwrap();
    let node = lab.node("node-a").unwrap();
    let devices = "/dev/vfio/devices/vfio0,/dev/vfio/devices/vfio1";
    let run = ["slackwater-lab-vmm", "run", "--socket", "/run/vmm.sock", "--device", devices];
    let pid = node.spawn("vmm", &run, &[]).await.unwrap();
    node.wait_line("vmm", "serving", Duration::from_secs(30)).await.unwrap();
    let report = async |pid: u32| {
        let executed = node.exec(&["slackwater-lab-vmm", "guest", "--pid", &pid.to_string()]).await.unwrap();
        executed.success().map(|json| serde_json::from_str::<Report>(&json).unwrap())
    };
    let (first, second) = (report(pid).await.unwrap(), report(pid).await.unwrap());
    println!("{first:?}\n{second:?}");
    assert!(second.count > first.count, "{first:?} {second:?}");
    assert_eq!((second.errors, second.devices.len()), (0, 2));
    let refused = report(1).await.unwrap_err().to_string();
    assert!(refused.contains("process 1 has no descriptor of memfd:guest-ram"), "{refused}");
}
