//! What the two ends have journalled: asking one, and relaying one's record to the other.

use slackwater_handover::resolver::{Answer, End};
use slackwater_handover::{Record, Word};
use slackwater_proto::node::JournalState;

use super::request::Accepted;
use crate::fleet::{CallError, Fleet};

/// Asks an end what it has journalled.
pub(super) async fn ask(fleet: &Fleet, accepted: &Accepted, end: End) -> Answer {
    match fleet.resolve(node_of(accepted, end), accepted.resolve(None)).await {
        Ok(state) => {
            Word::try_from(&state).map_or_else(|unknown| Answer::Silent(unknown.to_string()), Answer::Says)
        }
        // The one state that forbids an answer.
        Err(error) if error.is_precondition() => Answer::Unreadable(error.to_string()),
        Err(error) => Answer::Silent(error.to_string()),
    }
}

/// The last record of an end, if it can be asked.
pub(super) async fn record_at(fleet: &Fleet, accepted: &Accepted, end: End) -> Option<Record> {
    match ask(fleet, accepted, end).await {
        Answer::Says(word) => word.record,
        Answer::Silent(_) | Answer::Unreadable(_) => None,
    }
}

/// Relays the other end's record to an end.
///
/// # Errors
/// [`CallError`]; the record may have arrived.
pub(super) async fn relay(
    fleet: &Fleet,
    accepted: &Accepted,
    end: End,
    word: &Word,
) -> Result<(), CallError> {
    fleet.resolve(node_of(accepted, end), accepted.resolve(Some(JournalState::from(word)))).await.map(drop)
}

/// The node of an end.
pub(super) fn node_of(accepted: &Accepted, end: End) -> &str {
    match end {
        End::Source => &accepted.source,
        End::Destination => &accepted.target,
    }
}
