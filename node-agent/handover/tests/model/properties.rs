//! What must hold, wherever the world goes.

use slackwater_handover::Record;
use slackwater_handover::policy::Driver;
use slackwater_handover::state::{Features, MigrationState};
use stateright::Property;

use crate::steps::Handover;
use crate::world::{Device, Ended, LeftOver, Line, Process, Said, Side, World};

/// A rule that an action breaks, at the moment of the action.
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
    OneSession,
    HalfRollback,
    AskedTwice,
    SeesFork,
    SaidNeverStarted,
    QuiesceTogether,
    SlackWater,
    WakeTogether,
    IllegalMove,
}

pub(crate) const TWO_RUNNERS: &str = "I1: never two runners";
pub(crate) const NO_FORK: &str =
    "I1: S wakes nothing after STARTING at D, and D starts nothing after S has woken";
pub(crate) const ABORTED_FIRST: &str = "nothing resumes at S before ABORTED is durable";
pub(crate) const STARTING_FIRST: &str = "nothing starts at D before STARTING is durable";
pub(crate) const COMMITTED_FIRST: &str = "COMMIT leaves only when COMMITTED is durable";
pub(crate) const DISCARDED_TOO_LATE: &str = "DISCARDED is never journalled after STARTING";
pub(crate) const GIVEN_UP_ALONE: &str = "from LOADED on, a whole copy is given up only on S's word";
pub(crate) const RELEASED_TOO_EARLY: &str = "S is released only when RUNNING is durable at D";
pub(crate) const BELIEVED_UNVERIFIED: &str =
    "I5: no blob is believed that was not verified, and no device that was not checked";
pub(crate) const ONE_SESSION: &str = "I5: a device's blob comes from one session of it";
pub(crate) const HALF_ROLLBACK: &str = "I6: after a rollback the VM runs at S with every device RUNNING";
pub(crate) const QUIESCE_TOGETHER: &str =
    "I2: no device stops before all have reached the barrier of the plan";
pub(crate) const SLACK_WATER: &str =
    "I3: nothing final is captured before the vCPUs and all devices are stopped";
pub(crate) const WAKE_TOGETHER: &str = "I4: devices wake together, and the vCPUs last";
pub(crate) const ILLEGAL_MOVE: &str = "no device is asked for a state that it cannot reach";
pub(crate) const ASKED_TWICE: &str = "S asks one question at a time";
pub(crate) const ONE_END_RUNS: &str =
    "while both VMMs live and agents and operator reach each other, exactly one runs again";
pub(crate) const COPY_IS_USED: &str =
    "after COMMITTED, a whole copy at D runs in the end, whatever has become of S";
pub(crate) const NO_ALARM: &str = "without a decision the operator sees no fork";
pub(crate) const SAID_NEVER_STARTED: &str =
    "D never starts the VM once the operator has said that it never will";
pub(crate) const DECISION_HELPS: &str =
    "where an administrator has decided, the VM runs, though the other node stays off";
/// D gives everything back, and S has recorded ABORTED, keeps vCPUs that it has paused so, and has the other
/// devices in RUNNING_P2P, but for one that has failed, too.
pub(crate) const HOLDS_UP_NOTHING: &str =
    "a device that hangs before the commit, and for good, holds up only its own VM";
pub(crate) const NOTHING_HELD: &str =
    "in the end both ends have ended, and D holds nothing unless it runs the VM";

/// Situations that the model must reach, or it would show nothing, in the order of the faults that they take:
/// 0, 1, 1, 1, 2.
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

/// What a world with another migration must reach: the VM arrives by it, although one end of the first is
/// still open.
pub(crate) const AGAIN: [&str; 2] = [
    "the VM arrives by another migration while the first one's destination is still open",
    "the VM moves on while the first migration's source is still open",
];

/// Only a broken protocol comes there: an agent has restarted with two open journals of its VM.
pub(crate) const BOTH_HELD: &str = "two open journals of one VM are held";

macro_rules! kept {
    ($name:expr, $rule:expr) => {
        Property::always($name, |_, world: &World| !world.broken.contains(&$rule))
    };
}

pub(crate) fn all() -> Vec<Property<Handover>> {
    vec![
        Property::always(TWO_RUNNERS, |_, world: &World| world.runners() < 2),
        kept!(NO_FORK, Rule::NoFork),
        kept!(ABORTED_FIRST, Rule::AbortedFirst),
        kept!(STARTING_FIRST, Rule::StartingFirst),
        kept!(COMMITTED_FIRST, Rule::CommittedFirst),
        kept!(DISCARDED_TOO_LATE, Rule::DiscardedTooLate),
        kept!(GIVEN_UP_ALONE, Rule::GivenUpAlone),
        kept!(RELEASED_TOO_EARLY, Rule::ReleasedTooEarly),
        kept!(BELIEVED_UNVERIFIED, Rule::BelievedUnverified),
        kept!(ONE_SESSION, Rule::OneSession),
        kept!(HALF_ROLLBACK, Rule::HalfRollback),
        kept!(ASKED_TWICE, Rule::AskedTwice),
        kept!(QUIESCE_TOGETHER, Rule::QuiesceTogether),
        kept!(SLACK_WATER, Rule::SlackWater),
        kept!(WAKE_TOGETHER, Rule::WakeTogether),
        kept!(ILLEGAL_MOVE, Rule::IllegalMove),
        Property::always(ONE_END_RUNS, |model: &Handover, world: &World| {
            model.when_healed(world, one_end_runs)
        }),
        Property::always(COPY_IS_USED, |model: &Handover, world: &World| {
            model.when_healed(world, copy_is_used)
        }),
        Property::always(NOTHING_HELD, |model: &Handover, world: &World| {
            model.when_healed(world, nothing_held)
        }),
        Property::always(HOLDS_UP_NOTHING, |model: &Handover, world: &World| {
            world.stuck.is_none() || model.while_it_hangs(world, holds_up_nothing)
        }),
        kept!(NO_ALARM, Rule::SeesFork),
        kept!(SAID_NEVER_STARTED, Rule::SaidNeverStarted),
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
        Property::sometimes(BOTH_HELD, |_, world: &World| {
            world.source.up
                && world.source.machine.is_none()
                && world.source.forgotten.is_some()
                && has_committed(world)
                && world.destination.runs
        }),
        Property::sometimes(AGAIN[0], |_, world: &World| {
            arrived(world) && world.left_over.as_ref().is_some_and(|end| end.side() == Side::Destination)
        }),
        Property::sometimes(AGAIN[1], |_, world: &World| {
            arrived(world) && world.left_over.as_ref().is_some_and(|end| end.side() == Side::Source)
        }),
    ]
}

fn arrived(world: &World) -> bool {
    world.destination.runs && ended(world) == Some(Ended::Succeeded)
}

/// The source has been at COMMITTED, in the attempt of its journal.
fn has_committed(world: &World) -> bool {
    world.source.journal.is_some_and(|line| {
        world.said.contains(&Said::ToDestination { attempt: line.attempt, record: Record::Committed })
    })
}

fn ended(world: &World) -> Option<Ended> {
    world.source.journal.and_then(|line| line.ended)
}

/// A broken device or a failed call can keep the VM from starting at the destination, or from resuming at the
/// source. Then it runs nowhere, the status says so, and the protocol is not at fault.
fn could_not_run(world: &World) -> bool {
    let lost = |line: Option<Line>| line.and_then(|line| line.ended) == Some(Ended::Lost);
    let failed_at = |side| world.device_fault == Some(side) || world.call_fault == Some(side);
    (failed_at(Side::Destination) && lost(world.destination.journal))
        || (failed_at(Side::Source) && lost(world.source.journal))
}

fn one_end_runs(world: &World) -> bool {
    let both_live = world.source.vmm != Process::Died && world.destination.vmm != Process::Died;
    // The twin was gone before it was to start, and the write of STARTING failed but stands: an agent that
    // crashes then cannot know whether it had started.
    let may_have_started = world.twin_died
        && world.write_fault == Some(Side::Destination)
        && world.destination.journal.is_some_and(|line| line.record == Record::Starting);
    !both_live || may_have_started || could_not_run(world) || world.runners() == 1
}

fn decision_helps(world: &World) -> bool {
    match world.operator.decision {
        Some(Side::Source) => world.source.vmm != Process::Alive || world.source.runs,
        // A source that had given it up, or does when it comes back, is believed.
        Some(Side::Destination) => {
            world.destination.vmm == Process::Died
                || world.device_fault.is_some()
                || world.call_fault.is_some()
                || world.destination.runs
                || world
                    .said
                    .contains(&Said::ToDestination { attempt: world.attempt, record: Record::Aborted })
        }
        None => true,
    }
}

/// Where the source is on its way back. The VMM of a VM whose devices it drives takes the VM back by itself.
fn holds_up_nothing(model: &Handover, world: &World) -> bool {
    let Some(line) = world.source.journal else { return true };
    if world.stuck.is_none_or(|(side, _)| side == Side::Destination) || line.ended.is_some() {
        let goes_on = matches!(line.record, Record::Committed | Record::Released);
        return goes_on || line.ended.is_some() && (could_not_run(world) || nothing_held(world));
    }
    if matches!(line.record, Record::Committed | Record::Released) {
        return true;
    }
    let others = world.source.devices.iter().zip(&model.0.features);
    let wait = |(device, features): (&Device, &Features)| {
        let runs = [MigrationState::Running, MigrationState::RunningP2p, MigrationState::PreCopy];
        device.hangs.is_some() || device.refused || !features.p2p || runs.contains(&device.at)
    };
    // One that has failed waits for its reset, where it is.
    let failed = usize::from(world.device_fault == Some(Side::Source));
    // Before the pause the guest has run all along: no device has come further than PRE_COPY, but for one that
    // has failed there, and whose reset may hang. That a paused guest is not resumed so is a rule of its own.
    let never_paused = world.source.devices.iter().all(|device| {
        matches!(device.at, MigrationState::Running | MigrationState::PreCopy) || device.refused
    });
    line.record == Record::Aborted
        && model.0.driver == Driver::Agent
        && (!world.source.runs || never_paused)
        && others.into_iter().filter(|other| !wait(*other)).count() <= failed
        && world.destination.journal.is_none_or(|line| line.ended.is_some())
}

fn copy_is_used(world: &World) -> bool {
    !has_committed(world)
        || world.twin_died
        || world.device_fault.is_some()
        || world.write_fault.is_some()
        || world.call_fault.is_some()
        || world.destination.runs
        || world.source.runs
}

fn nothing_held(world: &World) -> bool {
    let over = |line: Option<Line>| line.is_none_or(|line| line.ended.is_some());
    let at_rest = world.destination.vmm == Process::None && world.destination.devices_run();
    // It had started: an administrator looks at what is left of it.
    let started = world.destination.journal.is_some_and(|line| line.record != Record::Discarded);
    let left_over = world.left_over.as_ref().and_then(LeftOver::journal);
    over(world.source.journal) && over(world.destination.journal) && over(left_over) && (at_rest || started)
}
