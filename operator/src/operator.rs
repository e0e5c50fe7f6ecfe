//! The operator as a whole: its loops, and how it ends.

use std::sync::Arc;

use kube::Client;
use slackwater_api::{AssignedVM, MigrationNode, VMMigration};
use slackwater_proto::tls::Credentials;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::cluster::{Cluster, observe};
use crate::fleet::Fleet;
use crate::migration::claims::Claims;
use crate::migration::controller::{self, Surroundings};
use crate::plan::Checks;
use crate::publish::{nodes, vms};

/// Runs until `stop`. Migrations that are under way go on at the agents; the next operator joins them.
///
/// # Errors
/// One of the loops has ended by itself: a watch is gone for good.
pub async fn run(
    client: Client,
    credentials: Credentials,
    checks: Checks,
    stop: CancellationToken,
) -> Result<(), Ended> {
    let tasks = TaskTracker::new();
    let cluster = Cluster::new(client);
    let observed_nodes = observe::<MigrationNode>(cluster.all(), &tasks);
    let observed_vms = observe::<AssignedVM>(cluster.all(), &tasks);
    let observed_migrations = observe::<VMMigration>(cluster.all(), &tasks);
    let fleet = Fleet::new(credentials, tasks.clone());
    let claims = Arc::new(Claims::default());

    let surroundings = Surroundings {
        cluster: cluster.clone(),
        migrations: observed_migrations,
        fleet: Arc::clone(&fleet),
        claims: Arc::clone(&claims),
        checks,
    };
    let ended = tokio::select! {
        () = stop.cancelled() => return Ok(()),
        () = nodes::run(cluster.clone(), observed_nodes.clone(), Arc::clone(&fleet)) => "MigrationNode",
        () = vms::run(cluster, observed_vms, observed_nodes, fleet, claims) => "AssignedVM",
        () = controller::run(surroundings) => "VMMigration",
    };
    Err(Ended { kind: ended })
}

/// A loop has ended by itself.
#[derive(Debug, thiserror::Error)]
#[error("watching {kind} objects has ended")]
pub struct Ended {
    /// The kind whose loop it was.
    pub kind: &'static str,
}
