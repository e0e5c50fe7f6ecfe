//! A VM's VFIO devices in QEMU's process: which descriptor is which device.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::{fs, io};

use slackwater_handover::state::MigrationState;

use super::super::{VmmDevice, VmmError};
use super::qmp::commands::QomGet;
use super::qmp::{QmpClient, VfioState};
use crate::host::devices::{ListDevicesError, vfio_devices};
use crate::vfio::borrow::GROUP_DEVICE;

/// The devices with these ids, in this order, and the descriptors by which QEMU holds them.
pub(super) async fn of(qmp: &QmpClient, pid: u32, ids: &[String]) -> Result<Vec<VmmDevice>, VmmError> {
    let mut named = Vec::with_capacity(ids.len());
    for id in ids {
        named.push((id.clone(), name(qmp, id).await?));
    }
    let open = tokio::task::spawn_blocking(move || open_devices(pid)).await;
    let open = open.map_err(|error| not_valid(&error))?.map_err(|error| not_valid(&error))?;
    assign(&named, open).map_err(|error| not_valid(&error))
}

fn not_valid(reason: &dyn ToString) -> VmmError {
    VmmError::Answer { call: "describe", reason: reason.to_string() }
}

/// Why QEMU's descriptors could not be listed.
#[derive(Debug, thiserror::Error)]
enum ListError {
    #[error("{}: {source}", folder.display())]
    Descriptors { folder: PathBuf, source: io::Error },
    #[error(transparent)]
    Devices(#[from] ListDevicesError),
}

/// Why a device of the VM has no descriptor.
#[derive(Debug, thiserror::Error)]
enum AssignError {
    #[error(
        "QEMU was given the devices `{}` by their descriptors alone, and does not say which is which: each needs \
         sysfsdev= or host= \
         beside fd=",
        ids.join("`, `")
    )]
    Ambiguous { ids: Vec<String> },
    #[error("QEMU has the device `{id}`, {}, but its process has no VFIO descriptor for \
        it", name.as_deref().unwrap_or("a device that it was given by its descriptor"))]
    NoDescriptor { id: String, name: Option<String> },
}

/// The device's name on the host, from `sysfsdev` or `host`, whichever QEMU was given. None if it was given a
/// descriptor.
async fn name(qmp: &QmpClient, id: &str) -> Result<Option<String>, VmmError> {
    for property in ["sysfsdev", "host"] {
        let path = format!("/machine/peripheral/{id}");
        let asked = qmp.execute(QomGet { path, property: property.to_owned() }).await;
        let value = asked.map_err(|error| match error {
            super::QmpError::Refused { class, desc, .. } => not_valid(&format!(
                "vmm.devices names `{id}`, and QEMU has no such VFIO device ({class}: {desc})"
            )),
            other => super::from_qmp("describe", other),
        })?;
        if let Some(name) = given(property, value.as_str().unwrap_or_default()) {
            return Ok(Some(name.to_owned()));
        }
    }
    Ok(None)
}

/// The name in the value of a property, if QEMU was given the property. A `host` that it was not given reads as
/// the address `ffff:ff:ff.f`, and no PCI device has a function above 7.
fn given<'a>(property: &str, value: &'a str) -> Option<&'a str> {
    let name = Path::new(value).file_name()?.to_str()?;
    let exists = property != "host" || name.ends_with(|function| ('0'..='7').contains(&function));
    exists.then_some(name)
}

/// The VFIO devices that a process has open.
#[derive(Debug, Default, PartialEq, Eq)]
struct Open {
    /// Character devices, by the device's name.
    named: BTreeMap<String, i32>,
    /// Those that were opened by a group.
    nameless: Vec<i32>,
}

fn open_devices(pid: u32) -> Result<Open, ListError> {
    let folder = PathBuf::from(format!("/proc/{pid}/fd"));
    let unreadable = |source| ListError::Descriptors { folder: folder.clone(), source };
    let mut links = Vec::new();
    for entry in fs::read_dir(&folder).map_err(unreadable)? {
        let entry = entry.map_err(unreadable)?;
        // It may have been closed meanwhile.
        let Ok(target) = fs::read_link(entry.path()) else { continue };
        let Some(number) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        links.push((number, target));
    }
    links.sort();
    let devices = vfio_devices(Path::new("/sys"))?.devices;
    let cdev =
        |target: &Path| devices.iter().find(|device| device.cdev == target).map(|device| device.name.clone());
    Ok(sort(&links, cdev))
}

fn sort(links: &[(i32, PathBuf)], device_of: impl Fn(&Path) -> Option<String>) -> Open {
    let mut open = Open::default();
    for (number, target) in links {
        if target.as_os_str() == GROUP_DEVICE {
            open.nameless.push(*number);
        } else if let Some(name) = device_of(target) {
            open.named.insert(name, *number);
        }
    }
    open
}

/// A device that was opened by a group gets any of those descriptors: only all of them together are
/// meaningful. A device that QEMU was given by its descriptor alone gets the one that is left; there may be
/// one such device.
fn assign(wanted: &[(String, Option<String>)], mut open: Open) -> Result<Vec<VmmDevice>, AssignError> {
    let nameless = wanted.iter().filter(|(_, name)| name.is_none());
    if nameless.clone().count() > 1 {
        return Err(AssignError::Ambiguous { ids: nameless.map(|(id, _)| id.clone()).collect() });
    }
    let known: Vec<&str> = wanted.iter().filter_map(|(_, name)| name.as_deref()).collect();
    let mut unclaimed: Vec<(i32, String)> = open
        .named
        .iter()
        .filter(|(name, _)| !known.contains(&name.as_str()))
        .map(|(name, number)| (*number, name.clone()))
        .collect();
    unclaimed.sort();
    let mut unclaimed = unclaimed.into_iter();
    open.nameless.reverse();
    let mut devices = Vec::with_capacity(wanted.len());
    for (id, name) in wanted {
        let found = match name {
            Some(name) => open
                .named
                .get(name)
                .copied()
                .or_else(|| open.nameless.pop())
                .map(|descriptor| (descriptor, name.clone())),
            None => unclaimed.next(),
        };
        let (descriptor, name) =
            found.ok_or_else(|| AssignError::NoDescriptor { id: id.clone(), name: name.clone() })?;
        devices.push(VmmDevice { name, descriptor, guest_address: id.clone() });
    }
    Ok(devices)
}

/// The kernel's state for QEMU's name of it.
pub(super) fn state(reported: &VfioState) -> Option<MigrationState> {
    Some(match reported {
        VfioState::Stop => MigrationState::Stop,
        VfioState::Running => MigrationState::Running,
        VfioState::StopCopy => MigrationState::StopCopy,
        VfioState::Resuming => MigrationState::Resuming,
        VfioState::RunningP2p => MigrationState::RunningP2p,
        VfioState::PreCopy => MigrationState::PreCopy,
        VfioState::PreCopyP2p => MigrationState::PreCopyP2p,
        VfioState::Other(_) => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_begins_like_no_address_is_one_and_an_address_that_was_not_given_is_none() {
        let mdev = "ffff2b1e-0000-4000-8000-00000000000f";
        let folder = format!("/sys/bus/mdev/devices/{mdev}");
        assert_eq!(given("sysfsdev", &folder), Some(mdev));
        assert_eq!(given("host", "ffff:03:00.7"), Some("ffff:03:00.7"));
        assert_eq!(given("host", "0000:03:00.1"), Some("0000:03:00.1"));
        assert_eq!(given("host", "ffff:ff:ff.f"), None);
        assert_eq!((given("host", ""), given("sysfsdev", "")), (None, None));
    }

    fn wanted(names: &[Option<&str>]) -> Vec<(String, Option<String>)> {
        names.iter().enumerate().map(|(n, name)| (format!("v{n}"), name.map(str::to_owned))).collect()
    }

    fn numbers(devices: Vec<VmmDevice>) -> Vec<(String, i32)> {
        devices.into_iter().map(|device| (device.name, device.descriptor)).collect()
    }

    #[test]
    fn links_are_sorted_by_their_targets() {
        let links = [(3, "/dev/kvm"), (7, "/dev/vfio/devices/vfio1"), (9, GROUP_DEVICE), (4, "socket:[1]")];
        let links = links.map(|(number, target)| (number, PathBuf::from(target)));
        let open = sort(&links, |path| path.ends_with("vfio1").then(|| "uuid-b".to_owned()));
        assert_eq!(open, Open { named: [("uuid-b".to_owned(), 7)].into(), nameless: vec![9] });
    }

    #[test]
    fn each_device_gets_its_own_descriptor_or_one_that_was_opened_by_a_group() {
        let open =
            || Open { named: [("a".to_owned(), 7), ("b".to_owned(), 6)].into(), nameless: vec![9, 10] };
        let found = assign(&wanted(&[Some("b"), Some("a")]), open()).unwrap();
        assert_eq!(numbers(found), [("b".to_owned(), 6), ("a".to_owned(), 7)]);
        let found = assign(&wanted(&[Some("c"), Some("d")]), open()).unwrap();
        assert_eq!(numbers(found), [("c".to_owned(), 9), ("d".to_owned(), 10)]);
        let found = assign(&wanted(&[None, Some("b")]), open()).unwrap();
        assert_eq!(numbers(found), [("a".to_owned(), 7), ("b".to_owned(), 6)]);
        let error = assign(&wanted(&[None, None]), open()).unwrap_err().to_string();
        assert!(error.contains("`v0`, `v1` by their descriptors alone"), "{error}");
    }

    #[test]
    fn a_device_without_a_descriptor_is_named() {
        let error = assign(&wanted(&[Some("a")]), Open::default()).unwrap_err().to_string();
        assert_eq!(error, "QEMU has the device `v0`, a, but its process has no VFIO descriptor for it");
    }
}
