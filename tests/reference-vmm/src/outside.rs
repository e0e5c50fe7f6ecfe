//! Reads a guest's data from outside: from the RAM of a running VMM through `/proc`, independent of the VMM's
//! own answers.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use super::guest::{Report, ReportError};
use super::ram::MEMFD_NAME;

/// Why a guest could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OutsideError {
    /// There is no such process, or this user may not inspect it.
    #[error("cannot list the descriptors of process {pid}")]
    ListDescriptors {
        /// The process.
        pid: u32,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The process has no guest RAM.
    #[error("process {pid} has no descriptor of memfd:{MEMFD_NAME}: it is not a reference VMM")]
    NoRam {
        /// The process.
        pid: u32,
    },
    /// The RAM could not be opened.
    #[error("cannot open the guest's RAM, {path}")]
    OpenRam {
        /// Its path under /proc.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// There is no guest in the RAM.
    #[error("process {pid}")]
    Report {
        /// The process.
        pid: u32,
        /// What is wrong.
        #[source]
        source: ReportError,
    },
}

/// The current report of the guest of the VMM with process id `pid`.
///
/// # Errors
/// If there is no such process, it may not be inspected (only by the same user, or root), or it has no guest.
pub fn report(pid: u32) -> Result<Report, OutsideError> {
    report_from(pid, MEMFD_NAME)
}

fn report_from(pid: u32, memfd: &str) -> Result<Report, OutsideError> {
    let list = |source| OutsideError::ListDescriptors { pid, source };
    let name = format!("/memfd:{memfd}");
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).map_err(list)? {
        let path = entry.map_err(list)?.path();
        // A descriptor may have been closed since the listing.
        let Ok(target) = fs::read_link(&path) else { continue };
        // The link reads "/memfd:NAME (deleted)".
        if target.to_str().and_then(|target| target.split(' ').next()) != Some(name.as_str()) {
            continue;
        }
        let ram = File::open(&path).map_err(|source| OutsideError::OpenRam { path, source })?;
        return Report::read(|gpa, bytes| ram.read_exact_at(bytes, gpa))
            .map_err(|source| OutsideError::Report { pid, source });
    }
    Err(OutsideError::NoRam { pid })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;
    use crate::guest;

    #[test]
    fn a_guest_is_read_from_outside_by_the_name_of_its_ram() {
        // A unique name: other tests of this process have guests, too.
        let ram = File::from(memfd_create("ram-read-from-outside", MemfdFlags::CLOEXEC).unwrap());
        ram.set_len(guest::MIN_RAM_BYTES).unwrap();
        let report = || report_from(std::process::id(), "ram-read-from-outside");
        assert!(matches!(report(), Err(OutsideError::Report { source: ReportError::NoGuest { .. }, .. })));
        for (gpa, bytes) in guest::image(3) {
            ram.write_all_at(&bytes, gpa).unwrap();
        }
        assert_eq!(report().unwrap().devices.len(), 3);
        drop(ram);
        assert!(matches!(report(), Err(OutsideError::NoRam { .. })));
    }
}
