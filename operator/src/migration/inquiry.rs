//! Asking both ends what they have journalled, as long as a migration does not go on by itself, and doing what the
//! [resolver](super::resolver) says.

use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use slackwater_handover::Word;
use slackwater_proto::node::JournalState;
use tokio::time::Instant;

use super::fact::{self, Doubtful};
use super::request::Accepted;
use super::resolver::{Decision, DoubtReason, Effect, End, Event, Heard, Resolver, Settlement, Unfit};
use super::run::Run;
use crate::fleet::Fleet;

/// The first and the longest pause between two rounds.
const PAUSES: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(5));

/// For so long an end may be unreachable before that is shown as a doubt: an agent that is being restarted, or a broken stream,
/// is none.
const PATIENCE: Duration = Duration::from_secs(15);

/// What both ends were heard to say.
pub(super) struct Round {
    source: Heard,
    target: Heard,
}

/// A word that is to be relayed.
pub(super) type Relay = (End, Word);

/// What is known about where a migration stands, between rounds.
pub(super) struct Inquiry {
    pub(super) resolver: Resolver,
    /// What keeps the source from going on, by its own word on the stream of events.
    pub(super) told: Option<Doubtful>,
    /// It has said so after the last round.
    told_since_asked: bool,
    /// Since when an end that is waited for has been unreachable in every round.
    unreachable_since: Option<Instant>,
    /// Why an end could not be asked in the last round.
    why: String,
    pause: Duration,
    /// To be relayed in the next round.
    relays: Vec<Relay>,
}

impl Inquiry {
    pub(super) fn new() -> Self {
        let (resolver, why) = (Resolver::default(), String::new());
        Self {
            resolver,
            told: None,
            told_since_asked: false,
            unreachable_since: None,
            why,
            pause: PAUSES.0,
            relays: Vec::new(),
        }
    }

    /// Takes in what is known without asking. Nothing is relayed by that alone.
    pub(super) fn hear(&mut self, event: Event) {
        self.resolver = std::mem::take(&mut self.resolver).step(event).0;
    }

    pub(super) fn decide(&mut self, decision: Decision) {
        self.hear(Event::Decided(decision));
        self.pause = PAUSES.0;
    }

    /// What is to be relayed in the next round, and how long to wait before both are asked.
    pub(super) fn next_round(&mut self) -> (Vec<Relay>, Duration) {
        let pause = self.pause;
        self.pause = (self.pause * 2).min(PAUSES.1);
        (std::mem::take(&mut self.relays), pause)
    }

    /// Asks quickly again.
    pub(super) fn hurry(&mut self) {
        self.pause = PAUSES.0;
    }

    /// Judges a round. How it is settled, if it is.
    fn judge(&mut self, round: Round) -> Option<Settlement> {
        let mut settled = None;
        let source = match round.source {
            Heard::Says(word) => Event::SourceSays(word),
            Heard::Silent(why) => Event::SourceSilent(why),
            Heard::Unreadable(why) => Event::SourceUnreadable(why),
        };
        let target = match round.target {
            Heard::Says(word) => Event::TargetSays(word),
            Heard::Silent(why) => Event::TargetSilent(why),
            Heard::Unreadable(why) => Event::TargetUnreadable(why),
        };
        self.told_since_asked = false;
        for event in [source, target] {
            let (resolver, effects) = std::mem::take(&mut self.resolver).step(event);
            self.resolver = resolver;
            for effect in effects {
                match effect {
                    Effect::TellSource(word) => self.relays.push((End::Source, word)),
                    Effect::TellTarget(word) => self.relays.push((End::Destination, word)),
                    Effect::Doubt { why, .. } => self.why = why,
                    Effect::NoDoubt => self.pause = PAUSES.0,
                    Effect::Settled(how) => settled = Some(how),
                }
            }
        }
        let waits = self.resolver.doubt().is_some_and(is_unreachable);
        self.unreachable_since = waits.then(|| self.unreachable_since.unwrap_or_else(Instant::now));
        settled
    }

    /// The source has told what keeps it from going on.
    pub(super) fn hear_doubt(&mut self, reason: String, message: String) {
        self.told = Some(Doubtful::Told { reason, message });
        self.told_since_asked = true;
        self.pause = PAUSES.0;
    }

    /// An end that is waited for has not been unreachable for long.
    fn is_patient(&self) -> bool {
        self.resolver.doubt().is_some_and(is_unreachable)
            && self.unreachable_since.is_none_or(|since| since.elapsed() < PATIENCE)
    }

    /// What is to be shown.
    fn doubt(&self) -> Option<Doubtful> {
        let known_better = |told: &Doubtful| told.is_about_the_target() && !self.told_since_asked;
        let reason = match self.resolver.doubt() {
            None => return self.told.clone().filter(|told| !known_better(told)),
            Some(_) if self.is_patient() => return self.told.clone(),
            Some(reason) => reason,
        };
        let remedy = [End::Source, End::Destination].into_iter().find(|end| self.resolver.fits(*end).is_ok());
        Some(Doubtful::Asked { reason, why: self.why.clone(), remedy })
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
pub(super) async fn round(
    fleet: Arc<Fleet>,
    accepted: Accepted,
    (relays, pause): (Vec<Relay>, Duration),
) -> Round {
    for (to, word) in relays {
        let node = node_of(&accepted, to);
        tracing::info!(migration = accepted.id, node, record = ?word.record, stated = ?word.stated_because, "relaying the other end's word");
        if let Err(error) = fleet.resolve(node, accepted.resolve(Some(JournalState::from(&word)))).await {
            tracing::warn!(migration = accepted.id, node, %error, "relaying failed; both are asked again");
        }
    }
    tokio::time::sleep(pause).await;
    let asked = join_all([End::Source, End::Destination].map(|end| ask(&fleet, &accepted, end))).await;
    let mut heard = asked.into_iter();
    let nothing = || Heard::Silent("it was not asked".to_owned());
    Round { source: heard.next().unwrap_or_else(nothing), target: heard.next().unwrap_or_else(nothing) }
}

async fn ask(fleet: &Fleet, accepted: &Accepted, end: End) -> Heard {
    match fleet.resolve(node_of(accepted, end), accepted.resolve(None)).await {
        Ok(state) => {
            Word::try_from(&state).map_or_else(|unknown| Heard::Silent(unknown.to_string()), Heard::Says)
        }
        // The one state that forbids an answer.
        Err(error) if error.is_precondition() => Heard::Unreadable(error.to_string()),
        Err(error) => Heard::Silent(error.to_string()),
    }
}

fn node_of(accepted: &Accepted, end: End) -> &str {
    match end {
        End::Source => &accepted.source,
        End::Destination => &accepted.target,
    }
}

impl Run {
    /// Asks both ends once, now or after a pause that grows. How it is settled, if it is.
    pub(super) async fn inquire(&mut self, accepted: &Accepted) -> Option<Settlement> {
        let next = self.inquiry.next_round();
        let round = round(Arc::clone(&self.around.fleet), accepted.clone(), next).await;
        self.look();
        self.take_in_round(round).await
    }

    /// Judges a round and shows what came of it.
    pub(super) async fn take_in_round(&mut self, round: Round) -> Option<Settlement> {
        let (source, target) = (round.source.clone(), round.target.clone());
        tracing::debug!(migration = self.name(), ?source, ?target, "both ends were asked");
        let settled = self.inquiry.judge(round);
        self.show_doubt();
        self.note_spec_change().await;
        self.write_progress().await;
        settled
    }

    /// Shows whether the migration is in doubt, by all that is known.
    pub(super) fn show_doubt(&mut self) {
        // What an earlier operator has found out stands until this one has asked, too.
        if self.draft.is_in_doubt() && !self.inquiry.resolver.has_judged() {
            return;
        }
        // The same goes for what this one shows, while an end may just be restarting.
        if self.draft.is_in_doubt() && self.inquiry.is_patient() {
            return;
        }
        match self.inquiry.doubt() {
            Some(doubt) => self.learn(|draft, stamp| fact::in_doubt(draft, &doubt, stamp)),
            None => self.learn(fact::doubt_cleared),
        }
    }

    /// What stands in the status, and an inquiry is to begin with.
    pub(super) fn recall(&mut self) {
        let status = &self.draft.status;
        if !status.timeline.is_empty() || self.draft.is_committed() {
            self.inquiry.hear(Event::SourceTold { committed: self.draft.is_committed() });
        }
        let observed = self.draft.status.observed_spec.as_ref();
        let resolve = observed.and_then(|spec| spec.resolve.as_ref()).filter(|_| self.draft.is_resolved());
        if let Some(resolve) = resolve {
            let run_on = fact::end(resolve.run_on);
            self.inquiry.decide(Decision { run_on, justification: resolve.justification.trim().to_owned() });
        }
    }

    /// Judges `spec.resolve`, if there is one that has not been judged. `true`: the status has been changed.
    pub(super) fn judge_resolve(&mut self) -> bool {
        let spec = self.spec();
        let Some(resolve) = fact::unjudged(&self.draft, &spec) else { return false };
        let resolver = &self.inquiry.resolver;
        let fits = match self.draft.is_in_doubt() {
            // A restarted operator has to ask first.
            true if !resolver.has_judged() => return false,
            true => resolver.fits(fact::end(resolve.run_on)),
            false => Err(Unfit::NotInDoubt),
        };
        match fact::judge(&self.draft, resolve, fits) {
            Ok(decision) => {
                self.learn(|draft, stamp| fact::resolve_accepted(draft, resolve, stamp));
                self.decided = Some(decision);
            }
            Err(refused) => {
                self.learn(|draft, stamp| fact::resolve_refused(draft, resolve, &refused, stamp));
            }
        }
        true
    }
}
