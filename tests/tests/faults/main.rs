//! Faults in migrations on real kernels and real processes: the most dangerous cells of the fault matrix, and
//! a random walk. The whole matrix is `make fault-matrix`.

#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used, reason = "a test fails by panicking")]

use slackwater_lab::faults::matrix::{Cell, Fault, Phase, Side, VmmKind, cells};
use slackwater_lab::faults::stage::Stage;
use slackwater_lab::faults::walk;

/// The seed of the walk. The default is fixed, so that a failure repeats.
const SEED: &str = "SLACKWATER_WALK_SEED";
/// How many migrations the walk has.
const STEPS: &str = "SLACKWATER_WALK_STEPS";
const FIRST_SEED: u64 = 1;
const FEW_STEPS: usize = 15;

/// The cells in which both ends may hold the VM, and one in which a fault is noticed late.
const DANGEROUS: [(Phase, Fault); 10] = [
    (Phase::Save, Fault::AgentKilled(Side::Source)),
    (Phase::Capture, Fault::AgentKilled(Side::Destination)),
    (Phase::Stop, Fault::SourceVmmKilled),
    (Phase::Loaded, Fault::AgentKilled(Side::Source)),
    (Phase::Loaded, Fault::LinkCutAndRestored),
    (Phase::Committed, Fault::AgentKilled(Side::Source)),
    (Phase::Committed, Fault::AgentKilled(Side::Destination)),
    (Phase::Committed, Fault::TwinKilled),
    (Phase::Starting, Fault::AgentKilled(Side::Destination)),
    (Phase::Starting, Fault::LinkCutForGood),
];

#[tokio::test(flavor = "multi_thread")]
async fn the_most_dangerous_cells_of_the_matrix_end_as_expected() {
    end_as_expected(VmmKind::Contract, &DANGEROUS).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_most_dangerous_cells_end_as_expected_where_qemu_drives_the_devices() {
    end_as_expected(VmmKind::Qemu, &DANGEROUS).await;
}

async fn end_as_expected(vmm: VmmKind, wanted: &[(Phase, Fault)]) {
    let mut stage = Stage::set(vmm).await.unwrap();
    let mut wrong = Vec::new();
    let wanted = |cell: &Cell| wanted.contains(&(cell.phase, cell.fault));
    for cell in cells(vmm).into_iter().filter(wanted) {
        let outcome = stage.play(&cell).await;
        println!("{cell}: {} ({:.0} s)", outcome.seen, outcome.took.as_secs_f64());
        if !outcome.ok() {
            wrong.push(format!("{cell}: {}\n{}", outcome.problems.join("\n"), outcome.evidence));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
}

#[tokio::test(flavor = "multi_thread")]
async fn after_random_faults_at_random_times_the_vm_runs_on_exactly_one_node() {
    let number = |name: &str| std::env::var(name).ok().map(|value| value.parse::<u64>().expect(name));
    let seed = number(SEED).unwrap_or(FIRST_SEED);
    let steps = number(STEPS).map_or(FEW_STEPS, |steps| usize::try_from(steps).unwrap());
    println!("the walk's seed is {seed} ({SEED}={seed} {STEPS}={steps} walks it again)");
    let mut stage = Stage::set(VmmKind::Contract).await.unwrap();
    walk::walk(&mut stage, seed, steps).await.unwrap();
}
