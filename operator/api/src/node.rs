//! `MigrationNode`: a node's agent, and how to reach it.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{CustomResource, KubeSchema};
use serde::{Deserialize, Serialize};

use crate::Features;

/// host:port, with an IPv6 address in brackets. The operator checks the port's range.
const ADDRESS_PATTERN: &str = r"^([A-Za-z0-9]([-A-Za-z0-9.]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}$";

/// The highest `acceptEpochUpTo`. The epoch is that of a Lease, which counts to 2^31 - 1 and never back: a
/// million changes of leadership are left above it.
pub const HIGHEST_ACCEPTED_EPOCH: i64 = 2_146_483_647;

/// How to reach the agent of a node. The name of the object is the node's name, and the agent's certificate
/// must carry it.
#[derive(CustomResource, KubeSchema, Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[kube(
    group = "slackwater.dev",
    version = "v1alpha1",
    kind = "MigrationNode",
    plural = "migrationnodes",
    singular = "migrationnode",
    shortname = "mignode",
    category = "slackwater",
    derive = "PartialEq",
    doc = "A MigrationNode is a host with a Slackwater agent. Its name is the node's name, and the agent's \
           certificate must carry it.",
    status = "MigrationNodeStatus",
    printcolumn(name = "Address", type_ = "string", json_path = ".spec.address"),
    printcolumn(
        name = "Ready",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].status"
    ),
    printcolumn(name = "VMs", type_ = "integer", json_path = ".status.vmCount"),
    printcolumn(name = "Devices", type_ = "integer", json_path = ".status.deviceCount"),
    printcolumn(name = "Free", type_ = "integer", json_path = ".status.freeDeviceCount"),
    printcolumn(name = "Agent version", type_ = "string", json_path = ".status.agentVersion"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct MigrationNodeSpec {
    /// host:port at which the operator reaches the agent.
    #[schemars(regex(pattern = ADDRESS_PATTERN), length(max = 261))]
    pub address: String,
    /// host:port at which other agents reach it. Default: address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = ADDRESS_PATTERN), length(max = 261))]
    pub peer_address: Option<String>,
    /// The operator epoch up to which this agent is believed. Set it only if the operator's Lease was deleted
    /// or restored from a backup, to the number that the condition Ready names with the reason EpochTooHigh:
    /// the operator then raises the Lease above what this agent has seen. From 1 to 2146483647.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = HIGHEST_ACCEPTED_EPOCH))]
    pub accept_epoch_up_to: Option<i64>,
}

/// What the agent reported last, and whether it can be reached.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct MigrationNodeStatus {
    /// The generation of the spec that this status is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Ready, ReportAccepted and CertificateValid.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
    /// The agent's version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent_version: Option<String>,
    /// The release of the node's kernel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel_release: Option<String>,
    /// The kernel's boot id: another value means that the node was booted meanwhile.
    #[serde(default, rename = "bootID", skip_serializing_if = "Option::is_none")]
    pub boot_id: Option<String>,
    /// The number of VMs with assigned devices.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm_count: Option<i32>,
    /// The number of VFIO devices.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device_count: Option<i32>,
    /// How many of them are free.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub free_device_count: Option<i32>,
    /// The VFIO devices of the node.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<NodeDevice>,
}

/// A VFIO device of a node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodeDevice {
    /// PCI address, or UUID of the mediated device.
    pub name: String,
    /// The kernel driver.
    pub driver: String,
    /// PCI vendor:device, or the type of the mediated device.
    pub model: String,
    /// What the driver has advertised.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub features: Features,
    /// Why the features are not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub features_unknown_reason: Option<String>,
    /// It is not in use.
    pub free: bool,
    /// What uses it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub holder: Option<String>,
}
