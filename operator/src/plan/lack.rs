//! What a node lacks for a VM's devices: per model how many are free, how many are needed, and where the
//! others are.

use std::collections::BTreeMap;
use std::fmt;

use slackwater_api::MigrationFeature;

use super::Checks;
use super::fit::{NEEDED, Taken, Wanted, is_alike};
use crate::inventory::Device;

/// Devices that a node lacks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", list(models, "; "))]
pub struct Lack {
    models: Vec<ModelLack>,
}

/// Devices of one driver and model that a node lacks.
#[derive(Debug, Clone, PartialEq, Eq)]
struct ModelLack {
    node: String,
    driver: String,
    model: String,
    needed: usize,
    free: usize,
    /// Devices of the model that are not free, and who holds them.
    held: Vec<String>,
    cause: Cause,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Cause {
    /// Fewer are free than are needed. Free devices of other models, by model.
    TooFew { others: Vec<String> },
    /// Enough are free, and these lack features.
    MissingFeatures { devices: Vec<String> },
}

impl Lack {
    /// What `node`, which has `devices`, lacks for `wanted`.
    pub(super) fn of(
        node: &str,
        devices: &[(&str, &Device)],
        wanted: &[Wanted<'_>],
        taken: &Taken<'_>,
        checks: Checks,
    ) -> Self {
        let mut kinds: BTreeMap<(&str, &str), Vec<&Wanted<'_>>> = BTreeMap::new();
        for want in wanted {
            let kind = (want.device.driver.as_str(), want.device.model.as_str());
            kinds.entry(kind).or_default().push(want);
        }
        let models = kinds.into_values().filter_map(|wants| lack_of(node, devices, &wants, taken, checks));
        Self { models: models.collect() }
    }
}

/// What is lacking of the one model that all of `wants` have.
fn lack_of(
    node: &str,
    devices: &[(&str, &Device)],
    wants: &[&Wanted<'_>],
    taken: &Taken<'_>,
    checks: Checks,
) -> Option<ModelLack> {
    let sample = wants.first()?.device;
    let holder = |name: &str, device: &Device| match taken.holder(node, name) {
        Some(planned) => Some(planned.to_owned()),
        None if device.free => None,
        None if device.holder.is_empty() => Some("in use".to_owned()),
        None => Some(device.holder.clone()),
    };
    let mut free = Vec::new();
    let mut held = Vec::new();
    for (name, have) in devices.iter().filter(|(_, have)| is_alike(sample, have, checks)) {
        match holder(name, have) {
            Some(holder) => held.push(format!("{name}: {holder}")),
            None => free.push((*name, *have)),
        }
    }
    let cause = if free.len() < wants.len() {
        Cause::TooFew { others: other_models(devices, sample) }
    } else {
        let poorer = free.iter().filter_map(|(name, have)| {
            let missing = missing_features(have, wants);
            (!missing.is_empty()).then(|| format!("{name} lacks {}", missing.join(" and ")))
        });
        Cause::MissingFeatures { devices: poorer.collect() }
    };
    if cause == (Cause::MissingFeatures { devices: Vec::new() }) {
        return None;
    }
    Some(ModelLack {
        node: node.to_owned(),
        driver: sample.driver.clone(),
        model: sample.model.clone(),
        needed: wants.len(),
        free: free.len(),
        held,
        cause,
    })
}

fn other_models(devices: &[(&str, &Device)], sample: &Device) -> Vec<String> {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    let is_other = |device: &Device| device.driver == sample.driver && device.model != sample.model;
    for (_, device) in devices.iter().filter(|(_, device)| device.free && is_other(device)) {
        *counts.entry(device.model.as_str()).or_default() += 1;
    }
    counts.into_iter().map(|(model, count)| format!("{count} {model}")).collect()
}

fn missing_features(have: &Device, wants: &[&Wanted<'_>]) -> Vec<&'static str> {
    let is_missing = |feature: &MigrationFeature| {
        wants.iter().any(|want| want.features.contains(feature)) && !have.features.known().contains(feature)
    };
    NEEDED.iter().filter(|(feature, _)| is_missing(feature)).map(|(_, name)| *name).collect()
}

impl fmt::Display for ModelLack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { node, driver, model, needed, free, held, cause } = self;
        match free {
            0 => write!(f, "{node} has no free {model} (driver {driver}), {needed} needed")?,
            free => write!(f, "{node} has {free} free {model} (driver {driver}), {needed} needed")?,
        }
        if !held.is_empty() {
            write!(f, ", not free there: {}", held.join(", "))?;
        }
        match cause {
            Cause::TooFew { others } if others.is_empty() => Ok(()),
            Cause::TooFew { others } => write!(f, ", free there of other models: {}", others.join(", ")),
            Cause::MissingFeatures { devices } => write!(f, ", but {}", devices.join(", ")),
        }
    }
}

fn list<T: fmt::Display>(items: &[T], separator: &str) -> String {
    items.iter().map(ToString::to_string).collect::<Vec<_>>().join(separator)
}
