//! Why a VM does not run, and what its owner can do about it. Pure.

use std::fmt;

use super::RunState;

/// Why a VM does not run, other than that it is paused or has not been loaded yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(test, derive(strum::EnumIter))]
pub enum Stopped {
    /// It has never run: its VMM was started so.
    NotStarted,
    /// Its guest has shut down, and its VMM was told to stay.
    ShutDown,
    /// Its guest sleeps (ACPI S3).
    Suspended,
    /// Its guest has panicked.
    Panicked,
    /// A disk has failed.
    IoError,
    /// Its watchdog has stopped it.
    Watchdog,
    /// Its VMM cannot run it any more.
    InternalError,
    /// Another client has migrated it away.
    MigratedAway,
    /// Another client is at work on it: a snapshot, a migration, a debugger.
    InUse,
}

impl RunState {
    /// What the VM does, as the rest of a sentence about it.
    #[must_use]
    pub fn words(self) -> &'static str {
        match self {
            Self::Running => "runs",
            Self::Paused => "is paused",
            Self::Incoming => "waits for an incoming migration",
            Self::Stopped(why) => match why {
                Stopped::NotStarted => "has not been started (`-S`)",
                Stopped::ShutDown => "has been shut down by its guest (`-no-shutdown` keeps its VMM)",
                Stopped::Suspended => "has been suspended by its guest",
                Stopped::Panicked => "stands still, since its guest has panicked",
                Stopped::IoError => "stands still, since a disk of it had an I/O error",
                Stopped::Watchdog => "was stopped by its watchdog",
                Stopped::InternalError => "was stopped by an internal error of its VMM",
                Stopped::MigratedAway => "has been migrated away by another client of its VMM",
                Stopped::InUse => "is stopped while another client of its VMM is at work on it",
            },
        }
    }

    /// What makes a VM that does not run migratable again, as an imperative. Empty for one that runs.
    #[must_use]
    pub fn remedy(self) -> &'static str {
        match self {
            Self::Running => "",
            Self::Paused => "resume it",
            Self::Incoming => "load and start it, or end its VMM",
            Self::Stopped(why) => match why {
                Stopped::NotStarted => "start it (`cont`)",
                Stopped::ShutDown => "start it again (`system_reset`, `cont`), or end its VMM (`quit`)",
                Stopped::Suspended => "wake it (`system_wakeup`)",
                Stopped::Panicked => "look why, then reset it (`system_reset`, `cont`) or end its VMM",
                Stopped::IoError => "mend the disk, then resume it (`cont`)",
                Stopped::Watchdog => "look why, then reset it (`system_reset`) and resume it (`cont`)",
                Stopped::InternalError => "reset it (`system_reset`, `cont`), or end its VMM",
                Stopped::MigratedAway => {
                    "if it runs elsewhere, end this VMM (`quit`) and never resume it; else resume it (`cont`)"
                }
                Stopped::InUse => "wait until that is done",
            },
        }
    }
}

/// What it does, and what makes it migratable.
impl fmt::Display for RunState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.remedy() {
            "" => f.write_str(self.words()),
            remedy => write!(f, "{}: {remedy}", self.words()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use strum::IntoEnumIterator;

    use super::*;

    #[test]
    fn each_state_in_which_a_vm_stands_still_has_words_and_a_remedy_of_its_own() {
        let stopped = Stopped::iter().map(RunState::Stopped);
        let all: Vec<_> = stopped.chain([RunState::Paused, RunState::Incoming]).collect();
        let words: BTreeSet<_> = all.iter().map(|state| state.words()).collect();
        assert_eq!(words.len(), all.len());
        assert!(all.iter().all(|state| !state.remedy().is_empty()));
        assert_eq!(RunState::Running.to_string(), "runs");
        assert_eq!(RunState::Paused.to_string(), "is paused: resume it");
    }
}
