//! Walks the lab's VMM through its contract, on real KVM and real VFIO devices, as an agent would: with the devices driven from
//! outside.
//!
//! It is run in a node of the lab (tests/vmm.rs), on devices that nobody uses. What it prints is one JSON object per line.

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
    /// What the contract promises, and what the guest finds out.
    Checks {
        /// Two devices of the VM and two of its twin, all of one type: the UUIDs of mediated devices.
        #[arg(num_args = 4)]
        devices: Vec<String>,
    },
    /// Pauses a VM many times, and tells when: what ran meanwhile is for the kernel to say.
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
