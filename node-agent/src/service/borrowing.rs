//! The devices of a VM, borrowed from its VMM.

use std::io;

use slackwater_handover::{Failure, Reason};

use crate::faults;
use crate::vfio::borrow::BorrowError;
use crate::vfio::error::DeviceError;
use crate::vfio::kernel::KernelDevice;
use crate::vfio::worker::DeviceHandle;
use crate::vmm::{Description, LocalVmm, VmmDevice};

/// Why a VM's device could not be borrowed.
#[derive(Debug, thiserror::Error)]
pub(super) enum BorrowDeviceError {
    /// The VMM has no such descriptor.
    #[error(transparent)]
    Borrow(#[from] BorrowError),
    /// Its driver has no migration.
    #[error(transparent)]
    Features(#[from] DeviceError),
    /// No thread.
    #[error("{device}: no thread could be started to serve it: {source}")]
    Serve {
        /// The device.
        device: String,
        /// What the kernel said.
        source: io::Error,
    },
}

impl From<BorrowDeviceError> for Failure {
    fn from(error: BorrowDeviceError) -> Self {
        Self::new(Reason::DeviceFailed, error.to_string())
    }
}

/// Borrows one device.
///
/// # Errors
/// If the VMM has no such descriptor, or its driver has no migration.
pub(super) fn device(vmm: &dyn LocalVmm, device: &VmmDevice) -> Result<KernelDevice, BorrowDeviceError> {
    let descriptor = vmm.process().borrow(device.descriptor, &device.name)?;
    Ok(KernelDevice::new(device.name.as_str(), descriptor)?)
}

/// Borrows all devices of a VM, in its order, each with a worker of its own.
///
/// # Errors
/// For the first device that cannot be borrowed. Nothing stays borrowed then.
pub(super) fn devices(
    vmm: &dyn LocalVmm,
    description: &Description,
) -> Result<Vec<DeviceHandle>, BorrowDeviceError> {
    let mut handles = Vec::with_capacity(description.devices.len());
    for used in &description.devices {
        let borrowed = device(vmm, used)?;
        let handle = DeviceHandle::serve(Box::new(faults::serve_device(borrowed)))
            .map_err(|source| BorrowDeviceError::Serve { device: used.name.clone(), source })?;
        handles.push(handle);
    }
    Ok(handles)
}
