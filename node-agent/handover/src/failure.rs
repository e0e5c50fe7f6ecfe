//! What goes wrong: a kind for programs, and words for a person.

use strum::{EnumIter, EnumString, IntoStaticStr};

/// The kind of a failure: a condition's reason, an event's reason and a metric's label.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, EnumIter, EnumString, IntoStaticStr)]
pub enum Reason {
    /// A device refused a state change, a read or a write.
    DeviceFailed,
    /// A call to a device does not return.
    DeviceHangs,
    /// The VMM refused a call or did not answer.
    #[strum(serialize = "VMMFailed")]
    VmmFailed,
    /// The VMM's process is gone.
    #[strum(serialize = "VMMExited")]
    VmmExited,
    /// The twin could not be started, or ended.
    TwinFailed,
    /// The destination could not be reached, or would not take part.
    TargetUnreachable,
    /// The destination was lost on the way.
    PeerLost,
    /// A blob's offset, length or digest was not what the source announced.
    BlobRejected,
    /// The destination gave up; the message is its own.
    TargetFailed,
    /// Not committed within `preCommitTimeout`.
    TimedOut,
    /// The user asked for it.
    Aborted,
    /// The source was silent for too long.
    SourceSilent,
    /// The source reported that it keeps the VM, or was never asked to give it.
    Released,
    /// The VM's devices could not all be brought back to RUNNING.
    RollbackFailed,
    /// The destination could not start what it had loaded.
    StartFailed,
    /// The agent restarted in the middle.
    AgentRestarted,
    /// A record could not be made durable.
    JournalFailed,
    /// The destination has no journal of what it was sent.
    TargetForgot,
    /// The destination answers, and has not started the VM yet.
    TargetSlow,
    /// The guest would have to be stopped for longer than it may.
    BudgetExceeded,
    /// One that this version does not know: a newer agent's.
    #[strum(disabled)]
    Other(Box<str>),
}

/// The longest reason that Kubernetes takes in a condition or an event.
const MAX_REASON_BYTES: usize = 128;

impl Reason {
    /// The reason of this name, as an agent has written it. `None` if Kubernetes would not take the name as a
    /// reason.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        let fits = name.len() <= MAX_REASON_BYTES
            && name.starts_with(|c: char| c.is_ascii_alphabetic())
            && name.chars().all(|c| c.is_ascii_alphanumeric());
        fits.then(|| name.parse().unwrap_or_else(|_| Self::Other(name.into())))
    }

    /// In CamelCase, as Kubernetes writes reasons.
    #[must_use]
    pub fn as_str(&self) -> &str {
        match self {
            Self::Other(name) => name,
            known => known.into(),
        }
    }
}

/// What went wrong, for a person.
#[derive(Clone, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// Its kind.
    pub reason: Reason,
    /// One or more sentences that name the device, the value or the peer.
    pub message: String,
}

impl Failure {
    /// A failure of a kind, in words.
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self { reason, message: message.into() }
    }
}

#[cfg(test)]
mod tests {
    use strum::IntoEnumIterator;

    use super::*;

    #[test]
    fn every_reason_is_parsed_from_its_own_name() {
        for reason in Reason::iter() {
            assert_eq!(Reason::parse(reason.as_str()), Some(reason));
        }
        assert_eq!(Reason::VmmExited.as_str(), "VMMExited");
    }

    #[test]
    fn the_reason_of_a_newer_agent_keeps_its_name_and_nonsense_is_none() {
        let newer = Reason::parse("QuorumLost").unwrap();
        assert_eq!((newer.as_str(), &newer), ("QuorumLost", &Reason::Other("QuorumLost".into())));
        for nonsense in ["", "9Lives", "no reason", "a\nb", &"A".repeat(129)] {
            assert_eq!(Reason::parse(nonsense), None, "{nonsense:?}");
        }
    }
}
