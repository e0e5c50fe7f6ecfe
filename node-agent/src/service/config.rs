//! What the administrator has configured for this node.

use std::path::PathBuf;
use std::time::Duration;

use crate::vmm::confinement::Confinement;
use crate::vmm::contract::Deadlines;

/// The agent's configuration.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// The node's name, as in the agent's certificate.
    pub node: String,
    /// Where VMs publish their `vm.json`.
    pub run_dir: PathBuf,
    /// Where cgroup v2 is mounted.
    pub cgroup_root: PathBuf,
    /// The programs that may be started as a twin.
    pub twin_programs: Vec<PathBuf>,
    /// What twins may reach.
    pub confinement: Confinement,
    /// Within this time a twin must answer.
    pub twin_start_limit: Duration,
    /// How long the calls to a VMM may take.
    pub deadlines: Deadlines,
    /// The network bandwidth that a migration may use where the VMM copies while the guest runs.
    pub migration_bandwidth_bytes_per_second: u64,
    /// The connections, besides the main one, over which the RAM of a QEMU VM is sent.
    pub migration_channels: u8,
}
