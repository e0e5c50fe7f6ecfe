//! What all migrations of an operator share.

use std::sync::Arc;

use slackwater_api::VMMigration;

use super::claims::Claims;
use crate::cluster::{Cluster, Observed};
use crate::fleet::Fleet;
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
    /// The planner's checks.
    pub checks: Checks,
}
