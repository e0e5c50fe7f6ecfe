//! What both ends ask of a VMM, and how a call that failed is described.

use futures::future::BoxFuture;
use slackwater_handover::{Failure, Reason};

use crate::vmm::{RunState, Vmm, VmmError};

/// A call to a VMM that yields nothing but success or failure.
pub(super) type VmmCall = for<'a> fn(&'a dyn Vmm) -> BoxFuture<'a, Result<(), VmmError>>;

/// Lets the vCPUs run, unless they do already. After a pause that failed, or in an agent that has started
/// again, it is not known whether they run, and a VMM refuses to resume a VM that runs.
pub(super) fn resume(vmm: &dyn Vmm) -> BoxFuture<'_, Result<(), VmmError>> {
    Box::pin(async move {
        match vmm.run_state().await? {
            RunState::Running => Ok(()),
            RunState::Paused | RunState::Incoming => vmm.resume().await,
        }
    })
}

/// Asks the twin for a sign of life. A process that is being killed gives none, even if its end has not been
/// seen yet.
pub(super) fn confirm(vmm: &dyn Vmm) -> BoxFuture<'_, Result<(), VmmError>> {
    Box::pin(async move { vmm.run_state().await.map(drop) })
}

/// A call to the VM's VMM at the source that failed.
pub(super) fn source_failure(error: &VmmError) -> Failure {
    let reason = match error {
        VmmError::BudgetExceeded(_) => Reason::BudgetExceeded,
        _ => Reason::VmmFailed,
    };
    Failure::new(reason, error.to_string())
}

/// A call to the twin that failed: it refused, or it has ended. The broken call may be the first sign of its
/// end.
pub(super) fn twin_failure(error: &VmmError) -> Failure {
    let reason = match error {
        VmmError::Lost { .. } => Reason::TwinFailed,
        _ => Reason::VmmFailed,
    };
    Failure::new(reason, format!("at the destination, {error}"))
}
