//! What the random explorer must find kept, and broken.

use proptest::prelude::*;
use slackwater_handover::policy::{Driver, StopPlan};
use slackwater_handover::state::Features;

use crate::effects::How;
use crate::mutants::Mutant;
use crate::operator::Statements;
use crate::properties;
use crate::random::{by_numbers, is_fault, walk};
use crate::steps::{Handover, Step};
use crate::world::{Again, Config, Ended, Side, World};

const P2P_ONLY: Features = Features { stop_copy: true, p2p: true, pre_copy: false };
const PRE_COPY_ONLY: Features = Features { stop_copy: true, p2p: false, pre_copy: true };

/// No walk is longer than this.
const LONGEST: usize = 400;

fn config(features: Vec<Features>, plan: StopPlan, driver: Driver) -> Config {
    Config {
        features,
        plan,
        driver,
        faults: 0,
        calls_fail: true,
        late_save: true,
        attempts: 1,
        again: Again::Never,
        doubts: false,
        relayed: false,
        power: 0,
        hangs: true,
        resets: true,
        statements: Statements::None,
        mutant: None,
    }
}

/// A VM of any kind, whose devices its VMM or the agent drives.
fn vm() -> impl Strategy<Value = Config> {
    let quiesced = proptest::collection::vec(prop_oneof![Just(Features::ALL), Just(P2P_ONLY)], 0..4)
        .prop_map(|features| (features, StopPlan::QuiesceFirst));
    let any_features =
        prop_oneof![Just(Features::ALL), Just(P2P_ONLY), Just(PRE_COPY_ONLY), Just(Features::STOP_COPY)];
    let isolated =
        proptest::collection::vec(any_features, 2..4).prop_map(|features| (features, StopPlan::StopFirst));
    let alone = prop_oneof![Just(PRE_COPY_ONLY), Just(Features::STOP_COPY)]
        .prop_map(|features| (vec![features], StopPlan::Alone));
    let driver = prop_oneof![3 => Just(Driver::Agent), 1 => Just(Driver::Vmm)];
    (prop_oneof![quiesced, isolated, alone], driver)
        .prop_map(|((features, plan), driver)| config(features, plan, driver))
}

/// The same, in a world in which things go wrong, agents crash among them.
fn troubled() -> impl Strategy<Value = Config> {
    (vm(), 0..4_u8, 1..3_u32, any::<bool>(), any::<bool>()).prop_map(
        |(config, faults, attempts, again, doubts)| {
            let again = if again { Again::Later } else { Again::Never };
            Config { faults, attempts, again, doubts, ..config }
        },
    )
}

fn numbers() -> impl Strategy<Value = Vec<u64>> {
    proptest::collection::vec(any::<u64>(), 1..LONGEST)
}

fn walks() -> u32 {
    std::env::var("SLACKWATER_MODEL_WALKS").map_or(4000, |text| text.parse().unwrap())
}

fn arrived(world: &World) -> bool {
    world.destination.runs && world.source.journal.and_then(|line| line.ended) == Some(Ended::Succeeded)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: walks(), ..ProptestConfig::default() })]

    #[test]
    fn whatever_fails_whenever_every_property_holds(config in troubled(), numbers in numbers()) {
        walk(&Handover(config), by_numbers(&numbers)).expect_kept();
    }

    #[test]
    fn without_a_fault_every_order_of_completion_succeeds(config in vm(), numbers in numbers()) {
        let mut numbers = numbers.iter().cycle().take(10 * LONGEST);
        let world = walk(&Handover(config), |world, steps| {
            if arrived(world) {
                return None;
            }
            // While the stream is whole, what is said outside it changes nothing.
            let gets_on = |step: &Step| !is_fault(*step) && !matches!(step, Step::Hear(_));
            let well: Vec<Step> = steps.iter().copied().filter(gets_on).collect();
            let index = usize::try_from(*numbers.next()?).ok()?.checked_rem(well.len())?;
            well.get(index).copied()
        })
        .expect_kept();
        prop_assert!(arrived(&world), "{world:#?}");
    }
}

/// The first step each time, but the effect of this number ends in its `way` to fail, if it has so many. A
/// late save ends when nothing else can happen. `None` if the effect was not reached, or cannot fail so.
fn with_one_failure(driver: Driver, number: usize, way: usize, late_save: bool) -> Option<World> {
    let vm = Config { faults: 1, ..config(vec![Features::ALL; 2], StopPlan::QuiesceFirst, driver) };
    let mut ended = 0;
    let mut failed = false;
    let walked = walk(&Handover(vm), |_, steps| {
        let ends = |step: &Step| matches!(step, Step::Effect(..) | Step::EndSave(_));
        let well = |step: &&Step| !is_fault(**step);
        let late = |step: &&Step| late_save && **step == Step::EndSave(true);
        let next = steps
            .iter()
            .filter(well)
            .find(|step| !late(step))
            .or_else(|| steps.iter().find(well))
            .copied()?;
        if !ends(&next) {
            return Some(next);
        }
        ended += 1;
        if ended != number + 1 {
            return Some(next);
        }
        let fails = |step: &&Step| match (**step, next) {
            (Step::Effect(side, index, how), Step::Effect(of, at, _)) => {
                (side, index) == (of, at) && how != How::Well
            }
            (Step::EndSave(well), Step::EndSave(_)) => !well,
            _ => false,
        };
        let failing = steps.iter().filter(fails).nth(way).copied();
        failed |= failing.is_some();
        failing.or(Some(next))
    });
    let world = walked.expect_kept();
    failed.then_some(world)
}

#[test]
fn every_single_failure_before_the_commit_is_rolled_back_and_leaves_nothing_reserved() {
    for (driver, least) in [(Driver::Agent, 20), (Driver::Vmm, 10)] {
        let mut rolled_back = 0;
        for number in 0..80 {
            for (way, late_save) in (0..4).flat_map(|way| [(way, false), (way, true)]) {
                let Some(world) = with_one_failure(driver, number, way, late_save) else { continue };
                if world.source.journal.and_then(|line| line.ended) != Some(Ended::RolledBack) {
                    continue;
                }
                rolled_back += 1;
                assert!(world.source.runs && world.source.devices_run(), "I6: {world:#?}");
                assert!(
                    world.destination.journal.is_none_or(|line| line.ended == Some(Ended::Discarded)),
                    "I6: the reservation is still held: {world:#?}"
                );
            }
        }
        assert!(
            rolled_back > least,
            "{driver:?}: only {rolled_back} were rolled back: the faults did not hit"
        );
        println!("{driver:?}: {rolled_back} single failures were rolled back");
    }
}

/// The random explorer finds that a broken protocol breaks one of these properties, in so many walks.
fn is_caught(mutant: Mutant, config: Config, by: &[&'static str]) {
    let config = Config { mutant: Some(mutant), ..config };
    let model = Handover(config);
    for walks in 1..20_000_u64 {
        let mut seed = walks;
        let numbers: Vec<u64> = std::iter::repeat_with(|| split_mix(&mut seed)).take(LONGEST).collect();
        let walked = walk(&model, by_numbers(&numbers));
        if let Some(property) = walked.broken.filter(|property| by.contains(property)) {
            println!("{mutant:?}: found in walk {walks}, after {} steps: {property}", walked.steps.len());
            return;
        }
    }
    panic!("{mutant:?} is not found");
}

#[test]
fn the_random_explorer_finds_an_agent_that_lets_the_vm_run_before_aborted_is_recorded() {
    let vm = config(vec![Features::ALL; 2], StopPlan::QuiesceFirst, Driver::Agent);
    is_caught(Mutant::WakeAtRestart, Config { faults: 2, ..vm }, &[properties::ABORTED_FIRST]);
}

#[test]
fn the_random_explorer_finds_the_end_of_a_stream_that_is_taken_for_the_end_of_the_save() {
    let vm = config(vec![Features::ALL; 2], StopPlan::QuiesceFirst, Driver::Vmm);
    let by = [properties::NO_FORK, properties::TWO_RUNNERS];
    is_caught(Mutant::StreamEndsTheSave, Config { faults: 2, ..vm }, &by);
}

#[test]
fn the_random_explorer_reaches_a_second_migration_on_both_ways() {
    let vm = config(vec![Features::ALL], StopPlan::QuiesceFirst, Driver::Agent);
    let model = Handover(Config { faults: 1, again: Again::Later, ..vm });
    let mut reached = std::collections::BTreeSet::new();
    for walks in 1..20_000_u64 {
        let mut seed = walks;
        let numbers: Vec<u64> = std::iter::repeat_with(|| split_mix(&mut seed)).take(LONGEST).collect();
        let world = walk(&model, by_numbers(&numbers)).expect_kept();
        if arrived(&world) {
            reached.extend(world.left_over.map(|end| end.side()));
        }
        if reached.len() == 2 {
            return;
        }
    }
    panic!(
        "only {reached:?} were left over in a walk that came to the end, of {:?}",
        [Side::Source, Side::Destination]
    );
}

/// SplitMix64.
fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mixed = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}
