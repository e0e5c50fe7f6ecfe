//! The model: what may happen next, and what has happened then.

use std::fmt;

use slackwater_handover::destination::{self, Destination};
use slackwater_handover::source::{self, Source};
use slackwater_handover::state::MigrationState;
use slackwater_handover::{Reason, Record};
use stateright::{Model, Property};

use crate::effects::{How, failure};
use crate::kinds::{Faults, Kind};
use crate::mutants::Mutant;
use crate::operator::{Act, Operator};
use crate::properties;
use crate::second_migration::{LeftOverStep, migration_before_the_end, second_migration};
use crate::world::{Again, Config, Ended, Line, Process, Said, Save, Side, World};

/// Two agents, an operator, and everything that may happen to them.
#[derive(Clone, Debug)]
pub(crate) struct Handover(pub Config);

/// What may happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// The operator asks the destination to reserve.
    Reserve,
    /// The operator asks the source to migrate.
    Migrate,
    /// The operator begins another attempt.
    TryAgain,
    /// The user migrates the VM once more, although one end of the first migration is still open.
    MigrateAgain,
    /// An effect ends, by its place among those that have begun.
    Effect(Side, usize, How),
    /// The save of the source's VMM ends after its last byte, well or not.
    EndSave(bool),
    /// The end of an attempt, which could not be written before, is written at this side.
    RecordEnd(Side),
    /// The next message of the stream arrives at this side.
    Deliver(Side),
    /// This side notices that the stream is broken.
    Notice(Side),
    /// What is said outside the stream arrives, as the operator relays it; or at the destination by the
    /// source's question.
    Hear(Said),
    /// The source's question is answered by this.
    Answer(Said),
    /// The source's question is not answered.
    NoAnswer,
    Overdue,
    Cut,
    /// A deadline before the commit passes, by the source's clock.
    Deadline,
    /// The source has been silent for too long, by the destination's clock.
    Silence,
    /// The call to a device has not returned in its time.
    Hang(Side, usize),
    /// The guest resets a device.
    GuestResets(usize),
    Crash(Side),
    Restart(Side),
    /// The process that holds the VM on this side ends.
    Kill(Side),
    /// The node's power is cut.
    PowerOff(Side),
    PowerOn(Side),
    Operator(Act),
    /// Something happens at the end that an earlier migration has left open.
    LeftOver(LeftOverStep),
}

impl Handover {
    pub(crate) fn effects(&self, world: &World, steps: &mut Vec<Step>) {
        steps.extend(self.effects_at(world, Side::Source));
        steps.extend(self.effects_at(world, Side::Destination));
        for (side, unrecorded) in
            [(Side::Source, world.source.unrecorded), (Side::Destination, world.destination.unrecorded)]
        {
            steps.extend(unrecorded.map(|_| Step::RecordEnd(side)));
        }
        if world.save == Save::Draining {
            steps.push(Step::EndSave(true));
            steps.extend(self.calls_may_fail(world).then_some(Step::EndSave(false)));
        }
    }

    fn calls_may_fail(&self, world: &World) -> bool {
        self.0.calls_fail && world.faults_left > 0 && world.call_fault.is_none()
    }

    pub(crate) fn effects_at(&self, world: &World, side: Side) -> Vec<Step> {
        let may = Faults {
            device: world.faults_left > 0 && world.device_fault.is_none(),
            write: world.faults_left > 0 && world.write_fault.is_none(),
            call: self.calls_may_fail(world),
        };
        let kinds: Vec<Option<Kind>> = match side {
            Side::Source => world.source.todo.iter().map(Kind::of_source).collect(),
            Side::Destination => world.destination.todo.iter().map(Kind::of_destination).collect(),
        };
        let mut steps = Vec::new();
        let mut recorded = false;
        for (index, kind) in kinds.into_iter().enumerate() {
            let Some(kind) = kind else { continue };
            // The records of one journal keep their order.
            if matches!(kind, Kind::Record | Kind::Finish) && std::mem::replace(&mut recorded, true) {
                continue;
            }
            steps.extend(kind.ways(may).into_iter().map(|how| Step::Effect(side, index, how)));
        }
        steps
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

    pub(crate) fn end_effect(&self, world: &mut World, side: Side, index: usize, how: How) {
        match how {
            How::Well => {}
            How::DeviceFails(_) => world.device_fault = Some(side),
            How::WriteFails { .. } => world.write_fault = Some(side),
            How::CallFails => world.call_fault = Some(side),
        }
        world.faults_left -= u8::from(how != How::Well);
        match side {
            Side::Source => world.perform_at_source(&self.0, index, how),
            Side::Destination => world.perform_at_destination(&self.0, index, how),
        }
    }

    /// A deadline passes at the source, or the destination has not heard from the source for too long.
    pub(crate) fn lose_patience(&self, world: &mut World, side: Side) {
        let config = &self.0;
        match side {
            Side::Source => {
                if let Some(phase) = world.source.machine.as_ref().map(Source::phase) {
                    world.source_event(config, Mutant::deadline(config.mutant, phase));
                }
            }
            Side::Destination => {
                if let Some(phase) = world.destination.machine.as_ref().map(Destination::phase) {
                    world.destination_event(config, Mutant::silence(config.mutant, phase));
                }
            }
        }
    }

    pub(crate) fn operator(&self, world: &World, steps: &mut Vec<Step>) {
        let (source, destination) = (&world.source, &world.destination);
        let over =
            |line: Option<Line>| line.is_none_or(|line| line.attempt < world.attempt && line.ended.is_some());
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
        if self.0.again == Again::Later
            && world.left_over.is_none()
            && world.stuck.is_none()
            && self.may_migrate_again(world)
        {
            steps.push(Step::MigrateAgain);
        }
    }

    fn faults(&self, world: &World, steps: &mut Vec<Step>) {
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
        if self.0.hangs && world.faults_left > 0 && world.stuck.is_none() {
            let source = world.source.todo.iter().filter_map(Kind::device_of_source);
            let destination = world.destination.todo.iter().filter_map(Kind::device_of_destination);
            steps.extend(source.map(|index| Step::Hang(Side::Source, index)));
            steps.extend(destination.map(|index| Step::Hang(Side::Destination, index)));
        }
        if self.0.resets && world.faults_left > 0 && world.source.runs {
            let devices = world.source.devices.iter().enumerate();
            let in_session = devices.filter(|(_, device)| device.at == MigrationState::PreCopy);
            steps.extend(in_session.map(|(index, _)| Step::GuestResets(index)));
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
                // What is left of an earlier attempt's stream has no reader any more.
                world.hang_up(Side::Destination);
                world.destination.todo.clear();
                world.destination.attempt = world.attempt;
                world.destination.machine = Some(config.new_destination());
                world.verified.clear();
                world.loaded = false;
                world.destination_event(config, destination::Event::Start);
            }
            // The source refuses a VM that does not run, and the operator has the destination give back what
            // it holds.
            Step::Migrate if !world.source.runs => {
                world.said.insert(Said::Release { attempt: world.attempt });
            }
            Step::Migrate => {
                world.hang_up(Side::Source);
                world.source.todo.clear();
                world.save = Save::None;
                world.source.attempt = world.attempt;
                world.source.machine = Some(config.new_source());
                world.source_event(config, source::Event::Start);
            }
            Step::TryAgain => {
                world.attempt += 1;
                let relayed = std::mem::take(&mut world.operator.relayed);
                world.operator = Operator { relayed, ..Operator::default() };
            }
            Step::MigrateAgain => world.begin_another_migration(config),
            Step::Effect(side, index, how) => self.end_effect(world, side, index, how),
            Step::EndSave(well) => {
                if !well {
                    world.call_fault = Some(Side::Source);
                    world.faults_left -= 1;
                }
                world.end_save(config, well);
            }
            Step::RecordEnd(side) => world.record_end(side),
            Step::Deliver(side) => world.deliver(config, side),
            Step::Notice(side) => world.notice(config, side),
            Step::Hear(said) => world.hear(config, said, false),
            Step::Answer(said) => world.hear(config, said, true),
            Step::NoAnswer => {
                if let Some(index) =
                    world.source.todo.iter().position(|effect| *effect == source::Effect::AskPeer)
                {
                    world.perform_at_source(config, index, How::Well);
                }
            }
            Step::Overdue => {
                world.source_event(config, source::Event::StartOverdue(failure(Reason::TargetSlow)));
            }
            Step::Cut => {
                world.cut();
                world.link_down = config.relayed;
            }
            Step::Deadline => self.lose_patience(world, Side::Source),
            Step::Silence => self.lose_patience(world, Side::Destination),
            Step::Hang(side, index) => {
                world.faults_left -= 1;
                world.hang(config, side, index);
            }
            Step::GuestResets(index) => {
                world.faults_left -= 1;
                world.guest_resets(index);
            }
            Step::Crash(side) => {
                world.faults_left -= 1;
                world.crash(config, side);
            }
            Step::Restart(side) => world.restart(config, side),
            Step::Kill(side) => {
                world.faults_left -= 1;
                world.kill(config, side);
            }
            Step::PowerOff(side) => {
                world.power_left -= 1;
                world.power_off(config, side);
            }
            Step::PowerOn(Side::Source) => world.source.off = false,
            Step::PowerOn(Side::Destination) => world.destination.off = false,
            Step::Operator(act) => world.act(config, act),
            Step::LeftOver(step) => self.take_left_over(world, step),
        }
    }
}

impl Model for Handover {
    type State = World;
    type Action = Step;

    fn init_states(&self) -> Vec<World> {
        if self.0.again == Again::FromTheStart {
            return [Side::Source, Side::Destination].map(|side| second_migration(&self.0, side)).to_vec();
        }
        if self.0.again == Again::BeforeTheEnd {
            return vec![migration_before_the_end(&self.0)];
        }
        vec![World::new(&self.0)]
    }

    fn actions(&self, world: &World, steps: &mut Vec<Step>) {
        // A world in which a rule is broken does not go on: the first fault on a way is the one to look at.
        if world.broken.is_empty() {
            self.operator(world, steps);
            self.effects(world, steps);
            self.messages(world, steps);
            self.faults(world, steps);
            self.left_over(world, true, steps);
            if self.0.relayed {
                let mut acts = Vec::new();
                self.operator_acts(world, &mut acts);
                steps.extend(acts.into_iter().map(Step::Operator));
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
