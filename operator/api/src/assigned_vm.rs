//! `AssignedVM`: a VM with assigned devices, as the agents report it.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Features;

/// An AssignedVM has no spec: the operator writes it from what the agents report.
#[derive(CustomResource, KubeSchema, Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[kube(
    group = "slackwater.dev",
    version = "v1alpha1",
    kind = "AssignedVM",
    plural = "assignedvms",
    singular = "assignedvm",
    shortname = "avm",
    category = "slackwater",
    namespaced,
    no_spec,
    derive = "PartialEq",
    doc = "An AssignedVM is a VM with assigned devices, as the node agents report it. The operator writes \
           it; it cannot be used to create a VM.",
    status = "AssignedVMStatus",
    printcolumn(name = "Node", type_ = "string", json_path = ".status.nodeName"),
    printcolumn(name = "State", type_ = "string", json_path = ".status.state"),
    printcolumn(name = "Devices", type_ = "integer", json_path = ".status.deviceCount"),
    printcolumn(
        name = "Migratable",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Migratable\")].status"
    ),
    printcolumn(
        name = "Reason",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Migratable\")].reason"
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
pub struct AssignedVMFields {}

/// What is known about a VM.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct AssignedVMStatus {
    /// The node on which the VM is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_name: Option<String>,
    /// Since when the operator has known it there. A report of the VM by another node is set aside.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_since: Option<Time>,
    /// What the VM does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<VmState>,
    /// How the agent talks to the VM's monitor: contract.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vmm_kind: Option<String>,
    /// Bytes of guest RAM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ram_bytes: Option<i64>,
    /// The number of assigned devices.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device_count: Option<i32>,
    /// The assigned devices, in the order in which the VM's monitor has them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<VmDevice>,
    /// The migration that holds the VM now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub migration: Option<MigrationReference>,
    /// Ready, Migratable, Contested.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
}

/// What a VM does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum VmState {
    /// It runs.
    Running,
    /// Its vCPUs are paused.
    Paused,
    /// Its monitor does not answer.
    Unreachable,
    /// The agent has not said.
    Unknown,
}

/// A device that is assigned to a VM.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct VmDevice {
    /// PCI address, or UUID of the mediated device.
    pub name: String,
    /// The kernel driver.
    pub driver: String,
    /// PCI vendor:device, or the type of the mediated device.
    pub model: String,
    /// What the driver has advertised.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub features: Features,
}

/// Names a migration.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct MigrationReference {
    /// The name of the VMMigration, in the namespace of the VM. Absent for a migration that was not started
    /// by one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The id by which the agents know it: the UID of the VMMigration.
    pub id: String,
}
