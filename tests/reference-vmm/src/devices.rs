//! The VM's VFIO devices: opened by cdev, bound to one iommufd, with guest RAM mapped to them.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use iommufd_bindings::iommufd::iommu_ioas_alloc;
use iommufd_ioctls::{IommuFd, IommufdError};
use rustix::fs::{major, minor};
use vfio_bindings::bindings::vfio::VFIO_PCI_BAR0_REGION_INDEX;

use super::bus::Registers;
use super::ram::GuestRam;
use super::sys::{self, DeviceMemory, Region};

/// Why the devices could not be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DevicesError {
    /// No iommufd, or no address space in it.
    #[error("cannot set up an I/O address space in /dev/iommu")]
    AllocateAddressSpace(#[source] IommufdError),
    /// Guest RAM could not be mapped.
    #[error("cannot map guest RAM for the devices")]
    MapRam(#[source] IommufdError),
    /// The device's cdev could not be opened.
    #[error("cannot open {}", path.display())]
    Open {
        /// The cdev.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The device could not be found in sysfs.
    #[error("cannot find out which device {} is", path.display())]
    FindName {
        /// The cdev.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The device is in use (EINVAL: its cdev is bound already), or does not take the address space.
    #[error("cannot bind device {name} to the iommufd; is it in use?")]
    Bind {
        /// The device.
        name: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The device did not describe its registers.
    #[error("cannot read where the registers of device {name} are")]
    FindRegisters {
        /// The device.
        name: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The device did not reset.
    #[error("cannot reset device {name}")]
    Reset {
        /// The device.
        name: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// An open device, bound to an iommufd. Migration ioctls work on its descriptor. Closing it leaves its state
/// as it is.
#[derive(Debug)]
pub struct VfioDevice {
    file: File,
    name: String,
    registers: Region,
}

impl VfioDevice {
    /// PCI address, or UUID of a mediated device.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The number of its descriptor in this process.
    pub fn descriptor(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    fn open(path: &Path, memory: &DeviceMemory) -> Result<Self, DevicesError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .map_err(|source| DevicesError::Open { path: path.to_owned(), source })?;
        let name =
            name_of(&file).map_err(|source| DevicesError::FindName { path: path.to_owned(), source })?;
        memory.attach(file.as_fd()).map_err(|source| DevicesError::Bind { name: name.clone(), source })?;
        let registers = sys::region(file.as_fd(), VFIO_PCI_BAR0_REGION_INDEX)
            .map_err(|source| DevicesError::FindRegisters { name: name.clone(), source })?;
        Ok(Self { file, name, registers })
    }
}

/// The name of the device's directory in sysfs, found by the cdev's number.
fn name_of(cdev: &File) -> io::Result<String> {
    let number = cdev.metadata()?.rdev();
    let link = format!("/sys/dev/char/{}:{}/device", major(number), minor(number));
    let device = fs::canonicalize(link)?;
    let name = device.file_name().and_then(|name| name.to_str());
    Ok(name.ok_or(io::ErrorKind::InvalidData)?.to_owned())
}

impl Registers for VfioDevice {
    fn bytes(&self) -> u64 {
        self.registers.bytes
    }
    fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(data, self.registers.offset + offset)
    }
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.file.write_all_at(data, self.registers.offset + offset)
    }
}

/// All devices of the VM.
pub struct Devices {
    list: Vec<Arc<VfioDevice>>,
    _memory: DeviceMemory,
}

impl Devices {
    /// Opens the devices at these cdevs, in this order, and maps `ram` to them.
    ///
    /// With `reset`, each is reset: its migration state is RUNNING then, independent of its previous use.
    /// Without it, the devices keep their state.
    ///
    /// # Errors
    /// The first failure. All devices are closed again then.
    pub fn open(cdevs: &[PathBuf], ram: &Arc<GuestRam>, reset: bool) -> Result<Self, DevicesError> {
        let iommufd = IommuFd::new().map_err(DevicesError::AllocateAddressSpace)?;
        let mut ioas = iommu_ioas_alloc { size: size_of::<iommu_ioas_alloc>() as u32, ..Default::default() };
        iommufd.alloc_iommu_ioas(&mut ioas).map_err(DevicesError::AllocateAddressSpace)?;
        let memory =
            DeviceMemory::new(iommufd, ioas.out_ioas_id, Arc::clone(ram)).map_err(DevicesError::MapRam)?;
        let list = cdevs
            .iter()
            .map(|cdev| VfioDevice::open(cdev, &memory).map(Arc::new))
            .collect::<Result<Vec<_>, _>>()?;
        if reset {
            for device in &list {
                sys::reset(device.file.as_fd())
                    .map_err(|source| DevicesError::Reset { name: device.name.clone(), source })?;
            }
        }
        Ok(Self { list, _memory: memory })
    }

    /// The devices, in the order of `cdevs`.
    pub fn list(&self) -> &[Arc<VfioDevice>] {
        &self.list
    }
}
