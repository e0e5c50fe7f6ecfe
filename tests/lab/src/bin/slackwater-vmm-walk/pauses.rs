//! Pausing a VM, and printing when.

use anyhow::{Result, ensure};
use serde::Serialize;
use slackwater_lab::node::monotonic_ns;
use slackwater_proto::vmm::{PauseRequest, ResumeRequest};

use crate::process::Vmm;

/// From the answer to a Pause to the Resume: CLOCK_MONOTONIC, nanoseconds.
#[derive(Serialize)]
struct Line {
    paused_ns: i64,
    resumed_ns: i64,
}

/// Pauses a VM 30 times, for 20 ms and more, and prints a line for each.
pub(crate) async fn run(devices: &[String]) -> Result<bool> {
    let mut vmm = Vmm::start("/run/vmm-walk.sock", devices, false).await?;
    for _ in 0..30 {
        vmm.counts(2).await?;
        vmm.client.pause(PauseRequest {}).await?;
        let paused_ns = monotonic_ns();
        // Long enough for more than one round of a guest that wrongly continues.
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        let resumed_ns = monotonic_ns();
        vmm.client.resume(ResumeRequest {}).await?;
        println!("{}", serde_json::to_string(&Line { paused_ns, resumed_ns })?);
    }
    let report = vmm.counts(2).await?;
    ensure!(report.errors == 0, "{report:?}");
    vmm.quit().await?;
    Ok(true)
}
