//! Which processes hold which VFIO device open, as procfs shows it. Read-only; the root is a parameter.
//!
//! A descriptor is recognized by the end of its link in `/proc/<pid>/fd`: `vfio/devices/vfio0`, or `vfio/12`
//! for a whole group. The beginning is ignored: a process in a container may have its /dev elsewhere.
//! Processes that the agent may not read are skipped, so the answer is complete only for an agent with
//! CAP_SYS_PTRACE.

use std::collections::BTreeMap;
use std::path::Path;
use std::{fmt, fs};

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
pub struct Holders(BTreeMap<Held, Vec<Holder>>);

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Held {
    /// `vfio0`
    Cdev(String),
    /// 12
    Group(u32),
}

impl Holders {
    /// Reads all processes of the procfs at `proc`. One that ends meanwhile is skipped.
    pub fn look(proc: &Path) -> Self {
        let mut held: BTreeMap<Held, Vec<Holder>> = BTreeMap::new();
        for process in fs::read_dir(proc).into_iter().flatten().flatten() {
            let Some(pid) = process.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            let descriptors = fs::read_dir(process.path().join("fd")).into_iter().flatten().flatten();
            let opened =
                descriptors.filter_map(|descriptor| held_by(&fs::read_link(descriptor.path()).ok()?));
            for what in opened {
                let command = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
                held.entry(what).or_default().push(Holder { pid, command: command.trim_end().to_owned() });
            }
        }
        Self(held)
    }

    /// The processes that hold the device, or its whole group, in the order of their ids.
    pub fn of(&self, device: &Device) -> Vec<&Holder> {
        let cdev = device.cdev.file_name().and_then(|name| name.to_str());
        let keys = [cdev.map(|name| Held::Cdev(name.to_owned())), device.group.map(Held::Group)];
        let mut holders: Vec<_> =
            keys.iter().flatten().filter_map(|held| self.0.get(held)).flatten().collect();
        holders.sort();
        holders.dedup();
        holders
    }
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
    use std::path::PathBuf;

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

        let holders = Holders::look(proc.path());
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
    fn the_real_procfs_can_be_read() {
        assert_eq!(
            Holders::look(Path::new("/proc")).of(&device("/dev/vfio/devices/vfio4095", None)),
            Vec::<&Holder>::new()
        );
    }
}
