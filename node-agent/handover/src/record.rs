//! What an end makes durable, and what it says of that.

use serde::{Deserialize, Serialize};
use strum::EnumIter;

use crate::failure::Failure;

/// What must be on stable storage before the message, or the action, that depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, EnumIter, Serialize, Deserialize)]
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

/// What one end has journalled of an attempt: as it says itself, or as the operator relays it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Word {
    /// Its last record. None: it has no journal of this attempt.
    pub record: Option<Record>,
    /// The attempt has ended at that end.
    pub ended: bool,
    /// Why it gave up or could not start, if it did.
    pub failure: Option<Failure>,
    /// An administrator states the record in place of that end, and this is the justification.
    pub stated_because: Option<String>,
}

impl Word {
    /// The end is at `record`, and the attempt goes on.
    #[must_use]
    pub fn at(record: Record) -> Self {
        Self { record: Some(record), ..Self::without_record() }
    }

    /// The end has no journal of the attempt.
    #[must_use]
    pub fn without_record() -> Self {
        Self { record: None, ended: false, failure: None, stated_because: None }
    }
}
