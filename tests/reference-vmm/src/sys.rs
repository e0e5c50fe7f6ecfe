//! The VMM's only unsafe code: the ioctls that hand memory to the kernel, and those of VFIO that no library
//! offers as needed (vfio-ioctls resets only what advertises a reset, which mtty does not, and swallows
//! errors of register accesses).

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use iommufd_bindings::iommufd::{
    iommu_ioas_map, iommufd_ioas_map_flags_IOMMU_IOAS_MAP_FIXED_IOVA as FIXED_IOVA,
    iommufd_ioas_map_flags_IOMMU_IOAS_MAP_READABLE as READABLE,
    iommufd_ioas_map_flags_IOMMU_IOAS_MAP_WRITEABLE as WRITEABLE,
};
use iommufd_ioctls::IommuFd;
use kvm_bindings::{kvm_userspace_memory_region, kvm_xsave};
use kvm_ioctls::{VcpuFd, VmFd};
use rustix::ioctl::{NoArg, Opcode, Updater, ioctl, opcode};
use vfio_bindings::bindings::vfio::{
    vfio_device_attach_iommufd_pt, vfio_device_bind_iommufd, vfio_region_info,
};

use super::ram::GuestRam;

/// A VM with one vCPU whose memory is `ram`. It holds the RAM: the kernel writes there for as long as either
/// descriptor is open.
#[derive(Debug)]
pub(super) struct VmOnRam {
    vcpu: VcpuFd,
    vm: VmFd,
    ram: Arc<GuestRam>,
}

impl VmOnRam {
    /// Gives `vm` a vCPU and, from guest physical address 0 on, `ram`.
    pub(super) fn new(vm: VmFd, ram: Arc<GuestRam>) -> Result<Self, kvm_ioctls::Error> {
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: ram.bytes(),
            userspace_addr: ram.address() as u64,
        };
        // SAFETY: the address and size are those of a mapping that lives as long as `ram`, of which the value
        // returned keeps a reference until both descriptors are closed (fields are dropped in the order of
        // their declaration). No Rust reference into the mapping exists anywhere: GuestRam is accessed
        // through its descriptor.
        unsafe { vm.set_user_memory_region(region) }?;
        let vcpu = vm.create_vcpu(0)?;
        Ok(Self { vcpu, vm, ram })
    }

    pub(super) fn vcpu(&mut self) -> &mut VcpuFd {
        &mut self.vcpu
    }

    pub(super) fn vm(&self) -> &VmFd {
        &self.vm
    }

    pub(super) fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// KVM_SET_XSAVE.
    pub(super) fn set_xsave(&self, xsave: &kvm_xsave) -> Result<(), kvm_ioctls::Error> {
        // SAFETY: the kernel reads more than `kvm_xsave` has only if a dynamic feature (AMX) has been enabled
        // for this process by arch_prctl, which this program does not do.
        unsafe { self.vcpu.set_xsave(xsave) }
    }
}

/// Guest RAM as the devices see it: all of it, at IOVA = guest physical address. Holds the RAM.
pub(super) struct DeviceMemory {
    iommufd: IommuFd,
    ioas: u32,
    _ram: Arc<GuestRam>,
}

impl DeviceMemory {
    /// Maps `ram` into the address space `ioas` of `iommufd`.
    pub(super) fn new(
        iommufd: IommuFd,
        ioas: u32,
        ram: Arc<GuestRam>,
    ) -> Result<Self, iommufd_ioctls::IommufdError> {
        let map = iommu_ioas_map {
            size: size_of::<iommu_ioas_map>() as u32,
            flags: FIXED_IOVA | READABLE | WRITEABLE,
            ioas_id: ioas,
            user_va: ram.address() as u64,
            length: ram.bytes(),
            iova: 0,
            ..Default::default()
        };
        // Not marked unsafe by its crate, but devices write there: the address and size are those of a
        // mapping that lives as long as `ram`, of which the value returned keeps a reference until the
        // iommufd is closed.
        iommufd.map_iommu_ioas(&map)?;
        Ok(Self { iommufd, ioas, _ram: ram })
    }

    /// Binds the device to the iommufd and attaches it to the RAM.
    pub(super) fn attach(&self, device: BorrowedFd<'_>) -> io::Result<()> {
        const BIND: Opcode = opcode::none(VFIO_TYPE, VFIO_BASE + 18);
        const ATTACH: Opcode = opcode::none(VFIO_TYPE, VFIO_BASE + 19);
        let mut bind = vfio_device_bind_iommufd {
            argsz: size_of::<vfio_device_bind_iommufd>() as u32,
            iommufd: self.iommufd.as_raw_fd(),
            ..Default::default()
        };
        let mut attach = vfio_device_attach_iommufd_pt {
            argsz: size_of::<vfio_device_attach_iommufd_pt>() as u32,
            pt_id: self.ioas,
            ..Default::default()
        };
        // SAFETY: VFIO_DEVICE_BIND_IOMMUFD reads and writes a vfio_device_bind_iommufd, which `argsz`
        // delimits.
        unsafe { ioctl(device, Updater::<BIND, _>::new(&mut bind)) }?;
        // SAFETY: VFIO_DEVICE_ATTACH_IOMMUFD_PT reads and writes a vfio_device_attach_iommufd_pt, which
        // `argsz` delimits.
        unsafe { ioctl(device, Updater::<ATTACH, _>::new(&mut attach)) }?;
        Ok(())
    }
}

// include/uapi/linux/vfio.h: VFIO's ioctls carry neither direction nor size, _IO(VFIO_TYPE, VFIO_BASE + n).
const VFIO_TYPE: u8 = b';';
const VFIO_BASE: u8 = 100;

/// A region of a VFIO device, as its descriptor shows it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Region {
    /// Where it begins in the descriptor.
    pub(super) offset: u64,
    pub(super) bytes: u64,
}

/// VFIO_DEVICE_GET_REGION_INFO of region `index`.
pub(super) fn region(device: BorrowedFd<'_>, index: u32) -> io::Result<Region> {
    const REGION_INFO: Opcode = opcode::none(VFIO_TYPE, VFIO_BASE + 8);
    let mut info =
        vfio_region_info { argsz: size_of::<vfio_region_info>() as u32, index, ..Default::default() };
    // SAFETY: VFIO_DEVICE_GET_REGION_INFO reads and writes a vfio_region_info, and capabilities behind it
    // only within `argsz`.
    unsafe { ioctl(device, Updater::<REGION_INFO, _>::new(&mut info)) }?;
    Ok(Region { offset: info.offset, bytes: info.size })
}

/// VFIO_DEVICE_RESET.
pub(super) fn reset(device: BorrowedFd<'_>) -> io::Result<()> {
    const RESET: Opcode = opcode::none(VFIO_TYPE, VFIO_BASE + 11);
    // SAFETY: VFIO_DEVICE_RESET takes no argument.
    unsafe { ioctl(device, NoArg::<RESET>::new()) }?;
    Ok(())
}
