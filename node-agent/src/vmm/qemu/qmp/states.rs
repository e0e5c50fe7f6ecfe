//! QEMU's own words for states, as of 10.0. Words of a later version are kept as they are.

use serde::{Deserialize, Serialize};
use strum::{AsRefStr, Display, EnumString};

/// `RunState` (qapi/run-state.json): what the machine does.
#[derive(Clone, Debug, PartialEq, Eq, Hash, AsRefStr, Display, EnumString, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
#[strum(serialize_all = "kebab-case")]
pub enum RunState {
    /// Under a debugger.
    Debug,
    /// Waits for an incoming migration.
    #[serde(rename = "inmigrate")]
    #[strum(serialize = "inmigrate")]
    InMigrate,
    /// An error that only a reset cures.
    InternalError,
    /// Stopped by an I/O error of a disk.
    IoError,
    /// Stopped by `stop`.
    Paused,
    /// Stopped after it has been migrated away.
    #[serde(rename = "postmigrate")]
    #[strum(serialize = "postmigrate")]
    PostMigrate,
    /// Started with `-S`, and not run yet.
    Prelaunch,
    /// Stopped for the rest of a migration.
    FinishMigrate,
    /// Loads a snapshot.
    RestoreVm,
    /// Its vCPUs run.
    Running,
    /// Saves a snapshot.
    SaveVm,
    /// Shut down, with `-no-shutdown`.
    Shutdown,
    /// Suspended by its guest (ACPI S3).
    Suspended,
    /// Stopped by its watchdog.
    Watchdog,
    /// Stopped by its guest's panic.
    GuestPanicked,
    /// Stopped for a COLO checkpoint.
    Colo,
    /// A word that is not among these.
    #[serde(untagged)]
    #[strum(default, transparent)]
    Other(String),
}

/// `MigrationStatus` (qapi/migration.json). It says the same at both ends.
#[derive(Clone, Debug, PartialEq, Eq, Hash, AsRefStr, Display, EnumString, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
#[strum(serialize_all = "kebab-case")]
pub enum MigrationStatus {
    /// There has been no migration.
    None,
    /// Begun: the connection is being made.
    Setup,
    /// Being cancelled.
    Cancelling,
    /// Cancelled.
    Cancelled,
    /// RAM and the devices' pre-copy data flow.
    Active,
    /// Post-copy.
    PostcopyActive,
    /// Post-copy, with the connection lost.
    PostcopyPaused,
    /// Post-copy, with a new connection being made.
    PostcopyRecoverSetup,
    /// Post-copy, going on over a new connection.
    PostcopyRecover,
    /// Done.
    Completed,
    /// Failed: `error-desc` of `query-migrate` says why.
    Failed,
    /// COLO.
    Colo,
    /// The machine stands, and waits for `migrate-continue` (capability `pause-before-switchover`).
    PreSwitchover,
    /// The devices' state flows. QEMU before 10.0 reports it only with `pause-before-switchover`.
    Device,
    /// Waits until the guest has let go of a failover device.
    WaitUnplug,
    /// A word that is not among these.
    #[serde(untagged)]
    #[strum(default, transparent)]
    Other(String),
}

impl MigrationStatus {
    /// Whether nothing will change any more without another command.
    pub fn is_over(&self) -> bool {
        matches!(self, Self::None | Self::Cancelled | Self::Completed | Self::Failed)
    }
}

/// `QapiVfioMigrationState` (qapi/vfio.json): the state that a device has entered.
#[derive(Clone, Debug, PartialEq, Eq, Hash, AsRefStr, Display, EnumString, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
#[strum(serialize_all = "kebab-case")]
pub enum VfioState {
    /// STOP.
    Stop,
    /// RUNNING.
    Running,
    /// STOP_COPY.
    StopCopy,
    /// RESUMING.
    Resuming,
    /// RUNNING_P2P.
    RunningP2p,
    /// PRE_COPY.
    PreCopy,
    /// PRE_COPY_P2P.
    PreCopyP2p,
    /// A word that is not among these.
    #[serde(untagged)]
    #[strum(default, transparent)]
    Other(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_word_is_kept() {
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
        for word in ["inmigrate", "postmigrate", "restore-vm", "guest-panicked", "daydreaming"] {
            let state: RunState = serde_json::from_value(word.into()).unwrap();
            assert_eq!((state.as_ref(), word.parse()), (word, Ok(state.clone())));
            assert_eq!(serde_json::to_value(&state).unwrap(), word);
        }
    }
}
