//! What all migrations of an operator share.

use std::sync::Arc;
use std::time::Duration;

use slackwater_api::VMMigration;

use super::claims::Claims;
use crate::cluster::{Cluster, Observed};
use crate::fleet::Fleet;
use crate::homes::{Homes, moves};
use crate::inventory::{Inventory, VmKey};
use crate::moment::Moment;
use crate::plan::Checks;

/// The API server, the agents, and what other migrations have been promised.
#[derive(Clone)]
pub struct Context {
    /// The API server.
    pub cluster: Cluster,
    /// All VMMigrations.
    pub migrations: Observed<VMMigration>,
    /// All agents.
    pub fleet: Arc<Fleet>,
    /// The VMs and devices that accepted migrations have.
    pub claims: Arc<Claims>,
    /// Which node is known to have which VM.
    pub homes: Arc<Homes>,
    /// The planner's checks.
    pub checks: Checks,
    /// How long a source may be silent before it counts as lost, where the target never starts the VM.
    pub source_patience: Duration,
}

impl Context {
    /// What the agents report: of this VM, as far as it counts.
    pub fn inventory(&self, vm: &VmKey) -> Arc<Inventory> {
        let migrations = self.migrations.in_group(&vm.to_string());
        let moves = moves(migrations.iter().map(Arc::as_ref));
        let settled = self.fleet.undecided().is_some_and(|undecided| undecided.is_empty());
        self.homes.look(vm, self.fleet.inventory(), &moves, settled, Moment::now()).inventory
    }
}
