//! The names of the faults, and of the variable that names their file. `node-agent/check-release` reads the
//! strings from this file, and checks that no release program contains one of them.

/// The environment variable with the path of the file of faults.
pub(super) const FILE: &str = "SLACKWATER_FAULTS_FILE";
/// The source halts in a phase.
pub(super) const HALT_SOURCE: &str = "halt.source";
/// The destination halts in a phase.
pub(super) const HALT_DESTINATION: &str = "halt.destination";
/// A call to a device fails.
pub(super) const DEVICE_ERROR: &str = "device.error";
/// A call to a device takes longer.
pub(super) const DEVICE_HANG: &str = "device.hang";
/// The VMM's own state.
pub(super) const BLOB_VMM: &str = "blob.vmm";
/// A target device may be of another model.
pub(super) const IGNORE_DEVICE_MODEL: &str = "ignore-device-model";

/// The state of a device. The check cannot look for it: symbols of a release program contain `blob.`, too. It
/// is used beside [`BLOB_VMM`] only.
pub(super) fn blob_of_device(index: usize) -> String {
    format!("blob.{index}")
}
