//! Walks the lab's VMM through its contract, on real KVM and real VFIO devices, as an agent would: with the devices driven from
//! outside.
//!
//! It is run in a node of the lab (tests/vmm.rs) with four devices of one type, which nobody uses: two for a VM and two for its
//! twin. What it prints is one JSON object per line.

mod checks;
mod process;

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;

#[derive(Parser)]
struct Arguments {
    /// The VM's devices and then the twin's: the UUIDs of mediated devices.
    #[arg(num_args = 4)]
    devices: Vec<String>,
}

#[tokio::main]
async fn main() -> Result<ExitCode> {
    let all_well = checks::run(&Arguments::parse().devices).await?;
    Ok(if all_well { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
