//! Asking the target to give back what it reserved, until it answers.

use slackwater_handover::Record;
use slackwater_handover::resolver::End;
use slackwater_proto::node::ReleaseReason;

use super::journals::record_at;
use super::request::Accepted;
use super::run::Run;
use super::tracked::RETRY_PAUSES;
use crate::fleet::CallError;

impl Run {
    pub(super) async fn release(&mut self, reason: ReleaseReason) {
        let Some(accepted) = self.tracked.accepted() else { return self.tracked.give_up_unreadable().await };
        let target = &accepted.target;
        let mut backoff = RETRY_PAUSES.begin();
        loop {
            match self.context.fleet.release(target, accepted.release(reason)).await {
                Ok(()) => {
                    let message = format!("{target} has given back what it reserved.");
                    self.tracked.draft_now().target_released(&message);
                    break;
                }
                Err(error) if error.is_precondition() && self.has_started_there(&accepted).await => {
                    tracing::error!(
                        migration = self.tracked.name(),
                        target,
                        %error,
                        "the target keeps its reservation"
                    );
                    self.tracked.draft_now().release_refused(&error.to_string());
                    break;
                }
                Err(error) if error.is_no_such_node() => {
                    let message = format!("{error}; its agent gives the devices back by itself.");
                    self.tracked.draft_now().target_released(&message);
                    break;
                }
                // Nobody knows when it can be asked: the VM must not wait for that.
                Err(error @ CallError::EpochTooHigh { .. }) => {
                    let message = format!(
                        "{target} cannot be asked to give back what it reserved: {error}. It does that by itself, \
                         or when the source tells it to."
                    );
                    self.tracked.draft_now().target_released(&message);
                    break;
                }
                // Nobody is there any more who waits for it.
                Err(error) if self.tracked.is_gone() => {
                    tracing::warn!(
                        migration = self.tracked.name(),
                        target,
                        %error,
                        "its finalizer was removed, and the target cannot be asked to give back what it reserved"
                    );
                    let message = format!("{error}; its agent gives the devices back by itself.");
                    self.tracked.draft_now().target_released(&message);
                    break;
                }
                Err(error) => {
                    tracing::warn!(
                        migration = self.tracked.name(),
                        target,
                        %error,
                        "releasing failed; trying again"
                    );
                    self.tracked.draft_now().release_failed(&error.to_string());
                    self.tracked.write_progress().await;
                    self.tracked.rest(&mut backoff).await;
                    self.tracked.look();
                }
            }
        }
        self.tracked.write().await;
    }

    /// The target says that it has started the VM: no other reason not to give back is for good.
    async fn has_started_there(&self, accepted: &Accepted) -> bool {
        let record = record_at(&self.context.fleet, accepted, End::Destination).await;
        matches!(record, Some(Record::Starting | Record::Running))
    }
}
