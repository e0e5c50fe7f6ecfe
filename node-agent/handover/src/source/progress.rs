//! What the source knows about each of those that it waits for.

use std::collections::BTreeSet;

use crate::{Blob, Reason};

/// Whether the guest runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) enum Vcpus {
    #[default]
    Running,
    Pausing,
    Paused,
}

/// The VMM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct VmmProgress {
    pub(super) vcpus: Vcpus,
    /// It has been asked for something that a rollback must undo.
    pub(super) touched: bool,
    /// Its process has ended.
    pub(super) gone: bool,
}

/// The VMM's save.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct SaveProgress {
    pub(super) started: bool,
    /// [`Effect::Converge`](super::Effect::Converge) has been asked for.
    pub(super) converging: bool,
    pub(super) converged: bool,
    /// The VMM has said so.
    pub(super) finished: bool,
}

/// The blobs on their way to the destination.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Streams {
    /// Devices that have given all of their initial data.
    pub(super) pre_copied: BTreeSet<usize>,
    /// Blobs that the destination has verified.
    pub(super) sent: BTreeSet<Blob>,
    /// All have ended, for a rollback.
    pub(super) closed: bool,
}

/// The destination.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct PeerProgress {
    pub(super) ready: bool,
    pub(super) loaded: bool,
    /// It is being asked what it has journalled.
    pub(super) asking: bool,
    /// What was last reported to keep the migration from its end.
    pub(super) doubt: Option<Reason>,
}
