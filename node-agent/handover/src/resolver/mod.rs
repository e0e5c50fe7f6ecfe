//! What two agents cannot settle between themselves, the operator does: it asks both what they have
//! journalled and relays the answer. Where one of them cannot be asked, it says so, and waits for that node
//! or for an administrator's word.
//!
//! Plain data and decisions: `step(self, event) -> (self, effects)`, without a clock, gRPC or Kubernetes. A
//! model checker runs this same code.
//!
//! The operator asks in rounds. When both ends have answered (or turned out not to be reachable) the pair is
//! judged and then forgotten, so that nothing is ever decided by a word of an earlier round:
//!
//! | source | destination | what is done |
//! |---|---|---|
//! | COMMITTED | LOADED | COMMITTED is relayed to the destination |
//! | COMMITTED | RUNNING, DISCARDED, or STARTING that has ended | that is relayed to the source |
//! | COMMITTED | STARTING | nothing: it goes forward |
//! | COMMITTED | silent, or without record | **in doubt**: `TargetUnreachable`, `TargetForgot` |
//! | ABORTED | RESERVED, LOADED | ABORTED is relayed to the destination |
//! | COMMITTED | with a journal that it cannot read | **in doubt**: `TargetJournalUnreadable` |
//! | with a journal that it cannot read | any | **in doubt**: `SourceJournalUnreadable` |
//! | ABORTED | STARTING, RUNNING | **alarm** `Forked`; nothing is touched |
//! | silent | LOADED | **in doubt**: `SourceUnreachable` |
//! | silent | DISCARDED, or none in the journal that had it reserved | settled, after a patience: `SourceLost` |
//! | silent, known to have committed | silent | **in doubt**: `AgentsUnreachable` |
//! | no record | LOADED | **in doubt**: `SourceForgot` |
//! | no record | RUNNING, or STARTING that has ended | settled, by the destination's word |
//! | no record, known to have begun | any other | **in doubt**: `SourceForgot` |
//! | no record, not known to have begun | RESERVED, DISCARDED, none | settled: it never began |
//! | any, ended | any | settled, by the source's own word |
//!
//! Relayed are records that their owner has made durable, and nothing else, with one exception: an
//! administrator's [`Decision`], in doubt and where it [fits](Resolver::fits). A decision for the source
//! stays in force: COMMITTED is not relayed any more, since the DISCARDED that was stated to the source may
//! still be on its way. A destination that turns up LOADED after all is sent ABORTED instead, and what it
//! journals then decides.

mod judge;
#[cfg(test)]
mod tests;

use crate::{Failure, Record, Word};

/// One of the two ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum End {
    /// Where the VM comes from.
    Source,
    /// Where it goes.
    Destination,
}

/// An administrator's word, with all that it must state (the caller has seen to that).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Decision {
    /// Where the VM shall run.
    pub run_on: End,
    /// Why that is safe, in the administrator's words.
    pub justification: String,
}

/// What the operator learns.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Event {
    /// The source has reported that it began, or has committed: on its stream of events, or to the operator
    /// before a restart.
    SourceReported {
        /// It has passed its point of no return.
        committed: bool,
    },
    /// The source's answer of this round.
    SourceSays(Word),
    /// The source cannot be asked, and why, for a person.
    SourceSilent(String),
    /// The source answers that it cannot read its journal, and why, for a person.
    SourceUnreadable(String),
    /// The destination's answer of this round.
    TargetSays {
        /// Its word.
        word: Word,
        /// It comes from the very journal in which the destination had recorded that it reserved. Another one
        /// may have lost what that one said.
        same_journal: bool,
    },
    /// The destination cannot be asked, and why, for a person.
    TargetSilent(String),
    /// The destination answers that it cannot read its journal, and why, for a person.
    TargetUnreadable(String),
    /// An administrator has decided. Takes effect with the next round, where it fits.
    Decided(Decision),
}

/// What keeps a migration in doubt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DoubtReason {
    /// The source has committed, and the destination cannot be asked.
    TargetUnreachable,
    /// The source has committed, and the destination has no record.
    TargetForgot,
    /// The destination waits for the source's word, and the source cannot be asked.
    SourceUnreachable,
    /// The destination waits for the source's word, or the source had begun, and the source has no record.
    SourceForgot,
    /// The source has committed, and neither can be asked.
    AgentsUnreachable,
    /// The source cannot read its journal: it touches neither the VM nor its devices before it can.
    SourceJournalUnreadable,
    /// The source has committed, and the destination cannot read its journal.
    TargetJournalUnreadable,
    /// Both ends may have run the VM. This must not happen.
    Forked,
}

impl DoubtReason {
    /// CamelCase, for a condition's reason.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::TargetUnreachable => "TargetUnreachable",
            Self::TargetForgot => "TargetForgot",
            Self::SourceUnreachable => "SourceUnreachable",
            Self::SourceForgot => "SourceForgot",
            Self::AgentsUnreachable => "AgentsUnreachable",
            Self::SourceJournalUnreadable => "SourceJournalUnreadable",
            Self::TargetJournalUnreadable => "TargetJournalUnreadable",
            Self::Forked => "Forked",
        }
    }
}

/// How it has ended, by what is journalled.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Settlement {
    /// The source has nothing to undo: it was never asked, or never began. What is reserved may be given back
    /// as never started.
    NeverBegan,
    /// The source has given it up, and is done with that.
    GivenUp(Option<Failure>),
    /// The VM runs at the destination.
    RunsAtDestination,
    /// The VM is lost.
    Lost(Option<Failure>),
    /// The source cannot be asked, and the destination has never started the VM, and never will. The source
    /// keeps the VM, if it still has it. The caller waits for long before it believes that the source is lost,
    /// and relays what the destination says should the source be back after that.
    SourceLost {
        /// Why the source cannot be asked, in the words of the error.
        why: String,
    },
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Effect {
    /// Relay this to the source, as the destination's word.
    RelayToSource(Word),
    /// Relay this to the destination, as the source's word.
    RelayToTarget(Word),
    /// It is in doubt now, or for another reason, or still for the same with other words.
    Doubt {
        /// Why.
        reason: DoubtReason,
        /// Why an end cannot be asked, in the words of the error.
        why: String,
    },
    /// It is not in doubt any more.
    NoDoubt,
    /// It has ended.
    Settled(Settlement),
}

/// Why a decision would change nothing, or must not be acted upon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Unfit {
    /// Nothing is in doubt.
    NotInDoubt,
    /// The end that would have to act cannot be reached.
    CannotBeReached(End),
    /// The end that would have to act does not wait for anybody's word.
    DoesNotWait(End),
    /// The other end can be asked, and has a record: its own word decides.
    OtherAnswers(End),
    /// The destination says that it has started the VM.
    Started,
}

/// What one end answered in a round.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Answer {
    /// Its word.
    Says(Word),
    /// It cannot be asked, and why.
    Silent(String),
    /// It answers that it cannot read its journal, and why.
    Unreadable(String),
}

impl Answer {
    fn journal(&self) -> Journal {
        match self {
            Self::Says(word) => word.record.map_or(Journal::Empty, Journal::At),
            Self::Silent(_) | Self::Unreadable(_) => Journal::NotRead,
        }
    }
}

/// What a round has shown of an end's journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Journal {
    /// The end could not be asked, or could not read it.
    NotRead,
    /// It holds nothing of this attempt.
    Empty,
    /// Its last record.
    At(Record),
}

/// The operator's part in bringing one attempt of a migration to its end.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Resolver {
    /// Of this round, not judged yet.
    source: Option<Answer>,
    target: Option<Answer>,
    /// The destination's answer of this round comes from the journal that had it reserved.
    same_journal: bool,
    /// The pair that was judged last.
    judged: Option<(Journal, Journal)>,
    /// The source is known to have begun, from all answers so far.
    began: bool,
    /// The source is known to have committed.
    committed: bool,
    decision: Option<Decision>,
    doubt: Option<DoubtReason>,
}

impl Resolver {
    /// Takes an answer into account, and returns what is to be done.
    #[must_use]
    pub fn step(mut self, event: Event) -> (Self, Vec<Effect>) {
        match event {
            Event::SourceReported { committed } => {
                self.began = true;
                self.committed |= committed;
            }
            Event::SourceSays(word) => {
                self.began |= word.record.is_some();
                self.committed |= matches!(word.record, Some(Record::Committed | Record::Released));
                self.source = Some(Answer::Says(word));
            }
            Event::SourceSilent(why) => self.source = Some(Answer::Silent(why)),
            Event::SourceUnreadable(why) => self.source = Some(Answer::Unreadable(why)),
            Event::TargetSays { word, same_journal } => {
                self.target = Some(Answer::Says(word));
                self.same_journal = same_journal;
            }
            Event::TargetSilent(why) => self.target = Some(Answer::Silent(why)),
            Event::TargetUnreadable(why) => self.target = Some(Answer::Unreadable(why)),
            Event::Decided(decision) => self.decision = Some(decision),
        }
        match (self.source.take(), self.target.take()) {
            (Some(source), Some(target)) => {
                self.judged = Some((source.journal(), target.journal()));
                let same_journal = std::mem::take(&mut self.same_journal);
                self.judge(&source, &target, same_journal)
            }
            (source, target) => {
                self.source = source;
                self.target = target;
                (self, Vec::new())
            }
        }
    }

    /// Why it is in doubt, if it is.
    #[must_use]
    pub fn doubt(&self) -> Option<DoubtReason> {
        self.doubt
    }

    /// The source is known to have committed.
    #[must_use]
    pub fn is_committed(&self) -> bool {
        self.committed
    }

    /// Both ends have answered at least once, so that [`fits`](Self::fits) means something.
    #[must_use]
    pub fn has_judged(&self) -> bool {
        self.judged.is_some()
    }

    /// Whether a decision could be acted upon as things stood in the last round.
    ///
    /// # Errors
    /// Why not.
    pub fn fits(&self, run_on: End) -> Result<(), Unfit> {
        let Some((source, target)) = self.judged.filter(|_| self.doubt.is_some()) else {
            return Err(Unfit::NotInDoubt);
        };
        match run_on {
            End::Source => judge::source_may_be_sent_discarded(source, target),
            End::Destination => judge::target_may_be_sent_committed(source, target),
        }
    }
}
