//! The node's VFIO devices, as sysfs shows them. Read-only; the root is a parameter.
//!
//! ```text
//! /sys/class/vfio-dev/vfio0        -> .../0000:3b:00.0/0000:3b:00.2/vfio-dev/vfio0      (PCI)
//!                                  -> .../virtual/mtty/mtty/1111...-1111/vfio-dev/vfio0 (mediated)
//!   dev                            244:0, if the kernel has VFIO character devices
//!   device                         -> the device; its last component is the name
//!     driver                       -> .../drivers/mlx5_vfio_pci, .../bus/mdev/drivers/mtty
//!     subsystem                    -> .../bus/pci, .../bus/mdev
//!     iommu_group                  -> .../iommu_groups/12
//!     vendor, device               0x15b3, 0x101e (PCI; `vendor` of a mediated device is a directory)
//!     mdev_type                    -> ../mdev_supported_types/mtty-1 (mediated)
//! ```

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// A VFIO device of the node.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Device {
    /// PCI address, or UUID of a mediated device.
    pub name: String,
    /// Its folder in sysfs: `/sys/bus/pci/devices/0000:3b:00.2`, `/sys/bus/mdev/devices/<UUID>`.
    pub sysfs: PathBuf,
    /// The VFIO character device: `/dev/vfio/devices/vfio0`.
    pub cdev: PathBuf,
    /// Number of its IOMMU group, if it has one: the older way in is `/dev/vfio/<group>`.
    pub group: Option<u32>,
    /// The driver that is bound to it: `mlx5_vfio_pci`, `mtty`.
    pub driver: String,
    /// A device can take over the state of another one of the same model: PCI vendor:device (`15b3:101e`), or
    /// the type of a mediated device (`mtty-1`). On any other bus `bus:driver`.
    pub model: String,
}

/// The VFIO devices of a node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inventory {
    /// Sorted by name.
    pub devices: Vec<Device>,
    /// Devices that VFIO has, but that cannot be used: the reason for each.
    pub unusable: Vec<String>,
}

/// Why sysfs could not be read.
#[derive(Debug, thiserror::Error)]
#[error("cannot list the VFIO devices in {path}")]
pub struct ListDevicesError {
    /// The directory.
    pub path: PathBuf,
    source: io::Error,
}

/// Lists the VFIO devices of the node whose sysfs is at `sys`. A node without VFIO has none.
///
/// # Errors
/// If the class's directory is there and cannot be read.
pub fn vfio_devices(sys: &Path) -> Result<Inventory, ListDevicesError> {
    let class = sys.join("class/vfio-dev");
    let list_error = |source| ListDevicesError { path: class.clone(), source };
    let entries = match fs::read_dir(&class) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Inventory::default()),
        Err(error) => return Err(list_error(error)),
    };
    let mut inventory = Inventory::default();
    for entry in entries {
        let entry = entry.map_err(list_error)?;
        match read(&entry.path()) {
            Ok(device) => inventory.devices.push(device),
            // It has been unplugged since the directory was read, for certain.
            Err(_) if matches!(entry.path().try_exists(), Ok(false)) => {}
            Err(reason) => {
                inventory.unusable.push(format!("{}: {reason}", entry.file_name().display()));
            }
        }
    }
    inventory.devices.sort_by(|a, b| a.name.cmp(&b.name));
    inventory.unusable.sort();
    Ok(inventory)
}

/// Why a device of the class cannot be used.
#[derive(Debug, thiserror::Error)]
enum UnusableError {
    #[error("it has no character device: the kernel lacks CONFIG_VFIO_DEVICE_CDEV")]
    NoCdev,
    #[error("no driver is bound to it ({0})")]
    NoDriver(Box<Self>),
    #[error("{}: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{} has no name", path.display())]
    NoName { path: PathBuf },
    #[error("{}: `{group}` is not the number of an IOMMU group", path.display())]
    NotAGroup { path: PathBuf, group: String },
    #[error("{}: `{text}` is not a PCI id", path.display())]
    NotAPciId { path: PathBuf, text: String },
}

/// Reads one entry of the class.
fn read(entry: &Path) -> Result<Device, UnusableError> {
    let number = last(entry)?;
    let dev = entry.join("dev");
    if !dev.try_exists().map_err(|source| cannot_read(&dev, source))? {
        return Err(UnusableError::NoCdev);
    }
    let device = entry.join("device");
    let driver = link(&device.join("driver")).map_err(|error| UnusableError::NoDriver(Box::new(error)))?;
    let bus = link(&device.join("subsystem"))?;
    let model = match bus.as_str() {
        "pci" => format!("{}:{}", pci_id(&device.join("vendor"))?, pci_id(&device.join("device"))?),
        "mdev" => link(&device.join("mdev_type"))?,
        other => format!("{other}:{driver}"),
    };
    let name = link(&device)?;
    Ok(Device {
        sysfs: Path::new("/sys/bus").join(bus).join("devices").join(&name),
        name,
        cdev: Path::new("/dev/vfio/devices").join(number),
        group: group(&device.join("iommu_group"))?,
        driver,
        model,
    })
}

/// The device's group. None only if it has none: whoever has an unknown group open would not be seen.
fn group(path: &Path) -> Result<Option<u32>, UnusableError> {
    match link(path) {
        Ok(group) => {
            let number =
                group.parse().map_err(|_| UnusableError::NotAGroup { path: path.to_owned(), group })?;
            Ok(Some(number))
        }
        Err(UnusableError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// The last component of a link's target.
fn link(path: &Path) -> Result<String, UnusableError> {
    let target = fs::read_link(path).map_err(|source| cannot_read(path, source))?;
    last(&target)
}

fn last(path: &Path) -> Result<String, UnusableError> {
    let name = path.file_name().and_then(|name| name.to_str());
    name.map(str::to_owned).ok_or_else(|| UnusableError::NoName { path: path.to_owned() })
}

fn cannot_read(path: &Path, source: io::Error) -> UnusableError {
    UnusableError::Read { path: path.to_owned(), source }
}

/// A PCI id as `lspci -n` writes it: sysfs says 0x15b3.
fn pci_id(path: &Path) -> Result<String, UnusableError> {
    let text = fs::read_to_string(path).map_err(|source| cannot_read(path, source))?;
    let hex = text
        .trim()
        .strip_prefix("0x")
        .filter(|hex| hex.len() == 4 && hex.bytes().all(|b| b.is_ascii_hexdigit()));
    hex.map(str::to_ascii_lowercase)
        .ok_or_else(|| UnusableError::NotAPciId { path: path.to_owned(), text: text.trim().to_owned() })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// A tree in the shape of the kernel's: mediated devices as seen on 6.12 with mtty, PCI devices as
    /// sysfs-bus-pci has them.
    struct Sysfs(tempfile::TempDir);

    impl Sysfs {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            fs::create_dir_all(dir.path().join("class/vfio-dev")).unwrap();
            Self(dir)
        }

        fn root(&self) -> &Path {
            self.0.path()
        }

        /// A device at `path` below /sys/devices, on `bus`, with a driver, in VFIO as `vfio`.
        fn device(&self, path: &str, bus: &str, driver: Option<&str>, vfio: &str) -> PathBuf {
            let device = self.root().join("devices").join(path);
            fs::create_dir_all(device.join("vfio-dev").join(vfio)).unwrap();
            let up = "../".repeat(path.split('/').count() + 1);
            symlink(format!("{up}bus/{bus}"), device.join("subsystem")).unwrap();
            if let Some(driver) = driver {
                symlink(format!("{up}bus/{bus}/drivers/{driver}"), device.join("driver")).unwrap();
            }
            let name = path.rsplit('/').next().unwrap();
            let entry = device.join("vfio-dev").join(vfio);
            symlink(format!("../../../{name}"), entry.join("device")).unwrap();
            fs::write(entry.join("dev"), "244:0\n").unwrap();
            symlink(&entry, self.root().join("class/vfio-dev").join(vfio)).unwrap();
            device
        }

        fn mediated(&self, uuid: &str, mdev_type: &str, vfio: &str) {
            let device = self.device(&format!("virtual/mtty/mtty/{uuid}"), "mdev", Some("mtty"), vfio);
            symlink(format!("../mdev_supported_types/{mdev_type}"), device.join("mdev_type")).unwrap();
            symlink("../../../../../kernel/iommu_groups/7", device.join("iommu_group")).unwrap();
            fs::create_dir(device.join("vendor")).unwrap();
        }

        fn pci(&self, address: &str, driver: Option<&str>, vfio: &str) -> PathBuf {
            let device = self.device(&format!("pci0000:3a/0000:3a:00.0/{address}"), "pci", driver, vfio);
            fs::write(device.join("vendor"), "0x15b3\n").unwrap();
            fs::write(device.join("device"), "0x101e\n").unwrap();
            device
        }
    }

    #[test]
    fn mediated_and_pci_devices_are_listed_with_driver_and_model_in_the_order_of_their_names() {
        let sysfs = Sysfs::new();
        sysfs.mediated("22222222-2222-2222-2222-222222222222", "mtty-2", "vfio0");
        sysfs.mediated("11111111-1111-1111-1111-111111111111", "mtty-1", "vfio1");
        sysfs.pci("0000:3b:00.2", Some("mlx5_vfio_pci"), "vfio12");
        let found = vfio_devices(sysfs.root()).unwrap();
        assert_eq!(found.unusable, Vec::<String>::new());
        let lines: Vec<String> = found
            .devices
            .iter()
            .map(|d| format!("{} {} {:?} {} {}", d.name, d.cdev.display(), d.group, d.driver, d.model))
            .collect();
        assert_eq!(
            lines,
            [
                "0000:3b:00.2 /dev/vfio/devices/vfio12 None mlx5_vfio_pci 15b3:101e",
                "11111111-1111-1111-1111-111111111111 /dev/vfio/devices/vfio1 Some(7) mtty mtty-1",
                "22222222-2222-2222-2222-222222222222 /dev/vfio/devices/vfio0 Some(7) mtty mtty-2",
            ]
        );
    }

    #[test]
    fn an_unusable_device_is_listed_with_its_reason_and_does_not_hide_the_others() {
        let sysfs = Sysfs::new();
        sysfs.mediated("11111111-1111-1111-1111-111111111111", "mtty-1", "vfio0");
        sysfs.pci("0000:3b:00.2", None, "vfio1");
        let broken = sysfs.pci("0000:3b:00.3", Some("mlx5_vfio_pci"), "vfio2");
        fs::write(broken.join("vendor"), "15b3\n").unwrap();
        let no_cdev = sysfs.pci("0000:3b:00.4", Some("mlx5_vfio_pci"), "vfio3");
        fs::remove_file(no_cdev.join("vfio-dev/vfio3/dev")).unwrap();

        let found = vfio_devices(sysfs.root()).unwrap();
        assert_eq!(found.devices.len(), 1);
        let [unbound, bad_id, no_cdev] = found.unusable.as_slice() else { panic!("{:?}", found.unusable) };
        assert!(unbound.starts_with("vfio1: no driver is bound to it"), "{unbound}");
        assert!(bad_id.ends_with("`15b3` is not a PCI id"), "{bad_id}");
        assert_eq!(no_cdev, "vfio3: it has no character device: the kernel lacks CONFIG_VFIO_DEVICE_CDEV");
    }

    #[test]
    fn a_device_whose_group_or_entry_cannot_be_read_is_not_mistaken_for_one_without() {
        let sysfs = Sysfs::new();
        let no_link = sysfs.pci("0000:3b:00.2", Some("mlx5_vfio_pci"), "vfio0");
        fs::write(no_link.join("iommu_group"), "7").unwrap();
        let no_number = sysfs.pci("0000:3b:00.3", Some("mlx5_vfio_pci"), "vfio1");
        symlink("../../../../kernel/iommu_groups/seven", no_number.join("iommu_group")).unwrap();
        // A link to itself: ELOOP, and not ENOENT.
        symlink("vfio2", sysfs.root().join("class/vfio-dev/vfio2")).unwrap();
        let found = vfio_devices(sysfs.root()).unwrap();
        assert_eq!(found.devices, []);
        let [no_link, no_number, looped] = found.unusable.as_slice() else { panic!("{:?}", found.unusable) };
        assert!(no_link.starts_with("vfio0: ") && no_link.contains("iommu_group: "), "{no_link}");
        assert!(no_number.ends_with("`seven` is not the number of an IOMMU group"), "{no_number}");
        assert!(looped.starts_with("vfio2: "), "{looped}");
    }

    #[test]
    fn devices_that_cannot_be_listed_are_an_error_and_not_none() {
        let sysfs = tempfile::tempdir().unwrap();
        fs::create_dir(sysfs.path().join("class")).unwrap();
        fs::write(sysfs.path().join("class/vfio-dev"), "").unwrap();
        let error = vfio_devices(sysfs.path()).unwrap_err().to_string();
        assert!(error.starts_with("cannot list the VFIO devices in "), "{error}");
    }

    #[test]
    fn a_node_without_vfio_has_no_devices_and_a_device_that_vanishes_is_left_out() {
        let empty = tempfile::tempdir().unwrap();
        assert_eq!(vfio_devices(empty.path()).unwrap(), Inventory::default());
        let sysfs = Sysfs::new();
        symlink("nowhere", sysfs.root().join("class/vfio-dev/vfio0")).unwrap();
        assert_eq!(vfio_devices(sysfs.root()).unwrap(), Inventory::default());
    }
}
