//! Every name of a fault, and of the variable that names their file. The check that no release program has
//! one of them reads the strings from this file.

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
/// Followed by a device's index.
pub(super) const BLOB: &str = "blob.";
/// A target device may be of another model.
pub(super) const IGNORE_DEVICE_MODEL: &str = "ignore-device-model";
