//! The devices of a VM, borrowed from its VMM.

use std::io;
use std::sync::Arc;
use std::thread;

use futures::future::try_join_all;
use parking_lot::Mutex;
use slackwater_handover::state::MigrationState;
use slackwater_handover::{Failure, Reason};
use tokio::sync::{oneshot, watch};
use tokio::time::timeout;

use super::asking::ANSWER_LIMIT;

use crate::faults;
use crate::vfio::borrow::BorrowError;
use crate::vfio::error::DeviceError;
use crate::vfio::kernel::KernelDevice;
use crate::vfio::worker::{CallWatch, DeviceHandle, Hang};
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
    /// The kernel does not return.
    #[error(
        "one of the devices {devices} hangs: the kernel has not returned from taking them out of the VMM's \
         process for {} s", ANSWER_LIMIT.as_secs()
    )]
    Hangs {
        /// Their names.
        devices: String,
    },
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
        let reason = match error {
            BorrowDeviceError::Hangs { .. } => Reason::DeviceHangs,
            _ => Reason::DeviceFailed,
        };
        Self::new(reason, error.to_string())
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

/// The devices that are borrowed now, so that the inventory can tell which of them hang, and when one that has
/// hung is free after all.
#[derive(Debug, Default)]
pub(super) struct Borrowed {
    watches: Mutex<Vec<CallWatch>>,
    /// Counts those that have been closed.
    closed: watch::Sender<u64>,
}

impl Borrowed {
    pub(super) fn add(self: &Arc<Self>, handle: &DeviceHandle) {
        let mut watches = self.watches.lock();
        watches.retain(|watch| !watch.is_closed());
        watches.push(handle.watch());
        let (watch, borrowed) = (handle.watch(), Arc::downgrade(self));
        tokio::spawn(async move {
            watch.closed().await;
            if let Some(borrowed) = borrowed.upgrade() {
                borrowed.closed.send_modify(|count| *count += 1);
            }
        });
    }

    /// Changes when a device has been closed.
    pub(super) fn closings(&self) -> watch::Receiver<u64> {
        self.closed.subscribe()
    }

    /// The call to this device that hangs, if there is one.
    pub(super) fn hangs(&self, device: &str) -> Option<Hang> {
        self.watches.lock().iter().filter(|watch| watch.name() == device).find_map(CallWatch::hangs_now)
    }
}

/// Borrows all devices of a VM, in its order, each with a worker of its own.
///
/// # Errors
/// For the first device that cannot be borrowed. Nothing stays borrowed then.
pub(super) async fn devices(
    vmm: &Arc<dyn LocalVmm>,
    description: &Description,
    borrowed: &Arc<Borrowed>,
) -> Result<Vec<DeviceHandle>, BorrowDeviceError> {
    let (vmm, used) = (Arc::clone(vmm), description.devices.clone());
    let names: Vec<&str> = description.devices.iter().map(|device| device.name.as_str()).collect();
    let names = names.join(", ");
    let (give, mut taken) = oneshot::channel();
    // Its question to the driver may hang: nothing waits for the thread longer than it may.
    let thread = thread::Builder::new().name("borrow".to_owned()).spawn(move || {
        let serve = |used: &VmmDevice| {
            let borrowed = device(vmm.as_ref(), used)?;
            DeviceHandle::serve(Box::new(faults::serve_device(borrowed)))
                .map_err(|source| BorrowDeviceError::Serve { device: used.name.clone(), source })
        };
        let _ = give.send(used.iter().map(serve).collect::<Result<Vec<_>, _>>());
    });
    thread.map_err(|source| BorrowDeviceError::Serve { device: names.clone(), source })?;
    match timeout(ANSWER_LIMIT, &mut taken).await {
        Ok(Ok(handles)) => {
            let handles = handles?;
            handles.iter().for_each(|handle| borrowed.add(handle));
            Ok(handles)
        }
        Ok(Err(_)) => Err(BorrowDeviceError::Hangs { devices: names }),
        Err(_) => {
            // They are closed as soon as they have been taken, and whoever waits for them hears of it.
            let borrowed = Arc::clone(borrowed);
            tokio::spawn(async move {
                if let Ok(Ok(late)) = taken.await {
                    late.iter().for_each(|handle| borrowed.add(handle));
                }
            });
            Err(BorrowDeviceError::Hangs { devices: names })
        }
    }
}

/// The state of each device, in the same order.
///
/// # Errors
/// For the first that does not say it in time, or cannot.
pub(super) async fn states(devices: &[DeviceHandle]) -> Result<Vec<MigrationState>, Failure> {
    let state = |device: &DeviceHandle| {
        let (name, device) = (device.name().to_owned(), device.clone());
        async move {
            match timeout(ANSWER_LIMIT, device.state()).await {
                Ok(state) => state.map_err(|error| Failure::new(Reason::DeviceFailed, error.to_string())),
                Err(_) => {
                    let message =
                        format!("device {name} hangs: it has not said its state for {ANSWER_LIMIT:?}");
                    Err(Failure::new(Reason::DeviceHangs, message))
                }
            }
        }
    };
    try_join_all(devices.iter().map(state)).await
}
