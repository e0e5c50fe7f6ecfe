//! An agent's description of its node, converted from the wire into the inventory's own types.
//!
//! What an agent sends is input. A VM whose name could not name a Kubernetes object is left out, and so is
//! what is more than any real node has: one agent must fill neither the operator's memory nor an object of the
//! API server, which takes 1.5 MiB. The report says what is left out.

use std::collections::BTreeMap;
use std::time::Duration;

use slackwater_api::MigrationFeature;
use slackwater_proto::node as proto;

use super::{Blocker, Certificate, Device, DeviceFeatures, NodeReport, Vm, VmKey, VmState};
use crate::conditions::{cut, is_hidden};
use crate::reason::camel_case_or;

/// VMs of a node.
const VMS: usize = 256;
/// Devices of a node: their list is part of the status of its MigrationNode.
const DEVICES: usize = 1024;
/// Devices of a VM, as in a request to an agent.
const DEVICES_OF_A_VM: usize = 256;
/// Bytes of a VM's vm.json, as at the agent.
const VM_JSON_BYTES: usize = 64 * 1024;
/// What a QEMU says about its CPU.
const CPU_FEATURES: usize = 4096;
/// All that is passed on about a QEMU.
const QEMU_BYTES: usize = 256 * 1024;
/// Blockers of a VM that are shown.
const BLOCKERS: usize = 16;
/// Bytes of names and versions.
const NAME_BYTES: usize = 64;
/// Bytes of what is said about each device.
const HOLDER_BYTES: usize = 128;
/// Bytes of a message about a VM.
const MESSAGE_BYTES: usize = 1024;
/// What is left out and named; the rest is counted.
const IGNORED: usize = 16;

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
        let mut ignored = Ignored::default();
        let vms = read_vms(description.vms, &mut ignored);
        let devices = read_devices(description.devices, &mut ignored);
        Ok(Self {
            agent_version: text(&description.agent_version, NAME_BYTES),
            kernel_release: text(&description.kernel_release, NAME_BYTES),
            boot_id: text(&description.boot_id, NAME_BYTES),
            known_epoch: description.known_epoch,
            twin_start_limit: (description.twin_start_limit_ms > 0)
                .then(|| Duration::from_millis(description.twin_start_limit_ms)),
            vms,
            certificate: description.certificate.map(read_certificate),
            devices,
            ignored: ignored.finish(),
        })
    }
}

fn read_certificate(certificate: proto::CertificateDescription) -> Certificate {
    Certificate {
        not_after_unix_s: certificate.not_after_unix_s,
        ends_soon: certificate.ends_soon,
        refused: text(&certificate.refused, MESSAGE_BYTES),
    }
}

/// What is not taken in, and why, for a person.
#[derive(Default)]
struct Ignored {
    shown: Vec<String>,
    more: usize,
}

impl Ignored {
    fn add(&mut self, what: impl FnOnce() -> String) {
        if self.shown.len() < IGNORED {
            self.shown.push(what());
        } else {
            self.more += 1;
        }
    }

    /// `has` of something are reported, and at most `limit` are taken in.
    fn surplus(&mut self, what: &str, has: usize, limit: usize) {
        if has > limit {
            // First, since it says the most.
            self.shown.insert(0, format!("{has} {what} are reported, and the first {limit} are taken in"));
        }
    }

    fn finish(mut self) -> Vec<String> {
        if self.more > 0 {
            self.shown.push(format!("{} more of them", self.more));
        }
        self.shown
    }
}

fn read_vms(described: Vec<proto::VmDescription>, ignored: &mut Ignored) -> BTreeMap<VmKey, Vm> {
    ignored.surplus("VMs", described.len(), VMS);
    let mut vms = BTreeMap::new();
    for mut vm in described.into_iter().take(VMS) {
        let key = vm.vm.take().unwrap_or_default();
        let key = VmKey { namespace: key.namespace, name: key.name };
        let refused = if !is_dns_label(&key.namespace) || !is_dns_label(&key.name) {
            Some("its namespace and name must be DNS labels (a-z, 0-9 and -, at most 63)".to_owned())
        } else if vms.contains_key(&key) {
            Some("it is reported twice in one report".to_owned())
        } else {
            too_large(&vm)
        };
        match refused {
            None => drop(vms.insert(key, read_vm(vm))),
            Some(why) => ignored.add(|| {
                let (namespace, name) = (text(&key.namespace, NAME_BYTES), text(&key.name, NAME_BYTES));
                format!("VM {namespace}/{name} is left out: {why}")
            }),
        }
    }
    vms
}

/// What of a VM is more than any agent may report. To cut it would make another VM of it.
fn too_large(vm: &proto::VmDescription) -> Option<String> {
    let features = vm.qemu.as_ref().map_or(0, |qemu| qemu.cpu_features.len());
    let qemu_bytes = vm.qemu.as_ref().map_or(0, |qemu| {
        let words = [&qemu.version, &qemu.package, &qemu.machine_type, &qemu.accelerator];
        words.into_iter().chain(&qemu.cpu_features).map(String::len).sum()
    });
    [
        ("devices", vm.devices.len(), DEVICES_OF_A_VM),
        ("bytes of vm.json", vm.vm_json.len(), VM_JSON_BYTES),
        ("bytes in a device's name", vm.devices.iter().map(String::len).max().unwrap_or(0), NAME_BYTES),
        ("bytes of a migration's id", vm.migration_id.len(), NAME_BYTES),
        ("CPU features", features, CPU_FEATURES),
        ("bytes about its QEMU", qemu_bytes, QEMU_BYTES),
    ]
    .into_iter()
    .find(|(_, has, limit)| has > limit)
    .map(|(what, has, limit)| format!("it has {has} {what}, and {limit} are the limit"))
}

fn read_devices(described: Vec<proto::DeviceDescription>, ignored: &mut Ignored) -> BTreeMap<String, Device> {
    ignored.surplus("devices", described.len(), DEVICES);
    let mut devices = BTreeMap::new();
    for device in described.into_iter().take(DEVICES) {
        let name = device.name.clone();
        let is_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, ':' | '.' | '-' | '_');
        let refused = if !(1..=NAME_BYTES).contains(&name.len()) || !name.chars().all(is_name) {
            Some("its name must be a PCI address or a UUID")
        } else if devices.contains_key(&name) {
            Some("it is reported twice in one report")
        } else {
            None
        };
        match refused {
            None => drop(devices.insert(name, read_device(device))),
            Some(why) => {
                ignored.add(|| format!("device {:?} is left out: {why}", text(&name, NAME_BYTES)));
            }
        }
    }
    devices
}

/// A text for a person, or a word that is compared: without anything that moves a terminal's cursor, and cut.
fn text(given: &str, limit: usize) -> String {
    // A character has at most 4 bytes: no more than this is looked at.
    let shown: String = given.chars().take(limit + 1).map(|c| if is_hidden(c) { '?' } else { c }).collect();
    cut(&shown, limit)
}

fn read_vm(vm: proto::VmDescription) -> Vm {
    Vm {
        state: match vm.state() {
            proto::VmState::Unspecified => VmState::Unknown,
            proto::VmState::Running => VmState::Running,
            proto::VmState::Paused => VmState::Paused,
            proto::VmState::Unreachable => VmState::Unreachable,
        },
        vmm_kind: text(&vm.vmm_kind, NAME_BYTES),
        devices: vm.devices,
        blockers: vm.blockers.into_iter().take(BLOCKERS).map(read_blocker).collect(),
        vm_json: vm.vm_json,
        unreachable_reason: text(&vm.unreachable_reason, MESSAGE_BYTES),
        migration_id: vm.migration_id,
        ram_bytes: vm.ram_bytes,
        qemu: vm.qemu.map(Box::new),
    }
}

fn read_blocker(blocker: proto::Blocker) -> Blocker {
    Blocker {
        reason: camel_case_or(&blocker.reason, "NotMigratable"),
        message: text(&blocker.message, MESSAGE_BYTES),
        lifted_by_assume_isolated: blocker.lifted_by_assume_isolated,
    }
}

fn read_device(device: proto::DeviceDescription) -> Device {
    let features = match device.features {
        Some(features) => DeviceFeatures::Known(features_from_proto(&features)),
        None => DeviceFeatures::Unknown { reason: text(&device.features_unknown_reason, HOLDER_BYTES) },
    };
    Device {
        driver: text(&device.driver, NAME_BYTES),
        model: text(&device.model, NAME_BYTES),
        features,
        free: device.free,
        holder: text(&device.holder, HOLDER_BYTES),
    }
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

    #[test]
    fn a_report_is_taken_in_up_to_its_limits_and_says_with_numbers_what_is_not() {
        let device = |name: String| proto::DeviceDescription { name, ..Default::default() };
        let huge = "x".repeat(1 << 20);
        let description = proto::NodeDescription {
            node: "n".into(),
            agent_version: huge.clone(),
            vms: (0..300).map(|n| described(&format!("vm-{n}"))).collect(),
            devices: (0..2000)
                .map(|n| proto::DeviceDescription {
                    driver: huge.clone(),
                    model: huge.clone(),
                    holder: "\"".repeat(1000),
                    features_unknown_reason: "\"".repeat(1000),
                    ..device(format!("0000:3b:00.{n}"))
                })
                .collect(),
            ..Default::default()
        };
        let report = NodeReport::read("n", Some(description)).unwrap();
        assert_eq!((report.vms.len(), report.devices.len()), (256, 1024));
        assert_eq!(report.agent_version.len(), 64);
        assert!(report.ignored.contains(&"300 VMs are reported, and the first 256 are taken in".to_owned()));
        assert!(
            report.ignored.contains(&"2000 devices are reported, and the first 1024 are taken in".to_owned())
        );
        // What is said about the devices fits into an object, however it is written.
        let text = |device: &Device| format!("{device:?}").len();
        let bytes: usize = report.devices.iter().map(|(name, device)| name.len() + text(device)).sum();
        assert!(bytes < 1 << 20, "{bytes}");
    }

    #[test]
    fn a_vm_that_is_too_large_is_left_out_with_both_numbers_and_the_others_stay() {
        let qemu = |features: usize| proto::QemuDescription {
            cpu_features: vec!["avx".into(); features],
            ..Default::default()
        };
        for (change, words) in [
            (
                proto::VmDescription { devices: vec!["d".into(); 257], ..described("big") },
                "257 devices, and 256",
            ),
            (
                proto::VmDescription { vm_json: "x".repeat(65_537), ..described("big") },
                "65537 bytes of vm.json, and 65536",
            ),
            (
                proto::VmDescription { devices: vec!["d".repeat(65)], ..described("big") },
                "65 bytes in a device's name",
            ),
            (
                proto::VmDescription { migration_id: "m".repeat(65), ..described("big") },
                "65 bytes of a migration's id",
            ),
            (
                proto::VmDescription { qemu: Some(qemu(4097)), ..described("big") },
                "4097 CPU features, and 4096",
            ),
            (described("ok"), "VM demo/ok is left out: it is reported twice in one report"),
        ] {
            let description = proto::NodeDescription {
                node: "n".into(),
                vms: vec![described("ok"), change],
                ..Default::default()
            };
            let report = NodeReport::read("n", Some(description)).unwrap();
            assert_eq!(report.vms.keys().map(|k| k.name.as_str()).collect::<Vec<_>>(), ["ok"], "{words}");
            assert!(report.ignored.len() == 1 && report.ignored[0].contains(words), "{:?}", report.ignored);
        }
    }

    #[test]
    fn what_an_agent_says_moves_no_cursor_and_a_flood_of_bad_names_is_counted() {
        let evil = "a\u{1b}[2J\r\nb\u{202e}c";
        let description = proto::NodeDescription {
            node: "n".into(),
            kernel_release: evil.into(),
            vms: (0..200).map(|n| described(&format!("{evil}{n}"))).collect(),
            devices: vec![
                proto::DeviceDescription { name: evil.into(), ..Default::default() },
                proto::DeviceDescription { name: "d".into(), holder: evil.into(), ..Default::default() },
            ],
            ..Default::default()
        };
        let report = NodeReport::read("n", Some(description)).unwrap();
        assert_eq!(
            (report.kernel_release.as_str(), report.devices["d"].holder.as_str()),
            ("a?[2J??b?c", "a?[2J??b?c")
        );
        assert_eq!((report.devices.len(), report.ignored.len()), (1, 17));
        assert_eq!(report.ignored.last().unwrap(), "185 more of them");
        assert!(!report.ignored.concat().contains(char::is_control));
    }
}
