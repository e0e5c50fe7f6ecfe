//! Telling both agents that the outcome stands in the status: until then they keep the journal of the migration,
//! however old, since it may be asked for.
//!
//! An agent that has not come to its end may wait for the other one's word, as a source does that was lost when
//! the migration ended and is back since: so each is told what the other has journalled, as long as that lasts.

use std::sync::Arc;
use std::time::Duration;

use super::inquiry::run_round;
use super::request::Accepted;
use super::run::Run;
use super::tracked::RETRY_PAUSES;
use crate::fleet::CallError;
use crate::reason::agent::END_NOT_RECORDED;

impl Run {
    /// Until both have heard it, or the object is deleted: the finalizer stays so long, for the next operator.
    pub(super) async fn acknowledge(&mut self) {
        let Some(accepted) = self.tracked.accepted() else { return };
        let mut left = vec![accepted.source.clone(), accepted.target.clone()];
        let mut backoff = RETRY_PAUSES.begin();
        loop {
            let mut silent = Vec::new();
            for node in left {
                let answer = self.context.fleet.acknowledge_end(&node, accepted.acknowledge_end()).await;
                if let Err(error) = &answer {
                    tracing::debug!(migration = self.tracked.name(), node, %error, "the end was not acknowledged");
                }
                if !is_over(&answer) {
                    silent.push(node);
                }
            }
            left = silent;
            if left.is_empty() || self.tracked.is_deleting() {
                return;
            }
            self.tracked.rest(&mut backoff).await;
            self.relay_what_is_journalled(&accepted).await;
            self.tracked.look();
            self.note_spec().await;
        }
    }
}

impl Run {
    /// One round of asking both ends. What comes of it changes nothing about the outcome.
    async fn relay_what_is_journalled(&mut self, accepted: &Accepted) {
        let next = self.attempt.inquiry.next_round();
        let round = run_round(Arc::clone(&self.context.fleet), accepted.clone(), next).await;
        self.attempt.inquiry.judge(round, Duration::MAX);
    }
}

/// Whether asking again would change nothing.
fn is_over(answer: &Result<(), CallError>) -> bool {
    match answer {
        Ok(()) | Err(CallError::NoSuchNode { .. }) => true,
        // Its journal cannot be used, or it has seen a newer attempt.
        Err(CallError::Refused(refusal)) => {
            refusal.reason.as_ref().is_none_or(|reason| reason.as_str() != END_NOT_RECORDED)
        }
        Err(
            CallError::NotReady { .. }
            | CallError::NotLeading
            | CallError::EpochTooHigh { .. }
            | CallError::Broken { .. },
        ) => false,
    }
}

#[cfg(test)]
mod tests {
    use slackwater_handover::Reason;
    use slackwater_proto::refusal::Refusal;

    use super::*;

    #[test]
    fn an_agent_that_cannot_be_asked_or_has_not_recorded_its_end_is_asked_again() {
        let refused = |reason: &str| {
            let reason = Reason::parse(reason).unwrap();
            Err(CallError::Refused(Refusal::precondition(reason, "no")))
        };
        assert!(is_over(&Ok(())));
        assert!(is_over(&Err(CallError::NoSuchNode { node: "node-a".to_owned() })));
        assert!(is_over(&refused("JournalUnreadable")) && is_over(&refused("AttemptOver")));
        assert!(!is_over(&refused("EndNotRecorded")));
        assert!(!is_over(&Err(CallError::Broken { reason: None, message: "lost".to_owned() })));
    }
}
