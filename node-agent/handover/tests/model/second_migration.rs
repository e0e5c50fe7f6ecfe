//! Another migration of the same VM, while one end of the first is still open.

use slackwater_handover::{Record, destination, source};

use crate::effects::How;
use crate::mutants::Mutant;
use crate::operator::Operator;
use crate::random::{is_fault, walk};
use crate::steps::{Handover, Step};
use crate::world::{
    Again, Config, DestinationEnd, Ended, LeftOver, Line, Said, Save, Side, SourceEnd, World,
};

/// What may happen at the end that an earlier migration has left open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LeftOverStep {
    Effect(usize, How),
    Hear(Said),
    Answer(Said),
    /// A deadline passes, or the other end has been silent for too long.
    Patience,
    Crash,
    Restart,
    RecordEnd,
}

impl Handover {
    /// The VM runs, and one end of the migration is still open in its journal: the destination's, which has
    /// not heard that the source keeps the VM; or the source's, which has not heard that the VM has arrived.
    pub(crate) fn may_migrate_again(&self, world: &World) -> bool {
        let (source, destination) = (&world.source, &world.destination);
        let stays = |ended| matches!(ended, Some(Ended::RolledBack | Ended::Refused));
        if Mutant::frees_before_the_end(self.0.mutant) && stays(source.unrecorded) && source.runs {
            return world.attempt == self.0.attempts;
        }
        let kept = source.journal.is_some_and(|line| stays(line.ended))
            && source.runs
            && Line::is_open(&destination.journal);
        let arrived = destination.runs
            && destination.journal.is_some_and(|line| line.ended == Some(Ended::Succeeded))
            && Line::is_open(&source.journal);
        world.attempt == self.0.attempts && (kept || arrived)
    }

    /// What may happen at the end that an earlier migration has left open; `faults`: agents may crash there,
    /// too.
    pub(crate) fn left_over(&self, world: &World, faults: bool, steps: &mut Vec<Step>) {
        let Some(side) = world.left_over.as_ref().map(LeftOver::side) else { return };
        let mut here = world.clone();
        here.swap_left_over();
        let mut push = |step| steps.push(Step::LeftOver(step));
        for step in self.effects_at(&here, side) {
            if let Step::Effect(_, index, how) = step
                && (faults || how == How::Well)
            {
                push(LeftOverStep::Effect(index, how));
            }
        }
        let unrecorded = match side {
            Side::Source => here.source.unrecorded,
            Side::Destination => here.destination.unrecorded,
        };
        if unrecorded.is_some() {
            push(LeftOverStep::RecordEnd);
        }
        let (up, off, attempt, over) = match side {
            Side::Source => {
                let end = &here.source;
                let waits = end.machine.as_ref().is_some_and(|m| m.phase() == source::Phase::AwaitingStarted);
                (end.up, end.off, end.attempt, !waits)
            }
            Side::Destination => {
                let end = &here.destination;
                let waits = end.machine.as_ref().is_some_and(|m| m.phase() != destination::Phase::Finished);
                (end.up, end.off, end.attempt, !waits)
            }
        };
        for said in world.said.iter().copied().filter(|_| !over) {
            let (of, to) = match said {
                Said::ToSource { attempt, .. } => (attempt, Side::Source),
                Said::ToDestination { attempt, .. } | Said::Release { attempt } => {
                    (attempt, Side::Destination)
                }
            };
            if to == side && Mutant::is_heard_by_left_over(self.0.mutant, of, attempt) {
                match side {
                    Side::Source if here.asks() => push(LeftOverStep::Answer(said)),
                    _ => push(LeftOverStep::Hear(said)),
                }
            }
        }
        if !up && !off {
            push(LeftOverStep::Restart);
        }
        // No source will ever connect to a destination that is left over, so its silence timer ends.
        if !over && (faults || side == Side::Destination) {
            push(LeftOverStep::Patience);
        }
        if faults && up && world.faults_left > 0 {
            push(LeftOverStep::Crash);
        }
    }

    pub(crate) fn take_left_over(&self, world: &mut World, step: LeftOverStep) {
        let Some(side) = world.left_over.as_ref().map(LeftOver::side) else { return };
        let config = &self.0;
        world.swap_left_over();
        match step {
            LeftOverStep::Effect(index, how) => self.end_effect(world, side, index, how),
            LeftOverStep::Hear(said) => world.hear(config, said, false),
            LeftOverStep::Answer(said) => world.hear(config, said, true),
            LeftOverStep::Patience => self.lose_patience(world, side),
            LeftOverStep::Crash => {
                world.faults_left -= 1;
                match side {
                    Side::Source => world.source.crash(),
                    Side::Destination => world.destination.crash(),
                }
            }
            LeftOverStep::Restart => world.restart(config, side),
            LeftOverStep::RecordEnd => world.record_end(side),
        }
        world.swap_left_over();
    }
}

impl World {
    /// The VM is migrated once more, by another VMMigration, although one end of the first migration is still
    /// open. The new one uses a node that the first did not.
    pub(crate) fn begin_another_migration(&mut self, config: &Config) {
        let devices = config.features.len();
        self.attempt += 1;
        self.operator = Operator::default();
        self.save = Save::None;
        self.hang_up(Side::Source);
        self.hang_up(Side::Destination);
        let next = DestinationEnd::without_vm(devices);
        let left_over = if self.destination.runs {
            // The VM has arrived. Its node is the source now, and the old source is still open.
            let twin = std::mem::replace(&mut self.destination, next);
            let source = SourceEnd {
                vmm: twin.vmm,
                runs: twin.runs,
                devices: twin.devices,
                up: twin.up,
                off: twin.off,
                ..SourceEnd::without_vm(0)
            };
            LeftOver::Source(std::mem::replace(&mut self.source, source))
        } else {
            // The next migration has a journal of its own, on the same disk.
            if self.source.unrecorded.take().is_some() {
                self.source.forgotten = self.source.journal.take();
                self.source.shown = None;
            }
            let end = std::mem::replace(&mut self.destination, next);
            let verified = std::mem::take(&mut self.verified);
            LeftOver::Destination { end, verified, loaded: std::mem::take(&mut self.loaded) }
        };
        self.left_over = Some(left_over);
    }
}

/// The world in which a second migration begins, while this side of the first is still open.
pub(crate) fn second_migration(config: &Config, open: Side) -> World {
    let first = Config { again: Again::Later, faults: 0, power: 0, mutant: None, ..config.clone() };
    let mut world = walk(&Handover(first), |world, steps| {
        if world.left_over.is_some() {
            return None;
        }
        let find = |wanted: fn(&Step) -> bool| steps.iter().copied().find(wanted);
        let again = find(|step| *step == Step::MigrateAgain);
        let loaded = world.destination.has_recorded(1, Record::Loaded);
        let starting = world.destination.has_recorded(1, Record::Starting)
            || world.destination.has_recorded(1, Record::Running);
        let here = match open {
            // The destination holds a whole copy, and hears no more of the source, which goes back.
            Side::Destination if loaded => find(|step| *step == Step::Cut)
                .or_else(|| find(|step| *step == Step::Notice(Side::Source)))
                .or_else(|| find(|step| matches!(step, Step::Effect(Side::Source, _, How::Well)))),
            // The destination runs the VM, and the source does not hear of it.
            Side::Source if starting => {
                find(|step| matches!(step, Step::Effect(Side::Destination, _, How::Well)))
            }
            _ => find(|step| !is_fault(*step)),
        };
        again.or(here)
    })
    .expect_kept();
    assert_eq!(world.left_over.as_ref().map(LeftOver::side), Some(open), "{world:#?}");
    world.faults_left = config.faults;
    world.power_left = config.power;
    world
}

/// The world in which a second migration has committed although the end of the first, which was rolled back, is
/// not in the journal: the agent has freed the VM too early.
pub(crate) fn migration_before_the_end(config: &Config) -> World {
    let first = Config { again: Again::Later, faults: 1, power: 0, ..config.clone() };
    let mut given_up = false;
    let mut world = walk(&Handover(first), |world, steps| {
        if world.left_over.is_some() && world.source.has_recorded(2, Record::Committed) {
            return None;
        }
        let find = |wanted: fn(&Step) -> bool| steps.iter().copied().find(wanted);
        if world.stream.is_some() && !std::mem::replace(&mut given_up, world.stream.is_some()) {
            return find(|step| *step == Step::Deadline);
        }
        let aborted = world.source.has_recorded(1, Record::Aborted);
        find(|step| *step == Step::MigrateAgain)
            .or_else(|| {
                find(|step| matches!(step, Step::Effect(Side::Source, _, How::WriteFails { .. })))
                    .filter(|_| aborted)
            })
            .or_else(|| find(|step| matches!(step, Step::Effect(_, _, How::Well))))
            .or_else(|| find(|step| matches!(step, Step::Reserve | Step::Migrate | Step::Deliver(_))))
    })
    .expect_kept();
    assert!(world.source.forgotten.is_some(), "{world:#?}");
    world.faults_left = config.faults;
    world.write_fault = None;
    world
}
