//! Asking the source to give a migration up.

use std::time::Duration;

use slackwater_handover::Record;
use slackwater_handover::resolver::End;
use slackwater_proto::node::AbortRequest;

use super::journals::record_at;
use super::request::Accepted;
use crate::fleet::{CallError, Fleet};

/// The pause before an abort that did not arrive is sent again.
const RESEND_PAUSE: Duration = Duration::from_secs(1);

/// What the source answers to an abort.
pub(super) enum AbortAnswer {
    /// The migration has ended there.
    Ended,
    /// The point of no return has passed.
    TooLate(CallError),
    /// No, for another reason.
    Refused(CallError),
}

/// Asks the source once.
///
/// # Errors
/// The source has not answered.
pub(super) async fn abort_once(
    fleet: &Fleet,
    accepted: &Accepted,
    request: AbortRequest,
) -> Result<AbortAnswer, CallError> {
    match fleet.abort(&accepted.source, request).await {
        Ok(()) => Ok(AbortAnswer::Ended),
        Err(error) if error.is_refusal() => Ok(refused_or_too_late(fleet, accepted, error).await),
        Err(error) => Err(error),
    }
}

/// Asks the source until it has answered.
pub(super) async fn abort(fleet: &Fleet, accepted: &Accepted, request: AbortRequest) -> AbortAnswer {
    loop {
        match abort_once(fleet, accepted, request.clone()).await {
            Ok(answer) => return answer,
            Err(error) => {
                tracing::warn!(source = accepted.source, %error, "aborting failed; trying again");
                tokio::time::sleep(RESEND_PAUSE).await;
            }
        }
    }
}

/// Whether the point of no return has passed, or the source cannot give up for another reason: its journal
/// says which.
async fn refused_or_too_late(fleet: &Fleet, accepted: &Accepted, error: CallError) -> AbortAnswer {
    match record_at(fleet, accepted, End::Source).await {
        Some(Record::Committed | Record::Released) => AbortAnswer::TooLate(error),
        _ => AbortAnswer::Refused(error),
    }
}
