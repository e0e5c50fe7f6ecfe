//! Whether a device can take over from another one, and which devices are still to be had.

use std::collections::BTreeMap;
use std::sync::Arc;

use slackwater_api::MigrationFeature;

use super::{Checks, OtherMigration};
use crate::inventory::Device;

/// A device of the VM, for which a match is wanted.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted<'a> {
    pub(super) name: &'a str,
    pub(super) device: &'a Device,
    /// All of its features: they are known.
    pub(super) features: &'a [MigrationFeature],
}

/// Devices that other migrations have been given and that their nodes may not report as used yet.
#[derive(Debug, Default)]
pub(super) struct Taken<'a> {
    /// (node, device) and the migration that has it.
    holders: BTreeMap<(&'a str, &'a str), &'a str>,
}

impl<'a> Taken<'a> {
    pub(super) fn by(others: &'a [Arc<OtherMigration>]) -> Self {
        let devices = |other: &'a Arc<OtherMigration>| {
            let (target, name) = (other.target.as_str(), other.name.as_str());
            other.target_devices.iter().map(move |device| ((target, device.as_str()), name))
        };
        Self { holders: others.iter().flat_map(devices).collect() }
    }

    pub(super) fn is_taken(&self, node: &str, device: &str) -> bool {
        self.holders.contains_key(&(node, device))
    }

    pub(super) fn holder(&self, node: &str, device: &str) -> Option<String> {
        let name = self.holders.get(&(node, device))?;
        Some(format!("planned for VMMigration {name}"))
    }
}

/// A device has the driver and the model that another one has.
pub(super) fn is_alike(want: &Device, have: &Device, checks: Checks) -> bool {
    want.driver == have.driver && (want.model == have.model || !checks.device_model)
}

/// The features that a device needs to take over from another one that has them, with the kernel's names. Not
/// PRE_COPY: a device that only loads has no use for it.
pub(super) const NEEDED: [(MigrationFeature, &str); 2] =
    [(MigrationFeature::StopCopy, "STOP_COPY"), (MigrationFeature::P2p, "P2P")];

/// A device has the features that it needs to take over from a device with `features`.
pub(super) fn covers(have: &Device, features: &[MigrationFeature]) -> bool {
    NEEDED.iter().all(|(feature, _)| !features.contains(feature) || have.features.known().contains(feature))
}
