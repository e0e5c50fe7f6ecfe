//! What a world comes to in which nothing goes wrong any more.

use slackwater_handover::source;

use crate::kinds::Kind;
use crate::operator::{Act, Statements};
use crate::steps::{Handover, Step};
use crate::world::{Again, Config, LeftOver, Process, Save, Side, World};

/// More steps than any healed world takes to come to rest.
const REST: usize = 500;

impl Handover {
    /// Whether `holds` once nothing goes wrong any more: both agents are up, everything that was begun ends
    /// well, and the operator does what there is to do. Both hear what the other has journalled, or hear it
    /// by the operator's resolver alone. Asked only of worlds in which nothing but asking goes on: every
    /// other world leads to one of these by itself.
    pub(crate) fn when_healed(&self, world: &World, holds: fn(&World) -> bool) -> bool {
        !waits(world) || holds(&self.healed(world, true))
    }

    /// The same, while a node that is off stays off.
    pub(crate) fn when_repaired(&self, world: &World, holds: fn(&World) -> bool) -> bool {
        !waits(world) || holds(&self.healed(world, false))
    }

    fn healed(&self, world: &World, power: bool) -> World {
        let calm = Config {
            faults: 0,
            attempts: world.attempt,
            again: Again::Never,
            doubts: false,
            ..self.0.clone()
        };
        let calm = Handover(Config { statements: Statements::None, ..calm });
        let mut world = World { faults_left: 0, power_left: 0, ..world.clone() };
        world.link_down = self.0.relayed;
        for _ in 0..REST {
            if let Some(next) = calm.goes_on(&world, power) {
                world = next;
                continue;
            }
            let next = if self.0.relayed { calm.round(&world) } else { world.clone() };
            if next == world {
                return world;
            }
            world = next;
        }
        panic!("a healed world does not come to rest: {world:#?}");
    }

    /// Whether `holds` once everything has happened that does not wait for the device that hangs, and nothing
    /// else goes wrong; the deadline before the commit passes, too. Asked only of worlds in which nothing but
    /// its call goes on.
    pub(crate) fn while_it_hangs(&self, world: &World, holds: fn(&Self, &World) -> bool) -> bool {
        if !waits_for_nothing_else(world) {
            return true;
        }
        let calm = Handover(Config {
            faults: 0,
            attempts: world.attempt,
            again: Again::Never,
            doubts: false,
            statements: Statements::None,
            ..self.0.clone()
        });
        let mut world = World { faults_left: 0, power_left: 0, ..world.clone() };
        let mut in_time = true;
        for _ in 0..REST {
            if let Some(next) = calm.goes_on_but_for_what_hangs(&world) {
                world = next;
            } else if std::mem::take(&mut in_time) {
                calm.lose_patience(&mut world, Side::Source);
            } else {
                return holds(self, &world);
            }
        }
        panic!("a world in which a device hangs does not come to rest: {world:#?}");
    }

    fn goes_on_but_for_what_hangs(&self, world: &World) -> Option<World> {
        let mut steps = Vec::new();
        for (side, up) in [(Side::Source, world.source.up), (Side::Destination, world.destination.up)] {
            steps.extend((!up).then_some(Step::Restart(side)));
        }
        self.effects(world, &mut steps);
        self.messages(world, &mut steps);
        self.left_over(world, false, &mut steps);
        self.operator(world, &mut steps);
        steps.retain(|step| match step {
            Step::Effect(side, index, _) => !is_stuck(world, *side, *index),
            step => *step != Step::Cut,
        });
        steps.into_iter().find_map(|step| {
            let mut next = world.clone();
            self.take(&mut next, step);
            (next != *world).then_some(next)
        })
    }

    /// One step that gets on with it, if there is one.
    fn goes_on(&self, world: &World, power: bool) -> Option<World> {
        let mut steps = Vec::new();
        for side in [Side::Source, Side::Destination] {
            let (up, off) = match side {
                Side::Source => (world.source.up, world.source.off),
                Side::Destination => (world.destination.up, world.destination.off),
            };
            steps.extend((off && power).then_some(Step::PowerOn(side)));
            steps.extend((!up && !off).then_some(Step::Restart(side)));
        }
        self.effects(world, &mut steps);
        self.messages(world, &mut steps);
        steps.retain(|step| *step != Step::Cut);
        self.left_over(world, false, &mut steps);
        self.operator(world, &mut steps);
        steps.into_iter().find_map(|step| {
            let mut next = world.clone();
            self.take(&mut next, step);
            (next != *world).then_some(next)
        })
    }

    /// The operator asks both ends, and what it relays now arrives. What it had relayed before is lost.
    fn round(&self, world: &World) -> World {
        let mut next = world.clone();
        if next.operator.done {
            return next;
        }
        next.operator.relayed.clear();
        let (source, destination) = (next.source.up, next.destination.up);
        next.act(&self.0, Act::Restarts);
        next.act(&self.0, Act::AsksSource(source));
        next.act(&self.0, Act::AsksDestination(destination, None));
        let mut relays = Vec::new();
        self.operator_acts(&next, &mut relays);
        for act in relays.into_iter().filter(|act| matches!(act, Act::Relays(_))) {
            next.act(&self.0, act);
        }
        next
    }
}

/// The effect of this place is a call to the device that hangs.
fn is_stuck(world: &World, side: Side, place: usize) -> bool {
    let device = match side {
        Side::Source => world.source.todo.get(place).and_then(Kind::device_of_source),
        Side::Destination => world.destination.todo.get(place).and_then(Kind::device_of_destination),
    };
    device.is_some_and(|device| world.stuck == Some((side, device)))
}

/// Nothing goes on but asking, and the call that hangs.
fn waits_for_nothing_else(world: &World) -> bool {
    let mut rest = world.clone();
    for side in [Side::Source, Side::Destination] {
        let count = match side {
            Side::Source => world.source.todo.len(),
            Side::Destination => world.destination.todo.len(),
        };
        for place in (0..count).rev().filter(|place| is_stuck(world, side, *place)) {
            match side {
                Side::Source => drop(rest.source.todo.remove(place)),
                Side::Destination => drop(rest.destination.todo.remove(place)),
            }
        }
    }
    world.source.vmm == Process::Alive && !world.source.off && !world.destination.off && waits(&rest)
}

/// Nothing goes on but asking.
fn waits(world: &World) -> bool {
    let asks_at_most = |todo: &[source::Effect]| todo.iter().all(|effect| *effect == source::Effect::AskPeer);
    let left_over_waits = match &world.left_over {
        None => true,
        Some(LeftOver::Source(end)) => asks_at_most(&end.todo),
        Some(LeftOver::Destination { end, .. }) => end.todo.is_empty(),
    };
    world.stream.is_none()
        && world.destination.todo.is_empty()
        && world.save != Save::Draining
        && asks_at_most(&world.source.todo)
        && left_over_waits
}
