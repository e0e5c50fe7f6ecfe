//! Reasons of conditions that more than one place of the operator writes or compares, and how an agent's
//! reason becomes one. A reason that only one place writes stays there.

/// VMMigration, Succeeded: the attempt goes on.
pub(crate) const IN_PROGRESS: &str = "InProgress";
/// VMMigration, Succeeded: the source is asked to give the migration up.
pub(crate) const ABORTING: &str = "Aborting";
/// VMMigration, Succeeded: the migration was given up because the user asked for it.
pub(crate) const ABORTED: &str = "Aborted";
/// VMMigration, Succeeded: the user asked for that after the point of no return.
pub(crate) const ABORT_TOO_LATE: &str = "AbortTooLate";
/// VMMigration, Succeeded: an attempt has failed, and another one follows.
pub(crate) const ATTEMPT_FAILED: &str = "AttemptFailed";
/// VMMigration, Succeeded: the source refused to begin, and its agent names no reason.
pub(crate) const SOURCE_REFUSED: &str = "SourceRefused";
/// VMMigration, Accepted and Succeeded: the source does not answer, or does not have the VM any more.
pub(crate) const SOURCE_NOT_READY: &str = "SourceNotReady";
/// VMMigration, Succeeded: the VM runs at the source again, and the agent names no reason.
pub(crate) const ROLLED_BACK: &str = "RolledBack";
/// VMMigration, Succeeded: the VM runs nowhere, and the agent names no reason.
pub(crate) const LOST: &str = "Lost";
/// VMMigration, Succeeded: the target never started the VM, and the source cannot be asked.
pub(crate) const SOURCE_LOST: &str = "SourceLost";
/// VMMigration, Succeeded: the VM runs at the target.
pub(crate) const VM_RUNS_AT_TARGET: &str = "VMRunsAtTarget";
/// VMMigration, Accepted: the spec was changed afterwards.
pub(crate) const SPEC_CHANGE_IGNORED: &str = "SpecChangeIgnored";
/// VMMigration, Stopped: the guest runs at the source.
pub(crate) const GUEST_RUNS: &str = "GuestRuns";
/// VMMigration, Accepted and Succeeded: it is a copy of one that was accepted before.
pub(crate) const RESTORED_COPY: &str = "RestoredCopy";
/// VMMigration, Stopped: the VM is at the source, and its guest or its owner has stopped it.
pub(crate) const LEFT_AS_IT_IS: &str = "LeftAsItIs";
/// VMMigration, Accepted and Succeeded: not every agent has answered or failed once.
pub(crate) const WAITING_FOR_AGENTS: &str = "WaitingForAgents";
/// VMMigration, Prepared and Succeeded: the target does not answer.
pub(crate) const TARGET_UNREACHABLE: &str = "TargetUnreachable";
/// VMMigration, Prepared: the target refused, and its agent names no reason.
pub(crate) const RESERVE_REFUSED: &str = "ReserveRefused";

/// MigrationNode, Ready: the agent cannot be reached.
pub(crate) const AGENT_UNREACHABLE: &str = "AgentUnreachable";
/// MigrationNode, Ready: the agent is connected and does not report.
pub(crate) const AGENT_SILENT: &str = "AgentSilent";
/// MigrationNode, Ready, and VMMigration, Prepared and Succeeded: the agent has seen an operator epoch that is
/// not believed.
pub(crate) const EPOCH_TOO_HIGH: &str = "EpochTooHigh";
/// MigrationNode, ReportAccepted: it reports a VM that is known to be on another node.
pub(crate) const VM_NAME_TAKEN: &str = "VMNameTaken";
/// MigrationNode, ReportAccepted: it reports names that nothing can have, or more than is taken in.
pub(crate) const REPORT_CUT: &str = "ReportCut";
/// AssignedVM, Contested: another node reports a VM of this name.
pub(crate) const REPORTED_ELSEWHERE: &str = "ReportedElsewhere";

/// AssignedVM, Ready: the node where the VM was last does not answer.
pub(crate) const NODE_NOT_READY: &str = "NodeNotReady";
/// AssignedVM, Ready: the node where the VM was last does not have it any more.
pub(crate) const NOT_REPORTED: &str = "NotReported";

/// Reasons that an agent gives for its doubt, and that the operator acts upon.
pub(crate) mod agent {
    /// The source's agent cannot reach the target's.
    pub(crate) const PEER_LOST: &str = "PeerLost";
    /// The target's agent has no record of the migration.
    pub(crate) const TARGET_FORGOT: &str = "TargetForgot";
    /// The target's agent answers and has not finished.
    pub(crate) const TARGET_SLOW: &str = "TargetSlow";
    /// The source's agent cannot write its journal.
    pub(crate) const JOURNAL_FAILED: &str = "JournalFailed";
    /// A migration has ended at an agent, and that is not durable there yet.
    pub(crate) const END_NOT_RECORDED: &str = "EndNotRecorded";
    /// Why a migration that does not go on holds its VM: its end is not durable yet, or its journal cannot be
    /// used, or is not the only one.
    pub(crate) const HOLDS: [&str; 3] = [END_NOT_RECORDED, "JournalsConflict", "JournalUnreadable"];
}

/// The longest reason that the API server takes in a condition.
const LONGEST_BYTES: usize = 128;

/// A reason that an agent gave, if the API server takes it as a condition's reason; otherwise `fallback`.
pub(crate) fn camel_case_or(reason: &str, fallback: &str) -> String {
    let fits = reason.len() <= LONGEST_BYTES
        && reason.starts_with(|c: char| c.is_ascii_alphabetic())
        && reason.chars().all(|c| c.is_ascii_alphanumeric());
    if fits { reason.to_owned() } else { fallback.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agents_reason_that_no_condition_could_carry_is_replaced() {
        assert_eq!(camel_case_or("DeviceNotMigratable", "X"), "DeviceNotMigratable");
        for bad in ["", "device not migratable", "1st", "Ä"] {
            assert_eq!(camel_case_or(bad, "NotMigratable"), "NotMigratable", "{bad}");
        }
    }
}
