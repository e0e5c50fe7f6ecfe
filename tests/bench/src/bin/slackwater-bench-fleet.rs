//! Many migrations at once: what they cost the operator. See `slackwater_bench::fleet` for what is measured.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use clap::{Parser, value_parser};
use slackwater_bench::fleet::{Settings, Size, run};

/// Measures the operator with simulated agents, and prints a table.
#[derive(Debug, Parser)]
struct Arguments {
    /// Nodes x migrations, as in 50x100; each pair is a run.
    #[arg(long, value_delimiter = ',', default_values = ["50x100", "200x1000"], value_parser = parse_pair)]
    sizes: Vec<(usize, usize)>,
    /// How many migrations have ended before; each number is a run of each size.
    #[arg(long, value_delimiter = ',', default_values_t = [0, 10_000])]
    ended: Vec<usize>,
    /// How long each pre-copy takes, milliseconds.
    #[arg(long, default_value_t = 2000)]
    pre_copy_ms: u64,
    /// How long a run may take, seconds.
    #[arg(long, default_value_t = 900, value_parser = value_parser!(u64).range(1..))]
    timeout_s: u64,
    /// Another operator's program, to compare with.
    #[arg(long)]
    operator: Option<PathBuf>,
}

fn parse_pair(text: &str) -> anyhow::Result<(usize, usize)> {
    let (nodes, migrations) = text.split_once('x').context("it must be NODESxMIGRATIONS, as in 50x100")?;
    let (nodes, migrations) = (nodes.parse()?, migrations.parse()?);
    anyhow::ensure!(nodes >= 2 && migrations >= 1, "{text}: at least 2 nodes and 1 migration are needed");
    Ok((nodes, migrations))
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let settings = Settings {
        pre_copy: Duration::from_millis(arguments.pre_copy_ms),
        timeout: Duration::from_secs(arguments.timeout_s),
        operator: arguments.operator,
    };
    println!(
        "| nodes | migrations | ended before | idle MiB | peak MiB | CPU s | CPU ms each | writes each (events) | \
         reports each | 429 | Lease lost | all ended after |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|---|");
    for (nodes, migrations) in arguments.sizes {
        for ended in &arguments.ended {
            let size = Size { nodes, migrations, ended: *ended };
            let figures = run(&size, &settings).await.with_context(|| format!("{size:?}"))?;
            println!(
                "| {nodes} | {migrations} | {ended} | {:.0} | {:.0} | {:.2} | {:.1} | {:.2} ({:.2}) | {:.2} | {} | \
                 {} | {:.1} s |",
                figures.idle_mib,
                figures.peak_mib,
                figures.cpu_s,
                figures.cpu_s * 1000.0 / migrations as f64,
                figures.writes,
                figures.events,
                figures.reports,
                figures.too_many,
                if figures.lease_lost { "yes" } else { "no" },
                figures.took.as_secs_f64(),
            );
        }
    }
    Ok(())
}
