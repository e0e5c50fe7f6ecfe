//! What goes wrong: a kind for programs, and words for a person.

use strum::{EnumIter, EnumString, IntoStaticStr};

/// The kind of a failure: a condition's reason, an event's reason and a metric's label.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, EnumIter, EnumString, IntoStaticStr)]
pub enum Reason {
    /// A device refused a state change, a read or a write.
    DeviceFailed,
    /// A device is not where it was left: its guest, or a program on the node, has reset it.
    DeviceReset,
    /// A call to a device does not return.
    DeviceHangs,
    /// The VMM refused a call or did not answer.
    #[strum(serialize = "VMMFailed")]
    VmmFailed,
    /// The VMM's process is gone.
    #[strum(serialize = "VMMExited")]
    VmmExited,
    /// The VM's guest, or its owner, has stopped it.
    #[strum(serialize = "VMStopped")]
    VmStopped,
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

/// The longest message of a failure, in bytes. It goes into journals, whose space is allocated beforehand.
pub const MESSAGE_MAX_BYTES: usize = 4096;

/// The longest justification of an administrator's statement, in bytes.
pub const JUSTIFICATION_MAX_BYTES: usize = 4096;

/// Text of another program, a peer or a user as it may be shown and recorded: no longer than `limit_bytes`,
/// with a mark where it was cut, and without control characters except for line breaks and tabs.
#[must_use]
pub fn cut(text: &str, limit_bytes: usize) -> String {
    let plain = |c: char| if c.is_control() && !matches!(c, '\n' | '\t') { '\u{fffd}' } else { c };
    let whole = text.len();
    let mark = format!(" [cut: it had {whole} bytes]");
    let room = limit_bytes.saturating_sub(mark.len());
    let mut kept = String::new();
    // Where the text ends if it has to be cut.
    let mut end = 0;
    for c in text.chars().map(plain) {
        if kept.len() + c.len_utf8() > limit_bytes {
            kept.truncate(end);
            kept.extend(mark.chars().take(limit_bytes - end));
            return kept;
        }
        kept.push(c);
        if kept.len() <= room {
            end = kept.len();
        }
    }
    kept
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
    /// A failure of a kind, in words. They are cut to [`MESSAGE_MAX_BYTES`]: most of them quote another program
    /// or the other end.
    pub fn new(reason: Reason, message: impl AsRef<str>) -> Self {
        Self { reason, message: cut(message.as_ref(), MESSAGE_MAX_BYTES) }
    }

    /// The same failure, with `more` after its words.
    #[must_use]
    pub fn and(self, more: &str) -> Self {
        Self::new(self.reason, self.message + more)
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
    fn text_is_cut_between_two_characters_with_a_mark_and_without_control_characters() {
        assert_eq!(cut("short", 5), "short");
        assert_eq!(cut(&"x".repeat(100), 40), format!("{} [cut: it had 100 bytes]", "x".repeat(16)));
        assert_eq!(cut("\u{1b}[2Jgone\r\nnext\tone\0", 100), "\u{fffd}[2Jgone\u{fffd}\nnext\tone\u{fffd}");
        for limit in 0..120 {
            for text in ["ä".repeat(50), "\0".repeat(70), "🌊".repeat(25), "plain".repeat(20)] {
                let kept = cut(&text, limit);
                assert!(kept.len() <= limit, "{limit}: {kept}");
                assert!(kept.is_char_boundary(kept.len()));
            }
        }
        let failure = Failure::new(Reason::TwinFailed, "x".repeat(100_000)).and(&"y".repeat(100_000));
        assert_eq!(failure.message.len(), MESSAGE_MAX_BYTES);
        assert!(failure.message.starts_with("xx") && failure.message.ends_with("bytes]"), "{failure}");
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
