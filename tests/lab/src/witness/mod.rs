//! The kernel as a witness of what happened to devices and vCPUs, independent of who caused it.
//!
//! Probes in each node's kernel record every state change, read, write and reset of every device, and every
//! run of every vCPU, with the kernel's own clock (`image/scripts/witness-arm.sh` has them; see
//! <https://docs.kernel.org/trace/kprobetrace.html>). The witness is armed when a node boots. The invariants
//! are checked with these traces, and not with what the product reports of itself.
//!
//! ```no_run
//! # async fn example(lab: &slackwater_lab::Lab) -> anyhow::Result<()> {
//! use slackwater_lab::witness::{self, PeerToPeer, Waking};
//!
//! let (a, b) = (lab.node("node-a")?, lab.node("node-b")?);
//! let (watch_a, watch_b) = (witness::watch(a).await?, witness::watch(b).await?);
//! // ... a VM moves from a to b ...
//! let source = watch_a.testimony(a).await?.of_devices(a.devices())?;
//! let destination = watch_b.testimony(b).await?.of_devices(b.devices())?;
//! witness::one_runner(&source, &destination)?;
//! witness::quiesced_together(&source, PeerToPeer::Required)?;
//! witness::captured_at_slack_water(&source)?;
//! witness::woke_together(&destination, Waking::AfterLoad, PeerToPeer::Required)?;
//! # Ok(())
//! # }
//! ```

mod assemble;
mod invariants;
mod parse;
mod state;
mod trace;

use std::time::Duration;

use crate::error::LabError;
use crate::node::{ClockReading, ClockRelation, Node};

pub use invariants::{
    Invariant, PeerToPeer, Separation, Violation, Waking, captured_at_slack_water, never_ran, one_runner,
    quiesced_together, woke_together,
};
pub use parse::ParseError;
pub use state::State;
pub use trace::{Access, AccessKind, Change, DeviceTrace, Run, Trace, VcpuTrace};

/// An emulated CPU takes a while to format a full buffer.
const COLLECT_TIMEOUT: Duration = Duration::from_secs(120);

/// A witness that has watched one node since this was created.
#[derive(Clone, Copy, Debug)]
pub struct Watch {
    first: ClockReading,
}

/// Starts to watch a node, and discards earlier records. A device's state is known from its first change on.
/// Do not call this while a device's data move: reads of files that were opened before could not be
/// attributed.
///
/// # Errors
/// When the node cannot be reached or its kernel refuses.
pub async fn watch(node: &Node) -> Result<Watch, LabError> {
    node.exec(&["witness-arm"]).await?.success()?;
    Ok(Watch { first: node.clock().await? })
}

impl Watch {
    /// Returns what the witness has recorded since. It continues to record.
    ///
    /// # Errors
    /// When the node cannot be reached, or anything is missing from the record.
    pub async fn testimony(&self, node: &Node) -> Result<Trace, LabError> {
        let collected = node.exec_for(&["witness-collect"], b"", COLLECT_TIMEOUT).await?.success()?;
        let clock = ClockRelation::between(self.first, node.clock().await?);
        Trace::parse(node.name(), clock, &collected)
            .map_err(|error| LabError::Witness { node: node.name().to_owned(), reason: error.to_string() })
    }
}
