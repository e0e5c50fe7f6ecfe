//! The status of a `VMMigration`: conditions, the timeline, and each device.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, MicroTime, Time};
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{Features, VMMigrationSpec};

/// How far a VMMigration has come. Everything about it that must survive a restart of the operator is here.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct VMMigrationStatus {
    /// The generation of the spec that this status is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// A summary of the conditions for a column in a table. Programs read the conditions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<MigrationPhase>,
    /// Accepted, Prepared, Stopped, Committed and Succeeded of the current attempt; InDoubt and
    /// ResolveAccepted if there was a doubt or a resolve.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
    /// The spec as it was when it was accepted or refused, with the cancel and the resolve that the operator
    /// has seen since. A migration does what it was accepted for, even if its spec changes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_spec: Option<VMMigrationSpec>,
    /// The node on which the VM ran when the migration was accepted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_node: Option<String>,
    /// The node to which it goes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_node: Option<String>,
    /// host:port at which the source's agent reaches the target's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_address: Option<String>,
    /// The current attempt. Counts from 1. The agents refuse what belongs to an older one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attempt: Option<i32>,
    /// The attempts that have ended, oldest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub attempts: Vec<EndedAttempt>,
    /// When the next attempt is planned. Absent while one is under way, and when there will be none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_attempt_time: Option<Time>,
    /// What the target's agent holds for this migration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reservation: Option<Reservation>,
    /// Identifies the journal in which the target's agent has recorded that it reserved. An answer of another
    /// journal, such as one that was begun anew, does not count for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_journal: Option<String>,
    /// When the migration was accepted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_time: Option<Time>,
    /// When it ended, with success or not. Absent while the outcome is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub completion_time: Option<Time>,
    /// The blackout that the VMM expects while it copies and the guest runs; afterwards, its last estimate.
    /// Absent for a VMM that gives none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub estimate: Option<BlackoutEstimate>,
    /// How long it took, measured by the source's agent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timings: Option<Timings>,
    /// How much was sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<TransferredBytes>,
    /// What happened when, on either node.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub timeline: Vec<TimelineEntry>,
    /// The devices of the VM, in the order in which its VMM has them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<DeviceMigration>,
}

/// How an attempt ended.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct EndedAttempt {
    /// Which one; counts from 1.
    pub attempt: i32,
    /// As the reason of the condition Succeeded.
    pub reason: String,
    /// For a person.
    pub message: String,
}

/// A summary of the conditions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum MigrationPhase {
    /// Not planned yet.
    Pending,
    /// Refused before anything was touched.
    Refused,
    /// The target is being made ready. The guest runs.
    Preparing,
    /// State is being copied. The guest runs.
    Copying,
    /// The guest is stopped.
    Stopped,
    /// Past the point of no return: the VM is being started at the target.
    Starting,
    /// The VM runs at the target.
    Succeeded,
    /// It is being given up, because it was cancelled or the object was deleted.
    Aborting,
    /// An attempt was rolled back; the VM runs at the source, and another attempt follows.
    Retrying,
    /// Given up; the VM runs at the source.
    RolledBack,
    /// It waits for a node that cannot be asked, or for a person: see the condition InDoubt.
    InDoubt,
    /// The VM runs nowhere.
    Lost,
    /// The target has never started the VM, and never will; the source cannot be asked whether it runs there.
    SourceLost,
}

/// What the target's agent holds for a migration. Written before the call that it is about, so that a
/// restarted operator knows what may have been asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Reservation {
    /// The target may have been asked to reserve. The source has not been asked for anything.
    Requested,
    /// The target has reserved. The source may have been asked to migrate.
    Held,
    /// To be given back; the source was never asked to migrate.
    ReleasingNeverStarted,
    /// To be given back; the source has given the migration up.
    ReleasingAbortedAtSource,
    /// Given back, or never taken.
    Released,
    /// The VM runs there.
    Used,
    /// It is not known whether it may be given back. The agents keep what they have.
    Kept,
}

/// The blackout that the VMM expects.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct BlackoutEstimate {
    /// How long the guest would stand still if it were stopped now, judged by the bytes that are left
    /// (412ms).
    pub downtime: String,
    /// What is allowed, where that is more than `spec.downtimeBudget`, since `spec.onBudgetExceeded` is
    /// Proceed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allowed: Option<String>,
    /// When the VMM reported it, by the source's wall clock.
    pub time: MicroTime,
}

/// Durations, all on the source's clock, written as Kubernetes does (87.412ms, 2.013s).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Timings {
    /// From the start of pre-copy to the pause of the vCPUs. The guest ran.
    pub pre_copy: String,
    /// From the pause of the vCPUs until the source learned that the VM runs at the target (or ran at the
    /// source again): what the guest felt, at most.
    pub blackout: String,
    /// From the start of the migration at the source to its end.
    pub total: String,
}

/// Bytes that have left the source.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct TransferredBytes {
    /// State of all devices.
    pub devices: i64,
    /// RAM and vCPU state.
    pub vmm: i64,
}

/// Something that happened on a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct TimelineEntry {
    /// CONNECTED, PRE_COPY, PAUSING, QUIESCING, STOPPING, CAPTURING, LOADED, COMMITTED, STARTING, STARTED,
    /// RELEASED, ROLLING_BACK or ROLLED_BACK.
    pub phase: String,
    /// The node on which it happened.
    pub node: String,
    /// By the source's wall clock; of what happened at the target it is an estimate, late by the time of one
    /// message at most.
    pub time: MicroTime,
    /// Since the first event of this attempt, by the same clock.
    pub elapsed: String,
}

/// One device of the VM: which device takes over from it, and how that went.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct DeviceMigration {
    /// PCI address, or UUID of the mediated device, at the source.
    pub source: String,
    /// The same at the target.
    pub target: String,
    /// The kernel driver that both have.
    pub driver: String,
    /// PCI vendor:device, or the type of the mediated device, that both have.
    pub model: String,
    /// What the driver at the source has advertised.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub features: Features,
    /// Bytes of the device's state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<i64>,
    /// Every state in which the device was read back, at either end. Filled in when the migration has ended.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub states: Vec<DeviceStep>,
    /// How many more states were reported than are shown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub states_left_out: Option<i32>,
}

/// A device was read back in another state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct DeviceStep {
    /// The node on which it happened.
    pub node: String,
    /// The kernel's name of the new state: RUNNING_P2P, STOP_COPY, RESUMING, ...
    pub state: String,
    /// By the source's wall clock; of what happened at the target it is an estimate, late by the time of one
    /// message at most.
    pub time: MicroTime,
    /// Since the first event of this attempt, by the same clock.
    pub elapsed: String,
    /// How long the change took, reading back included.
    pub took: String,
}
