//! What the agents report, shown in Kubernetes: the status of each MigrationNode, and one AssignedVM for each
//! VM.
//!
//! `node_status` and `vm_status` are pure: they decide what each status should be. `nodes` and `vms` compare
//! that with what it is, and write the difference.

mod node_status;
pub mod nodes;
mod vm_status;
pub mod vms;

use std::time::Duration;

/// The pause before a write that failed is tried again.
const RETRY_PAUSE: Duration = Duration::from_secs(2);

/// The API has no unsigned numbers.
fn count(items: usize) -> i32 {
    i32::try_from(items).unwrap_or(i32::MAX)
}
