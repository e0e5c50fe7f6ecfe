//! The numbered lines that the Linux guest sends through its serial ports and writes to its disk, and the
//! check of the disk.
//!
//! Line n, counted from 1, is in the disk's sector n - 1 and has its number, its stamp (the guest's clock
//! when it wrote the line), and the stamp of the line before it. Two VMs that both ran from the same state
//! wrote the same numbers with different stamps, so a mixture of the two on the disk is inconsistent.

/// Bytes of a sector.
pub const SECTOR_BYTES: usize = 512;

/// One line as it goes through a serial port. It fits into the FIFO of a 16550, which has 16 bytes.
#[must_use]
pub fn serial_line(number: u64) -> Vec<u8> {
    format!("{number:010}\n").into_bytes()
}

/// One line of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskLine {
    /// Its number: from 1.
    pub number: u64,
    /// The stamp of the line before; of the first line, 0.
    pub previous: u64,
    /// The guest's clock, in nanoseconds.
    pub stamp: u64,
}

/// What is wrong with a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DiskError {
    /// Its size is not a multiple of a sector's.
    #[error("the disk has {bytes} bytes, which are no whole sectors")]
    NoDisk {
        /// Its size.
        bytes: usize,
    },
    /// A sector holds something other than a line.
    #[error("sector {sector} has no line in it")]
    NoLine {
        /// Which.
        sector: usize,
    },
    /// A line is missing, and a later one is there.
    #[error("line {number} is missing, and a later one is there")]
    Hole {
        /// Which.
        number: u64,
    },
    /// A line is in the place of another: it was written twice.
    #[error("line {found} is in the place of line {number}")]
    Doubled {
        /// Which belongs there.
        number: u64,
        /// Which is there.
        found: u64,
    },
    /// A line was not written by the VM that had written the line before it.
    #[error("line {number} does not follow from the line before it: two VMs have written")]
    Fork {
        /// Which.
        number: u64,
    },
}

impl DiskLine {
    /// The sector that holds the line.
    #[must_use]
    pub fn sector(&self) -> Vec<u8> {
        let mut sector =
            format!("{:010} {:020} {:020}\n", self.number, self.previous, self.stamp).into_bytes();
        sector.resize(SECTOR_BYTES, 0);
        sector
    }

    fn read(sector: &[u8]) -> Option<Self> {
        let end = sector.iter().position(|byte| *byte == b'\n')?;
        let (text, rest) = sector.split_at_checked(end)?;
        let mut words = std::str::from_utf8(text).ok()?.split(' ');
        let mut number = || words.next()?.parse().ok();
        let line = Self { number: number()?, previous: number()?, stamp: number()? };
        (words.next().is_none() && is_empty(rest.get(1..)?)).then_some(line)
    }
}

/// Whether nothing was ever written to the sector.
#[must_use]
pub fn is_empty(sector: &[u8]) -> bool {
    sector.iter().all(|byte| *byte == 0)
}

/// Checks what was written to a disk that was empty, and returns how many lines that is.
///
/// # Errors
/// The first thing that is wrong.
pub fn check_disk(disk: &[u8]) -> Result<u64, DiskError> {
    if !disk.len().is_multiple_of(SECTOR_BYTES) {
        return Err(DiskError::NoDisk { bytes: disk.len() });
    }
    let mut last = DiskLine { number: 0, previous: 0, stamp: 0 };
    let mut end = None;
    for (sector, bytes) in disk.chunks(SECTOR_BYTES).enumerate() {
        let expected = last.number + 1;
        if is_empty(bytes) {
            end = end.or(Some(expected));
            continue;
        }
        let line = DiskLine::read(bytes).ok_or(DiskError::NoLine { sector })?;
        if let Some(number) = end {
            return Err(DiskError::Hole { number });
        }
        if line.number != expected {
            return Err(DiskError::Doubled { number: expected, found: line.number });
        }
        if line.previous != last.stamp {
            return Err(DiskError::Fork { number: line.number });
        }
        last = line;
    }
    Ok(last.number)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A disk of eight sectors with these lines, of VMs with these clocks.
    fn disk(lines: &[(u64, u64, u64)]) -> Vec<u8> {
        let line = |(number, previous, stamp): &(u64, u64, u64)| {
            DiskLine { number: *number, previous: *previous, stamp: *stamp }.sector()
        };
        let mut disk: Vec<u8> = lines.iter().flat_map(line).collect();
        disk.resize(8 * SECTOR_BYTES, 0);
        disk
    }

    #[test]
    fn a_line_fits_the_fifo_of_a_16550() {
        assert_eq!(serial_line(42), b"0000000042\n");
        assert!(serial_line(u64::from(u32::MAX)).len() <= 16);
    }

    #[test]
    fn lines_that_follow_each_other_are_counted() {
        assert_eq!(check_disk(&disk(&[])), Ok(0));
        assert_eq!(check_disk(&disk(&[(1, 0, 5), (2, 5, 7), (3, 7, 9)])), Ok(3));
    }

    #[test]
    fn a_hole_a_doubling_and_a_fork_are_found() {
        let mut hole = disk(&[(1, 0, 5), (2, 5, 7), (3, 7, 9)]);
        hole[SECTOR_BYTES..2 * SECTOR_BYTES].fill(0);
        assert_eq!(check_disk(&hole), Err(DiskError::Hole { number: 2 }));
        let doubled = disk(&[(1, 0, 5), (2, 5, 7), (2, 5, 8)]);
        assert_eq!(check_disk(&doubled), Err(DiskError::Doubled { number: 3, found: 2 }));
        let forked = disk(&[(1, 0, 5), (2, 5, 8), (3, 7, 9)]);
        assert_eq!(check_disk(&forked), Err(DiskError::Fork { number: 3 }));
    }

    #[test]
    fn what_is_no_line_is_not_taken_for_one() {
        let mut torn = disk(&[(1, 0, 5), (2, 5, 7)]);
        torn[SECTOR_BYTES + 100] = 1;
        assert_eq!(check_disk(&torn), Err(DiskError::NoLine { sector: 1 }));
        assert_eq!(check_disk(&torn[1..]), Err(DiskError::NoDisk { bytes: 8 * SECTOR_BYTES - 1 }));
    }
}
