//! The random explorer: walks through worlds that are too large to be searched through. Mostly it goes well,
//! so that a walk comes far. The same properties are checked after every step as in the exhaustive search.

use stateright::{Expectation, Model};

use crate::effects::How;
use crate::properties;
use crate::second_migration::LeftOverStep;
use crate::steps::{Handover, Step};
use crate::world::World;

/// One step in so many is a fault, where one may happen.
const RARELY: u64 = 25;

/// A walk that has ended, or that has found a broken property.
pub(crate) struct Walk {
    pub world: World,
    pub steps: Vec<Step>,
    pub broken: Option<&'static str>,
}

impl Walk {
    /// The way, a step a line, for a person.
    pub(crate) fn describe(&self) -> String {
        let steps: Vec<String> = self.steps.iter().map(|step| format!("  {step}")).collect();
        format!("{}\n{}\n{:#?}", self.broken.unwrap_or("nothing broken"), steps.join("\n"), self.world)
    }

    /// # Panics
    /// If a property is broken.
    pub(crate) fn expect_kept(self) -> World {
        assert!(self.broken.is_none(), "{}", self.describe());
        self.world
    }
}

/// Walks as `choose` says, among the steps that may be taken, until `choose` ends the walk or a property is
/// broken. Some of the properties ask what the world comes to once nothing goes wrong any more.
pub(crate) fn walk(model: &Handover, mut choose: impl FnMut(&World, &[Step]) -> Option<Step>) -> Walk {
    let mut walk = Walk { world: World::new(&model.0), steps: Vec::new(), broken: None };
    let always: Vec<_> = properties::all()
        .into_iter()
        .filter(|property| matches!(property.expectation, Expectation::Always))
        .collect();
    loop {
        walk.broken = always
            .iter()
            .find(|property| !(property.condition)(model, &walk.world))
            .map(|property| property.name);
        if walk.broken.is_some() {
            return walk;
        }
        let mut steps = Vec::new();
        model.actions(&walk.world, &mut steps);
        let Some(step) = choose(&walk.world, &steps) else { return walk };
        model.take(&mut walk.world, step);
        walk.steps.push(step);
    }
}

/// Chooses by `numbers`, faults rarely.
pub(crate) fn by_numbers(numbers: &[u64]) -> impl FnMut(&World, &[Step]) -> Option<Step> + use<'_> {
    let mut numbers = numbers.iter().copied();
    move |_, steps| {
        let number = numbers.next()?;
        let bad = number.is_multiple_of(RARELY);
        let wanted: Vec<Step> = steps.iter().copied().filter(|step| is_fault(*step) == bad).collect();
        let from = if wanted.is_empty() { steps } else { &wanted };
        let index = usize::try_from(number / RARELY).ok()?.checked_rem(from.len())?;
        from.get(index).copied()
    }
}

/// Something goes wrong in this step.
pub(crate) fn is_fault(step: Step) -> bool {
    match step {
        Step::Effect(_, _, how) | Step::LeftOver(LeftOverStep::Effect(_, how)) => how != How::Well,
        Step::LeftOver(LeftOverStep::Crash | LeftOverStep::Patience) | Step::EndSave(false) => true,
        Step::Cut | Step::Deadline | Step::Silence | Step::Overdue | Step::NoAnswer => true,
        Step::Hang(..) | Step::GuestResets(_) | Step::Crash(_) | Step::Kill(_) | Step::PowerOff(_) => true,
        _ => false,
    }
}
