//! The protocol, broken in several ways. Each is made outside the two machines, in what performs their effects
//! or brings them their events, so that the machines of the product have no switch for it.

use slackwater_handover::state::MigrationState;
use slackwater_handover::{Failure, Reason, Record, Word, destination, source};

use crate::world::Forth;

/// A way to break the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mutant {
    /// The source sends COMMIT when it asks for COMMITTED to be recorded.
    CommitBeforeFsync,
    /// The source takes a deadline after COMMITTED for the destination's DISCARDED.
    ResumeOnTimeout,
    /// The destination takes the source's silence after LOADED for a failure of its own.
    DiscardByTimeout,
    /// The destination, where it cannot start, journals DISCARDED and gives everything back.
    DiscardAfterStarting,
    /// Neither end looks at the attempt of what it hears.
    OlderAttempt,
    /// The source takes the end of the VMM's stream for the end of its save.
    StreamEndsTheSave,
    /// The source's devices go to STOP_COPY at once, without waiting for each other in STOP.
    StopWithoutBarrier,
    /// An agent that restarts lets the VM run before it has recorded ABORTED.
    WakeAtRestart,
    /// A VM whose migration has ended is free for another one before that is in the journal, and an agent that
    /// restarts acts on every open journal.
    EndNotDurable,
    /// The same, but an agent that restarts acts on none of several open journals of a VM.
    EndNotDurableButHeld,
    /// An end that an earlier migration has left open takes the words of a later one for its own.
    LaterMigration,
    /// Nobody tells the source that a device of it hangs.
    HangsInSilence,
    /// The source takes a device that hangs for one that has come as far as the others.
    WakeWithoutTheHungOne,
    /// The operator takes a destination that waits for a silent source for one that never starts the VM.
    LostWhileLoaded,
    /// The source asks a device for its next state wherever it finds it.
    WhereverItIs,
}

impl Mutant {
    /// What the source sends besides, when it asks for this.
    pub(crate) fn sends_early(mutant: Option<Self>, effect: &source::Effect) -> Option<Forth> {
        (mutant == Some(Self::CommitBeforeFsync) && *effect == source::Effect::Record(Record::Committed))
            .then_some(Forth::Commit)
    }

    /// What the source hears when a deadline passes.
    pub(crate) fn deadline(mutant: Option<Self>, phase: source::Phase) -> source::Event {
        if mutant == Some(Self::ResumeOnTimeout) && phase == source::Phase::AwaitingStarted {
            source::Event::PeerSays(Word::at(Record::Discarded))
        } else {
            source::Event::Failed(Failure::new(Reason::TimedOut, ""))
        }
    }

    /// What the destination hears when the source is silent.
    pub(crate) fn silence(mutant: Option<Self>, phase: destination::Phase) -> destination::Event {
        let failure = Failure::new(Reason::SourceSilent, "");
        if mutant == Some(Self::DiscardByTimeout) && phase == destination::Phase::Loaded {
            destination::Event::Failed(failure)
        } else {
            destination::Event::PeerLost(failure)
        }
    }

    /// What the destination does instead of this.
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

    /// The same, by an end that an earlier migration has left open.
    pub(crate) fn is_heard_by_left_over(mutant: Option<Self>, of: u32, at: u32) -> bool {
        of == at || mutant == Some(Self::LaterMigration)
    }

    /// Whether the VMM's save counts as ended with its stream.
    pub(crate) fn takes_the_stream_for_the_save(mutant: Option<Self>) -> bool {
        mutant == Some(Self::StreamEndsTheSave)
    }

    /// Where a device of the source goes when it is to go to `to` in this phase.
    pub(crate) fn moves_to(
        mutant: Option<Self>,
        phase: Option<source::Phase>,
        to: MigrationState,
    ) -> MigrationState {
        let quiesces = phase == Some(source::Phase::Quiescing);
        match to {
            MigrationState::Stop if quiesces && mutant == Some(Self::StopWithoutBarrier) => {
                MigrationState::StopCopy
            }
            to => to,
        }
    }

    /// Whether a VM is free for another migration before the end of the first is in the journal.
    pub(crate) fn frees_before_the_end(mutant: Option<Self>) -> bool {
        matches!(mutant, Some(Self::EndNotDurable | Self::EndNotDurableButHeld))
    }

    /// Whether an agent that restarts acts on several open journals of a VM.
    pub(crate) fn acts_on_all(mutant: Option<Self>) -> bool {
        mutant == Some(Self::EndNotDurable)
    }

    /// What the source hears when a call to a device does not return.
    pub(crate) fn hangs(mutant: Option<Self>, index: usize) -> Option<source::Event> {
        match mutant {
            Some(Self::HangsInSilence) => None,
            Some(Self::WakeWithoutTheHungOne) => {
                Some(source::Event::DeviceReached(index, MigrationState::RunningP2p))
            }
            _ => Some(source::Event::DeviceHangs(index, Failure::new(Reason::DeviceHangs, "it hangs"))),
        }
    }

    /// What the operator takes the destination to have journalled.
    pub(crate) fn record_at_destination(mutant: Option<Self>, record: Option<Record>) -> Option<Record> {
        match (mutant, record) {
            (Some(Self::LostWhileLoaded), Some(Record::Loaded)) => Some(Record::Discarded),
            (_, record) => record,
        }
    }

    /// Whether a device that is not where it was left is asked for its next state all the same.
    pub(crate) fn takes_it_where_it_is(mutant: Option<Self>) -> bool {
        mutant == Some(Self::WhereverItIs)
    }

    /// Whether an agent that restarts lets the VM run first.
    pub(crate) fn wakes_at_restart(mutant: Option<Self>) -> bool {
        mutant == Some(Self::WakeAtRestart)
    }
}
