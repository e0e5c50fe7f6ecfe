//! `VMMigration`: the request to move one VM.

use std::time::Duration;

use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::VMMigrationStatus;
use crate::duration::DURATION_PATTERN;

/// The least `spec.preCommitTimeout`.
pub const MIN_PRE_COMMIT_TIMEOUT: Duration = Duration::from_secs(1);
/// The greatest `spec.preCommitTimeout`.
pub const MAX_PRE_COMMIT_TIMEOUT: Duration = Duration::from_secs(24 * 3600);

/// Moves one VM, with its assigned devices, to another node, once. Deleting the object gives the migration up, if it
/// has not been committed yet. The spec cannot be changed.
#[derive(CustomResource, KubeSchema, Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[kube(
    group = "slackwater.dev",
    version = "v1alpha1",
    kind = "VMMigration",
    plural = "vmmigrations",
    singular = "vmmigration",
    shortname = "vmmig",
    category = "slackwater",
    namespaced,
    derive = "PartialEq",
    doc = "A VMMigration moves one VM, with its assigned devices, to another node, once. Deleting it gives the migration up, if it has not been committed yet.",
    status = "VMMigrationStatus",
    printcolumn(name = "VM", type_ = "string", json_path = ".spec.vmRef.name"),
    printcolumn(name = "From", type_ = "string", json_path = ".status.sourceNode"),
    printcolumn(name = "To", type_ = "string", json_path = ".status.targetNode"),
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"),
    printcolumn(
        name = "Blackout",
        type_ = "string",
        json_path = ".status.timings.blackout",
        description = "For how long the guest stood still, at most"
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(
        name = "Reason",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Succeeded\")].reason"
    )
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self == oldSelf")
        .message("the spec of a VMMigration cannot be changed; delete it and create another one"),
)]
pub struct VMMigrationSpec {
    /// The VM to move, in the namespace of the VMMigration.
    pub vm_ref: VmReference,
    /// Where to. Without it, the operator takes the first node, by name, whose free devices match those of the VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<Target>,
    /// What to do where the devices of the VM may talk to each other. Matters only for a VM with more than one device.
    #[serde(default)]
    pub peer_to_peer: PeerToPeer,
    /// The time within which the migration must be committed; otherwise it is rolled back and the VM runs on at the
    /// source. Whole hours, minutes, seconds and milliseconds, as in 5m or 1m30s; from 1s to 24h.
    #[serde(default = "default_pre_commit_timeout")]
    #[schemars(regex(pattern = DURATION_PATTERN), length(min = 2, max = 48))]
    #[x_kube(
        validation = Rule::new("duration(self) >= duration('1s') && duration(self) <= duration('24h')")
            .message("preCommitTimeout must be from 1s to 24h"),
    )]
    pub pre_commit_timeout: String,
}

fn default_pre_commit_timeout() -> String {
    "5m".to_owned()
}

/// Names the VM of a migration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct VmReference {
    /// The kind of the object that stands for the VM.
    #[serde(default)]
    pub kind: VmKind,
    /// The name of the AssignedVM.
    #[schemars(regex(pattern = "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"), length(min = 1, max = 63))]
    pub name: String,
}

/// The kinds that can stand for a VM.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum VmKind {
    /// A VM that an agent has reported.
    #[default]
    AssignedVM,
}

/// Where a VM shall go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Target {
    /// The name of a MigrationNode.
    #[schemars(length(min = 1, max = 253))]
    pub node_name: String,
}

/// The policy for a VM whose devices may talk to each other.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum PeerToPeer {
    /// With more than one device, every one must support P2P; otherwise the migration is refused before anything is
    /// touched.
    #[default]
    Required,
    /// The administrator states that these devices never talk to each other, so that they may be stopped one by one.
    AssumeIsolated,
}
