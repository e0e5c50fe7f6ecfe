//! QEMU's own words for states, as of 10.0. Words that it learns later are kept as they are.

use std::convert::Infallible;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $word:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, Hash)]
        pub enum $name {
            $($(#[$variant_doc])* $variant,)*
            /// A word that is not among these.
            Other(String),
        }

        impl $name {
            /// QEMU's word.
            pub fn as_str(&self) -> &str {
                match self {
                    $(Self::$variant => $word,)*
                    Self::Other(word) => word,
                }
            }
        }

        impl From<String> for $name {
            fn from(word: String) -> Self {
                match word.as_str() {
                    $($word => Self::$variant,)*
                    _ => Self::Other(word),
                }
            }
        }

        impl FromStr for $name {
            type Err = Infallible;

            fn from_str(word: &str) -> Result<Self, Infallible> {
                Ok(Self::from(word.to_owned()))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(self.as_str())
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer).map(Self::from)
            }
        }
    };
}

words! {
    /// `RunState` (qapi/run-state.json): what the machine does.
    RunState {
        /// Under a debugger.
        Debug = "debug",
        /// Waits for an incoming migration.
        InMigrate = "inmigrate",
        /// An error that only a reset cures.
        InternalError = "internal-error",
        /// Stopped by an I/O error of a disk.
        IoError = "io-error",
        /// Stopped by `stop`.
        Paused = "paused",
        /// Stopped after it has been migrated away.
        PostMigrate = "postmigrate",
        /// Started with `-S`, and not run yet.
        Prelaunch = "prelaunch",
        /// Stopped for the rest of a migration.
        FinishMigrate = "finish-migrate",
        /// Loads a snapshot.
        RestoreVm = "restore-vm",
        /// Its vCPUs run.
        Running = "running",
        /// Saves a snapshot.
        SaveVm = "save-vm",
        /// Shut down, with `-no-shutdown`.
        Shutdown = "shutdown",
        /// Suspended by its guest (ACPI S3).
        Suspended = "suspended",
        /// Stopped by its watchdog.
        Watchdog = "watchdog",
        /// Stopped by its guest's panic.
        GuestPanicked = "guest-panicked",
        /// Stopped for a COLO checkpoint.
        Colo = "colo",
    }
}

words! {
    /// `MigrationStatus` (qapi/migration.json). It says the same at both ends.
    MigrationStatus {
        /// There has been no migration.
        None = "none",
        /// Begun: the connection is being made.
        Setup = "setup",
        /// Being cancelled.
        Cancelling = "cancelling",
        /// Cancelled.
        Cancelled = "cancelled",
        /// RAM and the devices' pre-copy data flow.
        Active = "active",
        /// Post-copy.
        PostcopyActive = "postcopy-active",
        /// Post-copy, with the connection lost.
        PostcopyPaused = "postcopy-paused",
        /// Post-copy, with a new connection being made.
        PostcopyRecoverSetup = "postcopy-recover-setup",
        /// Post-copy, going on over a new connection.
        PostcopyRecover = "postcopy-recover",
        /// Done.
        Completed = "completed",
        /// Failed: `error-desc` of `query-migrate` says why.
        Failed = "failed",
        /// COLO.
        Colo = "colo",
        /// The machine stands, and waits for `migrate-continue` (capability `pause-before-switchover`).
        PreSwitchover = "pre-switchover",
        /// The devices' state flows. QEMU before 10.0 tells it only with `pause-before-switchover`.
        Device = "device",
        /// Waits until the guest has let go of a failover device.
        WaitUnplug = "wait-unplug",
    }
}

impl MigrationStatus {
    /// Whether nothing will change any more without another command.
    pub fn is_over(&self) -> bool {
        matches!(self, Self::None | Self::Cancelled | Self::Completed | Self::Failed)
    }
}

words! {
    /// `QapiVfioMigrationState` (qapi/vfio.json): the state that a device has entered.
    VfioState {
        /// STOP.
        Stop = "stop",
        /// RUNNING.
        Running = "running",
        /// STOP_COPY.
        StopCopy = "stop-copy",
        /// RESUMING.
        Resuming = "resuming",
        /// RUNNING_P2P.
        RunningP2p = "running-p2p",
        /// PRE_COPY.
        PreCopy = "pre-copy",
        /// PRE_COPY_P2P.
        PreCopyP2p = "pre-copy-p2p",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_that_is_not_known_is_kept() {
        let word: RunState = serde_json::from_str("\"daydreaming\"").unwrap();
        assert_eq!(word, RunState::Other("daydreaming".to_owned()));
        assert_eq!(serde_json::to_string(&word).unwrap(), "\"daydreaming\"");
    }

    #[test]
    fn a_known_word_is_the_same_both_ways() {
        let word: MigrationStatus = serde_json::from_str("\"pre-switchover\"").unwrap();
        assert_eq!(word, MigrationStatus::PreSwitchover);
        assert_eq!(word.to_string(), "pre-switchover");
        assert_eq!("running-p2p".parse(), Ok(VfioState::RunningP2p));
    }
}
