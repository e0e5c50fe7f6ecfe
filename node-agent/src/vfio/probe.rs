//! What the driver of a free device advertises. The device is opened for a moment.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use slackwater_handover::state::Features;

use super::os_error::OsError;
use super::{sys, uapi};

/// Why the features of a free device are not known.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProbeError {
    /// Opening the iommufd, or the device.
    #[error("opening {}: {errno}", path.display())]
    Open {
        /// What was to be opened.
        path: PathBuf,
        /// What the kernel answered.
        errno: OsError,
    },
    /// Another process has it open.
    #[error("{} is in use", path.display())]
    InUse {
        /// The character device.
        path: PathBuf,
    },
    /// The kernel does not say that it is in use, but it cannot be bound to an iommufd.
    #[error("binding {} to an iommufd: {errno}", path.display())]
    Bind {
        /// The character device.
        path: PathBuf,
        /// What the kernel answered.
        errno: OsError,
    },
    /// The driver advertises no migration.
    #[error("the driver of {} does not report its migration features: {errno}", path.display())]
    ReadFeatures {
        /// The character device.
        path: PathBuf,
        /// What the kernel answered; ENOTTY: it has no migration.
        errno: OsError,
    },
}

/// The features of the free device behind a VFIO character device (`/dev/vfio/devices/vfioN`).
///
/// Meanwhile no other process can open the device, and some drivers reset it: do not call this on a device
/// that a VM is about to get. The migration state of the device does not change.
///
/// # Errors
/// [`ProbeError::InUse`] where the kernel answers EBUSY or EINVAL: its answers for a device that another
/// process has bound.
pub fn features(cdev: &Path) -> Result<Features, ProbeError> {
    let device = open_bound(cdev)?;
    let flags = sys::migration_flags(device.as_fd());
    flags
        .map(uapi::features)
        .map_err(|errno| ProbeError::ReadFeatures { path: cdev.to_owned(), errno: OsError(errno) })
}

/// Opens a VFIO character device and binds it to an iommufd of its own, which lives as long as the device's
/// descriptor does.
///
/// # Errors
/// As [`features`].
pub fn open_bound(cdev: &Path) -> Result<OwnedFd, ProbeError> {
    let iommufd = open(Path::new("/dev/iommu"))?;
    let device = open(cdev)?;
    match sys::bind_iommufd(device.as_fd(), iommufd.as_fd()) {
        Ok(()) => Ok(device.into()),
        Err(Errno::BUSY | Errno::INVAL) => Err(ProbeError::InUse { path: cdev.to_owned() }),
        Err(errno) => Err(ProbeError::Bind { path: cdev.to_owned(), errno: OsError(errno) }),
    }
}

fn open(path: &Path) -> Result<File, ProbeError> {
    OpenOptions::new().read(true).write(true).open(path).map_err(|error| {
        let errno = OsError(Errno::from_io_error(&error).unwrap_or(Errno::IO));
        match errno {
            OsError(Errno::BUSY) => ProbeError::InUse { path: path.to_owned() },
            errno => ProbeError::Open { path: path.to_owned(), errno },
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_names_the_path_that_cannot_be_opened() {
        let error = open(Path::new("/dev/vfio/devices/none")).unwrap_err();
        assert_eq!(error.to_string(), "opening /dev/vfio/devices/none: No such file or directory (ENOENT)");
    }
}
