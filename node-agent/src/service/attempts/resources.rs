//! What an attempt needs of the node.

use std::sync::Arc;

use slackwater_proto::node::{MigrationRef, ReserveRequest};
use slackwater_proto::refusal::Refusal;
use slackwater_proto::tls::Credentials;
use slackwater_proto::transfer::Attempt;
use tokio::sync::watch;
use tracing::warn;

use crate::attempt::destination::DestinationRun;
use crate::attempt::entry::{EndEntry, Entry};
use crate::attempt::ledger::EndRecord;
use crate::attempt::link::Peer;
use crate::attempt::source::SourceRun;
use crate::host::identity::VfIdentity;
use crate::host::twin_users::TwinUsers;
use crate::journal::{Journal, JournalError, Key, Role};
use crate::service::config::NodeConfig;
use crate::service::inventory::Inventory;
use crate::service::reason::ServiceReason;
use crate::service::registry::{Hold, LocalEnd, MAX_UNACKNOWLEDGED, Registry};

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
    /// The destination of a source's attempt, by its journal. `None`: this node was the destination.
    pub(super) fn peer_of(&self, entry: &Entry) -> Option<Peer> {
        let EndEntry::Source { target_node, target_address, .. } = &entry.end else { return None };
        Some(Peer {
            credentials: Arc::clone(&self.credentials),
            node: target_node.clone(),
            address: target_address.clone(),
            attempt: Attempt { migration_id: entry.migration_id.clone(), attempt: entry.attempt },
        })
    }

    /// This node is the source of an attempt. When that has ended, durably, what it holds is given back.
    pub(super) fn join_source(&self, reference: &MigrationRef, run: &SourceRun) {
        self.registry.join(reference, LocalEnd::Source(run.clone()));
        let (node, run, reference) = (self.clone(), run.clone(), reference.clone());
        tokio::spawn(async move {
            run.ended().await;
            node.give_back(&reference, Role::Source, run.end_record()).await;
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
        let (node, run, reference) = (self.clone(), run.clone(), reference.clone());
        tokio::spawn(async move {
            run.free().await;
            node.give_back(&reference, Role::Destination, run.end_record()).await;
        });
    }

    /// Gives back what an attempt held, when its end is durable. An agent that starts anew acts on every journal
    /// without an end, and would take a VM back that another migration has moved on.
    pub(super) async fn give_back(
        &self,
        reference: &MigrationRef,
        role: Role,
        mut end: watch::Receiver<EndRecord>,
    ) {
        let (registry, id) = (&self.registry, &reference.id);
        loop {
            match end.borrow_and_update().clone() {
                EndRecord::Durable => break,
                EndRecord::Failing(why) => {
                    registry.explain(id, Hold { reason: ServiceReason::EndNotRecorded, why });
                }
                EndRecord::Open => {}
            }
            if end.changed().await.is_err() {
                // Nobody will record it any more: the agent is ending.
                return;
            }
        }
        registry.give_back(id);
        // Where no operator has ever called, none will acknowledge an end.
        if registry.highest_epoch() == 0
            && let Err(error) = self.acknowledge(reference, role).await
        {
            warn!(
                migration = reference.id,
                error = error.with_causes(),
                "an ended migration stays in the journal"
            );
        }
    }

    /// Notes, durably, that the operator knows how an attempt ended, and forgets the oldest of such ones.
    pub(super) async fn acknowledge(&self, reference: &MigrationRef, role: Role) -> Result<(), JournalError> {
        let (journal, key) = (Arc::clone(&self.journal), Key::new(&reference.id, role)?);
        on_disk(move || journal.acknowledge(&key)).await?;
        let forgotten = self.registry.acknowledge(&reference.id, reference.attempt);
        for key in forgotten {
            let (journal, id) = (Arc::clone(&self.journal), key.id().to_owned());
            if let Err(error) = on_disk(move || journal.remove_acknowledged(&key)).await {
                warn!(
                    migration = id,
                    error = error.with_causes(),
                    "an old journal stays until the next start"
                );
            }
        }
        Ok(())
    }

    /// Refuses to begin an attempt while more ends are to be remembered than may be.
    pub(super) fn check_memory(&self) -> Result<(), Refusal> {
        if self.registry.unacknowledged() < MAX_UNACKNOWLEDGED {
            return Ok(());
        }
        let message = format!(
            "{MAX_UNACKNOWLEDGED} migrations have ended here, and no operator has acknowledged that it knows how: \
             their journals may still be asked for. Run an operator of this version or a newer one"
        );
        Err(Refusal::precondition(ServiceReason::EndsNotAcknowledged, message))
    }
}

/// Runs what blocks.
async fn on_disk<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}
