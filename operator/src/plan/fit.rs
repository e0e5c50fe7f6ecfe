//! Whether a device can take over from another one, and which devices are still to be had.

use std::collections::BTreeMap;

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
pub(super) struct Taken {
    /// (node, device) and who has it.
    holders: BTreeMap<(String, String), String>,
}

impl Taken {
    pub(super) fn by(others: &[OtherMigration]) -> Self {
        let entry = |other: &OtherMigration, device: &String| {
            ((other.target.clone(), device.clone()), format!("planned for VMMigration {}", other.name))
        };
        let holders =
            others.iter().flat_map(|other| other.target_devices.iter().map(move |d| entry(other, d)));
        Self { holders: holders.collect() }
    }

    pub(super) fn holder(&self, node: &str, device: &str) -> Option<&str> {
        self.holders.get(&(node.to_owned(), device.to_owned())).map(String::as_str)
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
