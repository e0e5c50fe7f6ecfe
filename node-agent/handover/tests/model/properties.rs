//! What must hold, wherever the world goes.

use slackwater_handover::Record;
use slackwater_handover::state::MigrationState;
use stateright::Property;

use crate::steps::Handover;
use crate::world::{Ended, Line, Process, Said, Side, World};

/// A rule that is broken by a deed, at the moment of the deed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Rule {
    NoFork,
    AbortedFirst,
    StartingFirst,
    CommittedFirst,
    DiscardedTooLate,
    GivenUpAlone,
    ReleasedTooEarly,
    BelievedUnverified,
    HalfRollback,
    AskedTwice,
    SeesFork,
}

pub(crate) const TWO_RUNNERS: &str = "never two runners";
pub(crate) const NO_FORK: &str =
    "S wakes nothing after STARTING at D, and D starts nothing after S has woken";
pub(crate) const ABORTED_FIRST: &str = "nothing resumes at S before ABORTED is durable";
pub(crate) const STARTING_FIRST: &str = "nothing starts at D before STARTING is durable";
pub(crate) const COMMITTED_FIRST: &str = "COMMIT leaves only when COMMITTED is durable";
pub(crate) const DISCARDED_TOO_LATE: &str = "DISCARDED is never journalled after STARTING";
pub(crate) const GIVEN_UP_ALONE: &str = "from LOADED on, a whole copy is given up only on S's word";
pub(crate) const RELEASED_TOO_EARLY: &str = "S is released only when RUNNING is durable at D";
pub(crate) const BELIEVED_UNVERIFIED: &str = "no blob is believed that was not verified";
pub(crate) const HALF_ROLLBACK: &str = "after a rollback the VM runs at S with every device RUNNING";
pub(crate) const ASKED_TWICE: &str = "S asks one question at a time";
pub(crate) const SOMEBODY_RUNS: &str =
    "while both VMMs live and agents and operator reach each other, exactly one runs again";
pub(crate) const COPY_IS_USED: &str =
    "after COMMITTED, a whole copy at D runs in the end, whatever has become of S";
pub(crate) const NO_ALARM: &str = "without a decision the operator sees no fork";
pub(crate) const DECISION_HELPS: &str =
    "where an administrator has decided, the VM runs, though the other node stays off";
pub(crate) const NOTHING_HELD: &str =
    "in the end both ends have ended, and D holds nothing unless it runs the VM";

/// Situations that the model must reach, else it would show nothing, in the order of the faults that they take: 0, 1, 1, 1, 2.
pub(crate) const REACHED: [&str; 5] = [
    "the VM arrives",
    "S takes the VM back after COMMITTED",
    "S is down at COMMITTED, D at LOADED",
    "D is down at STARTING",
    "both agents are down between COMMITTED and STARTING",
];

/// Those that a world with so many faults can reach.
pub(crate) fn reachable(faults: u8) -> &'static [&'static str] {
    match faults {
        0 => &REACHED[..1],
        1 => &REACHED[..4],
        _ => &REACHED,
    }
}

macro_rules! kept {
    ($name:expr, $rule:expr) => {
        Property::always($name, |_, world: &World| !world.broken.contains(&$rule))
    };
}

pub(crate) fn all() -> Vec<Property<Handover>> {
    vec![
        Property::always(TWO_RUNNERS, |_, world: &World| !(world.source.runs && world.destination.runs)),
        kept!(NO_FORK, Rule::NoFork),
        kept!(ABORTED_FIRST, Rule::AbortedFirst),
        kept!(STARTING_FIRST, Rule::StartingFirst),
        kept!(COMMITTED_FIRST, Rule::CommittedFirst),
        kept!(DISCARDED_TOO_LATE, Rule::DiscardedTooLate),
        kept!(GIVEN_UP_ALONE, Rule::GivenUpAlone),
        kept!(RELEASED_TOO_EARLY, Rule::ReleasedTooEarly),
        kept!(BELIEVED_UNVERIFIED, Rule::BelievedUnverified),
        kept!(HALF_ROLLBACK, Rule::HalfRollback),
        kept!(ASKED_TWICE, Rule::AskedTwice),
        Property::always(SOMEBODY_RUNS, |model: &Handover, world: &World| {
            model.when_healed(world, somebody_runs)
        }),
        Property::always(COPY_IS_USED, |model: &Handover, world: &World| {
            model.when_healed(world, copy_is_used)
        }),
        Property::always(NOTHING_HELD, |model: &Handover, world: &World| {
            model.when_healed(world, nothing_held)
        }),
        kept!(NO_ALARM, Rule::SeesFork),
        Property::always(DECISION_HELPS, |model: &Handover, world: &World| {
            world.operator.decision.is_none() || model.when_repaired(world, decision_helps)
        }),
        Property::sometimes(REACHED[0], |_, world: &World| arrived(world)),
        Property::sometimes(REACHED[1], |_, world: &World| {
            ended(world) == Some(Ended::RolledBack) && has_committed(world)
        }),
        Property::sometimes(REACHED[2], |_, world: &World| {
            !world.source.up && has_committed(world) && world.destination.has_recorded(1, Record::Loaded)
        }),
        Property::sometimes(REACHED[3], |_, world: &World| {
            !world.destination.up && world.destination.has_recorded(1, Record::Starting)
        }),
        Property::sometimes(REACHED[4], |_, world: &World| {
            !world.source.up
                && !world.destination.up
                && has_committed(world)
                && world.destination.has_recorded(1, Record::Loaded)
        }),
    ]
}

fn arrived(world: &World) -> bool {
    world.destination.runs && ended(world) == Some(Ended::Succeeded)
}

/// S has been at COMMITTED, in the attempt of its journal.
fn has_committed(world: &World) -> bool {
    world.source.journal.is_some_and(|line| {
        world.said.contains(&Said::ToDestination { attempt: line.attempt, record: Record::Committed })
    })
}

fn ended(world: &World) -> Option<Ended> {
    world.source.journal.and_then(|line| line.ended)
}

/// A broken device at D can keep the VM from starting, and then nobody runs it: that is told, and no fault of the protocol.
fn broken_at_destination(world: &World) -> bool {
    world.device_fault == Some(Side::Destination)
        && world.destination.journal.and_then(|line| line.ended) == Some(Ended::Lost)
}

fn somebody_runs(world: &World) -> bool {
    let both_live = world.source.vmm != Process::Died && world.destination.vmm != Process::Died;
    !both_live || broken_at_destination(world) || world.source.runs != world.destination.runs
}

fn decision_helps(world: &World) -> bool {
    match world.operator.decision {
        Some(Side::Source) => world.source.vmm != Process::Alive || world.source.runs,
        // A source that had given it up, or does when it comes back, is believed.
        Some(Side::Destination) => {
            world.destination.vmm == Process::Died
                || world.device_fault.is_some()
                || world.destination.runs
                || world
                    .said
                    .contains(&Said::ToDestination { attempt: world.attempt, record: Record::Aborted })
        }
        None => true,
    }
}

fn copy_is_used(world: &World) -> bool {
    !has_committed(world)
        || world.twin_died
        || world.device_fault.is_some()
        || world.write_fault.is_some()
        || world.destination.runs
        || world.source.runs
}

fn nothing_held(world: &World) -> bool {
    let over = |line: Option<Line>| line.is_none_or(|line| line.ended.is_some());
    let at_rest = world.destination.vmm == Process::None
        && world.destination.devices.iter().all(|at| *at == MigrationState::Running);
    // It had started: what is left of it is for an administrator to look at.
    let started = world.destination.journal.is_some_and(|line| line.record != Record::Discarded);
    over(world.source.journal) && over(world.destination.journal) && (at_rest || started)
}
