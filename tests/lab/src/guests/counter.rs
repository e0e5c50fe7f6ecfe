//! The guest that counts: a boot sector (`counter.s`), small enough to be up as soon as the firmware is.
//!
//! It finds every mtty card on PCI bus 0 by its IDs, clears the scratch registers, and then, fifty times a
//! second:
//! ```text
//! old = low byte of count;  count += 1;  new = low byte of count
//! for every card:
//!     its scratch register must be old: else errors += 1
//!     write new and read it back; it must be new: else errors += 1
//! every eighth round: say count, errors and the number of cards
//! ```
//! All of that is in RAM. So a register that is lost, duplicated or swapped, or a count that does not match
//! the registers, shows as an error within one round, wherever in the round the vCPU was stopped. Between
//! rounds it halts, since an emulated node has little CPU time.

use std::{path::Path, process::Command};

use anyhow::{Context, ensure};

/// The path of the guest's disk in the nodes.
pub const DISK: &str = "/usr/share/slackwater-lab/counter.img";

const SOURCE: &str = include_str!("counter.s");
/// Where a firmware puts a boot sector.
const LOAD_ADDRESS: &str = "0x7c00";
const SECTOR_BYTES: usize = 512;
/// The firmware reads by cylinder, head and sector, and needs a disk of at least one cylinder: 16 heads of 63
/// sectors.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_disk_is_one_cylinder_with_a_boot_sector() {
        let disk = disk().unwrap();
        assert_eq!(disk.len(), 516_096);
        assert_eq!(disk[510..512], [0x55, 0xaa]);
    }
}
