//! The reference VMM on a real KVM with real VFIO devices. The walk itself (lab/src/bin/slackwater-vmm-walk)
//! runs in a node of the lab, like an agent; this test starts it there and checks its output and the kernel's
//! trace.

use std::time::Duration;

use serde_json::Value;
use slackwater_lab::witness;
use slackwater_lab::{Lab, LabConfig, LabError, Node, NodeConfig};
use slackwater_reference_vmm::guest::Report;

async fn lab(devices: &[&str]) -> Result<Lab, LabError> {
    let mut config = LabConfig::nodes([NodeConfig::new("node-a", devices.iter().copied())]);
    config.image = config.image.with_program("slackwater-vmm-walk")?;
    Lab::start(config).await
}

/// The walk's lines and its result. Check the lines first: they have the reasons of a failure.
async fn walk(node: &Node, what: &str) -> anyhow::Result<(Vec<Value>, Result<String, LabError>)> {
    let mut argv = vec!["slackwater-vmm-walk", what];
    argv.extend(node.devices().iter().map(String::as_str));
    let executed = node.exec_for(&argv, b"", Duration::from_secs(240)).await?;
    let lines = executed.stdout.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    let lines = lines.map(serde_json::from_slice).collect::<Result<_, _>>()?;
    Ok((lines, executed.success()))
}

#[tokio::test]
async fn a_vm_counts_saves_loads_and_notices_a_loss() {
    let lab = lab(&["mtty-1"; 4]).await.unwrap();
    let (lines, ending) = walk(lab.node("node-a").unwrap(), "checks").await.unwrap();
    let failed: Vec<_> = lines.iter().filter(|line| line["ok"] != true).collect();
    assert!(failed.is_empty(), "{failed:#?}");
    assert_eq!(lines.len(), 9, "{ending:?}");
    ending.unwrap();
}

#[tokio::test]
async fn the_kernel_sees_no_vcpu_run_between_the_answer_to_a_pause_and_the_resume() {
    let lab = lab(&["mtty-1"; 2]).await.unwrap();
    let node = lab.node("node-a").unwrap();
    let watch = witness::watch(node).await.unwrap();
    let (lines, ending) = walk(node, "pauses").await.unwrap();
    ending.unwrap();
    let vcpus = watch.testimony(node).await.unwrap().vcpus;
    let pauses: Vec<(u64, u64)> = lines
        .iter()
        .map(|line| (line["paused_ns"].as_u64().unwrap(), line["resumed_ns"].as_u64().unwrap()))
        .collect();
    assert_eq!(pauses.len(), 30);
    assert!(vcpus.gap_ns.is_none(), "the kernel's buffers are too small for this test: {:?}", vcpus.gap_ns);
    for (paused, resumed) in &pauses {
        let run = vcpus.runs.iter().find(|run| run.overlaps(*paused, *resumed));
        assert!(run.is_none(), "paused at {paused}, resumed at {resumed}, but {run:?}");
    }
    // The same clock, and the same vCPU: it ran between any two pauses.
    for pair in pauses.windows(2) {
        let [(_, from), (to, _)] = pair else { continue };
        assert!(vcpus.runs.iter().any(|run| run.overlaps(*from, *to)), "no run from {from} to {to}");
    }
    println!("{} runs, {} pauses", vcpus.runs.len(), pauses.len());
}

#[tokio::test]
async fn a_guests_report_is_read_by_the_pid_of_its_vmm() {
    let lab = lab(&["mtty-1", "mtty-2"]).await.unwrap();
    let node = lab.node("node-a").unwrap();
    let devices = "/dev/vfio/devices/vfio0,/dev/vfio/devices/vfio1";
    let run = ["slackwater-reference-vmm", "run", "--socket", "/run/vmm.sock", "--device", devices];
    let pid = node.spawn("vmm", &run, &[]).await.unwrap();
    node.wait_line("vmm", "serving", Duration::from_secs(30)).await.unwrap();
    let report = async |pid: u32| {
        let executed =
            node.exec(&["slackwater-reference-vmm", "guest", "--pid", &pid.to_string()]).await.unwrap();
        executed.success().map(|json| serde_json::from_str::<Report>(&json).unwrap())
    };
    let (first, second) = (report(pid).await.unwrap(), report(pid).await.unwrap());
    println!("{first:?}\n{second:?}");
    assert!(second.count > first.count, "{first:?} {second:?}");
    assert_eq!((second.errors, second.devices.len()), (0, 2));
    let refused = report(1).await.unwrap_err().to_string();
    assert!(refused.contains("process 1 has no descriptor of memfd:guest-ram"), "{refused}");
}
