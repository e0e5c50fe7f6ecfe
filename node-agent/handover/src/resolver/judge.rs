//! The table of [`super`], as code.

use super::{Answer, Decision, DoubtReason, Effect, End, Journal, Resolver, Settlement, Unfit};
use crate::{Reason, Record, Word};

/// What a pair of words amounts to.
#[derive(Default)]
struct Verdict {
    relay: Option<Effect>,
    doubt: Option<(DoubtReason, String)>,
    settled: Option<Settlement>,
}

impl Verdict {
    /// It goes on by itself.
    fn wait() -> Self {
        Self::default()
    }

    fn relay_to_source(word: &Word) -> Self {
        Self { relay: Some(Effect::RelayToSource(word.clone())), ..Self::default() }
    }

    fn relay_to_target(word: &Word) -> Self {
        Self { relay: Some(Effect::RelayToTarget(word.clone())), ..Self::default() }
    }

    /// It does not go on.
    fn doubt(reason: DoubtReason, why: &str) -> Self {
        Self { doubt: Some((reason, why.to_owned())), ..Self::default() }
    }

    /// Nothing goes on any more.
    fn settled(how: Settlement) -> Self {
        Self { settled: Some(how), ..Self::default() }
    }
}

impl Resolver {
    /// Judges a whole round.
    pub(super) fn judge(
        mut self,
        source: &Answer,
        target: &Answer,
        same_journal: bool,
    ) -> (Self, Vec<Effect>) {
        let verdict = self.verdict(source, target, same_journal);
        let mut effects = Vec::new();
        if self.doubt.is_some() && verdict.doubt.is_none() {
            effects.push(Effect::NoDoubt);
        }
        self.doubt = verdict.doubt.as_ref().map(|(reason, _)| *reason);
        effects.extend(verdict.relay);
        effects.extend(verdict.doubt.map(|(reason, why)| Effect::Doubt { reason, why }));
        effects.extend(self.stated(source.journal(), target.journal()));
        effects.extend(verdict.settled.map(Effect::Settled));
        (self, effects)
    }

    fn verdict(&self, source: &Answer, target: &Answer, same_journal: bool) -> Verdict {
        if self.decided_for(End::Destination)
            && target.journal() == Journal::At(Record::Running)
            && is_gone(source)
        {
            return Verdict::settled(Settlement::RunsAtDestination);
        }
        let word = match source {
            Answer::Silent(why) => return self.silent(why, target, same_journal),
            Answer::Unreadable(why) => return Verdict::doubt(DoubtReason::SourceJournalUnreadable, why),
            Answer::Says(word) => word,
        };
        match word.record {
            None => self.without_record(target),
            Some(Record::Aborted) => aborted(word, target),
            Some(Record::Released) if word.ended => Verdict::settled(Settlement::RunsAtDestination),
            // Only a VM that is gone ends it here.
            Some(Record::Saving | Record::Committed) if word.ended => {
                Verdict::settled(Settlement::Lost(word.failure.clone()))
            }
            Some(Record::Committed) => self.committed(word, target),
            // It saves, or gives back what is left: by itself. The others are no source's.
            _ => Verdict::wait(),
        }
    }

    /// The source has committed, and waits for the destination.
    fn committed(&self, source: &Word, target: &Answer) -> Verdict {
        let word = match target {
            Answer::Silent(why) => return Verdict::doubt(DoubtReason::TargetUnreachable, why),
            Answer::Unreadable(why) => return Verdict::doubt(DoubtReason::TargetJournalUnreadable, why),
            Answer::Says(word) => word,
        };
        match word.record {
            Some(Record::Running | Record::Discarded) => Verdict::relay_to_source(word),
            Some(Record::Starting) if word.ended => Verdict::relay_to_source(word),
            // See `stated`.
            Some(Record::Loaded) if self.decided_for(End::Source) => Verdict::wait(),
            Some(Record::Loaded) => Verdict::relay_to_target(source),
            None => Verdict::doubt(DoubtReason::TargetForgot, ""),
            // RESERVED is a word from before LOADED that was long on its way; the others are no
            // destination's.
            _ => Verdict::wait(),
        }
    }

    fn decided_for(&self, run_on: End) -> bool {
        self.decision.as_ref().is_some_and(|decision| decision.run_on == run_on)
    }

    /// The source has nothing journalled.
    fn without_record(&self, target: &Answer) -> Verdict {
        let forgot = |why: &str| Verdict::doubt(DoubtReason::SourceForgot, why);
        let word = match target {
            Answer::Silent(why) | Answer::Unreadable(why) if self.began => return forgot(why),
            // It may wait there, fully loaded.
            Answer::Silent(_) | Answer::Unreadable(_) => return Verdict::wait(),
            Answer::Says(word) => word,
        };
        match word.record {
            Some(Record::Running) => Verdict::settled(Settlement::RunsAtDestination),
            Some(Record::Starting) if word.ended => Verdict::settled(Settlement::Lost(word.failure.clone())),
            Some(Record::Starting) => Verdict::wait(),
            Some(Record::Loaded) => forgot(""),
            _ if self.began => forgot(""),
            _ => Verdict::settled(Settlement::NeverBegan),
        }
    }

    /// The source cannot be asked.
    fn silent(&self, why: &str, target: &Answer, same_journal: bool) -> Verdict {
        let never_started = || Verdict::settled(Settlement::SourceLost { why: why.to_owned() });
        match target {
            Answer::Says(word) => match word.record {
                Some(Record::Loaded) => Verdict::doubt(DoubtReason::SourceUnreachable, why),
                Some(Record::Discarded) => never_started(),
                None if self.committed => Verdict::doubt(DoubtReason::TargetForgot, why),
                None if same_journal => never_started(),
                // It has started, and the source hears of it when it is back; or it has not come that far.
                _ => Verdict::wait(),
            },
            Answer::Unreadable(other) if self.committed => {
                Verdict::doubt(DoubtReason::TargetJournalUnreadable, &format!("{other}; {why}"))
            }
            Answer::Silent(other) if self.committed => {
                Verdict::doubt(DoubtReason::AgentsUnreachable, &format!("{why}; {other}"))
            }
            // Before the commit the source goes on, or gives up, alone.
            Answer::Silent(_) | Answer::Unreadable(_) => Verdict::wait(),
        }
    }

    /// What the administrator's decision adds.
    fn stated(&self, source: Journal, target: Journal) -> Option<Effect> {
        let Decision { run_on, justification } = self.decision.clone()?;
        let stated = |record| Word { stated_because: Some(justification), ..Word::at(record) };
        match run_on {
            End::Source if self.doubt.is_some() && source_may_be_sent_discarded(source, target).is_ok() => {
                Some(Effect::RelayToSource(stated(Record::Discarded)))
            }
            // DISCARDED may be on its way to the source already. What the destination journals upon this
            // decides.
            End::Source if waits_at_both(source, target) => {
                Some(Effect::RelayToTarget(stated(Record::Aborted)))
            }
            End::Destination
                if self.doubt.is_some() && target_may_be_sent_committed(source, target).is_ok() =>
            {
                Some(Effect::RelayToTarget(stated(Record::Committed)))
            }
            End::Source | End::Destination => None,
        }
    }
}

/// The source cannot be asked, or has nothing journalled, or has found that its VMM was gone when it came
/// back: as an administrator had stated who let the destination start the VM.
fn is_gone(source: &Answer) -> bool {
    match source {
        Answer::Silent(_) => true,
        Answer::Says(word) => match word.record {
            None => true,
            Some(Record::Aborted) => {
                word.failure.as_ref().is_some_and(|failure| failure.reason == Reason::VmmExited)
            }
            _ => false,
        },
        Answer::Unreadable(_) => false,
    }
}

/// The source has given the migration up.
fn aborted(source: &Word, target: &Answer) -> Verdict {
    let settled = source.ended.then(|| Settlement::GivenUp(source.failure.clone()));
    match target.journal() {
        Journal::At(Record::Reserved | Record::Loaded) => {
            Verdict { settled, ..Verdict::relay_to_target(source) }
        }
        Journal::At(Record::Starting | Record::Running) => Verdict::doubt(DoubtReason::Forked, ""),
        _ => Verdict { settled, ..Verdict::wait() },
    }
}

fn waits_at_both(source: Journal, target: Journal) -> bool {
    source == Journal::At(Record::Committed) && target == Journal::At(Record::Loaded)
}

/// DISCARDED may be stated to the source: it waits for the destination's word, and there is none to be had.
pub(super) fn source_may_be_sent_discarded(source: Journal, target: Journal) -> Result<(), Unfit> {
    match target {
        Journal::At(Record::Starting | Record::Running) => return Err(Unfit::Started),
        Journal::Empty | Journal::NotRead => {}
        Journal::At(_) => return Err(Unfit::OtherAnswers(End::Destination)),
    }
    match source {
        Journal::NotRead => Err(Unfit::CannotBeReached(End::Source)),
        Journal::At(Record::Committed) => Ok(()),
        Journal::Empty | Journal::At(_) => Err(Unfit::DoesNotWait(End::Source)),
    }
}

/// COMMITTED may be stated to the destination: it waits for the source's word, and there is none to be had.
pub(super) fn target_may_be_sent_committed(source: Journal, target: Journal) -> Result<(), Unfit> {
    match source {
        Journal::Empty | Journal::NotRead => {}
        Journal::At(_) => return Err(Unfit::OtherAnswers(End::Source)),
    }
    match target {
        Journal::NotRead => Err(Unfit::CannotBeReached(End::Destination)),
        Journal::At(Record::Loaded) => Ok(()),
        Journal::At(Record::Starting | Record::Running) => Err(Unfit::Started),
        Journal::Empty | Journal::At(_) => Err(Unfit::DoesNotWait(End::Destination)),
    }
}
