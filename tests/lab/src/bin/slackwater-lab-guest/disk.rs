//! The disk that the lines are written to, past all caches.

use std::{
    fs::File,
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
};

use anyhow::Context;
use rustix::fs::OFlags;
use slackwater_lab::guests::lines::{DiskLine, SECTOR_BYTES, is_empty};
use slackwater_lab::guests::linux;
use slackwater_lab::node::monotonic_ns;

/// `O_DIRECT` wants the memory aligned as the disk is.
#[repr(align(512))]
struct Sector([u8; SECTOR_BYTES]);

/// An open disk.
pub(crate) struct Disk {
    file: File,
    sectors: u64,
    last: DiskLine,
}

impl Disk {
    /// The VM's disk, if it has one.
    pub(crate) fn open() -> anyhow::Result<Option<Self>> {
        let flags = (OFlags::DIRECT | OFlags::SYNC).bits();
        let opened =
            File::options().read(true).write(true).custom_flags(i32::try_from(flags)?).open(linux::DISK);
        let file = match opened {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened.with_context(|| format!("opening {}", linux::DISK))?,
        };
        let sectors = rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0))? / SECTOR_BYTES as u64;
        Ok(Some(Self { file, sectors, last: DiskLine { number: 0, previous: 0, stamp: 0 } }))
    }

    /// How many lines are on it.
    pub(crate) fn written(&self) -> u64 {
        self.last.number
    }

    /// Writes a line, as long as there is room. `false`: the sector was not empty, so another VM has written
    /// to it.
    pub(crate) fn write(&mut self, number: u64) -> anyhow::Result<bool> {
        if number > self.sectors {
            return Ok(true);
        }
        let offset = (number - 1) * SECTOR_BYTES as u64;
        let mut sector = Sector([0; SECTOR_BYTES]);
        self.file.read_exact_at(&mut sector.0, offset).context("reading from the disk")?;
        let empty = is_empty(&sector.0);
        let stamp = u64::try_from(monotonic_ns())?;
        let line = DiskLine { number, previous: self.last.stamp, stamp };
        sector.0.copy_from_slice(&line.sector());
        self.file.write_all_at(&sector.0, offset).context("writing to the disk")?;
        self.last = line;
        Ok(empty)
    }
}
