//! Attempts at this node: how one begins, and how the next agent takes it up again after a restart.
//!
//! ```text
//!  Migrate ─▶ begin_source ───────┐                 ┌─ take_up_source ◀──────┐
//!                                 ├─▶ an attempt ◀──┤                        ├─ take_up ◀─ journal
//!  Reserve ─▶ begin_destination ──┘        │        └─ take_up_destination ◀─┘
//!                                          ▼
//!                       the registry knows it, and gives back what it holds when it has ended
//! ```
//!
//! | module | what it is about |
//! |---|---|
//! | `resources` | what an attempt needs of the node; everything here works with it |
//! | `begin_source`, `begin_destination` | the checks before an attempt begins, and its beginning |
//! | `take_up`, `take_up_source`, `take_up_destination`, `reopen` | what an earlier agent began |
//! | `conflict` | open journals that are about the same |
//! | `journalled_vmm` | finding the VMM that the journal names |
//! | `taken` | what a beginning holds until it has come through, and whose turn it is |
//! | `entries` | a request as a journal's entry, and back |
//! | `reservation`, `site` | the target devices and the twin |
//! | `release` | what is left over of a VM that runs elsewhere |

mod begin_destination;
mod begin_source;
mod conflict;
mod entries;
mod journalled_vmm;
mod release;
mod reopen;
mod reservation;
mod resources;
mod site;
mod take_up;
mod take_up_destination;
mod take_up_source;
mod taken;

use std::sync::Arc;

use slackwater_handover::Reason;
use slackwater_handover::policy::NoStopPlan;
use slackwater_proto::node::MigrationRef;
use slackwater_proto::refusal::Refusal;
use slackwater_proto::tonic::Code;
use tokio::sync::Mutex;

use super::preflight::Preflight;
use super::reason::ServiceReason;
use super::registry::LocalEnd;
use crate::attempt::ledger::EndRecord;
use crate::journal::{JournalError, Role};

use self::taken::Turns;

pub use resources::NodeResources;

/// The attempts of this node.
pub struct Attempts {
    node: NodeResources,
    preflight: Preflight,
    /// Held while an attempt begins: what one has checked must not change before it has taken it.
    beginning: Mutex<()>,
    /// A migration away from here is begun once, however often it is asked for meanwhile.
    turns: Turns,
}

impl Attempts {
    /// None yet.
    pub fn new(node: NodeResources) -> Self {
        let preflight = Preflight::new(&node.config);
        Self { node, preflight, beginning: Mutex::new(()), turns: Turns::default() }
    }

    /// Takes up what earlier agents have left in the journal. To be called before any call is served.
    ///
    /// # Errors
    /// If the journal's directory cannot be read. A single file that cannot be read is logged, and held.
    pub async fn take_up_all(&self) -> Result<(), JournalError> {
        self.preflight.clear().await;
        take_up::take_up_all(&self.node).await
    }

    /// This node's part in the attempt that a call is about. A call that is out of date is refused.
    pub(super) async fn find(&self, reference: &MigrationRef) -> Result<Option<LocalEnd>, Refusal> {
        self.fence(reference).await?;
        self.node.registry.usable_part(&reference.id, reference.attempt)
    }

    /// Tells this node's journal from every other one; empty if it cannot be told now.
    pub(super) async fn journal_identity(&self) -> String {
        let journal = Arc::clone(&self.node.journal);
        match tokio::task::spawn_blocking(move || journal.identity()).await {
            Ok(Ok(identity)) => identity,
            Ok(Err(error)) => {
                let error = error.with_causes();
                tracing::warn!(error, "the journal's identity cannot be told");
                String::new()
            }
            Err(error) => {
                tracing::error!(%error, "the journal's identity cannot be told");
                String::new()
            }
        }
    }

    /// The operator knows how an attempt ended.
    pub(super) async fn acknowledge(&self, reference: &MigrationRef) -> Result<(), Refusal> {
        let (role, end) = match self.find(reference).await? {
            Some(LocalEnd::Source(run)) => (Role::Source, run.end_record()),
            Some(LocalEnd::Destination(run, _)) => (Role::Destination, run.end_record()),
            Some(LocalEnd::Recovering | LocalEnd::Unreadable(_) | LocalEnd::Conflicting(_)) | None => {
                return Ok(());
            }
        };
        if *end.borrow() != EndRecord::Durable {
            let message = "the attempt has not ended here, or that is not durable yet; try again";
            return Err(precondition(ServiceReason::EndNotRecorded, message));
        }
        self.node.acknowledge(reference, role).await.map_err(|error| {
            let message = format!("the acknowledgement could not be recorded: {}", error.with_causes());
            Refusal::unavailable(Reason::JournalFailed, message)
        })
    }

    /// Refuses a call that is out of date. A newer operator's epoch is durable before anything is done for
    /// it.
    async fn fence(&self, reference: &MigrationRef) -> Result<(), Refusal> {
        let epoch = reference.operator_epoch;
        if epoch > self.node.registry.highest_epoch() {
            let journal = Arc::clone(&self.node.journal);
            let written = tokio::task::spawn_blocking(move || journal.set_epoch(epoch)).await;
            let written = written
                .map_err(|error| Refusal::new(Code::Internal, ServiceReason::Internal, error.to_string()))?;
            written.map_err(|error| {
                let message = format!("the operator's epoch {epoch} could not be recorded: {error}");
                Refusal::unavailable(Reason::JournalFailed, message)
            })?;
        }
        Ok(self.node.registry.fence(reference)?)
    }
}

/// A state forbids the call.
fn precondition(reason: impl Into<Reason>, error: impl std::fmt::Display) -> Refusal {
    Refusal::precondition(reason, error.to_string())
}

/// No order of stops is safe.
fn no_stop_plan(error: NoStopPlan) -> Refusal {
    let reason = match error {
        NoStopPlan::NotMigratable(_) => ServiceReason::DeviceNotMigratable,
        NoStopPlan::PeerToPeerUnsupported(_) => ServiceReason::PeerToPeerUnsupported,
    };
    precondition(reason, error)
}
