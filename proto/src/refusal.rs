//! A refused call on the wire and back: its gRPC code, its reason, its message and its detail.
//!
//! | part | in the gRPC status |
//! |---|---|
//! | code | the code |
//! | reason | the metadata `slackwater-reason`: CamelCase, as in a condition |
//! | message | the message, at most 4096 bytes of it |
//! | detail | metadata of its own: `slackwater-known-epoch` |
//!
//! What comes over the wire is input: a reason that Kubernetes would not take is no reason, a detail that
//! cannot be read is none. Agents of version 0.1.0 send a reason only when their preflight refuses a
//! reservation, so a refusal may have none.

use slackwater_handover::{Failure, Reason};
use tonic::metadata::{AsciiMetadataValue, MetadataMap};
use tonic::{Code, Status};

use crate::channel::words;

/// The metadata that names the reason.
const REASON: &str = "slackwater-reason";

/// The metadata that names the highest operator epoch that an agent has seen, in decimal digits.
const KNOWN_EPOCH: &str = "slackwater-known-epoch";

/// The longest message, in bytes. A status travels in HTTP/2 headers, of which there may be 16 KiB; a byte
/// takes up to three there.
const MESSAGE_LIMIT_BYTES: usize = 4096;

/// Why a call was not carried out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// The kind of the refusal for gRPC: who has to change something before the call can succeed.
    pub code: Code,
    /// The kind of the refusal for a condition. None: the other end names none that can be used.
    pub reason: Option<Reason>,
    /// For a person.
    pub message: String,
    /// For a program.
    pub detail: Option<Detail>,
}

/// What a program needs to know about a refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Detail {
    /// The highest operator epoch that the agent has seen; the caller's is lower.
    KnownEpoch(u64),
}

impl Refusal {
    /// A refusal with a reason.
    pub fn new(code: Code, reason: impl Into<Reason>, message: impl Into<String>) -> Self {
        Self { code, reason: Some(reason.into()), message: message.into(), detail: None }
    }

    /// The request itself is wrong.
    pub fn invalid_argument(reason: impl Into<Reason>, message: impl Into<String>) -> Self {
        Self::new(Code::InvalidArgument, reason, message)
    }

    /// What the request is about does not exist here.
    pub fn not_found(reason: impl Into<Reason>, message: impl Into<String>) -> Self {
        Self::new(Code::NotFound, reason, message)
    }

    /// A state forbids the call.
    pub fn precondition(reason: impl Into<Reason>, message: impl Into<String>) -> Self {
        Self::new(Code::FailedPrecondition, reason, message)
    }

    /// The call cannot be carried out now. The caller is to repeat it.
    pub fn unavailable(reason: impl Into<Reason>, message: impl Into<String>) -> Self {
        Self::new(Code::Unavailable, reason, message)
    }

    /// The same, with something for a program.
    #[must_use]
    pub fn with_detail(self, detail: Detail) -> Self {
        Self { detail: Some(detail), ..self }
    }

    /// What a failed call says. A call that was lost on the way has no reason, and a message that says how it
    /// was lost.
    pub fn from_status(status: &Status) -> Self {
        let metadata = status.metadata();
        Self {
            code: status.code(),
            reason: text(metadata, REASON).and_then(Reason::parse),
            message: bounded(words(status)),
            detail: text(metadata, KNOWN_EPOCH).and_then(|epoch| epoch.parse().ok()).map(Detail::KnownEpoch),
        }
    }

    /// The other end has decided, and has changed nothing. False: the call may have been lost on the way, or
    /// carried out.
    #[must_use]
    pub fn is_decided(&self) -> bool {
        match self.code {
            Code::InvalidArgument
            | Code::NotFound
            | Code::AlreadyExists
            | Code::PermissionDenied
            | Code::ResourceExhausted
            | Code::FailedPrecondition
            | Code::OutOfRange
            | Code::Unimplemented
            | Code::Unauthenticated => true,
            Code::Ok
            | Code::Cancelled
            | Code::Unknown
            | Code::DeadlineExceeded
            | Code::Aborted
            | Code::Internal
            | Code::Unavailable
            | Code::DataLoss => false,
        }
    }
}

/// A state forbids the call, for the reason of the failure.
impl From<Failure> for Refusal {
    fn from(failure: Failure) -> Self {
        Self::precondition(failure.reason, failure.message)
    }
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        let mut status = Self::new(refusal.code, bounded(refusal.message));
        let reason = refusal.reason.as_ref().map(Reason::as_str).filter(|name| Reason::parse(name).is_some());
        let known_epoch = refusal.detail.map(|Detail::KnownEpoch(epoch)| epoch.to_string());
        for (key, value) in [(REASON, reason), (KNOWN_EPOCH, known_epoch.as_deref())] {
            if let Some(value) = value.and_then(|value| AsciiMetadataValue::try_from(value).ok()) {
                status.metadata_mut().insert(key, value);
            }
        }
        status
    }
}

fn text<'a>(metadata: &'a MetadataMap, key: &str) -> Option<&'a str> {
    metadata.get(key)?.to_str().ok()
}

/// As much of a message as may travel.
pub(crate) fn bounded(mut message: String) -> String {
    const ELLIPSIS: &str = "...";
    if message.len() > MESSAGE_LIMIT_BYTES {
        let room = MESSAGE_LIMIT_BYTES - ELLIPSIS.len();
        let end = (0..=room).rev().find(|index| message.is_char_boundary(*index)).unwrap_or_default();
        message.truncate(end);
        message.push_str(ELLIPSIS);
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_read_as_it_was_written() {
        for code in [Code::InvalidArgument, Code::NotFound, Code::FailedPrecondition, Code::Unavailable] {
            for reason in [Reason::JournalFailed, Reason::Other("QEMUOlder".into())] {
                for detail in [None, Some(Detail::KnownEpoch(u64::MAX))] {
                    let message = "the disk is full: 100 %".to_owned();
                    let refusal = Refusal { code, reason: Some(reason.clone()), message, detail };
                    assert_eq!(Refusal::from_status(&refusal.clone().into()), refusal);
                }
            }
        }
    }

    #[test]
    fn a_failure_keeps_its_reason_and_its_message() {
        let failure = Failure::new(Reason::DeviceFailed, "at the destination, EIO");
        let status = Status::from(Refusal::from(failure));
        assert_eq!((status.code(), status.message()), (Code::FailedPrecondition, "at the destination, EIO"));
        assert_eq!(status.metadata().get("slackwater-reason").unwrap(), "DeviceFailed");
        assert!(status.metadata().get("slackwater-known-epoch").is_none());
    }

    #[test]
    fn the_epoch_travels_in_decimal_digits() {
        let refusal =
            Refusal::precondition(Reason::Other("OperatorReplaced".into()), "another operator leads");
        let status = Status::from(refusal.with_detail(Detail::KnownEpoch(7)));
        assert_eq!(status.metadata().get("slackwater-known-epoch").unwrap(), "7");
    }

    #[test]
    fn a_peer_that_names_no_reason_is_understood() {
        let refusal = Refusal::from_status(&Status::failed_precondition("the VM is paused"));
        assert_eq!((refusal.reason, refusal.detail), (None, None));
        assert_eq!(refusal.message, "the VM is paused");
    }

    #[test]
    fn what_could_be_no_reason_is_none() {
        for hostile in ["", "no reason", "9Lives", "<script>", &"A".repeat(129)] {
            let mut status = Status::failed_precondition("x");
            status.metadata_mut().insert(REASON, hostile.parse().unwrap());
            status.metadata_mut().insert(KNOWN_EPOCH, "-1".parse().unwrap());
            let refusal = Refusal::from_status(&status);
            assert_eq!((refusal.reason, refusal.detail), (None, None), "{hostile:?}");
            let written = Status::from(Refusal::precondition(Reason::Other(hostile.into()), "x"));
            assert!(written.metadata().get(REASON).is_none(), "{hostile:?}");
        }
        let mut status = Status::failed_precondition("x");
        let not_ascii = AsciiMetadataValue::try_from(&b"\xc3\x84rger"[..]).unwrap();
        status.metadata_mut().insert(REASON, not_ascii);
        assert_eq!(Refusal::from_status(&status).reason, None);
    }

    #[test]
    fn a_message_is_cut_off_where_it_would_not_fit_into_a_header() {
        let written = Status::from(Refusal::precondition(Reason::TwinFailed, "ä".repeat(5000)));
        assert!(written.message().len() <= MESSAGE_LIMIT_BYTES && written.message().ends_with("ä..."));
        let read = Refusal::from_status(&Status::failed_precondition("x".repeat(5000)));
        assert_eq!(read.message.len(), MESSAGE_LIMIT_BYTES);
    }

    #[test]
    fn only_a_code_that_must_come_from_the_other_end_itself_is_its_decision() {
        let decided = |code| Refusal::new(code, Reason::TimedOut, "x").is_decided();
        assert!([Code::InvalidArgument, Code::NotFound, Code::FailedPrecondition].into_iter().all(decided));
        let lost = [Code::Unavailable, Code::Unknown, Code::Internal, Code::Cancelled, Code::DataLoss];
        assert!(!lost.into_iter().any(decided));
    }
}
