//! Which processes hold which VFIO device open, as procfs shows it. Read-only; the root is a parameter.
//!
//! A descriptor is recognized by the end of its link in `/proc/<pid>/fd`: `vfio/devices/vfio0`, or `vfio/12`
//! for a whole group. The beginning is ignored: a process in a container may have its /dev elsewhere.
//! A process that has ended is skipped. One that the agent may not read may hold any device: what nobody else
//! is seen to hold is then not known to be free. An agent with CAP_SYS_PTRACE may read all of them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::{fmt, fs, io};

use rustix::io::Errno;

use super::devices::Device;

/// A process that has a device open.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Holder {
    /// Its process id.
    pub pid: u32,
    /// Its command's name (at most 15 characters), or empty if it could not be read.
    pub command: String,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {} ({})", self.pid, self.command)
    }
}

/// Which processes hold which devices, at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Holders {
    held: BTreeMap<Held, Vec<Holder>>,
    /// Why the descriptors of a process could not be read.
    unread: Vec<String>,
}

/// The processes cannot be listed.
#[derive(Debug, thiserror::Error)]
#[error("cannot list the processes in {}", path.display())]
pub struct ListProcessesError {
    /// The procfs.
    pub path: PathBuf,
    source: io::Error,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Held {
    /// `vfio0`
    Cdev(String),
    /// 12
    Group(u32),
}

impl Holders {
    /// Reads all processes of the procfs at `proc`. One that ends meanwhile is skipped.
    ///
    /// # Errors
    /// If they cannot be listed.
    pub fn look(proc: &Path) -> Result<Self, ListProcessesError> {
        let list_error = |source| ListProcessesError { path: proc.to_owned(), source };
        let mut holders = Self::default();
        for process in fs::read_dir(proc).map_err(list_error)? {
            let process = process.map_err(list_error)?;
            let Some(pid) = process.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            match opened(&process.path().join("fd")) {
                Ok(opened) => {
                    for what in opened {
                        let command = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
                        let holder = Holder { pid, command: command.trim_end().to_owned() };
                        holders.held.entry(what).or_default().push(holder);
                    }
                }
                Err(error) if has_gone(&error) => {}
                Err(error) => holders.unread.push(format!("what process {pid} has open: {error}")),
            }
        }
        Ok(holders)
    }

    /// Why it is not known whether a device is free that no process is seen to hold; None if it is known.
    pub fn not_known(&self) -> Option<String> {
        let first = self.unread.first()?;
        let more = match self.unread.len() - 1 {
            0 => String::new(),
            more => format!(", and of {more} others"),
        };
        Some(format!("the agent cannot read {first}{more}"))
    }

    /// The processes that hold the device, or its whole group, in the order of their ids.
    pub fn of(&self, device: &Device) -> Vec<&Holder> {
        let cdev = device.cdev.file_name().and_then(|name| name.to_str());
        let keys = [cdev.map(|name| Held::Cdev(name.to_owned())), device.group.map(Held::Group)];
        let mut holders: Vec<_> =
            keys.iter().flatten().filter_map(|held| self.held.get(held)).flatten().collect();
        holders.sort();
        holders.dedup();
        holders
    }
}

/// What a process has open of VFIO, by its folder of descriptors.
fn opened(descriptors: &Path) -> io::Result<Vec<Held>> {
    let mut opened = Vec::new();
    for descriptor in fs::read_dir(descriptors)? {
        match fs::read_link(descriptor?.path()) {
            Ok(link) => opened.extend(held_by(&link)),
            // It has been closed.
            Err(error) if has_gone(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(opened)
}

/// ENOENT, and ESRCH of a process that ends while it is read.
fn has_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(Errno::SRCH.raw_os_error())
}

/// The VFIO device or group that an open file is, if it is one.
fn held_by(link: &Path) -> Option<Held> {
    let mut names = link.iter().rev().map(|name| name.to_str().unwrap_or_default());
    match (names.next()?, names.next()?, names.next()) {
        (name, "devices", Some("vfio")) if name.starts_with("vfio") => Some(Held::Cdev(name.to_owned())),
        (group, "vfio", _) => Some(Held::Group(group.parse().ok()?)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn process(proc: &Path, pid: u32, command: &str, links: &[&str]) {
        let fds = proc.join(pid.to_string()).join("fd");
        fs::create_dir_all(&fds).unwrap();
        fs::write(proc.join(pid.to_string()).join("comm"), format!("{command}\n")).unwrap();
        for (number, link) in links.iter().enumerate() {
            symlink(link, fds.join(number.to_string())).unwrap();
        }
    }

    fn device(cdev: &str, group: Option<u32>) -> Device {
        let (name, driver, model) = (String::new(), String::new(), String::new());
        Device {
            sysfs: PathBuf::from("/sys/bus/pci/devices").join(&name),
            name,
            cdev: PathBuf::from(cdev),
            group,
            driver,
            model,
        }
    }

    #[test]
    fn each_holder_of_a_device_or_its_group_is_found_once_and_no_other_process() {
        let proc = tempfile::tempdir().unwrap();
        process(
            proc.path(),
            9,
            "qemu-system-x86",
            &["/dev/vfio/devices/vfio0", "/dev/vfio/devices/vfio0", "/dev/null"],
        );
        process(
            proc.path(),
            7,
            "lab-vmm",
            &["/mnt/dev/vfio/devices/vfio0", "socket:[1]", "/dev/vfio/devices/vfio10"],
        );
        process(proc.path(), 8, "old", &["/dev/vfio/12", "anon_inode:[vfio-device]", "/dev/vfio/vfio"]);
        process(proc.path(), 6, "editor", &["/home/a/vfio/devices/notes", "/dev/vfio/12.txt"]);
        fs::create_dir(proc.path().join("self")).unwrap();

        let holders = Holders::look(proc.path()).unwrap();
        let of = |cdev: &str, group| {
            holders.of(&device(cdev, group)).iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
        };
        assert_eq!(
            of("/dev/vfio/devices/vfio0", Some(11)),
            "process 7 (lab-vmm), process 9 (qemu-system-x86)"
        );
        assert_eq!(of("/dev/vfio/devices/vfio1", Some(12)), "process 8 (old)");
        assert_eq!(of("/dev/vfio/devices/vfio10", Some(12)), "process 7 (lab-vmm), process 8 (old)");
        assert_eq!(of("/dev/vfio/devices/vfio2", None), "");
    }

    #[test]
    fn a_process_that_cannot_be_read_may_hold_any_device() {
        let proc = tempfile::tempdir().unwrap();
        process(proc.path(), 9, "qemu", &["/dev/vfio/devices/vfio0"]);
        let known = Holders::look(proc.path()).unwrap();
        assert_eq!(known.not_known(), None);
        // No folder of descriptors: it has ended.
        fs::create_dir(proc.path().join("10")).unwrap();
        assert_eq!(Holders::look(proc.path()).unwrap(), known);
        fs::create_dir(proc.path().join("11")).unwrap();
        fs::write(proc.path().join("11/fd"), "").unwrap();
        process(proc.path(), 12, "odd", &[]);
        fs::write(proc.path().join("12/fd/3"), "not a link").unwrap();
        let holders = Holders::look(proc.path()).unwrap();
        assert_eq!(holders.of(&device("/dev/vfio/devices/vfio0", None)).len(), 1, "what is seen counts");
        let why = holders.not_known().unwrap();
        assert!(why.starts_with("the agent cannot read what process 1"), "{why}");
        assert!(why.ends_with(", and of 1 others"), "{why}");
    }

    #[test]
    fn a_right_that_is_missing_is_no_end_of_a_process() {
        for (errno, gone) in
            [(Errno::NOENT, true), (Errno::SRCH, true), (Errno::ACCESS, false), (Errno::IO, false)]
        {
            assert_eq!(has_gone(&errno.into()), gone, "{errno}");
        }
    }

    #[test]
    fn processes_that_cannot_be_listed_are_an_error_and_not_none() {
        let error = Holders::look(Path::new("/nowhere")).unwrap_err();
        assert_eq!(error.to_string(), "cannot list the processes in /nowhere");
    }

    #[test]
    fn the_real_procfs_can_be_read() {
        assert_eq!(
            Holders::look(Path::new("/proc")).unwrap().of(&device("/dev/vfio/devices/vfio4095", None)),
            Vec::<&Holder>::new()
        );
    }
}
