//! The properties of QEMU's CPU objects that are features of the guest.
//!
//! Of the boolean properties of an x86 CPU (target/i386/cpu.c) those are bits of a CPUID leaf or of a feature
//! MSR that are made by `x86_cpu_register_bit_prop()`: these have no default value in `qom-list-properties`,
//! while the settings of QEMU itself (`x86_cpu_properties[]`: `check`, `hv-*`, `l3-cache`, `x-*` ...) have
//! one. Measured with QEMU 10.0.2: 465 boolean properties, 49 of them with a default; of the others 4 are
//! qdev's.

use std::collections::BTreeSet;

use crate::vmm::qemu::qmp::commands::TypeProperty;

/// Of all devices: hw/core/qdev.c and hw/core/cpu-common.c.
const OF_THE_DEVICE: [&str; 4] = ["realized", "hotplugged", "hotpluggable", "start-powered-off"];

/// What `-cpu max` leaves out although any node can give it (`no_autoenable_flags` of target/i386/cpu.c), or
/// what follows from `-smp` and `-machine` and not from the node: the twin has the same arguments.
const OF_THE_ARGUMENTS: [&str; 5] =
    ["ht", "cmp-legacy", "topoext", "kvm-hint-dedicated", "kvm-msi-ext-dest-id"];

/// A feature's name by which ends are compared: QEMU has `sse4.1`, `sse4_1` and `sse4-1` for the same bit.
pub(super) fn plain(name: &str) -> String {
    name.replace(['.', '_'], "-")
}

/// Whether it is a bit of nested virtualization on Intel: without `vmx` a guest sees none of them.
pub(super) fn is_nested(name: &str) -> bool {
    name.starts_with("vmx-")
}

/// The properties to compare, by QEMU's names, one for each feature.
pub(super) fn names(properties: &[TypeProperty]) -> Vec<String> {
    let mut seen = BTreeSet::new();
    let feature = |property: &&TypeProperty| {
        let plain = plain(&property.name);
        property.kind == "bool"
            && property.default_value.is_none()
            && !OF_THE_DEVICE.contains(&plain.as_str())
            && !OF_THE_ARGUMENTS.contains(&plain.as_str())
            && seen.insert(plain)
    };
    properties.iter().filter(feature).map(|property| property.name.clone()).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn property(name: &str, kind: &str, default_value: Option<Value>) -> TypeProperty {
        TypeProperty { name: name.to_owned(), kind: kind.to_owned(), default_value }
    }

    #[test]
    fn features_are_the_booleans_without_a_default_each_once() {
        let properties = [
            property("sse4.1", "bool", None),
            property("sse4_1", "bool", None),
            property("sse4-1", "bool", None),
            property("avx2", "bool", None),
            property("hv-relaxed", "bool", Some(json!(false))),
            property("pmu", "bool", Some(json!(false))),
            property("level", "uint32", None),
            property("realized", "bool", None),
            property("hotpluggable", "bool", None),
            property("ht", "bool", None),
            property("cmp_legacy", "bool", None),
            property("kvm-msi-ext-dest-id", "bool", None),
        ];
        assert_eq!(names(&properties), ["sse4.1", "avx2"]);
    }
}
