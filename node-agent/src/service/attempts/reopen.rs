//! What taking up has in common at both ends: going on with the journal, and how it can fail.

use std::sync::Arc;

use slackwater_handover::{Failure, Reason};
use tokio::task::JoinError;

use super::resources::NodeResources;
use crate::attempt::entry::Entry;
use crate::attempt::ledger::Ledger;
use crate::host::vm::VmJsonError;
use crate::journal::{JournalError, Key};

/// Why an attempt cannot be taken up.
#[derive(Debug, thiserror::Error)]
pub(super) enum TakeUpError {
    /// A task of the agent ended early.
    #[error(transparent)]
    Task(#[from] JoinError),
    /// The journal.
    #[error("the journal cannot be written any more: {}", .0.with_causes())]
    Reopen(JournalError),
    /// The journal of an attempt that holds a VM does not name the VM's process.
    #[error("the journal does not name the process of the VM's VMM, so whether that lives is not known")]
    NoProcess,
    /// The reservation's vm.json.
    #[error("vm_json in the journal {key}: {source}")]
    VmJson {
        /// The name of the journal.
        key: String,
        /// What is wrong with it.
        source: VmJsonError,
    },
    /// Where its VMM listens.
    #[error(transparent)]
    Socket(VmJsonError),
}

impl TakeUpError {
    /// Another try may succeed, without another start of the agent.
    pub(super) fn may_pass(&self) -> bool {
        match self {
            Self::Task(_) => true,
            Self::Reopen(error) => error.may_pass(),
            Self::NoProcess | Self::VmJson { .. } | Self::Socket(_) => false,
        }
    }
}

/// Why an attempt is given up that the journal names no other reason for.
pub(super) fn restarted() -> Failure {
    Failure::new(
        Reason::AgentRestarted,
        "the agent ended in the middle of the migration, and was started again",
    )
}

/// Goes on with a journal.
pub(super) async fn reopen(node: &NodeResources, key: &Key, entry: &Entry) -> Result<Ledger, TakeUpError> {
    let (journal, reopened) = (Arc::clone(&node.journal), key.clone());
    let file = tokio::task::spawn_blocking(move || journal.reopen(&reopened)).await?;
    let file = file.map_err(TakeUpError::Reopen)?;
    Ok(Ledger::go_on(Arc::clone(&node.journal), key.clone(), file, entry.clone()))
}
