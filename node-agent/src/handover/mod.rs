//! The hand-over: how exactly one of two nodes ends up running the VM.
//!
//! ```text
//!  source                                            destination
//!  Connecting ─────────── Hello ───────────────────▶ Reserved (twin paused, devices in RESUMING)
//!             ◀────────── Ready ────────────────────
//!  PreCopying ─────────── blobs ───────────────────▶ Loading
//!  Pausing, Quiescing, Stopping     slack water
//!  Capturing  ─────────── blobs, trailers ─────────▶ Loading: lengths and digests verified
//!                                                    Verifying: RESUMING -> STOP, read back
//!             ◀────────── Loaded ───────────────────  Loaded
//!  Committing              point of no return
//!  AwaitingStarted ────── Commit ──────────────────▶ Starting: from here the source's copy is dead
//!                                                    RUNNING_P2P, RUNNING, vCPUs
//!             ◀────────── Started ──────────────────  Running
//!  Releasing
//! ```
//!
//! Any failure before Committing ends in a rollback at the source and a discard at the destination. After it the source goes by
//! what the destination has journalled, and by nothing else: RUNNING ends it, DISCARDED lets it roll back, and until it hears
//! one of these it asks. [`source`] and [`destination`] are pure: `step(state, event) -> (state, effects)`, without a clock, a runtime or a
//! transport. [`shell`] performs the effects and turns what happens into events.

pub mod destination;
pub mod devices;
pub mod entry;
pub mod policy;
pub mod shell;
#[cfg(test)]
mod simulation;
pub mod source;

/// One of the streams that make up a VM's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Blob {
    /// A device's, by its index in the VM's order.
    Device(usize),
    /// RAM and machine state, as the VMM gives them.
    Vmm,
}

/// All blobs of a VM with `devices` devices.
pub fn blobs(devices: usize) -> impl Iterator<Item = Blob> {
    (0..devices).map(Blob::Device).chain([Blob::Vmm])
}

/// What must be on stable storage before the message, or the deed, that depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Record {
    /// Source: a save has begun.
    Saving,
    /// Source: the point of no return.
    Committed,
    /// Source: the VM stays here. Nothing resumes before this is recorded.
    Aborted,
    /// Source: the VM runs elsewhere and its devices are given back.
    Released,
    /// Destination: devices and a twin may be held.
    Reserved,
    /// Destination: everything has been verified and loaded.
    Loaded,
    /// Destination: from here on the source's copy is dead.
    Starting,
    /// Destination: the VM runs.
    Running,
    /// Destination: given up, before anything started.
    Discarded,
}

/// What the other end has journalled of this attempt: as it says itself, or as somebody relays it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Word {
    /// Its last record. None: it has no journal of this attempt.
    pub record: Option<Record>,
    /// Nothing goes on there any more.
    pub ended: bool,
    /// Why it gave up or could not start, where it did.
    pub failure: Option<Failure>,
    /// An administrator states the record in the other end's place, and this is why.
    pub stated_because: Option<String>,
}

impl Word {
    /// That it stands at a record, and goes on.
    pub fn of(record: Record) -> Self {
        Self { record: Some(record), ended: false, failure: None, stated_because: None }
    }
}

/// The kind of a failure: a condition's reason, an event's reason and a metric's label.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reason {
    /// A device refused a state change, a read or a write.
    DeviceFailed,
    /// The VMM refused a call or did not answer.
    VmmFailed,
    /// The VMM's process is gone.
    VmmExited,
    /// The twin could not be started, or ended.
    TwinFailed,
    /// The destination could not be reached, or would not take part.
    TargetUnreachable,
    /// The destination was lost on the way.
    PeerLost,
    /// A blob's offset, length or digest was not what the source announced.
    BlobRejected,
    /// The destination gave up; the message is its own.
    TargetFailed,
    /// Not committed within `preCommitTimeout`.
    TimedOut,
    /// Somebody asked for it.
    Aborted,
    /// The source was silent for too long.
    SourceSilent,
    /// The source reported that it keeps the VM, or was never asked to give it.
    Released,
    /// The VM's devices could not all be brought back to RUNNING.
    RollbackFailed,
    /// The destination could not start what it had loaded.
    StartFailed,
    /// The agent ended in the middle, and began again.
    AgentRestarted,
    /// A record could not be made durable.
    JournalFailed,
    /// The destination has no journal of what it was sent.
    TargetForgot,
    /// The destination answers, and has not started the VM yet.
    TargetSlow,
    /// The guest would have to stand still for longer than it may.
    BudgetExceeded,
}

impl Reason {
    const ALL: [Self; 19] = [
        Self::DeviceFailed,
        Self::VmmFailed,
        Self::VmmExited,
        Self::TwinFailed,
        Self::TargetUnreachable,
        Self::PeerLost,
        Self::BlobRejected,
        Self::TargetFailed,
        Self::TimedOut,
        Self::Aborted,
        Self::SourceSilent,
        Self::Released,
        Self::RollbackFailed,
        Self::StartFailed,
        Self::AgentRestarted,
        Self::JournalFailed,
        Self::TargetForgot,
        Self::TargetSlow,
        Self::BudgetExceeded,
    ];

    /// The reason of this name, as the other end has written it.
    pub fn of_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|reason| reason.as_str() == name)
    }

    /// In CamelCase, as Kubernetes writes reasons.
    pub fn as_str(self) -> &'static str {
        match self {
            Reason::DeviceFailed => "DeviceFailed",
            Reason::VmmFailed => "VMMFailed",
            Reason::VmmExited => "VMMExited",
            Reason::TwinFailed => "TwinFailed",
            Reason::TargetUnreachable => "TargetUnreachable",
            Reason::PeerLost => "PeerLost",
            Reason::BlobRejected => "BlobRejected",
            Reason::TargetFailed => "TargetFailed",
            Reason::TimedOut => "TimedOut",
            Reason::Aborted => "Aborted",
            Reason::SourceSilent => "SourceSilent",
            Reason::Released => "Released",
            Reason::RollbackFailed => "RollbackFailed",
            Reason::StartFailed => "StartFailed",
            Reason::AgentRestarted => "AgentRestarted",
            Reason::JournalFailed => "JournalFailed",
            Reason::TargetForgot => "TargetForgot",
            Reason::TargetSlow => "TargetSlow",
            Reason::BudgetExceeded => "BudgetExceeded",
        }
    }
}

/// What went wrong, for a person.
#[derive(Clone, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// Its kind.
    pub reason: Reason,
    /// One or more sentences that name the device, the value or the peer.
    pub message: String,
}

impl Failure {
    /// A failure of a kind, in words.
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self { reason, message: message.into() }
    }
}
