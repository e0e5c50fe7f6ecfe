//! QEMU's plain migration and Slackwater's, side by side: one run, two nodes, the same guest, in turns. See
//! `slackwater_bench` for what is measured, and how.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Context;
use clap::{Parser, ValueEnum, value_parser};
use serde_json::json;
use slackwater_bench::report::{AIM, Summary};
use slackwater_bench::{Bench, Measurement, Plan};
use slackwater_lab::cluster::QemuVm;

/// Measures the blackout and the total of QEMU's plain migration against Slackwater's.
#[derive(Debug, Parser)]
struct Arguments {
    /// How often each mover moves each VM.
    #[arg(long, default_value_t = 5, value_parser = value_parser!(u16).range(1..=1000))]
    rounds: u16,
    /// Numbers of devices.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 2, 4], value_parser = value_parser!(u8).range(1..=8))]
    devices: Vec<u8>,
    /// What runs in the VM.
    #[arg(long, value_enum, default_value_t = Guest::Counter)]
    guest: Guest,
    /// `downtime-limit` and `spec.downtimeBudget`, milliseconds; by default 300, with a Linux 5000.
    #[arg(long, value_parser = value_parser!(u32).range(1..=60_000))]
    downtime_limit_ms: Option<u32>,
    /// Writes every figure to this file.
    #[arg(long)]
    json: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Guest {
    /// A boot sector that counts.
    Counter,
    /// A Linux that talks through its devices.
    Linux,
}

#[tokio::main]
async fn main() -> ExitCode {
    let begin = Instant::now();
    let mut measurements = Vec::new();
    let arguments = Arguments::parse();
    let result = measure(&arguments, begin, &mut measurements).await;
    // Also print what was measured before a failure.
    let reported = report(&arguments, begin, &measurements);
    match result.and(reported) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nthe measurement failed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn plan(arguments: &Arguments) -> Plan {
    let (vm, limit_ms) = match arguments.guest {
        Guest::Counter => (QemuVm::counter(1), 300),
        Guest::Linux => (QemuVm::linux(1), 5000),
    };
    Plan {
        vm,
        sizes: arguments.devices.iter().copied().map(usize::from).collect(),
        rounds: arguments.rounds.into(),
        downtime_limit_ms: arguments.downtime_limit_ms.unwrap_or(limit_ms),
    }
}

async fn measure(
    arguments: &Arguments,
    begin: Instant,
    measurements: &mut Vec<Measurement>,
) -> anyhow::Result<()> {
    let plan = plan(arguments);
    let sizes = plan.sizes.clone();
    let mut bench = Bench::start(plan).await?;
    for devices in sizes {
        bench
            .measure(devices, |one| {
                println!(
                    "[{:6.1} s] {devices} devices, round {}, {:<7} from {}: blackout {:7.1} ms, \
                     QEMU's downtime {:5} ms, total {:7.1} ms",
                    begin.elapsed().as_secs_f64(),
                    one.round,
                    format!("{:?}", one.mover),
                    one.from,
                    one.kernels.blackout_ms,
                    one.qemu.downtime_ms,
                    one.total_ms,
                );
                measurements.push(one);
            })
            .await?;
    }
    Ok(())
}

fn report(arguments: &Arguments, begin: Instant, measurements: &[Measurement]) -> anyhow::Result<()> {
    let sizes = arguments.devices.iter().map(|devices| usize::from(*devices));
    let measured = sizes.filter(|devices| measurements.iter().any(|one| one.devices == *devices));
    let summaries: Vec<Summary> = measured.map(|devices| Summary::of(devices, measurements)).collect();
    for summary in &summaries {
        print!("{}", summary.to_text());
    }
    let optimized = !cfg!(debug_assertions);
    println!(
        "\nNodes are emulated and share this machine's processors: compare within this run only. \
         Optimized build: {optimized}. It took {:.0} s.",
        begin.elapsed().as_secs_f64()
    );
    let Some(path) = &arguments.json else { return Ok(()) };
    let plan = plan(arguments);
    let content = json!({
        "guest": format!("{:?}", arguments.guest).to_lowercase(),
        "rounds": plan.rounds,
        "downtimeLimitMs": plan.downtime_limit_ms,
        "optimizedBuild": optimized,
        "seconds": begin.elapsed().as_secs_f64(),
        "aim": AIM,
        "summaries": summaries,
        "migrations": measurements,
    });
    std::fs::write(path, serde_json::to_vec_pretty(&content)?)
        .with_context(|| format!("writing {}", path.display()))
}
