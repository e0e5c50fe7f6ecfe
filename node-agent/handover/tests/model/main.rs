//! The hand-over, model-checked: the product's own machines of source and destination, in a world where every message outside
//! the stream may be lost, late or repeated, the stream may break anywhere, and agents, VMMs, devices and disks fail at any step.
//!
//! `SLACKWATER_MODEL_FAULTS=4 cargo test -p slackwater-handover --test model -- --ignored --nocapture` goes deeper than every build does.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test fails by panicking")]

mod carry;
mod healing;
mod hear;
mod misfortune;
mod mutants;
mod operator;
mod properties;
mod steps;
mod walk;
mod world;

use std::collections::BTreeSet;
use std::time::Instant;

use mutants::Mutant;
use operator::Statements;
use stateright::{Checker, HasDiscoveries, Model};
use steps::Handover;
use walk::Walker;
use world::Config;

const SMALL: Config = Config {
    devices: 0,
    faults: 2,
    attempts: 1,
    doubts: false,
    relayed: false,
    power: 0,
    statements: Statements::None,
    mutant: None,
};
/// Nothing but the operator between the two, once their stream is broken.
const RELAYED: Config = Config { faults: 0, relayed: true, ..SMALL };

/// Every property holds, and every situation that matters is reached; or no more than so many `states` are looked at, the near ones first.
fn holds(name: &str, config: Config, states: Option<usize>) {
    let begun = Instant::now();
    let mut builder = Handover(config.clone()).checker().threads(2);
    if let Some(states) = states {
        builder = builder.target_state_count(states);
    }
    let checker = builder.spawn_bfs().join();
    tell(name, &checker, begun);
    if states.is_some() {
        return;
    }
    let discoveries = checker.discoveries();
    for situation in properties::reachable(config.faults) {
        assert!(discoveries.contains_key(situation), "never reached: {situation}");
    }
}

/// The same on random walks, until so many `states` have been seen.
fn holds_on_walks(name: &str, config: Config, seed: u64, states: usize) {
    let begun = Instant::now();
    let builder = Handover(config).checker().target_state_count(states);
    let checker = builder.spawn_simulation(seed, Walker).join();
    tell(&format!("{name}, seed {seed}"), &checker, begun);
    let discoveries = checker.discoveries();
    for situation in properties::REACHED {
        println!("  {}: {situation}", if discoveries.contains_key(situation) { "seen" } else { "not seen" });
    }
    assert!(discoveries.contains_key(properties::REACHED[0]), "no walk came to the end");
}

/// Counts, and fails with the way to the first fault, if there is one.
fn tell(name: &str, checker: &impl Checker<Handover>, begun: Instant) {
    println!(
        "{name}: {} states, {} transitions, depth {}, {:.1} s",
        checker.unique_state_count(),
        checker.state_count(),
        checker.max_depth(),
        begun.elapsed().as_secs_f64(),
    );
    let discoveries = checker.discoveries();
    let model = checker.model();
    for property in model.properties() {
        if property.expectation.discovery_is_failure()
            && let Some(path) = discoveries.get(property.name)
        {
            panic!("{}\n{}", property.name, told(path.clone()));
        }
    }
}

fn told(path: stateright::Path<world::World, steps::Step>) -> String {
    let last = path.last_state().clone();
    let steps: Vec<String> = path.into_actions().iter().map(|step| format!("  {step}")).collect();
    format!("{}\n{last:#?}", steps.join("\n"))
}

/// The checker finds the fork.
fn forks(name: &str, config: Config) {
    let forked = HasDiscoveries::AllOf([properties::NO_FORK].into());
    let checker = Handover(config).checker().finish_when(forked).spawn_bfs().join();
    let path = checker.discovery(properties::NO_FORK).unwrap_or_else(|| panic!("{name}: no fork is found"));
    println!("{name}: {} states", checker.unique_state_count());
    for step in path.into_actions() {
        println!("    {step}");
    }
}

/// The checker finds that a broken protocol breaks just these properties.
fn is_caught(mutant: Mutant, config: Config, by: &[&'static str]) {
    let begun = Instant::now();
    let wanted: BTreeSet<&'static str> = by.iter().copied().collect();
    let model = Handover(Config { mutant: Some(mutant), ..config });
    let checker = model.checker().finish_when(HasDiscoveries::AllOf(wanted)).spawn_bfs().join();
    println!("{mutant:?}: {} states, {:.1} s", checker.unique_state_count(), begun.elapsed().as_secs_f64());
    for property in by {
        let path =
            checker.discovery(property).unwrap_or_else(|| panic!("{mutant:?} does not break: {property}"));
        let steps = path.into_actions();
        println!("  {property}, after {} steps:", steps.len());
        for step in steps {
            println!("    {step}");
        }
    }
}

#[test]
fn the_protocol_holds_without_devices_whatever_two_things_fail() {
    holds("no device", SMALL, None);
}

#[test]
fn the_protocol_holds_with_a_device_whatever_fails() {
    holds("one device", Config { devices: 1, faults: 1, ..SMALL }, None);
}

#[test]
fn the_operator_alone_brings_it_to_an_end_where_the_link_stays_cut() {
    holds("relayed", RELAYED, None);
}

#[test]
fn a_decision_whose_statement_is_true_never_forks() {
    holds("decided", Config { power: 1, statements: Statements::True, ..RELAYED }, None);
}

#[test]
fn a_decision_for_the_source_while_the_destination_is_only_silent_forks() {
    forks("hasty", Config { statements: Statements::Hasty, ..RELAYED });
}

#[test]
fn a_decision_for_the_destination_after_the_source_has_resumed_forks() {
    forks("blind", Config { power: 1, statements: Statements::Blind, ..RELAYED });
}

#[test]
fn the_protocol_holds_with_two_devices_wherever_a_walk_goes() {
    let config = Config { devices: 2, faults: 2, ..SMALL };
    holds_on_walks("two devices", config, 20_261_123, 150_000);
}

#[test]
#[ignore = "minutes"]
fn deep() {
    let number = |name: &str, default: u32| std::env::var(name).map_or(default, |text| text.parse().unwrap());
    let config = Config {
        devices: number("SLACKWATER_MODEL_DEVICES", 1) as usize,
        faults: number("SLACKWATER_MODEL_FAULTS", 2) as u8,
        attempts: number("SLACKWATER_MODEL_ATTEMPTS", 1),
        doubts: number("SLACKWATER_MODEL_DOUBTS", 0) == 1,
        relayed: number("SLACKWATER_MODEL_RELAYED", 0) == 1,
        power: number("SLACKWATER_MODEL_POWER", 0) as u8,
        statements: match number("SLACKWATER_MODEL_STATEMENTS", 0) {
            1 => Statements::True,
            _ => Statements::None,
        },
        mutant: None,
    };
    let states = number("SLACKWATER_MODEL_STATES", 0) as usize;
    holds("deep", config, (states > 0).then_some(states));
}

#[test]
fn commit_sent_before_the_fsync_is_found() {
    is_caught(Mutant::CommitBeforeFsync, Config { faults: 1, ..SMALL }, &[properties::NO_FORK]);
}

#[test]
fn a_resume_by_a_timeout_after_committed_is_found() {
    is_caught(Mutant::ResumeOnTimeout, Config { faults: 0, ..SMALL }, &[properties::NO_FORK]);
}

#[test]
fn a_discard_by_a_timeout_after_loaded_is_found() {
    let by = [properties::GIVEN_UP_ALONE, properties::COPY_IS_USED];
    is_caught(Mutant::DiscardByTimeout, Config { faults: 1, ..SMALL }, &by);
}

#[test]
fn discarded_after_starting_is_found() {
    is_caught(Mutant::DiscardAfterStarting, Config { faults: 1, ..SMALL }, &[properties::DISCARDED_TOO_LATE]);
}

#[test]
fn a_word_of_an_older_attempt_is_found() {
    is_caught(Mutant::OlderAttempt, Config { faults: 0, attempts: 2, ..SMALL }, &[properties::NO_FORK]);
}
