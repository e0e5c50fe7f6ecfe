//! The ioctls of VFIO migration v2, and the only unsafe code of the agent: one more call is [`close_on_exec`].
//! Each ioctl is a safe function over
//! a borrowed descriptor that returns what the kernel answered, and decides nothing.
//!
//! Source: include/uapi/linux/vfio.h of the kernel. On a character device each one but [`bind_iommufd`] gives
//! EINVAL before the device has been bound.

#![allow(unsafe_code)]

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use rustix::io::Errno;
use rustix::ioctl::{NoArg, Opcode, Updater, ioctl, opcode};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use vfio_bindings::bindings::vfio::{
    VFIO_BASE, VFIO_DEVICE_FEATURE_GET, VFIO_DEVICE_FEATURE_MIG_DATA_SIZE,
    VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE, VFIO_DEVICE_FEATURE_MIGRATION, VFIO_DEVICE_FEATURE_SET,
    VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_DATA_NONE, VFIO_PCI_INTX_IRQ_INDEX, VFIO_TYPE,
    vfio_device_bind_iommufd, vfio_device_feature_mig_data_size, vfio_device_feature_mig_state,
    vfio_device_feature_migration, vfio_irq_set, vfio_precopy_info,
};

use super::device::PrecopyInfo;

/// Closes a descriptor of this process when it executes another program. It need not be open.
///
/// # Errors
/// What the kernel answered.
pub(crate) fn close_on_exec(number: RawFd) -> io::Result<()> {
    // SAFETY: it is used for this one call, which touches no memory and changes a flag of the number alone.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    match rustix::io::fcntl_setfd(borrowed, rustix::io::FdFlags::CLOEXEC) {
        Ok(()) | Err(Errno::BADF) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// An ioctl of VFIO: `_IO(VFIO_TYPE, VFIO_BASE + offset)`.
const fn vfio(offset: u8) -> Opcode {
    opcode::none(VFIO_TYPE, VFIO_BASE as u8 + offset)
}

const DEVICE_SET_IRQS: Opcode = vfio(10);
const DEVICE_RESET: Opcode = vfio(11);
const DEVICE_FEATURE: Opcode = vfio(17);
const DEVICE_BIND_IOMMUFD: Opcode = vfio(18);
/// On the data descriptor, not the device's.
const MIG_GET_PRECOPY_INFO: Opcode = vfio(21);

/// `struct vfio_device_feature` with the payload that its `flags` name behind it.
#[repr(C)]
#[derive(Clone, Copy)]
struct FeatureCall<T> {
    argsz: u32,
    flags: u32,
    data: T,
}

/// `argsz` of a structure: its size, which is a few dozen bytes.
const fn argsz<T>() -> u32 {
    size_of::<T>() as u32
}

/// VFIO_DEVICE_FEATURE: `flags` is the feature's number and GET or SET.
///
/// # Safety
/// `T` is the kernel's structure for the feature in `flags`, plain integers without pointers into this
/// process.
unsafe fn feature<T>(device: BorrowedFd<'_>, flags: u32, data: T) -> Result<T, Errno> {
    let mut call = FeatureCall { argsz: argsz::<FeatureCall<T>>(), flags, data };
    // SAFETY: the kernel reads and writes at most `argsz` bytes at the address of `call`, which is that large
    // and lives until the ioctl has returned. By the contract of this function every bit pattern that it
    // writes is a `T`.
    unsafe { ioctl(device, Updater::<DEVICE_FEATURE, _>::new(&mut call)) }?;
    Ok(call.data)
}

/// The flags that the driver advertises (VFIO_DEVICE_FEATURE_MIGRATION). ENOTTY: it has no migration.
pub(super) fn migration_flags(device: BorrowedFd<'_>) -> Result<u64, Errno> {
    let flags = VFIO_DEVICE_FEATURE_MIGRATION | VFIO_DEVICE_FEATURE_GET;
    // SAFETY: the structure is this feature's, and consists of one integer.
    unsafe { feature(device, flags, vfio_device_feature_migration::default()) }.map(|data| data.flags)
}

/// The number of the state that the device is in (VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE, GET).
pub(super) fn mig_state(device: BorrowedFd<'_>) -> Result<u32, Errno> {
    let flags = VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE | VFIO_DEVICE_FEATURE_GET;
    let data = vfio_device_feature_mig_state { device_state: 0, data_fd: -1 };
    // SAFETY: the structure is this feature's, and consists of two integers.
    unsafe { feature(device, flags, data) }.map(|data| data.device_state)
}

/// Asks for a state (VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE, SET). Gives the data stream, if the change has
/// opened one. After an error the device may be in any state along the path.
pub(super) fn set_mig_state(device: BorrowedFd<'_>, state: u32) -> Result<Option<OwnedFd>, Errno> {
    let flags = VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE | VFIO_DEVICE_FEATURE_SET;
    let data = vfio_device_feature_mig_state { device_state: state, data_fd: -1 };
    // SAFETY: the structure is this feature's, and consists of two integers.
    let data_fd = unsafe { feature(device, flags, data) }?.data_fd;
    // SAFETY: after a success a number that is not negative is a descriptor that the kernel has just made for
    // this call, so no other code owns it.
    Ok((data_fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(data_fd) }))
}

/// The estimated bytes of the device's state (VFIO_DEVICE_FEATURE_MIG_DATA_SIZE).
pub(super) fn mig_data_bytes(device: BorrowedFd<'_>) -> Result<u64, Errno> {
    let flags = VFIO_DEVICE_FEATURE_MIG_DATA_SIZE | VFIO_DEVICE_FEATURE_GET;
    // SAFETY: the structure is this feature's, and consists of one integer.
    unsafe { feature(device, flags, vfio_device_feature_mig_data_size::default()) }
        .map(|data| data.stop_copy_length)
}

/// What is left to pre-copy (VFIO_MIG_GET_PRECOPY_INFO, on the data descriptor).
pub(super) fn precopy_info(data_stream: BorrowedFd<'_>) -> Result<PrecopyInfo, Errno> {
    let mut info = vfio_precopy_info { argsz: argsz::<vfio_precopy_info>(), ..Default::default() };
    // SAFETY: the kernel reads and writes at most `argsz` bytes at the address of `info`, which is that
    // large, consists of integers, and lives until the ioctl has returned.
    unsafe { ioctl(data_stream, Updater::<MIG_GET_PRECOPY_INFO, _>::new(&mut info)) }?;
    Ok(PrecopyInfo { initial_bytes: info.initial_bytes, dirty_bytes: info.dirty_bytes })
}

/// Signals the device's INTx to its listener, as if the device had raised it (VFIO_DEVICE_SET_IRQS,
/// ACTION_TRIGGER). EINVAL: no process listens for an INTx of the device.
pub(super) fn trigger_intx(device: BorrowedFd<'_>) -> Result<(), Errno> {
    let mut call = vfio_irq_set {
        argsz: argsz::<vfio_irq_set>(),
        flags: VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_TRIGGER,
        index: VFIO_PCI_INTX_IRQ_INDEX,
        start: 0,
        count: 1,
        ..Default::default()
    };
    // SAFETY: the kernel reads at most `argsz` bytes at the address of `call`, which is that large, and lives
    // until the ioctl has returned. Without data none are read behind it.
    unsafe { ioctl(device, Updater::<DEVICE_SET_IRQS, _>::new(&mut call)) }
}

/// Resets the device (VFIO_DEVICE_RESET), to RUNNING.
pub(super) fn reset(device: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: the ioctl takes no argument.
    unsafe { ioctl(device, NoArg::<DEVICE_RESET>::new()) }
}

/// Binds an opened character device to an iommufd (VFIO_DEVICE_BIND_IOMMUFD), which makes it usable. The
/// device keeps a reference to the iommufd. EINVAL or EBUSY: another process has bound the device.
pub(super) fn bind_iommufd(device: BorrowedFd<'_>, iommufd: BorrowedFd<'_>) -> Result<(), Errno> {
    let mut bind = vfio_device_bind_iommufd {
        argsz: argsz::<vfio_device_bind_iommufd>(),
        flags: 0,
        iommufd: iommufd.as_raw_fd(),
        out_devid: 0,
        token_uuid_ptr: 0,
    };
    // SAFETY: the kernel reads and writes at most `argsz` bytes at the address of `bind`, which is that
    // large, and lives until the ioctl has returned. The one pointer in it is used only with a flag that is
    // not set.
    unsafe { ioctl(device, Updater::<DEVICE_BIND_IOMMUFD, _>::new(&mut bind)) }
}

/// Lets the tokio runtime in which it is called watch a descriptor for becoming readable.
///
/// # Panics
/// Outside a tokio runtime.
pub(super) fn watch_readable(descriptor: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is the same open descriptor until it is dropped, which the `AsyncFd` does only
    // after it has taken it out of the runtime.
    unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE) }.map_err(io::Error::from)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn the_numbers_are_those_of_the_header() {
        assert_eq!(DEVICE_SET_IRQS, 0x3b6e);
        assert_eq!(DEVICE_RESET, 0x3b6f);
        assert_eq!(DEVICE_FEATURE, 0x3b75);
        assert_eq!(DEVICE_BIND_IOMMUFD, 0x3b76);
        assert_eq!(MIG_GET_PRECOPY_INFO, 0x3b79);
    }

    #[test]
    fn a_payload_lies_eight_bytes_behind_the_header_as_in_the_kernels_structure() {
        assert_eq!(std::mem::offset_of!(FeatureCall<vfio_device_feature_migration>, data), 8);
        assert_eq!(std::mem::offset_of!(FeatureCall<vfio_device_feature_mig_state>, data), 8);
        assert_eq!(argsz::<FeatureCall<vfio_device_feature_migration>>(), 16);
        assert_eq!(argsz::<FeatureCall<vfio_device_feature_mig_state>>(), 16);
        assert_eq!(argsz::<vfio_precopy_info>(), 24);
        assert_eq!(argsz::<vfio_irq_set>(), 20);
    }

    #[test]
    fn a_file_that_is_not_a_vfio_device_answers_enotty() {
        let null = std::fs::File::open("/dev/null").unwrap();
        let fd = null.as_fd();
        assert_eq!(migration_flags(fd), Err(Errno::NOTTY));
        assert_eq!(mig_state(fd), Err(Errno::NOTTY));
        assert_eq!(set_mig_state(fd, 1).unwrap_err(), Errno::NOTTY);
        assert_eq!(mig_data_bytes(fd), Err(Errno::NOTTY));
        assert_eq!(precopy_info(fd), Err(Errno::NOTTY));
        assert_eq!(trigger_intx(fd), Err(Errno::NOTTY));
        assert_eq!(reset(fd), Err(Errno::NOTTY));
        assert_eq!(bind_iommufd(fd, fd), Err(Errno::NOTTY));
    }
}
