//! The kernel's own driver against the agent's table of states, and against what else the agent relies on.
//! The walk itself (lab/src/bin/slackwater-vfio-walk) runs in a node of the lab; this test starts it there
//! and checks its output.

use std::collections::BTreeSet;
use std::time::Duration;

use serde_json::Value;
use slackwater_lab::{Lab, LabConfig, LabError, Node, NodeConfig};

/// A node with two devices of one type and one of another.
async fn lab() -> Result<Lab, LabError> {
    let mut config = LabConfig::nodes([NodeConfig::new("node-a", ["mtty-1", "mtty-1", "mtty-2"])]);
    config.image = config.image.with_program("slackwater-vfio-walk")?;
    Lab::start(config).await
}

/// The walk's lines and its result. Check the lines first: they have the reasons of a failure.
async fn walk(node: &Node, arguments: &[&str]) -> anyhow::Result<(Vec<Value>, Result<String, LabError>)> {
    let argv = [&["slackwater-vfio-walk"], arguments].concat();
    let executed = node.exec_for(&argv, b"", Duration::from_secs(60)).await?;
    let lines = executed.stdout.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    let lines = lines.map(serde_json::from_slice).collect::<Result<_, _>>()?;
    Ok((lines, executed.success()))
}

#[tokio::test]
async fn mtty_has_exactly_the_paths_between_its_states_that_the_table_has() {
    let lab = lab().await.unwrap();
    let node = lab.node("node-a").unwrap();
    // Both types: their state differs in size.
    for (device, blob_bytes) in [(&node.devices()[0], 60), (&node.devices()[2], 96)] {
        let (mut lines, ending) =
            walk(node, &["pairs", device, "--tracefs", "/sys/kernel/tracing"]).await.unwrap();
        let sum = lines.pop().unwrap_or_else(|| panic!("it printed nothing: {ending:?}"));
        let wrong: Vec<_> = lines.iter().filter(|pair| pair["agree"] != true).collect();
        assert!(wrong.is_empty(), "{wrong:#?}");

        let pairs: BTreeSet<_> =
            lines.iter().map(|pair| (pair["from"].as_str(), pair["to"].as_str())).collect();
        assert_eq!(pairs.len(), 8 * 8, "every ordered pair, once");
        assert_eq!(sum["features"], "STOP_COPY | P2P | PRE_COPY");
        assert_eq!(sum["traced"], true, "the states along the way come from the kernel");
        assert_eq!(sum["blob_bytes"], blob_bytes);
        assert_eq!(sum["mismatches"], 0);
        // Only a device that fails enters ERROR, so no pair from there can be requested.
        assert_eq!((sum["pairs_asked"].as_u64(), sum["pairs_unreachable"].as_u64()), (Some(56), Some(8)));
        // Into ERROR from the seven other states, and from STOP_COPY back into the saving group.
        let refused: Vec<_> =
            lines.iter().filter(|pair| pair["refusal"] == "Invalid argument (EINVAL)").collect();
        assert_eq!(refused.len(), 7 + 2, "{refused:#?}");
        ending.unwrap();
    }
}

#[tokio::test]
async fn the_real_driver_borrows_loads_and_refuses_as_the_agent_expects() {
    let lab = lab().await.unwrap();
    let node = lab.node("node-a").unwrap();
    let [device, like, unlike] = node.devices() else { panic!("three devices") };
    let (lines, ending) = walk(node, &["checks", device, like, unlike]).await.unwrap();
    let failed: Vec<_> = lines.iter().filter(|line| line["ok"] != true).collect();
    assert!(failed.is_empty(), "{failed:#?}");
    assert_eq!(lines.len(), 11, "{ending:?}");
    ending.unwrap();
}
