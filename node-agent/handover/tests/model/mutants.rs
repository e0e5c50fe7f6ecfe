//! The protocol, broken in five ways. Each is made outside the two machines, in what carries their effects out or brings them
//! their events, so that the machines of the product have no switch for it.

use slackwater_handover::{Failure, Reason, Record, Word, destination, source};

use crate::world::Forth;

/// A way to break the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mutant {
    /// S sends COMMIT when it asks for COMMITTED to be recorded.
    CommitBeforeFsync,
    /// S takes a deadline after COMMITTED for D's DISCARDED.
    ResumeOnTimeout,
    /// D takes S's silence after LOADED for its own failure.
    DiscardByTimeout,
    /// D, where it cannot start, journals DISCARDED and gives everything back.
    DiscardAfterStarting,
    /// Neither end looks at the attempt of what it hears.
    OlderAttempt,
}

impl Mutant {
    /// What S sends besides, when it asks for this.
    pub(crate) fn sends_early(mutant: Option<Self>, effect: &source::Effect) -> Option<Forth> {
        (mutant == Some(Self::CommitBeforeFsync) && *effect == source::Effect::Record(Record::Committed))
            .then_some(Forth::Commit)
    }

    /// What S is told when a deadline passes.
    pub(crate) fn deadline(mutant: Option<Self>, phase: source::Phase) -> source::Event {
        if mutant == Some(Self::ResumeOnTimeout) && phase == source::Phase::AwaitingStarted {
            source::Event::PeerSays(Word::at(Record::Discarded))
        } else {
            source::Event::Failed(Failure::new(Reason::TimedOut, ""))
        }
    }

    /// What D is told when S is silent.
    pub(crate) fn silence(mutant: Option<Self>, phase: destination::Phase) -> destination::Event {
        let failure = Failure::new(Reason::SourceSilent, "");
        if mutant == Some(Self::DiscardByTimeout) && phase == destination::Phase::Loaded {
            destination::Event::Failed(failure)
        } else {
            destination::Event::PeerLost(failure)
        }
    }

    /// What D does instead of this.
    pub(crate) fn instead(
        mutant: Option<Self>,
        effects: Vec<destination::Effect>,
    ) -> Vec<destination::Effect> {
        let stuck = |effect: &destination::Effect| {
            matches!(effect, destination::Effect::Finish(destination::End::Stuck(_)))
        };
        if mutant == Some(Self::DiscardAfterStarting) && effects.iter().any(stuck) {
            vec![destination::Effect::Record(Record::Discarded), destination::Effect::Discard]
        } else {
            effects
        }
    }

    /// Whether something said of attempt `of` is heard by an end that is at `at`.
    pub(crate) fn is_heard(mutant: Option<Self>, of: u32, at: u32) -> bool {
        of == at || mutant == Some(Self::OlderAttempt)
    }
}
