//! The exhaustive explorer: every order of everything that may happen, in small worlds, and the broken
//! protocols that it must find.

use std::collections::BTreeSet;
use std::time::Instant;

use slackwater_handover::policy::{Driver, StopPlan};
use slackwater_handover::state::Features;
use stateright::{Checker, HasDiscoveries, Model};

use crate::mutants::Mutant;
use crate::operator::Statements;
use crate::properties;
use crate::steps::{Handover, Step};
use crate::world::{Again, Config, World};

const SMALL: Config = Config {
    features: Vec::new(),
    plan: StopPlan::QuiesceFirst,
    driver: Driver::Agent,
    faults: 2,
    calls_fail: false,
    late_save: false,
    attempts: 1,
    again: Again::Never,
    doubts: false,
    relayed: false,
    power: 0,
    hangs: false,
    resets: false,
    statements: Statements::None,
    mutant: None,
};

/// Nothing but the operator connects the two, once their stream is broken.
fn relayed() -> Config {
    Config { faults: 0, relayed: true, ..SMALL }
}

/// Every property holds, and every situation that matters is reached; or no more than so many `states` are
/// looked at, the near ones first.
fn holds(name: &str, config: Config, states: Option<usize>) {
    let begun = Instant::now();
    let mut builder = Handover(config.clone()).checker().threads(2);
    if let Some(states) = states {
        builder = builder.target_state_count(states);
    }
    let checker = builder.spawn_bfs().join();
    report(name, &checker, begun);
    if states.is_some() {
        return;
    }
    let discoveries = checker.discoveries();
    let situations = match config.again {
        Again::Never => properties::reachable(config.faults),
        Again::Later | Again::FromTheStart | Again::BeforeTheEnd => &properties::AGAIN,
    };
    for situation in situations {
        assert!(discoveries.contains_key(situation), "never reached: {situation}");
    }
}

/// Counts, and fails with the way to the first fault, if there is one.
fn report(name: &str, checker: &impl Checker<Handover>, begun: Instant) {
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
            panic!("{}\n{}", property.name, describe(path.clone()));
        }
    }
}

fn describe(path: stateright::Path<World, Step>) -> String {
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
    let config = Config { features: vec![Features::ALL], faults: 1, resets: true, ..SMALL };
    holds("one device", config, None);
}

#[test]
fn the_operator_alone_brings_it_to_an_end_where_the_link_stays_cut() {
    holds("relayed", relayed(), None);
}

#[test]
fn a_decision_whose_statement_is_true_never_forks() {
    holds("decided", Config { power: 1, statements: Statements::True, ..relayed() }, None);
}

#[test]
fn a_decision_for_the_source_while_the_destination_is_only_silent_forks() {
    forks("hasty", Config { statements: Statements::Hasty, ..relayed() });
}

#[test]
fn a_decision_for_the_destination_after_the_source_has_resumed_forks() {
    forks("blind", Config { power: 1, statements: Statements::Blind, ..relayed() });
}

#[test]
fn the_protocol_holds_for_a_vmm_that_drives_its_devices_whatever_fails() {
    let config = Config {
        features: vec![Features::ALL],
        driver: Driver::Vmm,
        faults: 1,
        calls_fail: true,
        late_save: true,
        ..SMALL
    };
    holds("driven by the VMM", config, None);
}

#[test]
fn the_protocol_holds_where_a_save_fails_after_its_last_byte() {
    let config = Config { faults: 1, calls_fail: true, late_save: true, ..SMALL };
    holds("late save", config, None);
}

#[test]
fn the_protocol_holds_with_two_devices_without_p2p_that_are_isolated() {
    let config =
        Config { features: vec![Features::STOP_COPY; 2], plan: StopPlan::StopFirst, faults: 0, ..SMALL };
    holds("two devices without P2P", config, None);
}

#[test]
fn another_migration_of_the_same_vm_is_safe_while_one_end_of_the_first_is_still_open() {
    let config = Config { again: Again::FromTheStart, faults: 0, ..SMALL };
    holds("another migration", config, None);
}

#[test]
#[ignore = "minutes"]
fn deep() {
    let number = |name: &str, default: u32| std::env::var(name).map_or(default, |text| text.parse().unwrap());
    let config = Config {
        features: vec![Features::ALL; number("SLACKWATER_MODEL_DEVICES", 1) as usize],
        driver: if number("SLACKWATER_MODEL_VMM", 0) == 1 { Driver::Vmm } else { Driver::Agent },
        calls_fail: number("SLACKWATER_MODEL_CALLS", 0) == 1,
        late_save: number("SLACKWATER_MODEL_LATE_SAVE", 0) == 1,
        again: if number("SLACKWATER_MODEL_AGAIN", 0) == 1 { Again::FromTheStart } else { Again::Never },
        faults: number("SLACKWATER_MODEL_FAULTS", 2) as u8,
        attempts: number("SLACKWATER_MODEL_ATTEMPTS", 1),
        doubts: number("SLACKWATER_MODEL_DOUBTS", 0) == 1,
        relayed: number("SLACKWATER_MODEL_RELAYED", 0) == 1,
        power: number("SLACKWATER_MODEL_POWER", 0) as u8,
        hangs: number("SLACKWATER_MODEL_HANGS", 0) == 1,
        resets: number("SLACKWATER_MODEL_RESETS", 0) == 1,
        statements: match number("SLACKWATER_MODEL_STATEMENTS", 0) {
            1 => Statements::True,
            _ => Statements::None,
        },
        ..SMALL
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

#[test]
fn the_end_of_a_stream_that_is_taken_for_the_end_of_the_save_is_found() {
    let config = Config {
        features: vec![Features::ALL],
        driver: Driver::Vmm,
        faults: 1,
        calls_fail: true,
        late_save: true,
        ..SMALL
    };
    is_caught(Mutant::StreamEndsTheSave, config, &[properties::NO_FORK, properties::TWO_RUNNERS]);
}

#[test]
fn a_stop_without_the_barrier_is_found() {
    let config =
        Config { features: vec![Features::STOP_COPY; 2], plan: StopPlan::StopFirst, faults: 0, ..SMALL };
    is_caught(Mutant::StopWithoutBarrier, config, &[properties::QUIESCE_TOGETHER]);
}

#[test]
fn an_agent_that_lets_the_vm_run_before_aborted_is_recorded_is_found() {
    let config = Config { features: vec![Features::ALL], faults: 1, ..SMALL };
    is_caught(Mutant::WakeAtRestart, config, &[properties::ABORTED_FIRST]);
}

#[test]
fn a_vm_that_is_free_for_another_migration_before_its_end_is_durable_is_found() {
    let config = Config { again: Again::BeforeTheEnd, faults: 1, ..SMALL };
    is_caught(Mutant::EndNotDurable, config, &[properties::NO_FORK]);
}

#[test]
fn an_agent_that_acts_on_none_of_several_open_journals_of_a_vm_never_forks_it() {
    let mutant = Some(Mutant::EndNotDurableButHeld);
    let config = Config { again: Again::BeforeTheEnd, faults: 1, mutant, ..SMALL };
    let checker = Handover(config).checker().threads(2).finish_when(HasDiscoveries::All).spawn_bfs().join();
    println!("held: {} states", checker.unique_state_count());
    for property in [properties::NO_FORK, properties::TWO_RUNNERS, properties::ABORTED_FIRST] {
        if let Some(path) = checker.discovery(property) {
            panic!("{property}\n{}", describe(path));
        }
    }
    // It came as far as it had to for that: both journals were there when an agent restarted.
    assert!(checker.discovery(properties::BOTH_HELD).is_some());
}

#[test]
fn a_word_of_a_later_migration_is_found() {
    let config = Config { again: Again::FromTheStart, faults: 1, ..SMALL };
    is_caught(Mutant::LaterMigration, config, &[properties::NO_FORK]);
}

/// Two devices, of which one may hang.
fn hangs() -> Config {
    let p2p = Features { pre_copy: false, ..Features::ALL };
    Config { features: vec![p2p; 2], faults: 1, hangs: true, ..SMALL }
}

#[test]
fn a_device_that_hangs_holds_up_nothing_but_its_own_vm() {
    holds("hangs", hangs(), Some(1_500_000));
}

#[test]
fn a_device_that_hangs_on_its_way_back_from_pre_copy_leaves_a_guest_that_was_never_paused_running() {
    holds("hangs in pre-copy", Config { features: vec![Features::ALL], faults: 2, ..hangs() }, Some(600_000));
}

#[test]
fn a_device_that_hangs_holds_up_no_vmm_that_drives_its_devices() {
    let config = Config { features: vec![Features::ALL], driver: Driver::Vmm, ..hangs() };
    holds("hangs, driven by the VMM", config, None);
}

#[test]
fn a_device_that_hangs_in_silence_is_found() {
    is_caught(Mutant::HangsInSilence, hangs(), &[properties::HOLDS_UP_NOTHING]);
}

#[test]
fn a_wake_without_the_device_that_hangs_is_found() {
    is_caught(Mutant::WakeWithoutTheHungOne, hangs(), &[properties::WAKE_TOGETHER]);
}

#[test]
fn a_loaded_destination_that_is_taken_for_one_that_never_starts_is_found() {
    is_caught(Mutant::LostWhileLoaded, relayed(), &[properties::SAID_NEVER_STARTED]);
}

#[test]
fn a_device_that_is_taken_on_wherever_its_guest_has_left_it_is_found() {
    let config = Config { features: vec![Features::ALL], faults: 1, resets: true, ..SMALL };
    is_caught(Mutant::WhereverItIs, config, &[properties::ONE_SESSION]);
}
