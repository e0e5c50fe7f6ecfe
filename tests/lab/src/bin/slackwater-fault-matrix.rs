//! Plays the fault matrix on the lab and writes its table. Its exit status is 0 only if every cell that was
//! run ended as expected.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, ensure};
use clap::Parser;
use slackwater_lab::faults::matrix::{self, Cell, Expected, VmmKind};
use slackwater_lab::faults::report::{Outcome, markdown};
use slackwater_lab::faults::stage::Stage;

/// Plays every phase of a migration with every fault that can hit it, on real kernels, and reports how each
/// ended.
#[derive(Debug, Parser)]
struct Arguments {
    /// Only these phases (reserve, save, quiesce, stop, capture, load, loaded, committed, starting, release).
    #[arg(long, value_delimiter = ',')]
    phase: Vec<String>,
    /// Only these faults, by their names in the table.
    #[arg(long, value_delimiter = ',')]
    fault: Vec<String>,
    /// What runs the VM.
    #[arg(long, value_enum, default_value_t)]
    vmm: VmmKind,
    /// Where to write the table; without it, to the standard output.
    #[arg(long)]
    out: Option<PathBuf>,
    /// Play nothing: print what is expected.
    #[arg(long)]
    list: bool,
}

#[tokio::main]
async fn main() -> ExitCode {
    match run(&Arguments::parse()).await {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("slackwater-fault-matrix: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: &Arguments) -> anyhow::Result<bool> {
    let all = matrix::cells(arguments.vmm);
    let named = |names: &[String], name: &str| names.is_empty() || names.iter().any(|one| one == name);
    let is_wanted = |cell: &&Cell| {
        let possible = !matches!(cell.expected, Expected::CannotOccur(_));
        possible && named(&arguments.phase, cell.phase.name()) && named(&arguments.fault, cell.fault.name())
    };
    let wanted: Vec<Cell> = all.iter().filter(is_wanted).copied().collect();
    ensure!(!wanted.is_empty(), "no cell has that name");
    let mut outcomes = Vec::new();
    if !arguments.list {
        let mut stage = Stage::set(arguments.vmm).await?;
        for (number, cell) in (1..).zip(&wanted) {
            let outcome = stage.play(cell).await;
            report(number, wanted.len(), &outcome);
            outcomes.push(outcome);
            write(arguments, &all, &outcomes)?;
        }
    }
    write(arguments, &all, &outcomes)?;
    if arguments.out.is_none() {
        print!("{}", markdown(&all, &outcomes));
    }
    Ok(outcomes.iter().all(Outcome::ok))
}

/// Called after each cell, so that an interrupted run leaves its results.
fn write(arguments: &Arguments, all: &[Cell], outcomes: &[Outcome]) -> anyhow::Result<()> {
    let Some(path) = &arguments.out else { return Ok(()) };
    std::fs::write(path, markdown(all, outcomes)).with_context(|| format!("writing {}", path.display()))
}

fn report(number: usize, of: usize, outcome: &Outcome) {
    let (cell, seconds) = (outcome.cell, outcome.took.as_secs_f64());
    let verdict = if outcome.ok() { "ok" } else { "NOT AS EXPECTED" };
    println!("[{number}/{of}] {cell}: {} ({seconds:.0} s) {verdict}", outcome.seen);
    if !outcome.ok() {
        println!("    expected: {}", cell.expected);
        for problem in &outcome.problems {
            println!("    {}", problem.replace('\n', "\n    "));
        }
        println!("{}", outcome.evidence);
    }
}
