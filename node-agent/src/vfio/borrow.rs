//! A device that a VMM has open, borrowed from its process.
//!
//! The VMM names the number of a descriptor; `pidfd_getfd(2)` gives a duplicate of it, so that the agent
//! drives the same open file. That takes CAP_SYS_PTRACE over the VMM's process. The duplicate is checked to
//! be a VFIO device, and the one that the VMM says it is, as far as the kernel shows that: a character device
//! has a device number, a descriptor that was opened by a VFIO group has none.
//!
//! Dropping the duplicate changes nothing in the device. But as long as it is open the device stays bound,
//! even if the VMM has ended: drop it as soon as [`VmmProcess::exited`] returns.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, fstat, major, minor};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use super::os_error::OsError;
use super::sys;
use crate::host::node::boot_id;

/// The target of the link in /proc/PID/fd of a VFIO device that was opened by its group. It does not say
/// which device it is.
pub(crate) const GROUP_DEVICE: &str = "anon_inode:[vfio-device]";

/// Why a device could not be borrowed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BorrowError {
    /// There is no such process (any more).
    #[error("there is no process {pid}")]
    NoProcess {
        /// The process.
        pid: u32,
    },
    /// The process could not be opened.
    #[error("opening process {pid}: {errno}")]
    OpenProcess {
        /// The process.
        pid: u32,
        /// What the kernel answered.
        errno: OsError,
    },
    /// A file of /proc could not be read or parsed.
    #[error("reading {}: {why}", path.display())]
    ReadProc {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The process does not have the descriptor.
    #[error("process {pid} has no descriptor {descriptor}")]
    NoDescriptor {
        /// The process.
        pid: u32,
        /// The number that it named.
        descriptor: i32,
    },
    /// The kernel does not hand it out.
    #[error("taking descriptor {descriptor} of process {pid}: {errno}")]
    TakeDescriptor {
        /// The process.
        pid: u32,
        /// The number that it named.
        descriptor: i32,
        /// What the kernel answered. EPERM: CAP_SYS_PTRACE is missing.
        errno: OsError,
    },
    /// It is something else than a VFIO device.
    #[error("descriptor {descriptor} of process {pid} is not a VFIO device but {what}")]
    NotVfio {
        /// The process.
        pid: u32,
        /// The number that it named.
        descriptor: i32,
        /// What it is, by its link in /proc.
        what: String,
    },
    /// It is a VFIO device, but not the one that the VMM named.
    #[error("descriptor {descriptor} of process {pid} is the device {found}, not {named}")]
    OtherDevice {
        /// The process.
        pid: u32,
        /// The number that it named.
        descriptor: i32,
        /// The device that the VMM named.
        named: String,
        /// The device that it is.
        found: String,
    },
    /// Waiting for the end of the process.
    #[error("waiting for the end of process {pid}: {why}")]
    Wait {
        /// The process.
        pid: u32,
        /// What went wrong.
        why: String,
    },
}

/// Identifies a process uniquely, also across reboots: process ids are used again.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ProcessIdentity {
    /// The kernel's boot id.
    pub boot_id: String,
    /// The process' number.
    pub pid: u32,
    /// When it started, in clock ticks since boot: field 22 of /proc/PID/stat.
    pub start_ticks: u64,
}

/// The process of a VMM, held by a pidfd: its number cannot pass to another process unnoticed.
#[derive(Debug)]
pub struct VmmProcess {
    identity: ProcessIdentity,
    pidfd: OwnedFd,
}

impl VmmProcess {
    /// Opens a process that runs.
    ///
    /// # Errors
    /// [`BorrowError::NoProcess`] only if there is none for certain; [`BorrowError::OpenProcess`],
    /// [`BorrowError::ReadProc`] and [`BorrowError::Wait`] if that is not known.
    pub fn open(pid: u32) -> Result<Self, BorrowError> {
        let (pidfd, start_ticks) = hold(pid, Path::new("/proc"))?;
        Ok(Self { identity: ProcessIdentity { boot_id: this_boot()?, pid, start_ticks }, pidfd })
    }

    /// Its unique identity.
    #[must_use]
    pub fn identity(&self) -> &ProcessIdentity {
        &self.identity
    }

    /// A duplicate of the process' descriptor for `device`: a PCI address, or the UUID of a mediated device.
    ///
    /// # Errors
    /// [`BorrowError`], which says what the descriptor is instead.
    pub fn borrow(&self, descriptor: i32, device: &str) -> Result<OwnedFd, BorrowError> {
        self.borrow_by(descriptor, device, Path::new("/sys"))
    }

    fn borrow_by(&self, descriptor: i32, device: &str, sysfs: &Path) -> Result<OwnedFd, BorrowError> {
        let pid = self.identity.pid;
        let taken = pidfd_getfd(&self.pidfd, descriptor, PidfdGetfdFlags::empty());
        let taken = taken.map_err(|errno| match errno {
            Errno::SRCH => BorrowError::NoProcess { pid },
            Errno::BADF => BorrowError::NoDescriptor { pid, descriptor },
            errno => BorrowError::TakeDescriptor { pid, descriptor, errno: OsError(errno) },
        })?;
        match identify(taken.as_fd(), sysfs)? {
            Kind::Cdev(found) if found == device => Ok(taken),
            Kind::GroupDevice => Ok(taken),
            Kind::Cdev(found) => {
                Err(BorrowError::OtherDevice { pid, descriptor, named: device.to_owned(), found })
            }
            Kind::Other(what) => Err(BorrowError::NotVfio { pid, descriptor, what }),
        }
    }

    /// Returns when the process has ended.
    ///
    /// # Errors
    /// [`BorrowError::Wait`] if the runtime cannot wait for it.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub async fn exited(&self) -> Result<(), BorrowError> {
        let wait_error =
            |error: io::Error| BorrowError::Wait { pid: self.identity.pid, why: error.to_string() };
        let pidfd = self.pidfd.try_clone().map_err(wait_error)?;
        let pidfd = sys::watch_readable(pidfd).map_err(wait_error)?;
        // A pidfd becomes readable once, when the process ends, and stays so.
        pidfd.readable().await.map(|_| ()).map_err(wait_error)
    }
}

/// The id of this boot.
pub(super) fn this_boot() -> Result<String, BorrowError> {
    boot_id(Path::new("/proc")).map_err(|error| unreadable(&error.path, &error.source))
}

/// When the process that has this number now was started.
pub(super) fn start_of(pid: u32) -> Result<u64, BorrowError> {
    hold(pid, Path::new("/proc")).map(|(_, start_ticks)| start_ticks)
}

/// Holds a process that runs; since when it does.
fn hold(pid: u32, proc: &Path) -> Result<(OwnedFd, u64), BorrowError> {
    let number = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(BorrowError::NoProcess { pid })?;
    let pidfd = pidfd_open(number, PidfdFlags::empty()).map_err(|errno| not_opened(pid, errno))?;
    let start_ticks = start_ticks(pid, proc);
    // What was read belongs to the process behind the pidfd only if that has not ended before. And only the
    // pidfd tells a process that has ended from one that /proc does not show.
    if has_exited(&pidfd, pid)? {
        return Err(BorrowError::NoProcess { pid });
    }
    Ok((pidfd, start_ticks?))
}

/// ESRCH: no process. EINVAL, or ENOENT since Linux 6.15: the number is that of a thread, which is no process.
fn not_opened(pid: u32, errno: Errno) -> BorrowError {
    match errno {
        Errno::SRCH | Errno::INVAL | Errno::NOENT => BorrowError::NoProcess { pid },
        errno => BorrowError::OpenProcess { pid, errno: OsError(errno) },
    }
}

/// What a descriptor turned out to be.
#[derive(Debug, PartialEq, Eq)]
enum Kind {
    /// A VFIO character device of the device with this name.
    Cdev(String),
    /// A VFIO device that was opened by its group. It cannot be seen which one.
    GroupDevice,
    /// Something else: what /proc calls it.
    Other(String),
}

/// By the device's number, not by its path: a VMM in a container may have its device nodes elsewhere.
fn identify(descriptor: BorrowedFd<'_>, sysfs: &Path) -> Result<Kind, BorrowError> {
    let link = PathBuf::from(format!("/proc/self/fd/{}", descriptor.as_raw_fd()));
    let what = fs::read_link(&link).map_err(|error| unreadable(&link, &error))?;
    if what.as_os_str() == GROUP_DEVICE {
        return Ok(Kind::GroupDevice);
    }
    let other = Kind::Other(what.display().to_string());
    let Ok(stat) = fstat(descriptor) else { return Ok(other) };
    if FileType::from_raw_mode(stat.st_mode) != FileType::CharacterDevice {
        return Ok(other);
    }
    let number = format!("{}:{}", major(stat.st_rdev), minor(stat.st_rdev));
    let entry = sysfs.join("dev/char").join(number);
    let base_of = |name: &str| {
        let target = fs::canonicalize(entry.join(name)).ok()?;
        Some(target.file_name()?.to_str()?.to_owned())
    };
    Ok(match (base_of("subsystem").as_deref(), base_of("device")) {
        (Some("vfio-dev"), Some(device)) => Kind::Cdev(device),
        _ => other,
    })
}

fn unreadable(path: &Path, why: &dyn ToString) -> BorrowError {
    BorrowError::ReadProc { path: path.to_owned(), why: why.to_string() }
}

fn start_ticks(pid: u32, proc: &Path) -> Result<u64, BorrowError> {
    let path = proc.join(format!("{pid}/stat"));
    let stat = fs::read_to_string(&path).map_err(|error| unreadable(&path, &error))?;
    parse_start_ticks(&stat).ok_or_else(|| unreadable(&path, &"the start time is missing"))
}

/// Field 22 (proc_pid_stat(5)). The second field, the program's name in parentheses, may itself hold spaces
/// and parentheses.
fn parse_start_ticks(stat: &str) -> Option<u64> {
    let (_, after_name) = stat.rsplit_once(')')?;
    after_name.split_ascii_whitespace().nth(22 - 3)?.parse().ok()
}

/// Whether the pidfd is readable now.
fn has_exited(pidfd: &OwnedFd, pid: u32) -> Result<bool, BorrowError> {
    let mut fds = [PollFd::new(pidfd, PollFlags::IN)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let ready = poll(&mut fds, Some(&now));
    ready.map(|ready| ready > 0).map_err(|errno| BorrowError::Wait { pid, why: errno.to_string() })
}

#[cfg(test)]
#[path = "borrow_tests.rs"]
mod tests;
