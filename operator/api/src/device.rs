//! What the kinds say about a VFIO device's abilities.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A part of VFIO migration v2 that a device's driver has advertised (include/uapi/linux/vfio.h).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
pub enum MigrationFeature {
    /// VFIO_MIGRATION_STOP_COPY: without it the device cannot be migrated at all.
    #[serde(rename = "STOP_COPY")]
    StopCopy,
    /// VFIO_MIGRATION_P2P: the device can be quiesced before it is stopped.
    #[serde(rename = "P2P")]
    P2p,
    /// VFIO_MIGRATION_PRE_COPY: state can be copied while the device runs.
    #[serde(rename = "PRE_COPY")]
    PreCopy,
}

/// The features of one device, in the order of the enum.
pub type Features = Vec<MigrationFeature>;
