//! The operator as a whole: its loops, and how it ends.

use std::sync::Arc;
use std::time::Duration;

use kube::{Client, Config};
use slackwater_api::{MigrationNode, VMMigration};
use slackwater_proto::tls::Credentials;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::cluster::{Cluster, Keep, observe};
use crate::epoch::Epoch;
use crate::fleet::Fleet;
use crate::homes::{Homes, group_of_move};
use crate::leadership::{Keeper, LeadershipLost, Terms};
use crate::migration::claims::Claims;
use crate::migration::context::Context;
use crate::migration::step::forget_details;
use crate::migration::{controller, retention};
use crate::plan::Checks;
use crate::publish::{nodes, vms};

/// What an operator is told about how to decide.
#[derive(Debug, Clone, Copy)]
pub struct Policy {
    /// The planner's checks.
    pub checks: Checks,
    /// How long a source may be silent before it counts as lost, where the target never starts the VM.
    pub source_patience: Duration,
}

/// Waits until this operator leads, and then acts until `stop`. Migrations that are under way go on at the
/// agents; the next operator joins them.
///
/// # Errors
/// [`RunError`]. All that acted by the leadership has ended by then.
pub async fn run(
    config: Config,
    credentials: Credentials,
    terms: Terms,
    policy: Policy,
    stop: CancellationToken,
) -> Result<(), RunError> {
    let client = Client::try_from(config.clone())?;
    let Some((mut keeper, epoch)) = Keeper::start(|| Client::try_from(config), terms, &stop).await? else {
        return Ok(());
    };
    let ended = tokio::select! {
        // First, so that nothing goes on after the leadership is lost.
        biased;
        lost = keeper.lost() => return Err(RunError::LeadershipLost(lost)),
        () = stop.cancelled() => Ok(()),
        kind = act(client, credentials, epoch, policy) => Err(RunError::WatchEnded { kind }),
    };
    keeper.release().await;
    ended
}

/// Runs all loops. Ends when one of them does, and returns its kind of objects.
async fn act(client: Client, credentials: Credentials, epoch: Epoch, policy: Policy) -> &'static str {
    let tasks = TaskTracker::new();
    let cluster = Cluster::new(client, epoch.clone());
    let whole_node = Keep::<MigrationNode> { slim: |_| {}, group: |_| None };
    let observed_nodes = observe(&cluster, whole_node, &tasks);
    let observed_vms = observe(&cluster, Keep { slim: |_| {}, group: vms::node_of }, &tasks);
    let by_vm = Keep::<VMMigration> { slim: forget_details, group: group_of_move };
    let observed_migrations = observe(&cluster, by_vm, &tasks);
    let fleet = Fleet::new(credentials, epoch, tasks.clone());
    let claims = Arc::new(Claims::default());

    let homes = Arc::new(Homes::default());
    let context = Context {
        cluster: cluster.clone(),
        migrations: observed_migrations.clone(),
        fleet: Arc::clone(&fleet),
        claims: Arc::clone(&claims),
        homes: Arc::clone(&homes),
        checks: policy.checks,
        source_patience: policy.source_patience,
    };
    let sources = vms::Sources {
        vms: observed_vms,
        nodes: observed_nodes.clone(),
        migrations: observed_migrations,
        fleet: Arc::clone(&fleet),
        claims,
        homes: Arc::clone(&homes),
    };
    tokio::select! {
        () = nodes::run(cluster.clone(), observed_nodes, fleet, homes) => "MigrationNode",
        () = vms::run(cluster, sources) => "AssignedVM",
        () = controller::run(context.clone()) => "VMMigration",
        () = retention::run(context) => "VMMigration",
    }
}

/// Why the operator has ended without being asked to.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// There is no client for the API server.
    #[error("a client for the API server cannot be made")]
    Client(#[from] kube::Error),
    /// A watch has ended for good.
    #[error("watching {kind} objects has ended")]
    WatchEnded {
        /// The kind whose loop it was.
        kind: &'static str,
    },
    /// Another operator may lead now.
    #[error("the leadership is lost, so this operator ends; start it again to have it wait for its turn")]
    LeadershipLost(#[from] LeadershipLost),
}
