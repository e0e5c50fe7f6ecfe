//! Walks a real VFIO device through every ordered pair of migration states, and compares the driver with the
//! table from which Slackwater computes its paths. It also checks what else the agent relies on at a real
//! driver.
//!
//! It is run in a node of the lab (tests/vfio_walk.rs), on free devices, which it resets many times. It
//! prints one JSON object per line.

mod checks;
mod node;
mod pairs;
mod trace;

use std::io::Read;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
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
    /// Every ordered pair of states, on one device.
    Pairs {
        /// The device: the UUID of a mediated device, or a PCI address.
        device: String,
        /// Where tracefs is mounted: the states along the way are then taken from the kernel's trace, too.
        #[arg(long)]
        tracefs: Option<PathBuf>,
    },
    /// Borrowing, loading, refusals: on two devices of one type and one of another.
    Checks {
        /// The first device.
        device: String,
        /// Another one of the same type.
        like: String,
        /// One of another type.
        unlike: String,
    },
    /// Opens a device, prints the number of its descriptor, and holds it until standard input ends: a VMM, as
    /// seen from outside.
    Hold {
        /// The device.
        device: String,
    },
}

#[tokio::main]
async fn main() -> Result<ExitCode> {
    let all_well = match Arguments::parse().what {
        What::Pairs { device, tracefs } => pairs::walk(&device, tracefs.as_deref())?,
        What::Checks { device, like, unlike } => checks::run(&device, &like, &unlike).await?,
        What::Hold { device } => hold(&device)?,
    };
    Ok(if all_well { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn hold(device: &str) -> Result<bool> {
    let descriptor = node::open(device)?;
    println!("{}", descriptor.as_raw_fd());
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(true)
}
