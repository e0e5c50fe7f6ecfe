//! What an attempt needs of the node.

use std::sync::Arc;

use slackwater_proto::node::{MigrationRef, ReserveRequest};
use slackwater_proto::tls::Credentials;
use tokio::sync::watch;

use crate::attempt::destination::DestinationRun;
use crate::attempt::ledger::EndRecord;
use crate::attempt::source::SourceRun;
use crate::host::identity::VfIdentity;
use crate::host::twin_users::TwinUsers;
use crate::journal::Journal;
use crate::service::config::NodeConfig;
use crate::service::inventory::Inventory;
use crate::service::reason::ServiceReason;
use crate::service::registry::{Hold, LocalEnd, Registry};

/// What beginning an attempt and taking one up again both need; clones are handles to the same.
#[derive(Clone)]
pub struct NodeResources {
    /// What the administrator has configured.
    pub config: NodeConfig,
    /// The agent's credentials, for its calls to other agents.
    pub credentials: Arc<Credentials>,
    /// The node's VMs and devices.
    pub inventory: Arc<Inventory>,
    /// The migrations that this node takes part in.
    pub registry: Arc<Registry>,
    /// What outlives the agent.
    pub journal: Arc<Journal>,
    /// The users that twins run as.
    pub twin_users: TwinUsers,
    /// The network identities of the devices.
    pub vf_identity: Arc<dyn VfIdentity>,
}

impl NodeResources {
    /// This node is the source of an attempt. When that has ended, durably, what it holds is given back.
    pub(super) fn join_source(&self, reference: &MigrationRef, run: &SourceRun) {
        self.registry.join(reference, LocalEnd::Source(run.clone()));
        let (registry, run, id) = (Arc::clone(&self.registry), run.clone(), reference.id.clone());
        tokio::spawn(async move {
            run.ended().await;
            give_back(&registry, &id, run.end_record()).await;
        });
    }

    /// This node is the destination of an attempt. When nothing is held for it any more, and that is durable,
    /// it is given back.
    pub(super) fn join_destination(
        &self,
        reference: &MigrationRef,
        run: &DestinationRun,
        request: ReserveRequest,
    ) {
        self.registry.join(reference, LocalEnd::Destination(run.clone(), Box::new(request)));
        let (registry, run, id) = (Arc::clone(&self.registry), run.clone(), reference.id.clone());
        tokio::spawn(async move {
            run.free().await;
            give_back(&registry, &id, run.end_record()).await;
        });
    }
}

/// Gives back what an attempt held, when its end is durable. An agent that starts anew acts on every journal
/// without an end, and would take a VM back that another migration has moved on.
async fn give_back(registry: &Registry, id: &str, mut end: watch::Receiver<EndRecord>) {
    loop {
        match end.borrow_and_update().clone() {
            EndRecord::Durable => break,
            EndRecord::Failing(why) => {
                registry.explain(id, Hold { reason: ServiceReason::EndNotRecorded, why })
            }
            EndRecord::Open => {}
        }
        if end.changed().await.is_err() {
            // Nobody will record it any more: the agent is ending.
            return;
        }
    }
    registry.give_back(id);
}
