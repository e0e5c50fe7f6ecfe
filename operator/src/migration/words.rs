//! The agents' words, as the [resolver](super::resolver) has them, and back.

use slackwater_proto::node::{JournalRecord, JournalState};

use super::resolver::{Failure, Record, Word};
use crate::reason::camel_case_or;

/// What an agent has said. `None`: a record that is not known here, from a newer agent. That says nothing, which is not the
/// same as that nothing is journalled.
pub fn from_wire(state: &JournalState) -> Option<Word> {
    let record = match JournalRecord::try_from(state.record).ok()? {
        JournalRecord::Unspecified => Record::None,
        JournalRecord::Reserved => Record::Reserved,
        JournalRecord::Loaded => Record::Loaded,
        JournalRecord::Starting => Record::Starting,
        JournalRecord::Running => Record::Running,
        JournalRecord::Discarded => Record::Discarded,
        JournalRecord::Saving => Record::Saving,
        JournalRecord::Committed => Record::Committed,
        JournalRecord::Released => Record::Released,
        JournalRecord::Aborted => Record::Aborted,
    };
    let failed = !(state.reason.is_empty() && state.message.is_empty());
    let failure = failed
        .then(|| Failure { reason: camel_case_or(&state.reason, "Failed"), message: state.message.clone() });
    let stated = (!state.stated_because.is_empty()).then(|| state.stated_because.clone());
    Some(Word { record, ended: state.ended, failure, stated })
}

/// What is relayed to the other agent.
pub fn to_wire(word: &Word) -> JournalState {
    let record = match word.record {
        Record::None => JournalRecord::Unspecified,
        Record::Reserved => JournalRecord::Reserved,
        Record::Loaded => JournalRecord::Loaded,
        Record::Starting => JournalRecord::Starting,
        Record::Running => JournalRecord::Running,
        Record::Discarded => JournalRecord::Discarded,
        Record::Saving => JournalRecord::Saving,
        Record::Committed => JournalRecord::Committed,
        Record::Released => JournalRecord::Released,
        Record::Aborted => JournalRecord::Aborted,
    };
    let failure = word.failure.clone();
    JournalState {
        record: record.into(),
        ended: word.ended,
        reason: failure.as_ref().map(|failure| failure.reason.clone()).unwrap_or_default(),
        message: failure.map(|failure| failure.message).unwrap_or_default(),
        stated_because: word.stated.clone().unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_is_relayed_as_it_was_heard() {
        for record in Record::ALL {
            let failure =
                Some(Failure { reason: "StartFailed".into(), message: "the twin has exited".into() });
            let word = Word { record, ended: true, failure, stated: Some("its node is off".into()) };
            assert_eq!(from_wire(&to_wire(&word)), Some(word));
            assert_eq!(from_wire(&to_wire(&Word::of(record))), Some(Word::of(record)));
        }
    }

    #[test]
    fn a_record_of_a_newer_agent_is_not_taken_for_none() {
        let state = JournalState { record: 99, ..Default::default() };
        assert_eq!(from_wire(&state), None);
    }
}
