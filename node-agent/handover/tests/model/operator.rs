//! The operator, where S and D have nothing but one stream between them: its own resolver asks both and
//! relays, and everything it says may be lost, late or repeated. It may be started again at any time, and an
//! administrator may decide.

use std::collections::BTreeSet;

use slackwater_handover::resolver::{self, Decision, DoubtReason, Effect, Event, Resolver, Settlement};
use slackwater_handover::{Record, Word, destination, source};

use crate::mutants::Mutant;
use crate::properties::Rule;
use crate::steps::Handover;
use crate::world::{Config, Line, Said, Side, World};

/// What an administrator may state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Statements {
    /// Nothing.
    None,
    /// What is true: D is off and has not started the VM; S is off and has not resumed it, or has committed.
    True,
    /// That D never started, although all that is known is that it cannot be asked.
    Hasty,
    /// That S never resumes, although it is off and may have resumed before.
    Blind,
}

/// The operator. Only `committed`, `decision` and `done` outlive its process. Of a round that has been judged
/// it keeps no more than that, either: it learns the rest of what a resolver keeps again by the next round,
/// as one that has restarted does.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Operator {
    pub resolver: Resolver,
    /// S has answered in this round.
    pub heard: bool,
    /// It has shown that S has committed.
    pub committed: bool,
    /// Where an administrator wants the VM to run.
    pub decision: Option<Side>,
    /// The last attempt of which it has said that D never started the VM, and never will.
    pub said_never_started: u32,
    /// It knows how it ended, and asks no more.
    pub done: bool,
    /// Has been relayed, and may arrive at any time.
    pub relayed: BTreeSet<Relay>,
}

/// A word on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Relay {
    pub to: Side,
    pub attempt: u32,
    pub record: Record,
    pub ended: bool,
    pub stated: bool,
}

/// What the operator does, or what happens to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Act {
    /// S's stream of events reports that it has committed.
    HearsCommit,
    /// A round: S is asked, then D; whether it answers.
    AsksSource(bool),
    /// The round is judged, and an administrator may decide by what is shown then.
    AsksDestination(bool, Option<Side>),
    /// Something relayed arrives.
    Relays(Relay),
    /// Another process takes over, from the status alone.
    Restarts,
}

impl Operator {
    fn hear(&mut self, attempt: u32, event: Event) -> Vec<Effect> {
        let (resolver, effects) = std::mem::take(&mut self.resolver).step(event);
        self.resolver = resolver;
        for effect in &effects {
            let (to, word) = match effect {
                Effect::RelayToSource(word) => (Side::Source, word),
                Effect::RelayToTarget(word) => (Side::Destination, word),
                _ => continue,
            };
            let Some(record) = word.record else { continue };
            let stated = word.stated_because.is_some();
            self.relayed.insert(Relay { to, attempt, record, ended: word.ended, stated });
        }
        effects
    }

    /// Begins anew with what it can recall.
    fn recall(&mut self, attempt: u32) {
        self.resolver = Resolver::default();
        self.heard = false;
        if self.committed {
            self.hear(attempt, Event::SourceReported { committed: true });
        }
        if let Some(run_on) = self.decision {
            let decision = Decision { run_on: end(run_on), justification: String::new() };
            self.hear(attempt, Event::Decided(decision));
        }
    }
}

impl Handover {
    /// What the operator may do now.
    pub(crate) fn operator_acts(&self, world: &World, acts: &mut Vec<Act>) {
        let operator = &world.operator;
        let arrives = |relay: &Relay| {
            let (attempt, over) = match relay.to {
                Side::Source => (
                    world.source.attempt,
                    world.source.machine.as_ref().is_none_or(|m| m.phase() != source::Phase::AwaitingStarted),
                ),
                Side::Destination => (
                    world.destination.attempt,
                    world
                        .destination
                        .machine
                        .as_ref()
                        .is_none_or(|m| m.phase() == destination::Phase::Finished),
                ),
            };
            !over && Mutant::is_heard(self.0.mutant, relay.attempt, attempt)
        };
        acts.extend(operator.relayed.iter().copied().filter(arrives).map(Act::Relays));
        // While the stream is whole the two do not need the operator.
        let alone = world.stream.as_ref().is_none_or(|stream| stream.cut);
        if operator.done || !alone || world.reserved != world.attempt {
            return;
        }
        acts.push(Act::HearsCommit);
        if !operator.heard {
            acts.push(Act::AsksSource(false));
            acts.extend(world.source.up.then_some(Act::AsksSource(true)));
            return;
        }
        acts.push(Act::Restarts);
        let may = [Side::Source, Side::Destination]
            .into_iter()
            .filter(|run_on| operator.decision.is_none() && self.may_be_stated(world, *run_on));
        for decides in [None].into_iter().chain(may.map(Some)) {
            acts.push(Act::AsksDestination(false, decides));
            acts.extend(world.destination.up.then_some(Act::AsksDestination(true, decides)));
        }
    }

    fn may_be_stated(&self, world: &World, run_on: Side) -> bool {
        let destination_off = world.destination.off && world.started.is_empty();
        let source_off = world.source.off && world.woken < world.attempt;
        match (self.0.statements, run_on) {
            (Statements::None, _) => false,
            (Statements::True, Side::Source) => destination_off,
            (Statements::True, Side::Destination) => source_off || world.operator.committed,
            (Statements::Hasty, Side::Source) => true,
            (Statements::Blind, Side::Destination) => world.source.off,
            (Statements::Hasty | Statements::Blind, _) => false,
        }
    }
}

impl World {
    pub(crate) fn act(&mut self, config: &Config, act: Act) {
        let attempt = self.attempt;
        match act {
            Act::HearsCommit => {
                let machine = self.source.machine.as_ref();
                let committed =
                    |phase| matches!(phase, source::Phase::AwaitingStarted | source::Phase::Releasing);
                if self.source.attempt == attempt && machine.is_some_and(|m| committed(m.phase())) {
                    self.operator.committed = true;
                    self.operator.hear(attempt, Event::SourceReported { committed: true });
                }
            }
            Act::AsksSource(answers) => {
                let event = if answers {
                    Event::SourceSays(answer(self.source.word(), attempt))
                } else {
                    Event::SourceSilent(String::new())
                };
                self.operator.heard = true;
                self.operator.hear(attempt, event);
            }
            Act::AsksDestination(answers, decides) => {
                let event = if answers {
                    let word = answer(self.destination.word(), attempt);
                    let record = Mutant::record_at_destination(config.mutant, word.record);
                    Event::TargetSays { word: Word { record, ..word }, same_journal: true }
                } else {
                    Event::TargetSilent(String::new())
                };
                for effect in self.operator.hear(attempt, event) {
                    match effect {
                        // After a decision for D, a source that comes back has given up what it had not
                        // committed.
                        Effect::Doubt { reason: DoubtReason::Forked, .. }
                            if self.operator.decision.is_none() =>
                        {
                            self.broken.insert(Rule::SeesFork);
                        }
                        // S may be asked to begin, yet.
                        Effect::Settled(Settlement::NeverBegan) => {}
                        // The operator goes on asking, as it does until S has acknowledged the end.
                        Effect::Settled(Settlement::SourceLost { .. }) => {
                            self.operator.said_never_started = attempt;
                            if self.started.contains(&attempt) {
                                self.broken.insert(Rule::SaidNeverStarted);
                            }
                        }
                        // Before that is believed S is joined again: it may have begun since it was asked.
                        Effect::Settled(how) => {
                            let line = self.source.journal.filter(|line| line.attempt == attempt);
                            self.operator.done = line.is_none_or(|line| line.ended.is_some());
                            if matches!(how, Settlement::GivenUp(_)) {
                                self.said.insert(Said::Release { attempt });
                            }
                        }
                        _ => {}
                    }
                }
                let fits = |side: &Side| self.operator.resolver.fits(end(*side)).is_ok();
                if let Some(run_on) = decides.filter(fits) {
                    self.operator.decision = Some(run_on);
                }
                self.operator.recall(attempt);
            }
            Act::Relays(relay) => {
                let word = Word {
                    ended: relay.ended,
                    stated_because: relay.stated.then(String::new),
                    ..Word::at(relay.record)
                };
                match relay.to {
                    Side::Source => self.source_event(config, source::Event::Relayed(word)),
                    Side::Destination => self.destination_event(config, destination::Event::PeerSays(word)),
                }
            }
            Act::Restarts => self.operator.recall(attempt),
        }
    }
}

fn end(side: Side) -> resolver::End {
    match side {
        Side::Source => resolver::End::Source,
        Side::Destination => resolver::End::Destination,
    }
}

/// What an agent answers.
fn answer(line: Option<Line>, attempt: u32) -> Word {
    let line = line.filter(|line| line.attempt == attempt);
    line.map_or_else(Word::without_record, |line| Word {
        ended: line.ended.is_some(),
        ..Word::at(line.record)
    })
}
