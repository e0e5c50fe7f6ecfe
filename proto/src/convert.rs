//! The core's types ([`slackwater_handover`]) on the wire and back. Each conversion is here and nowhere else.

use slackwater_handover::failure::{JUSTIFICATION_MAX_BYTES, cut};
use slackwater_handover::policy::PeerToPeer;
use slackwater_handover::state::Features;
use slackwater_handover::{Failure, Reason, Record, Word, source};

use crate::node::{self, Finished, JournalRecord, JournalState, MigrationFeatures, Outcome};
use crate::refusal::bounded;
use crate::transfer::{self, Failed};

/// A record that only a newer agent knows. It says nothing, which is not the same as having no journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("its journal has a record that this version does not know, number {0}: a newer version wrote it")]
pub struct UnknownRecord(pub i32);

impl From<Record> for JournalRecord {
    fn from(record: Record) -> Self {
        match record {
            Record::Reserved => Self::Reserved,
            Record::Loaded => Self::Loaded,
            Record::Starting => Self::Starting,
            Record::Running => Self::Running,
            Record::Discarded => Self::Discarded,
            Record::Saving => Self::Saving,
            Record::Committed => Self::Committed,
            Record::Released => Self::Released,
            Record::Aborted => Self::Aborted,
        }
    }
}

impl From<JournalRecord> for Option<Record> {
    fn from(record: JournalRecord) -> Self {
        Some(match record {
            JournalRecord::Unspecified => return None,
            JournalRecord::Reserved => Record::Reserved,
            JournalRecord::Loaded => Record::Loaded,
            JournalRecord::Starting => Record::Starting,
            JournalRecord::Running => Record::Running,
            JournalRecord::Discarded => Record::Discarded,
            JournalRecord::Saving => Record::Saving,
            JournalRecord::Committed => Record::Committed,
            JournalRecord::Released => Record::Released,
            JournalRecord::Aborted => Record::Aborted,
        })
    }
}

impl From<&Word> for JournalState {
    fn from(word: &Word) -> Self {
        let (reason, message) = match &word.failure {
            Some(failure) => (failure.reason.as_str().to_owned(), failure.message.clone()),
            None => (String::new(), String::new()),
        };
        Self {
            record: word.record.map_or(JournalRecord::Unspecified, JournalRecord::from).into(),
            ended: word.ended,
            reason,
            message,
            stated_because: word.stated_because.clone().unwrap_or_default(),
        }
    }
}

impl TryFrom<&JournalState> for Word {
    type Error = UnknownRecord;

    fn try_from(state: &JournalState) -> Result<Self, UnknownRecord> {
        let record = JournalRecord::try_from(state.record).map_err(|_| UnknownRecord(state.record))?;
        let failed = !(state.reason.is_empty() && state.message.is_empty());
        Ok(Self {
            record: record.into(),
            ended: state.ended,
            failure: failed.then(|| failure(&state.reason, &state.message)),
            stated_because: (!state.stated_because.is_empty())
                .then(|| cut(&state.stated_because, JUSTIFICATION_MAX_BYTES)),
        })
    }
}

/// A failure as another process names it. A name that Kubernetes would not take as a reason becomes
/// [`Reason::TargetFailed`]. The message is cut as that of a refusal is.
#[must_use]
pub fn failure(reason: &str, message: &str) -> Failure {
    Failure::new(Reason::parse(reason).unwrap_or(Reason::TargetFailed), bounded(message.to_owned()))
}

impl From<Features> for MigrationFeatures {
    fn from(features: Features) -> Self {
        Self { stop_copy: features.stop_copy, p2p: features.p2p, pre_copy: features.pre_copy }
    }
}

impl From<MigrationFeatures> for Features {
    fn from(features: MigrationFeatures) -> Self {
        Self { stop_copy: features.stop_copy, p2p: features.p2p, pre_copy: features.pre_copy }
    }
}

impl From<PeerToPeer> for node::PeerToPeer {
    fn from(policy: PeerToPeer) -> Self {
        match policy {
            PeerToPeer::Required => Self::Required,
            PeerToPeer::AssumeIsolated => Self::AssumeIsolated,
        }
    }
}

impl From<node::PeerToPeer> for Option<PeerToPeer> {
    fn from(policy: node::PeerToPeer) -> Self {
        match policy {
            node::PeerToPeer::Unspecified => None,
            node::PeerToPeer::Required => Some(PeerToPeer::Required),
            node::PeerToPeer::AssumeIsolated => Some(PeerToPeer::AssumeIsolated),
        }
    }
}

/// The phase that an operator sees. None: a phase that only carries out what has been decided already is not
/// reported.
#[must_use]
pub fn reported_phase(phase: source::Phase) -> Option<node::Phase> {
    use source::Phase;
    match phase {
        Phase::PreCopying => Some(node::Phase::PreCopy),
        Phase::Pausing => Some(node::Phase::Pausing),
        Phase::Quiescing => Some(node::Phase::Quiescing),
        Phase::Stopping => Some(node::Phase::Stopping),
        Phase::Capturing => Some(node::Phase::Capturing),
        Phase::AwaitingStarted => Some(node::Phase::Committed),
        Phase::Releasing => Some(node::Phase::Started),
        Phase::Settling => Some(node::Phase::RollingBack),
        Phase::New
        | Phase::Saving
        | Phase::Connecting
        | Phase::Committing
        | Phase::LeavingCapture
        | Phase::WakingP2p
        | Phase::Mending
        | Phase::Waking
        | Phase::Resuming
        | Phase::Finished => None,
    }
}

/// The phase that an operator sees at the end, if it sees one.
#[must_use]
pub fn last_phase(end: &source::End) -> Option<node::Phase> {
    match end {
        source::End::Succeeded => Some(node::Phase::Released),
        source::End::RolledBack(_) => Some(node::Phase::RolledBack),
        source::End::Refused(_) | source::End::Lost(_) => None,
    }
}

/// Without the timings and the bytes, which the node has measured.
impl From<source::End> for Finished {
    fn from(end: source::End) -> Self {
        let (outcome, failure) = match end {
            source::End::Succeeded => (Outcome::Succeeded, None),
            source::End::RolledBack(failure) => (Outcome::RolledBack, Some(failure)),
            source::End::Refused(failure) => (Outcome::Refused, Some(failure)),
            source::End::Lost(failure) => (Outcome::Lost, Some(failure)),
        };
        let (reason, message) = match failure {
            Some(Failure { reason, message }) => (reason.as_str().to_owned(), message),
            None => (String::new(), String::new()),
        };
        Self { outcome: outcome.into(), reason, message, ..Self::default() }
    }
}

impl From<&Failure> for Failed {
    fn from(failure: &Failure) -> Self {
        Self { reason: failure.reason.as_str().to_owned(), message: failure.message.clone() }
    }
}

impl From<&Failure> for transfer::Doubt {
    fn from(failure: &Failure) -> Self {
        Self { reason: failure.reason.as_str().to_owned(), message: failure.message.clone() }
    }
}

impl From<&Failure> for node::Doubt {
    fn from(failure: &Failure) -> Self {
        Self { reason: failure.reason.as_str().to_owned(), message: failure.message.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RECORDS: [Record; 9] = [
        Record::Saving,
        Record::Committed,
        Record::Aborted,
        Record::Released,
        Record::Reserved,
        Record::Loaded,
        Record::Starting,
        Record::Running,
        Record::Discarded,
    ];

    #[test]
    fn a_word_is_read_as_it_was_written() {
        for record in RECORDS.map(Some).into_iter().chain([None]) {
            for failure in [None, Some(Failure::new(Reason::StartFailed, "the twin has exited"))] {
                for stated_because in [None, Some("its node is off".to_owned())] {
                    let word =
                        Word { record, ended: failure.is_some(), failure: failure.clone(), stated_because };
                    assert_eq!(Word::try_from(&JournalState::from(&word)), Ok(word));
                }
            }
        }
        assert_eq!(Word::try_from(&JournalState::default()), Ok(Word::without_record()));
    }

    #[test]
    fn a_record_of_a_newer_agent_is_not_taken_for_none() {
        let state = JournalState { record: 99, ..JournalState::default() };
        assert_eq!(Word::try_from(&state), Err(UnknownRecord(99)));
    }

    #[test]
    fn a_newer_agents_reason_keeps_its_name_and_nonsense_does_not_pass() {
        assert_eq!(failure("QuorumLost", "gone").reason.as_str(), "QuorumLost");
        assert_eq!(failure("not a reason", "gone").reason, Reason::TargetFailed);
        assert_eq!(failure("QuorumLost", &"x".repeat(1 << 20)).message.len(), 4096);
    }

    #[test]
    fn features_and_policy_are_read_as_they_were_written() {
        let features = Features { stop_copy: true, p2p: false, pre_copy: true };
        assert_eq!(Features::from(MigrationFeatures::from(features)), features);
        for policy in [PeerToPeer::Required, PeerToPeer::AssumeIsolated] {
            assert_eq!(Option::from(node::PeerToPeer::from(policy)), Some(policy));
        }
    }

    #[test]
    fn an_end_is_finished_with_its_outcome_and_its_failure() {
        let failure = Failure::new(Reason::VmmExited, "the VMM has exited");
        let finished = Finished::from(source::End::Lost(failure.clone()));
        assert_eq!((finished.outcome(), finished.reason.as_str()), (Outcome::Lost, "VMMExited"));
        assert_eq!(finished.message, failure.message);
        let succeeded = Finished::from(source::End::Succeeded);
        assert_eq!(succeeded, Finished { outcome: Outcome::Succeeded.into(), ..Finished::default() });
    }

    #[test]
    fn the_commit_and_every_end_of_a_vm_that_runs_are_reported_phases() {
        use source::{End, Phase};
        assert_eq!(reported_phase(Phase::Committing), None);
        assert_eq!(reported_phase(Phase::AwaitingStarted), Some(node::Phase::Committed));
        let failure = Failure::new(Reason::Aborted, "the user asked for it");
        assert_eq!(last_phase(&End::Succeeded), Some(node::Phase::Released));
        assert_eq!(last_phase(&End::RolledBack(failure.clone())), Some(node::Phase::RolledBack));
        assert_eq!(last_phase(&End::Lost(failure)), None);
    }

    #[test]
    fn a_failure_that_an_end_reports_is_read_as_it_was_written() {
        let told = Failure::new(Reason::DeviceFailed, "at the destination, EIO");
        let Failed { reason, message } = Failed::from(&told);
        assert_eq!(failure(&reason, &message), told);
        let doubt = node::Doubt::from(&told);
        assert_eq!((doubt.reason, doubt.message), (reason, message));
    }
}
