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

/// The least `spec.downtimeBudget`.
pub const MIN_DOWNTIME_BUDGET: Duration = Duration::from_millis(1);
/// The greatest `spec.downtimeBudget`.
pub const MAX_DOWNTIME_BUDGET: Duration = Duration::from_secs(60);

/// The most `spec.attempts`.
pub const MAX_ATTEMPTS: i32 = 10;
/// The least and the most characters of `spec.resolve.justification`.
pub const JUSTIFICATION_CHARACTERS: std::ops::RangeInclusive<usize> = 10..=1024;

/// Moves one VM, with its assigned devices, to another node, once. `cancel: true`, or deleting the object,
/// gives the migration up, if it has not been committed yet. Only `cancel`, `resolve` and
/// `ttlSecondsAfterFinished` can be changed.
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
    doc = "A VMMigration moves one VM, with its assigned devices, to another node, once. `spec.cancel: \
           true`, or deleting it, gives the migration up, if it has not been committed yet.",
    status = "VMMigrationStatus",
    validation = Rule::new(RESOLVE_STAYS)
        .message("an accepted resolve cannot be changed or removed; only a refused one may be replaced")
        .field_path(".spec.resolve"),
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
    ),
    printcolumn(
        name = "Attempt",
        type_ = "integer",
        json_path = ".status.attempt",
        priority = 1,
        description = "Counts from 1"
    ),
    printcolumn(
        name = "In Doubt",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"InDoubt\")].status",
        priority = 1,
        description = "Whether the migration waits for a node, or for a person"
    )
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new(MOVE_STAYS)
        .message("of the spec of a VMMigration only cancel, resolve and ttlSecondsAfterFinished can be changed; \
                  delete it and create another one"),
    validation = Rule::new("!oldSelf.cancel || self.cancel")
        .message("a cancel cannot be taken back; create another VMMigration")
        .field_path(".cancel"),
)]
pub struct VMMigrationSpec {
    /// The VM to move, in the namespace of the VMMigration.
    pub vm_ref: VmReference,
    /// Where to. Without it, the operator takes the first node, by name, whose free devices match those of
    /// the VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<Target>,
    /// What to do where the devices of the VM may talk to each other. Matters only for a VM with more than
    /// one device.
    #[serde(default)]
    pub peer_to_peer: PeerToPeer,
    /// The time within which the migration must be committed; otherwise it is rolled back and the VM runs on
    /// at the source. Whole hours, minutes, seconds and milliseconds, as in 5m or 1m30s; from 1s to 24h.
    #[serde(default = "default_pre_commit_timeout")]
    #[schemars(regex(pattern = DURATION_PATTERN), length(min = 2, max = 48))]
    #[x_kube(
        validation = Rule::new("duration(self) >= duration('1s') && duration(self) <= duration('24h')")
            .message("preCommitTimeout must be from 1s to 24h"),
    )]
    pub pre_commit_timeout: String,
    /// How long the guest may stand still for what is left to be sent when it is stopped, as far as that is
    /// known before: a VMM that copies while the guest runs (QEMU) stops it only when it expects to need no
    /// longer. The time that the hand-over itself needs is not included. It has no effect yet for a VMM of
    /// the VMM contract, which stops the guest before it copies. Whole minutes, seconds and milliseconds, as
    /// in 300ms or 1s500ms; from 1ms to 60s.
    #[serde(default = "default_downtime_budget")]
    #[schemars(regex(pattern = DURATION_PATTERN), length(min = 2, max = 48))]
    #[x_kube(
        validation = Rule::new("duration(self) >= duration('1ms') && duration(self) <= duration('60s')")
            .message("downtimeBudget must be from 1ms to 60s"),
    )]
    pub downtime_budget: String,
    /// What to do when the state does not fit `downtimeBudget`: when the VMM has gone through the guest's RAM
    /// three times, for at least 5s, and still expects to need longer.
    #[serde(default)]
    pub on_budget_exceeded: OnBudgetExceeded,
    /// How often to try. After an attempt that was rolled back, with the target's reservation given back, the
    /// next one is planned again, 5s later, then 10s, up to 60s. From 1 to 10.
    #[serde(default = "default_attempts")]
    #[schemars(range(min = 1, max = 10))]
    pub attempts: i32,
    /// Gives the migration up, if it has not been committed yet: the VM runs on where it is, and this object
    /// stays as a record. Can be set at any time, and cannot be taken back.
    #[serde(default)]
    pub cancel: bool,
    /// So many seconds after its end, with success or not, the operator deletes this object. Not while an agent
    /// has not heard of the end, and not if the VM was lost. Without it, the object stays.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub ttl_seconds_after_finished: Option<i32>,
    /// An administrator's decision on a migration that is in doubt, where an agent cannot be asked. Refused,
    /// and without any effect, unless the condition InDoubt is True and names it as a remedy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resolve: Option<Resolve>,
}

impl VMMigrationSpec {
    /// A migration of the AssignedVM of that name, with the API's default for everything else.
    #[must_use]
    pub fn new(vm: &str) -> Self {
        Self {
            vm_ref: VmReference { kind: VmKind::default(), name: vm.to_owned() },
            target: None,
            peer_to_peer: PeerToPeer::default(),
            pre_commit_timeout: default_pre_commit_timeout(),
            downtime_budget: default_downtime_budget(),
            on_budget_exceeded: OnBudgetExceeded::default(),
            attempts: default_attempts(),
            cancel: false,
            ttl_seconds_after_finished: None,
            resolve: None,
        }
    }
}

/// Nothing but `cancel` and `resolve` has changed.
const MOVE_STAYS: &str = "self.vmRef == oldSelf.vmRef && self.peerToPeer == oldSelf.peerToPeer && \
                          self.preCommitTimeout == oldSelf.preCommitTimeout && self.downtimeBudget == \
                          oldSelf.downtimeBudget && self.onBudgetExceeded == oldSelf.onBudgetExceeded && \
                          self.attempts == oldSelf.attempts && has(self.target) == has(oldSelf.target) && \
                          (!has(self.target) || self.target == oldSelf.target)";

/// `resolve` is set once, unless the operator has refused what was set.
const RESOLVE_STAYS: &str = "!has(oldSelf.spec.resolve) || (has(self.spec.resolve) && (self.spec.resolve == \
                             oldSelf.spec.resolve || (has(self.status) && has(self.status.conditions) && \
                             self.status.conditions.exists(c, c.type == 'ResolveAccepted' && c.status == \
                             'False'))))";

fn default_attempts() -> i32 {
    1
}

fn default_pre_commit_timeout() -> String {
    "5m".to_owned()
}

fn default_downtime_budget() -> String {
    "300ms".to_owned()
}

/// Where the VM is to run, as an administrator decides in the place of an agent that cannot be asked. Nothing
/// checks what is stated: if it is not true, the VM runs twice.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.runOn != 'Source' || self.destinationNeverStarted")
        .message("runOn: Source needs destinationNeverStarted: true"),
)]
pub struct Resolve {
    /// Source: the source takes the VM back. Destination: the destination starts it.
    pub run_on: RunOn,
    /// The destination has not started the VM, and cannot do so any more: its node is off, or its agent and
    /// the waiting VMM have been ended for good. Needed for `runOn: Source`.
    #[serde(default)]
    pub destination_never_started: bool,
    /// The source has not run the VM since the migration stopped it, and never will: its node went down while
    /// the VM was paused and stays off, or the VMM there has been ended. A source that gave the migration up,
    /// ran the VM on and went down later has a newer state than the destination: then this is not true.
    /// Needed for `runOn: Destination`, unless the condition Committed is True (then the source's own journal
    /// has kept it from that).
    #[serde(default)]
    pub source_never_resumes: bool,
    /// How that is known, for later readers; it is recorded in an event and in the agent's journal. 10 to
    /// 1024 characters.
    #[schemars(length(min = 10, max = 1024))]
    pub justification: String,
}

/// One of the two ends of a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum RunOn {
    /// The node that the VM comes from.
    Source,
    /// The node that it was to go to.
    Destination,
}

/// Names the VM of a migration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct VmReference {
    /// The kind of the object that represents the VM.
    #[serde(default)]
    pub kind: VmKind,
    /// The name of the AssignedVM.
    #[schemars(regex(pattern = "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"), length(min = 1, max = 63))]
    pub name: String,
}

/// The kinds that can represent a VM.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum VmKind {
    /// A VM that an agent has reported.
    #[default]
    AssignedVM,
}

/// Where a VM is to go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Target {
    /// The name of a MigrationNode.
    #[schemars(length(min = 1, max = 253))]
    pub node_name: String,
}

/// What to do when the blackout would be longer than `downtimeBudget`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum OnBudgetExceeded {
    /// The migration is rolled back with the reason BudgetExceeded; the guest was never stopped.
    #[default]
    Abort,
    /// The guest is stopped for longer: twice the expected time is allowed then, which an event reports.
    Proceed,
}

/// The policy for a VM whose devices may talk to each other.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum PeerToPeer {
    /// With more than one device, every one must support P2P; otherwise the migration is refused before
    /// anything is touched.
    #[default]
    Required,
    /// The administrator states that these devices never talk to each other, so that they may be stopped one
    /// by one.
    AssumeIsolated,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_spec_has_the_defaults_that_the_api_server_fills_in() {
        let filled_in = serde_json::json!({"vmRef": {"name": "counter"}});
        assert_eq!(
            serde_json::from_value::<VMMigrationSpec>(filled_in).unwrap(),
            VMMigrationSpec::new("counter")
        );
    }
}
