//! Every phase of a migration, every fault that can hit it there, and how it must end: the expectations,
//! written before the run.
//!
//! Pure data. A phase is the moment at which the test halts the hand-over ([`Phase::halt`]). A [`Fault`] hits
//! it then, and [`expected`] is the end that follows from the protocol (docs/handover.md), by these rules:
//!
//! 1. Before COMMITTED is durable the source takes the VM back after any fault, unless its own VMM is gone.
//! 2. After COMMITTED only DISCARDED brings the VM back, and then only the end of the twin
//!    makes the destination discard.
//! 3. After STARTING there is no way back. If the twin ends then, the VM is lost.
//! 4. If an end cannot be reached, or its journal cannot be read, the migration is in doubt and
//!    waits. Nothing is guessed.
//! 5. A call to a device that has not returned after 20 s is named. Before COMMITTED it ends the migration,
//!    at the latest with preCommitTimeout; but the VM is not back before the device is. After that it is
//!    waited for.
//! 6. The end of a process that holds no VM (an agent, the operator, the API server) loses nothing.

use std::fmt;

use strum::{IntoStaticStr, VariantArray};

/// One of the two ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, IntoStaticStr)]
#[strum(serialize_all = "kebab-case")]
pub enum Side {
    /// Where the VM runs at first.
    Source,
    /// Where it is to go.
    Destination,
}

/// A moment of a migration, in their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "kebab-case")]
pub enum Phase {
    /// The destination holds devices and a twin, and has not said so yet. The source has not been asked.
    Reserve,
    /// SAVING is recorded, the source is connected, and pre-copy begins. The guest runs.
    Save,
    /// The vCPUs are paused; the devices are about to be quiesced.
    Quiesce,
    /// All devices are quiesced and about to be stopped.
    Stop,
    /// Slack water: the final state is about to be read.
    Capture,
    /// Everything has arrived at the destination and is about to be put in place.
    Load,
    /// LOADED is durable at the destination, and the source does not know it yet.
    Loaded,
    /// COMMITTED is durable at the source, and the destination does not know it yet.
    Committed,
    /// STARTING is durable at the destination, and nothing runs there yet.
    Starting,
    /// The VM runs at the destination, the source knows it, and has not released anything yet.
    Release,
}

/// A fault that hits a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Fault {
    /// The agent at one end is killed with its whole cgroup, and started again.
    AgentKilled(Side),
    /// The operator is killed, and started again.
    OperatorKilled,
    /// The VM's process at the source is killed.
    SourceVmmKilled,
    /// The VM's process at the destination is killed.
    TwinKilled,
    /// The destination is cut off from the source and the operator until they notice, and is then reachable
    /// again.
    LinkCutAndRestored,
    /// The link between the nodes is cut until the migration has ended. The operator reaches both.
    LinkCutForGood,
    /// The disk under the journal of one end is full, until the migration has ended or is in doubt.
    JournalFull(Side),
    /// The agent at one end is killed, a byte of its journal of this migration is changed, and it is started
    /// again. After it has reported that, the file is restored as from a backup, and the agent started once
    /// more.
    JournalCorrupted(Side),
    /// A device refuses the request of this phase, and continues to refuse.
    DeviceError,
    /// A device takes 30 s longer for the request of this phase.
    DeviceHang,
    /// A device does not return from the request of this phase until the fault is lifted, which it is when the
    /// migration has ended, or is in doubt about this device.
    DeviceHangsForGood,
    /// The API server answers no request for 30 s.
    ApiServerAway,
}

/// How a migration ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum End {
    /// The VM runs at the source; the status gives one of these reasons.
    AtSource(&'static [&'static str]),
    /// The VM runs at the destination, and the status says Succeeded.
    AtDestination,
    /// The VM was lost with the process that held it; the status gives one of these reasons.
    Lost(&'static [&'static str]),
    /// The VM had arrived, so the status says Succeeded. Its process was killed afterwards, and the
    /// AssignedVM shows that it does not run.
    DiedAtDestination,
}

/// The expected observation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Expected {
    /// This end, and before LOADED never in doubt. From LOADED on, without word from the source it is unknown
    /// whether it has committed.
    Ends(End),
    /// `InDoubt=True` until this, and then this end.
    InDoubtUntil(Until, End),
    /// The fault cannot hit this phase, for this reason.
    CannotOccur(&'static str),
}

/// What ends a doubt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Until {
    /// The destination can be reached again.
    LinkIsBack,
    /// The operator has asked both ends and relayed the answer.
    OperatorHasRelayed,
    /// The journal can be read again.
    JournalIsReadable,
    /// The device has done what it was asked for.
    DeviceIsDone,
}

/// A cell of the matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Cell {
    /// When.
    pub phase: Phase,
    /// What.
    pub fault: Fault,
    /// How it must end.
    pub expected: Expected,
}

impl Phase {
    /// Its name in the table and on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        self.into()
    }

    /// The end whose state machine is halted, and the phase at which it is.
    #[must_use]
    pub fn halt(self) -> (Side, &'static str) {
        match self {
            Self::Reserve => (Side::Destination, "reserved"),
            Self::Save => (Side::Source, "precopying"),
            Self::Quiesce => (Side::Source, "quiescing"),
            Self::Stop => (Side::Source, "stopping"),
            Self::Capture => (Side::Source, "capturing"),
            Self::Load => (Side::Destination, "finishing"),
            Self::Loaded => (Side::Destination, "loaded"),
            Self::Committed => (Side::Source, "awaitingstarted"),
            Self::Starting => (Side::Destination, "starting"),
            Self::Release => (Side::Source, "releasing"),
        }
    }

    /// COMMITTED is durable at the source.
    #[must_use]
    pub fn is_committed(self) -> bool {
        self >= Self::Committed
    }

    /// The request to a device at this phase, as the agent's fault names it, and at which end. `None`: there
    /// is none. A QEMU VM's devices are only read at the gate.
    #[must_use]
    pub fn device_call(self, vmm: VmmKind) -> Option<(Side, &'static str)> {
        match self {
            Self::Stop if vmm == VmmKind::Qemu => Some((Side::Source, "state")),
            Self::Reserve => Some((Side::Destination, "RESUMING")),
            Self::Save => Some((Side::Source, "PRE_COPY")),
            Self::Quiesce => Some((Side::Source, "PRE_COPY_P2P")),
            Self::Stop => Some((Side::Source, "STOP_COPY")),
            Self::Capture => Some((Side::Source, "read")),
            // RESUMING -> STOP: here a driver accepts or refuses its data.
            Self::Load => Some((Side::Destination, "STOP")),
            Self::Starting => Some((Side::Destination, "RUNNING")),
            Self::Release => Some((Side::Source, "reset")),
            Self::Loaded | Self::Committed => None,
        }
    }
}

impl Side {
    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        self.into()
    }
}

impl Fault {
    /// In the order of the table.
    pub const ALL: [Self; 15] = [
        Self::AgentKilled(Side::Source),
        Self::AgentKilled(Side::Destination),
        Self::OperatorKilled,
        Self::SourceVmmKilled,
        Self::TwinKilled,
        Self::LinkCutAndRestored,
        Self::LinkCutForGood,
        Self::JournalFull(Side::Source),
        Self::JournalFull(Side::Destination),
        Self::JournalCorrupted(Side::Source),
        Self::JournalCorrupted(Side::Destination),
        Self::DeviceError,
        Self::DeviceHang,
        Self::DeviceHangsForGood,
        Self::ApiServerAway,
    ];

    /// Its name in the table and on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::AgentKilled(Side::Source) => "source-agent-killed",
            Self::AgentKilled(Side::Destination) => "destination-agent-killed",
            Self::OperatorKilled => "operator-killed",
            Self::SourceVmmKilled => "source-vmm-killed",
            Self::TwinKilled => "twin-killed",
            Self::LinkCutAndRestored => "link-cut-and-restored",
            Self::LinkCutForGood => "link-cut-for-good",
            Self::JournalFull(Side::Source) => "source-journal-full",
            Self::JournalFull(Side::Destination) => "destination-journal-full",
            Self::JournalCorrupted(Side::Source) => "source-journal-corrupted",
            Self::JournalCorrupted(Side::Destination) => "destination-journal-corrupted",
            Self::DeviceError => "device-error",
            Self::DeviceHang => "device-hang",
            Self::DeviceHangsForGood => "device-hangs-for-good",
            Self::ApiServerAway => "api-server-away",
        }
    }
}

/// What runs the VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, clap::ValueEnum)]
pub enum VmmKind {
    /// The reference VMM, whose devices the agents drive.
    #[default]
    Contract,
    /// QEMU, which drives them itself.
    Qemu,
}

/// The whole matrix, phase by phase.
#[must_use]
pub fn cells(vmm: VmmKind) -> Vec<Cell> {
    let expected = match vmm {
        VmmKind::Contract => expected,
        VmmKind::Qemu => expected_of_qemu,
    };
    let cell = |phase| Fault::ALL.map(|fault| Cell { phase, fault, expected: expected(phase, fault) });
    Phase::VARIANTS.iter().copied().flat_map(cell).collect()
}

/// The same for a QEMU VM: where the fault can hit, it ends like any other VM.
#[must_use]
pub fn expected_of_qemu(phase: Phase, fault: Fault) -> Expected {
    match (fault, phase) {
        (_, Phase::Quiesce) => Expected::CannotOccur(
            "QEMU quiesces and stops its devices in one step of its own; `stop` comes after it",
        ),
        // The gate reads each device. The agent gives a read that hangs up, and QEMU takes the VM back: nothing
        // is in doubt, and the fault need not be lifted.
        (Fault::DeviceHang | Fault::DeviceHangsForGood, Phase::Stop) => {
            Expected::Ends(End::AtSource(&["DeviceHangs"]))
        }
        // RESUMING -> STOP, the check, and the reset of released devices.
        (
            Fault::DeviceError | Fault::DeviceHang | Fault::DeviceHangsForGood,
            Phase::Load | Phase::Release,
        ) => expected(phase, fault),
        (Fault::DeviceError | Fault::DeviceHang | Fault::DeviceHangsForGood, _) => {
            Expected::CannotOccur("QEMU drives its devices: here the agent makes no request that could fail")
        }
        _ => expected(phase, fault),
    }
}

/// How a migration must end when this fault hits it at this phase.
#[must_use]
pub fn expected(phase: Phase, fault: Fault) -> Expected {
    use Expected::{CannotOccur, Ends, InDoubtUntil};
    use Fault::{
        AgentKilled, ApiServerAway, DeviceError, DeviceHang, DeviceHangsForGood, JournalCorrupted,
        JournalFull, LinkCutAndRestored, LinkCutForGood, OperatorKilled, SourceVmmKilled, TwinKilled,
    };
    use Side::{Destination, Source};

    const RESTARTED: End = End::AtSource(&["AgentRestarted"]);
    const PEER_LOST: End = End::AtSource(&["PeerLost"]);
    const NOT_RESERVED: End = End::AtSource(&["TargetUnreachable"]);
    const HUNG: End = End::AtSource(&["DeviceHangs"]);
    const MOVED: End = End::AtDestination;

    match (fault, phase) {
        // The source is not involved yet: its agent is back before its first request.
        (AgentKilled(Source), Phase::Reserve) => Ends(MOVED),
        (AgentKilled(Source), _) if phase.is_committed() => Ends(MOVED),
        (AgentKilled(Source), _) => Ends(RESTARTED),

        (AgentKilled(Destination), Phase::Reserve) => Ends(NOT_RESERVED),
        (AgentKilled(Destination), _) if phase.is_committed() => Ends(MOVED),
        (AgentKilled(Destination), _) => Ends(PEER_LOST),

        (OperatorKilled | ApiServerAway, _) => Ends(MOVED),

        // All of the VM is at the destination, and verified: it continues there.
        (SourceVmmKilled, Phase::Load | Phase::Loaded) => Ends(MOVED),
        (SourceVmmKilled, _) if phase.is_committed() => Ends(MOVED),
        // The source has had no request yet, and refuses the first: there is no VM any more.
        (SourceVmmKilled, Phase::Reserve) => {
            Ends(End::Lost(&["VMMExited", "VMMUnreachable", "SourceNotReady"]))
        }
        (SourceVmmKilled, _) => Ends(End::Lost(&["VMMExited"])),

        // The reservation may have been answered already: the operator or the source finds it released.
        (TwinKilled, Phase::Reserve) => Ends(End::AtSource(&["TwinFailed", "TargetFailed"])),
        // LOADED does not promise that the twin lives: the destination records DISCARDED, and the source may
        // take the VM back.
        (TwinKilled, Phase::Committed) => Ends(End::AtSource(&["TwinFailed", "TargetFailed"])),
        (TwinKilled, Phase::Starting) => Ends(End::Lost(&["StartFailed", "TwinFailed"])),
        (TwinKilled, Phase::Release) => Ends(End::DiedAtDestination),
        (TwinKilled, _) => Ends(End::AtSource(&["TwinFailed", "TargetFailed"])),

        (LinkCutAndRestored, Phase::Reserve) => Ends(NOT_RESERVED),
        (LinkCutAndRestored, Phase::Committed | Phase::Starting) => InDoubtUntil(Until::LinkIsBack, MOVED),
        (LinkCutForGood, Phase::Reserve) => Ends(End::AtSource(&["TargetUnreachable"])),
        (LinkCutForGood, Phase::Committed | Phase::Starting) => {
            InDoubtUntil(Until::OperatorHasRelayed, MOVED)
        }
        (LinkCutAndRestored | LinkCutForGood, Phase::Release) => Ends(MOVED),
        (LinkCutAndRestored | LinkCutForGood, _) => Ends(PEER_LOST),

        // Full before the first record is written. That record reserves the space for later ones.
        (JournalFull(_), Phase::Reserve) => Ends(End::AtSource(&["JournalFailed"])),
        (JournalFull(_), _) => Ends(MOVED),

        (JournalCorrupted(Source), Phase::Reserve) => CannotOccur("the source has no journal yet"),
        (JournalCorrupted(Source), _) if phase.is_committed() => {
            InDoubtUntil(Until::JournalIsReadable, MOVED)
        }
        (JournalCorrupted(Source), _) => InDoubtUntil(Until::JournalIsReadable, RESTARTED),
        (JournalCorrupted(Destination), Phase::Reserve) => Ends(NOT_RESERVED),
        (JournalCorrupted(Destination), Phase::Committed | Phase::Starting) => {
            InDoubtUntil(Until::JournalIsReadable, MOVED)
        }
        (JournalCorrupted(Destination), Phase::Release) => Ends(MOVED),
        (JournalCorrupted(Destination), _) => Ends(PEER_LOST),

        (DeviceError | DeviceHang | DeviceHangsForGood, Phase::Loaded) => {
            CannotOccur("between LOADED and COMMIT there is no request to a device")
        }
        (DeviceError | DeviceHang | DeviceHangsForGood, Phase::Committed) => {
            CannotOccur("COMMITTED is a record and a message, without a request to a device")
        }
        (DeviceError, Phase::Starting) => Ends(End::Lost(&["StartFailed"])),
        // The copy at the source is dead: the device's next user resets it.
        (DeviceError, Phase::Release) => Ends(MOVED),
        (DeviceError, _) => Ends(End::AtSource(&["DeviceFailed"])),

        // A device that is not ready is refused, before anything was touched. It is free when it answers.
        (DeviceHang | DeviceHangsForGood, Phase::Reserve) => Ends(HUNG),
        // In the blackout a change of state has 20 s, and the vCPUs wait for the device.
        (DeviceHang | DeviceHangsForGood, Phase::Quiesce | Phase::Stop) => {
            InDoubtUntil(Until::DeviceIsDone, HUNG)
        }
        (DeviceHang | DeviceHangsForGood, Phase::Capture | Phase::Load | Phase::Starting) => {
            InDoubtUntil(Until::DeviceIsDone, MOVED)
        }
        // While the guest runs, preCommitTimeout decides: the test sets a short one.
        (DeviceHangsForGood, Phase::Save) => InDoubtUntil(Until::DeviceIsDone, End::AtSource(&["TimedOut"])),
        (DeviceHang, Phase::Save) => Ends(MOVED),
        // The VM runs elsewhere, and its end here waits for no device.
        (DeviceHang | DeviceHangsForGood, Phase::Release) => Ends(MOVED),
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AtSource(reasons) => write!(f, "runs at the source ({})", reasons.join(" or ")),
            Self::AtDestination => f.write_str("runs at the destination"),
            Self::Lost(reasons) => write!(f, "lost with its process ({})", reasons.join(" or ")),
            Self::DiedAtDestination => f.write_str("arrived, and died there with its process"),
        }
    }
}

impl fmt::Display for Until {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::LinkIsBack => "the destination is back",
            Self::OperatorHasRelayed => "the operator has relayed",
            Self::JournalIsReadable => "the journal can be read again",
            Self::DeviceIsDone => "the device is done",
        })
    }
}

impl fmt::Display for Expected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ends(end) => end.fmt(f),
            Self::InDoubtUntil(until, end) => write!(f, "in doubt until {until}, then {end}"),
            Self::CannotOccur(why) => write!(f, "cannot occur: {why}"),
        }
    }
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} / {}", self.phase.name(), self.fault.name())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn end(expected: Expected) -> Option<End> {
        match expected {
            Expected::Ends(end) | Expected::InDoubtUntil(_, end) => Some(end),
            Expected::CannotOccur(_) => None,
        }
    }

    #[test]
    fn every_phase_has_every_fault_once() {
        let cells = cells(VmmKind::Contract);
        let names: BTreeSet<String> = cells.iter().map(Cell::to_string).collect();
        assert_eq!(cells.len(), Phase::VARIANTS.len() * Fault::ALL.len());
        assert_eq!(names.len(), cells.len());
        assert!(Phase::VARIANTS.is_sorted());
    }

    #[test]
    fn a_vm_is_lost_only_with_its_own_process_or_when_it_could_not_be_started() {
        for cell in cells(VmmKind::Contract) {
            if matches!(end(cell.expected), Some(End::Lost(_) | End::DiedAtDestination)) {
                let starting = (Phase::Starting, Fault::DeviceError);
                let killed = matches!(cell.fault, Fault::SourceVmmKilled | Fault::TwinKilled);
                assert!(killed || (cell.phase, cell.fault) == starting, "{cell}: {}", cell.expected);
            }
        }
    }

    #[test]
    fn after_the_commit_only_the_end_of_the_twin_brings_the_vm_back() {
        for cell in cells(VmmKind::Contract).into_iter().filter(|cell| cell.phase.is_committed()) {
            let back = matches!(end(cell.expected), Some(End::AtSource(_)));
            assert_eq!(back, (cell.phase, cell.fault) == (Phase::Committed, Fault::TwinKilled), "{cell}");
        }
    }

    #[test]
    fn there_is_doubt_only_after_the_commit_or_where_the_source_waits_for_its_journal_or_a_device() {
        for cell in cells(VmmKind::Contract) {
            if matches!(cell.expected, Expected::InDoubtUntil(..)) {
                let unreadable = cell.fault == Fault::JournalCorrupted(Side::Source);
                let hangs = matches!(cell.fault, Fault::DeviceHang | Fault::DeviceHangsForGood);
                assert!(cell.phase.is_committed() || unreadable || hangs, "{cell}");
            }
        }
    }

    #[test]
    fn a_device_can_fail_only_at_a_phase_with_a_device_request() {
        for cell in cells(VmmKind::Contract) {
            let faults = [Fault::DeviceError, Fault::DeviceHang, Fault::DeviceHangsForGood];
            if faults.contains(&cell.fault) {
                let cannot = matches!(cell.expected, Expected::CannotOccur(_));
                assert_eq!(cell.phase.device_call(VmmKind::Contract).is_none(), cannot, "{cell}");
            }
        }
    }
}
