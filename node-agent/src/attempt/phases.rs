//! How the pure machines' phases and ends are told to others.

use slackwater_handover::{Failure, source};
use slackwater_proto::node::{Finished, Outcome, Phase};

/// The phase that an operator is told. Phases that only settle what has been decided are not told.
pub(super) fn told(phase: source::Phase) -> Option<Phase> {
    use source::Phase as S;
    match phase {
        S::PreCopying => Some(Phase::PreCopy),
        S::Pausing => Some(Phase::Pausing),
        S::Quiescing => Some(Phase::Quiescing),
        S::Stopping => Some(Phase::Stopping),
        S::Capturing => Some(Phase::Capturing),
        S::AwaitingStarted => Some(Phase::Committed),
        S::Releasing => Some(Phase::Started),
        S::Settling => Some(Phase::RollingBack),
        S::New
        | S::Saving
        | S::Connecting
        | S::Committing
        | S::LeavingCapture
        | S::WakingP2p
        | S::Mending
        | S::Waking
        | S::Resuming
        | S::Finished => None,
    }
}

/// The phase that goes with an end, if there is one.
pub(super) fn last(end: &source::End) -> Option<Phase> {
    match end {
        source::End::Succeeded => Some(Phase::Released),
        source::End::RolledBack(_) => Some(Phase::RolledBack),
        source::End::Refused(_) | source::End::Lost(_) => None,
    }
}

/// The end, without what has been measured.
pub(super) fn finished(end: source::End) -> Finished {
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
    Finished { outcome: outcome.into(), reason, message, ..Finished::default() }
}
