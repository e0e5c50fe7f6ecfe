//! The reasons that the services give themselves. Failures of an attempt have those of
//! [`slackwater_handover::Reason`], findings of preflight those of [`crate::vmm::qemu::preflight::Kind`].

use slackwater_handover::Reason;
use strum::IntoStaticStr;

/// Why a VM cannot be migrated as it is, or a call is refused. In CamelCase on the wire and in conditions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, IntoStaticStr)]
#[cfg_attr(test, derive(strum::EnumIter))]
pub(super) enum ServiceReason {
    /// The VM is paused, and a migration would resume it.
    #[strum(serialize = "VMPaused")]
    VmPaused,
    /// The VM does not run, for another reason than a pause: its guest has shut down, sleeps, has panicked.
    #[strum(serialize = "VMNotRunning")]
    VmNotRunning,
    /// The VMM does not answer, or its vm.json is invalid.
    #[strum(serialize = "VMMUnreachable")]
    VmmUnreachable,
    /// A device's driver has no migration, or does not say so.
    DeviceNotMigratable,
    /// The VMM would refuse.
    MigrationBlocked,
    /// Not all of the VM's devices can be quiesced.
    PeerToPeerUnsupported,
    /// There is no such VM on this node.
    #[strum(serialize = "VMNotFound")]
    VmNotFound,
    /// Source and destination are the same node.
    TargetIsSource,
    /// A VM of this name is on this node already.
    #[strum(serialize = "VMAlreadyThere")]
    VmAlreadyThere,
    /// A target device is not there, not free, or cannot take over from its source.
    NoMatchingDevices,
    /// The VM does not have the devices that the migration was planned for.
    DevicesDiffer,
    /// A device of the VM is not in RUNNING before the migration begins.
    DeviceNotRunning,
    /// Another migration holds the VM or a device, or this one has another role or reservation here.
    MigrationInProgress,
    /// The program of the twin may not be started on this node.
    TwinNotAllowed,
    /// No sandbox can be made for the twin on this node.
    TwinNotConfined,
    /// A field of the request is wrong.
    InvalidRequest,
    /// A newer attempt of the migration has been seen.
    AttemptOver,
    /// Another operator leads now.
    OperatorReplaced,
    /// What was journalled of the migration cannot be read or used.
    JournalUnreadable,
    /// Several open journals are about the same VM or device: none of them is acted upon.
    JournalsConflict,
    /// A migration of the VM has ended, and that is not durable yet.
    EndNotRecorded,
    /// Too many migrations have ended here without the operator's acknowledgement.
    EndsNotAcknowledged,
    /// The agent was restarted, and has not found the VM again yet.
    Recovering,
    /// The point of no return has passed.
    AlreadyCommitted,
    /// Nothing is reserved here for this attempt.
    NotReserved,
    /// A task of the agent ended early.
    Internal,
}

impl ServiceReason {
    /// As a condition has it.
    pub(super) fn as_str(self) -> &'static str {
        self.into()
    }
}

impl From<ServiceReason> for Reason {
    fn from(reason: ServiceReason) -> Self {
        Self::Other(reason.as_str().into())
    }
}

#[cfg(test)]
mod tests {
    use strum::IntoEnumIterator;

    use super::*;

    #[test]
    fn every_reason_can_be_a_conditions_and_is_not_one_of_the_cores() {
        for reason in ServiceReason::iter() {
            assert_eq!(Reason::parse(reason.as_str()), Some(reason.into()), "{reason:?}");
        }
        assert_eq!(ServiceReason::VmPaused.as_str(), "VMPaused");
    }
}
