//! An agent's description of its node, converted from the wire into the inventory's own types.
//!
//! What an agent sends is input: a VM whose name could not name a Kubernetes object is left out, and the
//! report says so.

use std::collections::BTreeMap;
use std::time::Duration;

use slackwater_api::MigrationFeature;
use slackwater_proto::node as proto;

use super::{Blocker, Certificate, Device, DeviceFeatures, NodeReport, Vm, VmKey, VmState};
use crate::conditions::cut;
use crate::reason::camel_case_or;

/// The most that is kept of why an agent refuses its certificate files.
const REFUSED_LIMIT_BYTES: usize = 1024;

/// A description that cannot be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ReportError {
    /// It is missing.
    #[error("the agent has sent an empty description of its node")]
    Empty,
    /// It is about another node.
    #[error(
        "the agent says that it is node {said:?}; this address should lead to the agent of node {expected:?}"
    )]
    OtherNode {
        /// The MigrationNode's name.
        expected: String,
        /// What the agent says.
        said: String,
    },
}

impl NodeReport {
    /// Reads a description from the agent of node `expected`.
    ///
    /// # Errors
    /// [`ReportError`]: the description is missing or is about another node.
    pub fn read(expected: &str, description: Option<proto::NodeDescription>) -> Result<Self, ReportError> {
        let description = description.ok_or(ReportError::Empty)?;
        if description.node != expected {
            return Err(ReportError::OtherNode { expected: expected.to_owned(), said: description.node });
        }
        let mut ignored = Vec::new();
        let mut vms = BTreeMap::new();
        for vm in description.vms {
            let key = vm.vm.clone().unwrap_or_default();
            let key = VmKey { namespace: key.namespace, name: key.name };
            if is_dns_label(&key.namespace) && is_dns_label(&key.name) {
                vms.insert(key, read_vm(vm));
            } else {
                ignored.push(format!(
                    "VM {key} is left out: its namespace and name must be DNS labels (a-z, 0-9 and -, at most 63)"
                ));
            }
        }
        Ok(Self {
            agent_version: description.agent_version,
            kernel_release: description.kernel_release,
            boot_id: description.boot_id,
            twin_start_limit: (description.twin_start_limit_ms > 0)
                .then(|| Duration::from_millis(description.twin_start_limit_ms)),
            vms,
            certificate: description.certificate.map(read_certificate),
            devices: description.devices.into_iter().map(|d| (d.name.clone(), read_device(d))).collect(),
            ignored,
        })
    }
}

fn read_certificate(certificate: proto::CertificateDescription) -> Certificate {
    Certificate {
        not_after_unix_s: certificate.not_after_unix_s,
        ends_soon: certificate.ends_soon,
        refused: cut(&certificate.refused, REFUSED_LIMIT_BYTES),
    }
}

fn read_vm(vm: proto::VmDescription) -> Vm {
    Vm {
        state: match vm.state() {
            proto::VmState::Unspecified => VmState::Unknown,
            proto::VmState::Running => VmState::Running,
            proto::VmState::Paused => VmState::Paused,
            proto::VmState::Unreachable => VmState::Unreachable,
        },
        vmm_kind: vm.vmm_kind,
        devices: vm.devices,
        blockers: vm.blockers.into_iter().map(read_blocker).collect(),
        vm_json: vm.vm_json,
        unreachable_reason: vm.unreachable_reason,
        migration_id: vm.migration_id,
        ram_bytes: vm.ram_bytes,
        qemu: vm.qemu.map(Box::new),
    }
}

fn read_blocker(blocker: proto::Blocker) -> Blocker {
    Blocker {
        reason: camel_case_or(&blocker.reason, "NotMigratable"),
        message: blocker.message,
        lifted_by_assume_isolated: blocker.lifted_by_assume_isolated,
    }
}

fn read_device(device: proto::DeviceDescription) -> Device {
    let features = match device.features {
        Some(features) => DeviceFeatures::Known(features_from_proto(&features)),
        None => DeviceFeatures::Unknown { reason: device.features_unknown_reason },
    };
    Device { driver: device.driver, model: device.model, features, free: device.free, holder: device.holder }
}

/// The features of a device, from the wire.
fn features_from_proto(features: &proto::MigrationFeatures) -> Vec<MigrationFeature> {
    [
        (features.stop_copy, MigrationFeature::StopCopy),
        (features.p2p, MigrationFeature::P2p),
        (features.pre_copy, MigrationFeature::PreCopy),
    ]
    .into_iter()
    .filter_map(|(advertised, feature)| advertised.then_some(feature))
    .collect()
}

fn is_dns_label(text: &str) -> bool {
    let inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    (1..=63).contains(&text.len())
        && text.chars().all(|c| inner(c) || c == '-')
        && text.starts_with(inner)
        && text.ends_with(inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn described(name: &str) -> proto::VmDescription {
        let vm = proto::VmRef { namespace: "demo".into(), name: name.into() };
        proto::VmDescription { vm: Some(vm), ..Default::default() }
    }

    #[test]
    fn a_report_about_another_node_is_refused() {
        let description = proto::NodeDescription { node: "node-b".into(), ..Default::default() };
        let error = NodeReport::read("node-a", Some(description)).unwrap_err();
        assert_eq!(error, ReportError::OtherNode { expected: "node-a".into(), said: "node-b".into() });
        assert_eq!(NodeReport::read("node-a", None), Err(ReportError::Empty));
    }

    #[test]
    fn a_vm_that_could_not_name_an_object_is_left_out_and_the_report_says_so() {
        for bad in ["", "Counter", "a/b", "-a", "a-", &"a".repeat(64)] {
            let description = proto::NodeDescription {
                node: "n".into(),
                vms: vec![described(bad), described("ok")],
                ..Default::default()
            };
            let report = NodeReport::read("n", Some(description)).unwrap();
            assert_eq!(report.vms.keys().map(|k| k.name.as_str()).collect::<Vec<_>>(), ["ok"], "{bad}");
            assert_eq!(report.ignored.len(), 1, "{bad}");
        }
    }
}
