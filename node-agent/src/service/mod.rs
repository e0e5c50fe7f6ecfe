//! The agent's gRPC services, and what they share: what there is on the node, what is under way, and who may have a say in it.

mod blockers;
mod borrowing;
mod connections;
pub mod inventory;
mod journalling;
pub mod node;
mod preflight;
mod recovery;
pub mod registry;
mod request;
mod reservation;
mod site;
pub mod transfer;
mod watching;

use std::path::PathBuf;
use std::time::Duration;

use crate::vmm::contract::Deadlines;

/// What the administrator has said of this node.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// The node's name, as in the agent's certificate.
    pub node: String,
    /// Where VMs make themselves known.
    pub run_dir: PathBuf,
    /// Where cgroup v2 is mounted.
    pub cgroup_root: PathBuf,
    /// The programs that may be started as a twin.
    pub twin_programs: Vec<PathBuf>,
    /// Within so long a twin must answer.
    pub twin_start_limit: Duration,
    /// How long the calls to a VMM may take.
    pub deadlines: Deadlines,
    /// What a migration may take of the wire, where the VMM copies while the guest runs.
    pub migration_bandwidth_bytes_per_second: u64,
    /// By how many connections, besides the main one, the RAM of a VM of QEMU's goes.
    pub migration_channels: u8,
}
