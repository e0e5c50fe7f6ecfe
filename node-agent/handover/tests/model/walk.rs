//! Random walks, for worlds that are too large to be searched through: mostly it goes well, so that a walk comes far.

use stateright::Chooser;

use crate::carry::How;
use crate::steps::{Handover, Step};
use crate::world::World;

/// One step in so many is a misfortune, where one may happen.
const RARELY: u64 = 25;

/// Chooses by a seed, misfortunes rarely.
#[derive(Clone)]
pub(crate) struct Walker;

impl Chooser<Handover> for Walker {
    type State = u64;

    fn new_state(&self, seed: u64) -> u64 {
        seed
    }

    fn choose_initial_state(&self, _: &mut u64, _: &[World]) -> usize {
        0
    }

    fn choose_action(&self, random: &mut u64, _: &World, steps: &[Step]) -> usize {
        let bad = split_mix(random).is_multiple_of(RARELY);
        let wanted: Vec<usize> = (0..steps.len()).filter(|at| is_misfortune(steps[*at]) == bad).collect();
        let next = split_mix(random) as usize;
        if wanted.is_empty() { next % steps.len() } else { wanted[next % wanted.len()] }
    }
}

fn is_misfortune(step: Step) -> bool {
    match step {
        Step::Effect(_, _, how) => how != How::Well,
        Step::Cut | Step::Deadline | Step::Silence | Step::Overdue | Step::NoAnswer => true,
        Step::Crash(_) | Step::Kill(_) | Step::PowerOff(_) => true,
        _ => false,
    }
}

/// SplitMix64.
fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mixed = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}
