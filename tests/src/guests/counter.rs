//! The guest that counts: a boot sector (`counter.s`), small enough to be up as soon as the firmware is.
//!
//! It finds every mtty card on PCI bus 0 by its IDs, clears the scratch registers, and then, fifty times a second:
//! ```text
//! old = low byte of count;  count += 1;  new = low byte of count
//! for every card:
//!     its scratch register must be old: else errors += 1
//!     write new and read it back; it must be new: else errors += 1
//! every eighth round: say count, errors and the number of cards
//! ```
//! All of that lies in RAM. So one register lost, doubled or mixed up, or a count that does not fit the registers, shows as an
//! error within one round, wherever in the round the vCPU was stopped. Between rounds it halts: an emulated node has other
//! things to do.

use std::{path::Path, process::Command};

use anyhow::{Context, ensure};

/// Where the guest's disk lies in the nodes.
pub const DISK: &str = "/usr/share/slackwater-lab/counter.img";

const SOURCE: &str = include_str!("counter.s");
/// Where a firmware puts a boot sector.
const LOAD_ADDRESS: &str = "0x7c00";
const SECTOR_BYTES: usize = 512;
/// The firmware reads by cylinder, head and sector, and no disk smaller than one cylinder: 16 heads of 63 sectors.
const DISK_BYTES: usize = 16 * 63 * SECTOR_BYTES;

/// The guest's disk: its boot sector, assembled by binutils, and nothing else.
///
/// # Errors
/// When binutils are missing.
pub fn disk() -> anyhow::Result<Vec<u8>> {
    let folder = tempfile::tempdir()?;
    let [source, object, sector] =
        ["s", "o", "bin"].map(|name| folder.path().join("counter").with_extension(name));
    std::fs::write(&source, SOURCE)?;
    run(Command::new("as").args(["--32", "-o"]).args([&object, &source]))?;
    run(Command::new("ld")
        .args(["-m", "elf_i386", "-Ttext", LOAD_ADDRESS, "--oformat", "binary", "-o"])
        .args([&sector, &object]))?;
    read_sector(&sector)
}

fn read_sector(path: &Path) -> anyhow::Result<Vec<u8>> {
    let mut disk = std::fs::read(path)?;
    ensure!(disk.len() == SECTOR_BYTES, "the boot sector has {} bytes", disk.len());
    disk.resize(DISK_BYTES, 0);
    Ok(disk)
}

fn run(command: &mut Command) -> anyhow::Result<()> {
    let output = command.output().with_context(|| format!("starting {command:?} (install host-packages)"))?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// What the guest says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Report {
    /// Rounds begun.
    pub count: u64,
    /// How often a register held something else than the guest had put there.
    pub errors: u64,
    /// Cards that it found.
    pub devices: usize,
}

impl Report {
    /// The last report that is whole, of what the guest has said so far. A guest that moves may have said the half of a line at
    /// the one node and the rest at the other.
    #[must_use]
    pub fn last_of(said: &str) -> Option<Self> {
        let whole = said.rsplit_once('\n')?.0;
        whole.lines().rev().find_map(Self::parse)
    }

    fn parse(line: &str) -> Option<Self> {
        let mut words = line.split(' ');
        let mut number =
            |name: &str| words.next()?.strip_prefix(name)?.strip_prefix('=')?.parse::<u64>().ok();
        let (count, errors, devices) = (number("count")?, number("errors")?, number("devices")?);
        Some(Self { count, errors, devices: usize::try_from(devices).ok()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_disk_is_one_cylinder_with_a_boot_sector() {
        let disk = disk().unwrap();
        assert_eq!(disk.len(), 516_096);
        assert_eq!(disk[510..512], [0x55, 0xaa]);
    }

    #[test]
    fn the_last_whole_line_counts() {
        let said = "count=0000000008 errors=0000000000 devices=0000000002\n\
                    count=0000000016 errors=0000000003 devices=0000000002\ncount=00000";
        assert_eq!(Report::last_of(said), Some(Report { count: 16, errors: 3, devices: 2 }));
    }

    #[test]
    fn the_rest_of_a_line_that_began_at_another_node_is_no_report() {
        assert_eq!(Report::last_of("0024 errors=0000000000 devices=0000000002\n"), None);
        assert_eq!(Report::last_of("count=0000000024 errors=0000000000 devices=2"), None);
        assert_eq!(Report::last_of(""), None);
    }
}
