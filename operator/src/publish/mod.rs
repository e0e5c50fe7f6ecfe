//! What the agents report, shown in Kubernetes: the status of each MigrationNode, and one AssignedVM for each
//! VM.
//!
//! `node_status` and `vm_status` are pure: they decide what each status should be. `nodes` and `vms` compare
//! that with what it is, and write the difference.

mod node_status;
pub mod nodes;
mod vm_status;
pub mod vms;

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::time::Instant;

/// The pause before a write that failed is tried again.
const RETRY_PAUSE: Duration = Duration::from_secs(2);
/// How many objects of a kind are written at a time.
const WRITES_AT_A_TIME: usize = 8;

/// What has to be looked at again although nothing may change: a write has failed, or time alone tells.
#[derive(Debug)]
struct Again<T> {
    names: BTreeSet<T>,
    /// When.
    time: Option<Instant>,
}

impl<T> Default for Again<T> {
    fn default() -> Self {
        Self { names: BTreeSet::new(), time: None }
    }
}

impl<T: Ord> Again<T> {
    fn later(&mut self, name: T) {
        self.names.insert(name);
        self.time.get_or_insert_with(|| Instant::now() + RETRY_PAUSE);
    }

    /// Returns when it is time, with what is to be looked at.
    async fn due(&mut self) -> BTreeSet<T> {
        match self.time {
            Some(time) => tokio::time::sleep_until(time).await,
            None => std::future::pending().await,
        }
        self.time = None;
        std::mem::take(&mut self.names)
    }
}

/// The API has no unsigned numbers.
fn count(items: usize) -> i32 {
    i32::try_from(items).unwrap_or(i32::MAX)
}
