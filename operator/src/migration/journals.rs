//! What the two ends have journalled: asking one, and relaying one's record to the other.

use slackwater_handover::resolver::{Answer, End};
use slackwater_handover::{Record, Word};
use slackwater_proto::node::{JournalState, ResolveResponse};

use super::request::Accepted;
use crate::fleet::{CallError, Fleet};

/// What an end was heard to say.
#[derive(Debug)]
pub(super) struct Heard {
    pub(super) answer: Answer,
    /// It comes from the journal in which the target had recorded that it reserved.
    pub(super) same_journal: bool,
}

/// Asks an end what it has journalled.
pub(super) async fn ask(fleet: &Fleet, accepted: &Accepted, end: End) -> Heard {
    let silent = |answer| Heard { answer, same_journal: false };
    match fleet.resolve(node_of(accepted, end), accepted.resolve(None)).await {
        Ok(ResolveResponse { own, journal_id }) => {
            let word = Word::try_from(&own.unwrap_or_default());
            Heard {
                answer: word.map_or_else(|unknown| Answer::Silent(unknown.to_string()), Answer::Says),
                same_journal: accepted.target_journal.as_ref() == Some(&journal_id),
            }
        }
        // The one state that forbids an answer.
        Err(error) if error.is_precondition() => silent(Answer::Unreadable(error.to_string())),
        Err(error) => silent(Answer::Silent(error.to_string())),
    }
}

/// The last record of an end, if it can be asked.
pub(super) async fn record_at(fleet: &Fleet, accepted: &Accepted, end: End) -> Option<Record> {
    match ask(fleet, accepted, end).await.answer {
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
