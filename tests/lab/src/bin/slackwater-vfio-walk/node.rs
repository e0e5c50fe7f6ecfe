//! The devices of the node that this runs in.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use slackwater_handover::state::MigrationState;
use slackwater_node_agent::vfio::device::{DataRead, Device, MAX_READ_BYTES};
use slackwater_node_agent::vfio::kernel::KernelDevice;
use slackwater_node_agent::vfio::probe;

/// The character device of a device: /dev/vfio/devices/vfioN.
pub(crate) fn cdev(device: &str) -> Result<PathBuf> {
    let bus = ["mdev", "pci"].map(|bus| format!("/sys/bus/{bus}/devices/{device}/vfio-dev"));
    let folder = bus.iter().map(Path::new).find(|folder| folder.is_dir());
    let folder = folder.with_context(|| format!("{device} is no device bound to a VFIO driver"))?;
    let entry = fs::read_dir(folder)?.next().with_context(|| format!("{} is empty", folder.display()))??;
    Ok(Path::new("/dev/vfio/devices").join(entry.file_name()))
}

/// Opens a free device and binds it.
pub(crate) fn open(device: &str) -> Result<OwnedFd> {
    Ok(probe::open_bound(&cdev(device)?)?)
}

/// The same, reset to RUNNING: an mtty keeps the state that its last user left.
pub(crate) fn fresh(device: &str) -> Result<KernelDevice> {
    let mut fresh = KernelDevice::new(device, open(device)?)?;
    fresh.reset()?;
    Ok(fresh)
}

/// Reads a saving session until it is drained, or ends.
pub(crate) fn read_all(device: &mut dyn Device) -> Result<(Vec<u8>, DataRead)> {
    let mut all = Vec::new();
    loop {
        match device.read_data(MAX_READ_BYTES)? {
            DataRead::Data(data) => all.extend_from_slice(&data),
            end => return Ok((all, end)),
        }
    }
}

/// The whole state of a device, which is left in RUNNING.
pub(crate) fn save(device: &mut dyn Device) -> Result<Vec<u8>> {
    device.set_state(MigrationState::StopCopy)?;
    let (blob, _) = read_all(device)?;
    device.set_state(MigrationState::Running)?;
    Ok(blob)
}
