//! The devices of a VM, borrowed from its VMM.

use slackwater_handover::{Failure, Reason};

use crate::faults;
use crate::vfio::kernel::KernelDevice;
use crate::vfio::worker::DeviceHandle;
use crate::vmm::{Description, LocalVmm, VmmDevice};

/// Borrows one device.
///
/// # Errors
/// In words: the VMM has no such descriptor, or its driver has no migration.
pub(super) fn device(vmm: &dyn LocalVmm, device: &VmmDevice) -> Result<KernelDevice, String> {
    let descriptor =
        vmm.process().borrow(device.descriptor, &device.name).map_err(|error| error.to_string())?;
    KernelDevice::new(device.name.as_str(), descriptor).map_err(|error| error.to_string())
}

/// Borrows all devices of a VM, in its order, each with a worker of its own.
///
/// # Errors
/// DeviceFailed, in words. Nothing stays borrowed then.
pub(super) fn devices(vmm: &dyn LocalVmm, description: &Description) -> Result<Vec<DeviceHandle>, Failure> {
    let failed = |why: String| Failure::new(Reason::DeviceFailed, why);
    let mut handles = Vec::with_capacity(description.devices.len());
    for named in &description.devices {
        let borrowed = device(vmm, named).map_err(failed)?;
        let handle = DeviceHandle::serve(Box::new(faults::serve_device(borrowed))).map_err(|error| {
            failed(format!("{}: no thread could be started to serve it: {error}", named.name))
        })?;
        handles.push(handle);
    }
    Ok(handles)
}
