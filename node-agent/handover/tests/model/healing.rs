//! What a world comes to in which nothing goes wrong any more.

use slackwater_handover::source;

use crate::operator::{Act, Statements};
use crate::steps::{Handover, Step};
use crate::world::{Again, Config, LeftOver, Save, Side, World};

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
