//! Asking both ends what they have journalled, as long as a migration does not go on by itself, and doing
//! what the [resolver](slackwater_handover::resolver) says. A round relays what the last one found, pauses,
//! and asks both ends at once.

use std::sync::Arc;
use std::time::Duration;

use slackwater_handover::Word;
use slackwater_handover::resolver::{
    Answer, Decision, DoubtReason, Effect, End, Event, Resolver, Settlement,
};
use tokio::time::Instant;

use super::journals::{Heard, ask, node_of, relay};
use super::request::Accepted;
use super::status::Doubtful;
use crate::backoff::{Backoff, Pauses};
use crate::fleet::Fleet;

/// Between two rounds.
const ROUND_PAUSES: Pauses = Pauses::new(Duration::from_millis(500), Duration::from_secs(5));

/// How long an end may be unreachable before the status shows that as a doubt: an agent that is being
/// restarted, or a broken stream, is no doubt.
const SHOW_UNREACHABLE_AFTER: Duration = Duration::from_secs(15);

/// What both ends answered.
#[derive(Debug)]
pub(super) struct Round {
    pub(super) source: Answer,
    pub(super) target: Heard,
}

/// One end's record, on its way to the other end.
pub(super) struct Relay {
    to: End,
    word: Word,
}

/// A round that is to begin.
pub(super) struct NextRound {
    /// What to relay first.
    relays: Vec<Relay>,
    /// How long to wait then, before both ends are asked.
    pause: Duration,
}

/// What is known about both ends, between rounds.
pub(super) struct Inquiry {
    resolver: Resolver,
    /// What keeps the source from going on, as it says on the stream of events.
    source_doubt: Option<Doubtful>,
    /// The source has said so after the last round.
    source_doubt_is_newer: bool,
    /// Since when an end that the other one waits for has been unreachable in every round.
    unreachable_since: Option<Instant>,
    /// Since when the source has been silent in every round, while the target never starts the VM.
    lost_since: Option<Instant>,
    /// Why an end could not be asked in the last round.
    why: String,
    backoff: Backoff,
    /// To be relayed in the next round.
    relays: Vec<Relay>,
}

impl Default for Inquiry {
    fn default() -> Self {
        Self {
            resolver: Resolver::default(),
            source_doubt: None,
            source_doubt_is_newer: false,
            unreachable_since: None,
            lost_since: None,
            why: String::new(),
            backoff: ROUND_PAUSES.begin(),
            relays: Vec::new(),
        }
    }
}

impl Inquiry {
    pub(super) fn resolver(&self) -> &Resolver {
        &self.resolver
    }

    /// Takes in what is known without asking. Nothing is relayed by that alone.
    fn take_in(&mut self, event: Event) {
        self.resolver = std::mem::take(&mut self.resolver).step(event).0;
    }

    /// The source is known to have begun, and perhaps to have committed.
    pub(super) fn source_began(&mut self, committed: bool) {
        self.take_in(Event::SourceReported { committed });
    }

    /// An administrator has decided.
    pub(super) fn decide(&mut self, decision: Decision) {
        self.take_in(Event::Decided(decision));
        self.hurry();
    }

    /// The source has reported what keeps it from going on.
    pub(super) fn source_doubts(&mut self, reason: String, message: String) {
        self.source_doubt = Some(Doubtful::SourceSays { reason, message });
        self.source_doubt_is_newer = true;
        self.hurry();
    }

    /// The source has come to another phase, which ends its own doubt, whether the status has shown it or
    /// not.
    pub(super) fn source_goes_on(&mut self, committed: bool) {
        self.source_doubt = None;
        self.source_began(committed);
    }

    /// The source has a doubt of its own.
    pub(super) fn has_source_doubt(&self) -> bool {
        self.source_doubt.is_some()
    }

    /// Asks again soon.
    pub(super) fn hurry(&mut self) {
        self.backoff.reset();
    }

    /// What to relay in the next round, and how long to wait before both ends are asked. Each pause is longer
    /// than the last.
    pub(super) fn next_round(&mut self) -> NextRound {
        NextRound { relays: std::mem::take(&mut self.relays), pause: self.backoff.next_pause() }
    }

    /// Judges a round. Returns how the migration is settled, if it is. `patience`: how long a source may be silent
    /// before it counts as lost.
    pub(super) fn judge(&mut self, round: Round, patience: Duration) -> Option<Settlement> {
        let mut settled = None;
        let source = match round.source {
            Answer::Says(word) => Event::SourceSays(word),
            Answer::Silent(why) => Event::SourceSilent(why),
            Answer::Unreadable(why) => Event::SourceUnreadable(why),
        };
        let Heard { answer, same_journal } = round.target;
        let target = match answer {
            Answer::Says(word) => Event::TargetSays { word, same_journal },
            Answer::Silent(why) => Event::TargetSilent(why),
            Answer::Unreadable(why) => Event::TargetUnreadable(why),
        };
        self.source_doubt_is_newer = false;
        for event in [source, target] {
            let (resolver, effects) = std::mem::take(&mut self.resolver).step(event);
            self.resolver = resolver;
            for effect in effects {
                match effect {
                    Effect::RelayToSource(word) => self.relays.push(Relay { to: End::Source, word }),
                    Effect::RelayToTarget(word) => self.relays.push(Relay { to: End::Destination, word }),
                    Effect::Doubt { why, .. } => self.why = why,
                    Effect::NoDoubt => self.hurry(),
                    Effect::Settled(how) => settled = Some(how),
                }
            }
        }
        let waits = self.resolver.doubt().is_some_and(is_unreachable);
        self.unreachable_since = waits.then(|| self.unreachable_since.unwrap_or_else(Instant::now));
        let lost = matches!(settled, Some(Settlement::SourceLost { .. }));
        self.lost_since = lost.then(|| self.lost_since.unwrap_or_else(Instant::now));
        settled.filter(|_| self.lost_since.is_none_or(|since| since.elapsed() >= patience))
    }

    /// An end that the other one waits for is unreachable, and has not been for long.
    pub(super) fn is_patient(&self) -> bool {
        self.resolver.doubt().is_some_and(is_unreachable)
            && self.unreachable_since.is_none_or(|since| since.elapsed() < SHOW_UNREACHABLE_AFTER)
    }

    /// What the status is to show.
    pub(super) fn doubt(&self) -> Option<Doubtful> {
        let known_better = |doubt: &Doubtful| doubt.is_about_the_target() && !self.source_doubt_is_newer;
        let reason = match self.resolver.doubt() {
            None => return self.source_doubt.clone().filter(|doubt| !known_better(doubt)),
            Some(_) if self.is_patient() => return self.source_doubt.clone(),
            Some(reason) => reason,
        };
        let remedy = [End::Source, End::Destination].into_iter().find(|end| self.resolver.fits(*end).is_ok());
        Some(Doubtful::AskedBoth { reason, why: self.why.clone(), remedy })
    }
}

fn is_unreachable(reason: DoubtReason) -> bool {
    match reason {
        DoubtReason::TargetUnreachable | DoubtReason::SourceUnreachable | DoubtReason::AgentsUnreachable => {
            true
        }
        DoubtReason::TargetForgot
        | DoubtReason::SourceForgot
        | DoubtReason::SourceJournalUnreadable
        | DoubtReason::TargetJournalUnreadable
        | DoubtReason::Forked => false,
    }
}

/// One round: relays, waits, and asks both ends at once.
pub(super) async fn run_round(fleet: Arc<Fleet>, accepted: Accepted, next: NextRound) -> Round {
    for Relay { to, word } in next.relays {
        let node = node_of(&accepted, to);
        tracing::info!(
            migration = accepted.id,
            node,
            record = ?word.record,
            stated = ?word.stated_because,
            "relaying the other end's record"
        );
        if let Err(error) = relay(&fleet, &accepted, to, &word).await {
            tracing::warn!(migration = accepted.id, node, %error, "relaying failed; both ends are asked again");
        }
    }
    tokio::time::sleep(next.pause).await;
    let (source, target) =
        tokio::join!(ask(&fleet, &accepted, End::Source), ask(&fleet, &accepted, End::Destination));
    Round { source: source.answer, target }
}

#[cfg(test)]
mod tests {
    use slackwater_handover::Record;

    use super::*;

    fn discarded(source: Answer) -> Round {
        let target = Heard { answer: Answer::Says(Word::at(Record::Discarded)), same_journal: true };
        Round { source, target }
    }

    fn silent() -> Answer {
        Answer::Silent("connection refused".to_owned())
    }

    #[test]
    fn a_source_counts_as_lost_only_when_it_has_been_silent_in_every_round_for_the_whole_patience() {
        let patience = Duration::from_millis(80);
        let mut inquiry = Inquiry::default();
        assert_eq!(inquiry.judge(discarded(silent()), patience), None);
        std::thread::sleep(patience);
        // One answer, and it begins anew.
        assert_eq!(inquiry.judge(discarded(Answer::Says(Word::at(Record::Saving))), patience), None);
        assert_eq!(inquiry.judge(discarded(silent()), patience), None);
        std::thread::sleep(patience);
        let lost = Settlement::SourceLost { why: "connection refused".to_owned() };
        assert_eq!(inquiry.judge(discarded(silent()), patience), Some(lost));
    }

    #[test]
    fn nothing_else_waits_for_that_patience() {
        let ended = Word { ended: true, ..Word::at(Record::Aborted) };
        let settled = Inquiry::default().judge(discarded(Answer::Says(ended)), Duration::MAX);
        assert_eq!(settled, Some(Settlement::GivenUp(None)));
    }
}
