//! Walks the reference VMM through the contract, on real KVM and real VFIO devices. Like an agent, it drives
//! the devices from outside.
//!
//! It is run in a node of the lab (tests/vmm.rs), on free devices. It prints one JSON object per line.

mod checks;
mod pauses;
mod process;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Checks what the contract promises, and what the guest notices.
    Checks {
        /// Two devices of the VM and two of its twin, all of one type: the UUIDs of mediated devices.
        #[arg(num_args = 4)]
        devices: Vec<String>,
    },
    /// Pauses a VM many times, and prints when. The kernel's trace shows what ran meanwhile.
    Pauses {
        /// The VM's devices.
        #[arg(num_args = 2)]
        devices: Vec<String>,
    },
}

#[tokio::main]
async fn main() -> Result<ExitCode> {
    let all_well = match Arguments::parse().what {
        What::Checks { devices } => checks::run(&devices).await?,
        What::Pauses { devices } => pauses::run(&devices).await?,
    };
    Ok(if all_well { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
