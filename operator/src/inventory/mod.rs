//! What the operator knows about nodes, VMs and devices: plain data, without Kubernetes, gRPC or a clock.

mod from_proto;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use slackwater_api::MigrationFeature;
use slackwater_proto::node::QemuDescription;

use crate::epoch::EpochClaim;
pub use from_proto::ReportError;

/// Names a VM: namespace and name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VmKey {
    /// The namespace.
    pub namespace: String,
    /// The name within it.
    pub name: String,
}

impl VmKey {
    /// Reads what its `Display` writes: no namespace has a slash.
    #[must_use]
    pub fn read(text: &str) -> Option<Self> {
        let (namespace, name) = text.split_once('/')?;
        Some(Self { namespace: namespace.to_owned(), name: name.to_owned() })
    }
}

impl fmt::Display for VmKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// All nodes, by name.
pub type Inventory = BTreeMap<String, Node>;

/// A node, as far as the operator can see it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Node {
    /// host:port at which the operator reaches its agent.
    pub address: String,
    /// host:port at which other agents reach it.
    pub peer_address: String,
    /// Whether its agent answers now.
    pub link: Link,
    /// What its agent said last, even if it does not answer now. Shared, so that a copy of the inventory is cheap.
    pub report: Option<Arc<NodeReport>>,
    /// The operator epoch up to which an administrator has said that its agent is to be believed.
    pub accepted_epoch: Option<u64>,
    /// Why its agent is set aside: it has seen an epoch that is not believed.
    pub epoch_claim: Option<EpochClaim>,
}

/// Whether an agent answers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Link {
    /// The first try is still under way.
    #[default]
    Connecting,
    /// It answers, and `report` is what it says now.
    Ready,
    /// It does not answer.
    Down {
        /// Why, for a condition.
        reason: &'static str,
        /// Why, for a person.
        error: String,
    },
}

/// What an agent says about its node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeReport {
    /// The agent's version.
    pub agent_version: String,
    /// The release of the node's kernel.
    pub kernel_release: String,
    /// Another value means that the node was booted meanwhile.
    pub boot_id: String,
    /// How long its agent lets a twin take to start, if it says so.
    pub twin_start_limit: Option<Duration>,
    /// The highest operator epoch that its agent has seen; 0 if it does not say.
    pub known_epoch: u64,
    /// The VMs, by name.
    pub vms: BTreeMap<VmKey, Vm>,
    /// The VFIO devices, by name.
    pub devices: BTreeMap<String, Device>,
    /// The agent's certificate, if it has described it.
    pub certificate: Option<Certificate>,
    /// What the agent reported and cannot be used, for a person.
    pub ignored: Vec<String>,
}

/// The certificate that an agent shows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Certificate {
    /// Its last second, since 1970, UTC.
    pub not_after_unix_s: i64,
    /// It should have been renewed by now.
    pub ends_soon: bool,
    /// Why the agent does not use the files that it should read now; empty if it does.
    pub refused: String,
}

/// What a VM does.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum VmState {
    /// The agent has not said.
    #[default]
    Unknown,
    /// It runs.
    Running,
    /// Its vCPUs are paused.
    Paused,
    /// Its monitor does not answer.
    Unreachable,
}

/// A VM at one node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Vm {
    /// What it does.
    pub state: VmState,
    /// How the agent talks to its monitor.
    pub vmm_kind: String,
    /// Names of its devices, in its monitor's order.
    pub devices: Vec<String>,
    /// Why it cannot be migrated as it is.
    pub blockers: Vec<Blocker>,
    /// The content of its vm.json.
    pub vm_json: String,
    /// Why its monitor does not answer; empty if it does.
    pub unreachable_reason: String,
    /// The migration that holds it; empty if none does.
    pub migration_id: String,
    /// Bytes of guest RAM.
    pub ram_bytes: u64,
    /// What its QEMU is, if it is a QEMU VM, in its agent's words: only the target's agent reads them.
    pub qemu: Option<Box<QemuDescription>>,
}

/// Something that prevents a migration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blocker {
    /// CamelCase.
    pub reason: String,
    /// For a person.
    pub message: String,
    /// `peerToPeer: AssumeIsolated` lifts it.
    pub lifted_by_assume_isolated: bool,
}

/// A VFIO device.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Device {
    /// The kernel driver.
    pub driver: String,
    /// PCI vendor:device, or the type of the mediated device.
    pub model: String,
    /// What the driver has advertised, or why that is not known.
    pub features: DeviceFeatures,
    /// Not in use.
    pub free: bool,
    /// What uses it, for a person; empty if it is free.
    pub holder: String,
}

/// What a device's driver has advertised.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeviceFeatures {
    /// In the order of the enum, each once.
    Known(Vec<MigrationFeature>),
    /// They could not be read.
    Unknown {
        /// Why, for a person.
        reason: String,
    },
}

impl Default for DeviceFeatures {
    fn default() -> Self {
        Self::Known(Vec::new())
    }
}

impl DeviceFeatures {
    /// The features, as far as they are known.
    pub fn known(&self) -> &[MigrationFeature] {
        match self {
            Self::Known(features) => features,
            Self::Unknown { .. } => &[],
        }
    }
}

impl Node {
    /// Its agent answers now, and is not set aside.
    pub fn is_ready(&self) -> bool {
        self.link == Link::Ready && self.epoch_claim.is_none()
    }

    /// Why its agent cannot be asked; `None` if it can.
    pub fn not_ready_reason(&self) -> Option<String> {
        match &self.link {
            Link::Ready => self.epoch_claim.as_ref().map(ToString::to_string),
            Link::Connecting => Some("its agent has not answered yet".to_owned()),
            Link::Down { error, .. } => Some(error.clone()),
        }
    }
}

/// One node's report of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VmReport<'a> {
    /// The node's name.
    pub name: &'a str,
    /// The node.
    pub node: &'a Node,
    /// What it says about the VM.
    pub vm: &'a Vm,
}

/// The reports of one VM, by node.
pub fn reports_of<'a>(inventory: &'a Inventory, vm: &VmKey) -> Vec<VmReport<'a>> {
    inventory
        .iter()
        .filter_map(|(name, node)| {
            let vm = node.report.as_ref()?.vms.get(vm)?;
            Some(VmReport { name, node, vm })
        })
        .collect()
}

/// Where a VM is, when it is reported by this many nodes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Whereabouts<'a> {
    /// No node reports it.
    Nowhere,
    /// One node has it; or two do, because it is being handed over between them, and it runs at this one.
    At(VmReport<'a>),
    /// Several nodes claim to have it. The operator cannot tell which copy is the VM.
    Several(Vec<&'a str>),
}

/// Decides where a VM is.
///
/// During a hand-over two agents report the VM for a moment: the source, where it is paused and held by the
/// migration, and the destination. Then the node where it runs counts. A person has to clear up any other
/// double report.
pub fn whereabouts<'a>(inventory: &'a Inventory, vm: &VmKey) -> Whereabouts<'a> {
    let reports = reports_of(inventory, vm);
    match reports.as_slice() {
        [] => Whereabouts::Nowhere,
        [report] => Whereabouts::At(*report),
        several => {
            let is_handed_over = |vm: &Vm| vm.state != VmState::Running && !vm.migration_id.is_empty();
            let mut remaining = several.iter().filter(|report| !is_handed_over(report.vm));
            match (remaining.next(), remaining.next()) {
                (Some(report), None) => Whereabouts::At(*report),
                _ => Whereabouts::Several(several.iter().map(|report| report.name).collect()),
            }
        }
    }
}
