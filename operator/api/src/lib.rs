//! The custom resources of Slackwater, `slackwater.dev/v1alpha1`, and nothing else.
//!
//! | kind | scope | spec by | status by | what it says |
//! |---|---|---|---|---|
//! | [`VMMigration`] | namespaced | a user | the operator | which VM goes where, and how far it has come |
//! | [`AssignedVM`] | namespaced | - | the operator | where a VM runs, its devices, whether it can be migrated |
//! | [`MigrationNode`] | cluster | an administrator | the operator | how to reach a node's agent, what it has |
//!
//! The doc comments of the fields become the descriptions in the CRDs, and `kubectl explain` prints them.

#![forbid(unsafe_code)]
// KubeSchema repeats each struct, with its visibility, inside a function.
#![allow(unreachable_pub)]
// Clippy takes the columns of a table for attributes that are given twice.
#![allow(clippy::duplicated_attributes)]

mod assigned_vm;
mod device;
mod duration;
mod migration;
mod migration_status;
mod node;

pub use assigned_vm::{
    AssignedVM, AssignedVMFields, AssignedVMStatus, MigrationReference, VmDevice, VmState,
};
pub use device::{Features, MigrationFeature};
pub use duration::{DurationError, format_duration, parse_duration};
pub use migration::{
    JUSTIFICATION_CHARACTERS, MAX_ATTEMPTS, MAX_DOWNTIME_BUDGET, MAX_PRE_COMMIT_TIMEOUT, MIN_DOWNTIME_BUDGET,
    MIN_PRE_COMMIT_TIMEOUT, OnBudgetExceeded, PeerToPeer, Resolve, RunOn, Target, VMMigration,
    VMMigrationSpec, VmKind, VmReference,
};
pub use migration_status::{
    BlackoutEstimate, DeviceMigration, DeviceStep, EndedAttempt, MigrationPhase, Reservation, TimelineEntry,
    Timings, TransferredBytes, VMMigrationStatus,
};
pub use node::{HIGHEST_ACCEPTED_EPOCH, MigrationNode, MigrationNodeSpec, MigrationNodeStatus, NodeDevice};

/// The API group of all kinds.
pub const GROUP: &str = "slackwater.dev";

/// The finalizer of a VMMigration: its removal says that no agent holds anything for it any more.
pub const MIGRATION_FINALIZER: &str = "slackwater.dev/migration";

/// The annotation with the UID by which a VMMigration was accepted. A copy of it, such as one from a backup, has
/// another UID, and does not run again.
pub const ACCEPTED_AS_ANNOTATION: &str = "slackwater.dev/accepted-as";

/// The condition types that the kinds use.
pub mod condition {
    /// VMMigration: the request has been planned, or refused.
    pub const ACCEPTED: &str = "Accepted";
    /// VMMigration: the target holds free devices and a waiting VMM for it.
    pub const PREPARED: &str = "Prepared";
    /// VMMigration: slack water; every vCPU and every device at the source has been read back as stopped.
    pub const STOPPED: &str = "Stopped";
    /// VMMigration: the source has passed its point of no return.
    pub const COMMITTED: &str = "Committed";
    /// VMMigration: how it ended.
    pub const SUCCEEDED: &str = "Succeeded";
    /// VMMigration: it goes on only when a node comes back, or when an administrator decides.
    pub const IN_DOUBT: &str = "InDoubt";
    /// VMMigration: whether `spec.resolve` is acted upon.
    pub const RESOLVE_ACCEPTED: &str = "ResolveAccepted";
    /// AssignedVM: exactly one reachable agent reports it, and its VMM answers. MigrationNode: the agent
    /// answers.
    pub const READY: &str = "Ready";
    /// MigrationNode: the agent's certificate is valid; the message says until when.
    pub const CERTIFICATE_VALID: &str = "CertificateValid";
    /// AssignedVM: nothing that is known prevents a migration.
    pub const MIGRATABLE: &str = "Migratable";
    /// AssignedVM: another node reports a VM of this name, and that report is set aside.
    pub const CONTESTED: &str = "Contested";
    /// MigrationNode: everything that the agent reports is used.
    pub const REPORT_ACCEPTED: &str = "ReportAccepted";
    /// All kinds, while it is False: the operator cannot read the object, and leaves it alone.
    pub const READABLE: &str = "Readable";
}
