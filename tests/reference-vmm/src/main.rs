//! The program of the reference VMM: see `slackwater_reference_vmm`.

use anyhow::Context;
use clap::{Parser, Subcommand};
use slackwater_reference_vmm::outside;
use slackwater_reference_vmm::run::{self, Options};
use tracing_subscriber::EnvFilter;

/// A small virtual machine monitor for tests. Its guest counts, and checks its RAM and its devices on every
/// count.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run a VM and serve the VMM contract, until Quit or SIGTERM.
    Run(Options),
    /// Print the report of the guest of a running VMM, as JSON.
    Guest {
        /// Process id of the VMM.
        #[arg(long)]
        pid: u32,
    },
}

#[tokio::main(worker_threads = 2)]
async fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info")))
        .with_ansi(false)
        .with_writer(std::io::stderr)
        .init();
    match Cli::parse().command {
        Command::Run(options) => run::run(options).await.context("slackwater-reference-vmm"),
        Command::Guest { pid } => {
            println!("{}", serde_json::to_string(&outside::report(pid)?)?);
            Ok(())
        }
    }
}
