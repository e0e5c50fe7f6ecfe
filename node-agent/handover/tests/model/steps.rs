//! The model: what may happen next, and what has happened then.

use std::fmt;

use slackwater_handover::destination::{self, Destination};
use slackwater_handover::policy::Driver;
use slackwater_handover::source::{self, Source};
use slackwater_handover::{Reason, Record};
use stateright::{Model, Property};

use crate::carry::{How, failure};
use crate::mutants::Mutant;
use crate::operator::{Deed, Operator};
use crate::properties;
use crate::world::{Config, Ended, Process, Said, Side, World};

/// Two agents, an operator, and everything that may happen to them.
#[derive(Clone, Debug)]
pub(crate) struct Handover(pub Config);

/// What may happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// The operator asks D to reserve.
    Reserve,
    /// The operator asks S to migrate.
    Migrate,
    /// The operator begins another attempt.
    TryAgain,
    /// An effect ends, by its place among those that have begun.
    Effect(Side, usize, How),
    /// The next message of the stream arrives at this side.
    Deliver(Side),
    /// This side hears that the stream is broken.
    Notice(Side),
    /// What is said outside the stream arrives, as somebody relays it; or at D by S's question.
    Hear(Said),
    /// S's question is answered by this.
    Answer(Said),
    /// S's question is not answered.
    NoAnswer,
    Overdue,
    Cut,
    /// A deadline before the commit passes, by S's clock.
    Deadline,
    /// S has been silent for too long, by D's clock.
    Silence,
    Crash(Side),
    Restart(Side),
    /// The process that holds the VM on this side ends.
    Kill(Side),
    /// The node's power is cut.
    PowerOff(Side),
    PowerOn(Side),
    Operator(Deed),
}

impl Handover {
    pub(crate) fn effects(&self, world: &World, steps: &mut Vec<Step>) {
        let faulty = world.faults_left > 0;
        let device = faulty && world.device_fault.is_none();
        let write = faulty && world.write_fault.is_none();
        let mut recorded = false;
        for (index, effect) in world.source.todo.iter().enumerate() {
            let step = |how| Step::Effect(Side::Source, index, how);
            match effect {
                source::Effect::AskPeer => continue,
                source::Effect::Record(_) | source::Effect::RecordAgain(_) | source::Effect::Finish(_) => {
                    if std::mem::replace(&mut recorded, true) {
                        continue;
                    }
                    if write && !matches!(effect, source::Effect::Finish(_)) {
                        steps.extend([false, true].map(|stands| step(How::WriteFails { stands })));
                    }
                }
                source::Effect::SetState(..) | source::Effect::Reset(_) if device => {
                    steps.extend([None, Some(false), Some(true)].map(|found| step(How::DeviceFails(found))));
                }
                source::Effect::FinishSave | source::Effect::Capture(_) if device => {
                    steps.push(step(How::DeviceFails(None)));
                }
                _ => {}
            }
            steps.push(step(How::Well));
        }
        recorded = false;
        for (index, effect) in world.destination.todo.iter().enumerate() {
            let step = |how| Step::Effect(Side::Destination, index, how);
            match effect {
                destination::Effect::Record(_)
                | destination::Effect::RecordAgain(_)
                | destination::Effect::Finish(_) => {
                    if std::mem::replace(&mut recorded, true) {
                        continue;
                    }
                    if write && !matches!(effect, destination::Effect::Finish(_)) {
                        steps.extend([false, true].map(|stands| step(How::WriteFails { stands })));
                    }
                }
                destination::Effect::StartTwin if device => steps.push(step(How::DeviceFails(None))),
                destination::Effect::SetState(..) if device => {
                    steps.extend([None, Some(false), Some(true)].map(|found| step(How::DeviceFails(found))));
                }
                _ => {}
            }
            steps.push(step(How::Well));
        }
    }

    /// The stream, and what is said outside it.
    pub(crate) fn messages(&self, world: &World, steps: &mut Vec<Step>) {
        if let Some(stream) = &world.stream {
            if stream.forth.as_ref().is_some_and(|queue| !queue.is_empty()) && world.destination.up {
                steps.push(Step::Deliver(Side::Destination));
            }
            if stream.back.as_ref().is_some_and(|queue| !queue.is_empty()) && world.source.up {
                steps.push(Step::Deliver(Side::Source));
            }
            if stream.cut {
                steps.extend(stream.forth.is_some().then_some(Step::Notice(Side::Destination)));
                steps.extend(stream.back.is_some().then_some(Step::Notice(Side::Source)));
            } else {
                steps.push(Step::Cut);
            }
        }
        for said in world.said.iter().copied().filter(|said| self.is_heard(world, *said)) {
            let asked = matches!(said, Said::ToSource { .. }) && world.asks();
            steps.extend(asked.then_some(Step::Answer(said)));
            // What settles it does so in the same way, asked for or not.
            steps.extend((!asked || self.0.doubts).then_some(Step::Hear(said)));
        }
    }

    fn is_heard(&self, world: &World, said: Said) -> bool {
        match said {
            Said::ToSource { .. } | Said::ToDestination { .. } if self.0.relayed => false,
            Said::ToSource { attempt, record, ended } => {
                let settles = matches!(record, Record::Running | Record::Discarded) || ended;
                world.source.machine.as_ref().is_some_and(|m| m.phase() == source::Phase::AwaitingStarted)
                    && Mutant::is_heard(self.0.mutant, attempt, world.source.attempt)
                    && (settles || self.0.doubts)
            }
            Said::ToDestination { attempt, .. } | Said::Release { attempt } => {
                world.destination.machine.as_ref().is_some_and(|m| m.phase() != destination::Phase::Finished)
                    && Mutant::is_heard(self.0.mutant, attempt, world.destination.attempt)
            }
        }
    }

    pub(crate) fn operator(&self, world: &World, steps: &mut Vec<Step>) {
        let (source, destination) = (&world.source, &world.destination);
        let over = |line: Option<crate::world::Line>| {
            line.is_none_or(|line| line.attempt < world.attempt && line.ended.is_some())
        };
        if destination.up
            && destination.machine.as_ref().is_none_or(|m| m.phase() == destination::Phase::Finished)
            && (destination.attempt < world.attempt || destination.machine.is_none())
            && over(destination.journal)
        {
            steps.push(Step::Reserve);
        }
        if source.up
            && source.machine.as_ref().is_none_or(|m| m.phase() == source::Phase::Finished)
            && (source.attempt < world.attempt || source.machine.is_none())
            && over(source.journal)
            && world.reserved == world.attempt
        {
            steps.push(Step::Migrate);
        }
        let stays = |ended| matches!(ended, Some(Ended::RolledBack | Ended::Refused));
        if world.attempt < self.0.attempts
            && world.operator.decision.is_none()
            && source.journal.is_some_and(|line| line.attempt == world.attempt && stays(line.ended))
            && destination.journal.is_none_or(|line| line.ended.is_some())
        {
            steps.push(Step::TryAgain);
        }
    }

    fn misfortunes(&self, world: &World, steps: &mut Vec<Step>) {
        if let Some(machine) = &world.source.machine
            && machine.phase() != source::Phase::Finished
        {
            steps.push(Step::Deadline);
            if self.0.doubts && machine.phase() == source::Phase::AwaitingStarted {
                steps.push(Step::Overdue);
                steps.extend(world.asks().then_some(Step::NoAnswer));
            }
        }
        if world.destination.machine.as_ref().is_some_and(|m| m.phase() != destination::Phase::Finished) {
            steps.push(Step::Silence);
        }
        if world.faults_left > 0 {
            steps.extend(world.source.up.then_some(Step::Crash(Side::Source)));
            steps.extend(world.destination.up.then_some(Step::Crash(Side::Destination)));
            steps.extend((world.source.vmm == Process::Alive).then_some(Step::Kill(Side::Source)));
            steps.extend((world.destination.vmm == Process::Alive).then_some(Step::Kill(Side::Destination)));
        }
        if world.power_left > 0 {
            steps.extend((!world.source.off).then_some(Step::PowerOff(Side::Source)));
            steps.extend((!world.destination.off).then_some(Step::PowerOff(Side::Destination)));
        }
        for (side, up, off) in [
            (Side::Source, world.source.up, world.source.off),
            (Side::Destination, world.destination.up, world.destination.off),
        ] {
            steps.extend(off.then_some(Step::PowerOn(side)));
            steps.extend((!up && !off).then_some(Step::Restart(side)));
        }
    }

    pub(crate) fn take(&self, world: &mut World, step: Step) {
        let config = &self.0;
        match step {
            Step::Reserve => {
                // Whatever is left of an earlier attempt's stream is read by nobody.
                world.hang_up(Side::Destination);
                world.destination.todo.clear();
                world.destination.attempt = world.attempt;
                world.destination.machine = Some(Destination::new(&config.features(), Driver::Agent));
                world.verified.clear();
                world.loaded = false;
                world.tell_destination(config, destination::Event::Start);
            }
            // S refuses a VM that does not run, and the operator has D give back what it holds.
            Step::Migrate if !world.source.runs => {
                world.said.insert(Said::Release { attempt: world.attempt });
            }
            Step::Migrate => {
                world.hang_up(Side::Source);
                world.source.todo.clear();
                world.source.attempt = world.attempt;
                world.source.machine = Some(Source::new(&config.features(), Config::plan(), Driver::Agent));
                world.tell_source(config, source::Event::Start);
            }
            Step::TryAgain => {
                world.attempt += 1;
                let relayed = std::mem::take(&mut world.operator.relayed);
                world.operator = Operator { relayed, ..Operator::default() };
            }
            Step::Effect(side, index, how) => {
                match how {
                    How::Well => {}
                    How::DeviceFails(_) => world.device_fault = Some(side),
                    How::WriteFails { .. } => world.write_fault = Some(side),
                }
                world.faults_left -= u8::from(how != How::Well);
                match side {
                    Side::Source => world.carry_out_at_source(config, index, how),
                    Side::Destination => world.carry_out_at_destination(config, index, how),
                }
            }
            Step::Deliver(side) => world.deliver(config, side),
            Step::Notice(side) => world.notice(config, side),
            Step::Hear(said) => world.hear(config, said, false),
            Step::Answer(said) => world.hear(config, said, true),
            Step::NoAnswer => {
                if let Some(index) =
                    world.source.todo.iter().position(|effect| *effect == source::Effect::AskPeer)
                {
                    world.carry_out_at_source(config, index, How::Well);
                }
            }
            Step::Overdue => {
                world.tell_source(config, source::Event::StartOverdue(failure(Reason::TargetSlow)));
            }
            Step::Cut => {
                world.cut();
                world.link_down = config.relayed;
            }
            Step::Deadline => {
                if let Some(phase) = world.source.machine.as_ref().map(Source::phase) {
                    world.tell_source(config, Mutant::deadline(config.mutant, phase));
                }
            }
            Step::Silence => {
                if let Some(phase) = world.destination.machine.as_ref().map(Destination::phase) {
                    world.tell_destination(config, Mutant::silence(config.mutant, phase));
                }
            }
            Step::Crash(side) => {
                world.faults_left -= 1;
                world.crash(side);
            }
            Step::Restart(side) => world.restart(config, side),
            Step::Kill(side) => {
                world.faults_left -= 1;
                world.kill(config, side);
            }
            Step::PowerOff(side) => {
                world.power_left -= 1;
                world.power_off(side);
            }
            Step::PowerOn(Side::Source) => world.source.off = false,
            Step::PowerOn(Side::Destination) => world.destination.off = false,
            Step::Operator(deed) => world.act(config, deed),
        }
    }
}

impl Model for Handover {
    type State = World;
    type Action = Step;

    fn init_states(&self) -> Vec<World> {
        vec![World::new(&self.0)]
    }

    fn actions(&self, world: &World, steps: &mut Vec<Step>) {
        // What has gone wrong is not gone on from: the first fault on a way is the one to look at.
        if world.broken.is_empty() {
            self.operator(world, steps);
            self.effects(world, steps);
            self.messages(world, steps);
            self.misfortunes(world, steps);
            if self.0.relayed {
                let mut deeds = Vec::new();
                self.deeds(world, &mut deeds);
                steps.extend(deeds.into_iter().map(Step::Operator));
            }
        }
    }

    fn next_state(&self, world: &World, step: Step) -> Option<World> {
        let mut next = world.clone();
        self.take(&mut next, step);
        (next != *world).then_some(next)
    }

    fn format_action(&self, step: &Step) -> String {
        step.to_string()
    }

    fn properties(&self) -> Vec<Property<Self>> {
        properties::all()
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}
