//! What the journal holds of one attempt at one end: enough for an agent that was restarted to find the VM
//! and go on. It is JSON, so that a person can read it, too.
//!
//! The version of an entry is that of its journal file. [`Entry::parse`] reads every version; agents write
//! only the newest:
//!
//! | version | what is different |
//! |---|---|
//! | 1 | numbers and arrays without names (`version_1.rs`) |
//! | 2 | the fields of [`Entry`]. `end.monitor` may be missing: earlier agents did not write it |
//!
//! A change of a field here needs a new version (`journal/format.rs`) and a reader for the one before it.

mod room;
mod version_1;

pub use room::NoRoom;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use slackwater_handover::policy::PeerToPeer;
use slackwater_handover::{Failure, Reason, Record, Word};
use slackwater_proto::node::{self, DevicePair, Finished, JournalState, MigrationFeatures};

use crate::host::vm::{VmmEntry, VmmKind};
use crate::journal::Content;
use crate::vfio::borrow::ProcessIdentity;

/// One end of one attempt. An entry with a field that this agent does not know is refused: nothing is
/// guessed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// The migration.
    pub migration_id: String,
    /// Which attempt of it.
    pub attempt: u32,
    /// How far it has come.
    pub record: Record,
    /// Set when nothing goes on here any more.
    pub ended: Option<Ended>,
    /// Why it was given up, or could not be started.
    pub failure: Option<FailureEntry>,
    /// The administrator's justification, if they stated the other end's last record in its place.
    pub stated_because: Option<String>,
    /// When it was recorded, by this node's wall clock; for a person.
    pub recorded_unix_ns: i64,
    /// The VM's namespace.
    pub namespace: String,
    /// The VM's name.
    pub name: String,
    /// The process that holds the VM here; none before the twin has been started.
    pub vmm: Option<Process>,
    /// The multi-device policy is AssumeIsolated.
    pub assume_isolated: bool,
    /// Devices, in the VMM's order.
    pub devices: Vec<Pair>,
    /// What only this end needs.
    pub end: EndEntry,
}

/// What only one of the ends needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, tag = "role")]
pub enum EndEntry {
    /// The VM leaves from here.
    Source {
        /// Where it goes.
        target_node: String,
        /// host:port of the agent there.
        target_address: String,
        /// The cgroup of the VMM, if it was started as a twin: it is cleared away with it.
        cgroup: Option<String>,
        /// When the phases that the timings need were reached: CLOCK_MONOTONIC of the boot in which they
        /// were, in nanoseconds.
        marks: Marks,
        /// How the VMM is reached, whatever becomes of the VM's vm.json. None in the journals of agents that
        /// did not write it.
        #[serde(default)]
        monitor: Option<Monitor>,
    },
    /// The VM lands here.
    Destination {
        /// Where it comes from.
        source_node: String,
        /// Its vm.json.
        vm_json: String,
        /// Opaque, for other programs that hand out devices.
        claim: Vec<u8>,
        /// For so long the source's Hello is waited for.
        silence_timeout_ms: u64,
        /// The number of the user that the twin runs as. An older agent
        /// has started twins as its own.
        #[serde(default)]
        twin_user: Option<u32>,
    },
}

/// How the VMM of a VM is reached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Monitor {
    /// The VMM's protocol.
    pub kind: VmmKind,
    /// The absolute path of its socket.
    pub socket: PathBuf,
    /// QEMU's names of the VM's devices.
    pub devices: Vec<String>,
}

impl Monitor {
    /// As a `vm.json` has it.
    pub fn vmm(&self) -> VmmEntry {
        VmmEntry { kind: self.kind, socket: self.socket.clone(), devices: self.devices.clone() }
    }
}

/// When the phases that matter were reached, in nanoseconds of CLOCK_MONOTONIC.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Marks {
    /// The attempt began.
    pub begun: Option<u64>,
    /// Pre-copy began.
    pub pre_copy: Option<u64>,
    /// The vCPUs were being paused.
    pub pausing: Option<u64>,
    /// The VM ran again, at either end.
    pub guest_runs_again: Option<u64>,
}

/// How it ended.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ended {
    /// At the source: how. The destination has its last record instead.
    pub outcome: Option<Outcome>,
    /// At the source: how long it took.
    pub timings: Option<Timings>,
    /// Bytes of each device's blob.
    pub device_bytes: Vec<u64>,
    /// Bytes of RAM and machine state.
    pub vmm_bytes: u64,
}

/// How it ended at the source: `slackwater.node.v1.Outcome`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Outcome {
    /// The VM runs at the destination.
    Succeeded,
    /// The VM runs at the source.
    RolledBack,
    /// Nothing was touched.
    Refused,
    /// The VM runs nowhere.
    Lost,
}

/// How long it took, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Timings {
    /// Pre-copy.
    pub pre_copy_ns: u64,
    /// From the pause of the vCPUs until they ran again.
    pub blackout_ns: u64,
    /// From the beginning to the end.
    pub total_ns: u64,
}

/// A failure, as it is written.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FailureEntry {
    /// [`Reason::as_str`].
    pub reason: String,
    /// For a person.
    pub message: String,
}

/// A process, distinguished from any other that had or will have its number.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Process {
    /// The kernel's boot id.
    pub boot_id: String,
    /// Its number.
    pub pid: u32,
    /// When it started, in clock ticks since boot.
    pub start_ticks: u64,
}

/// Which device takes over from which.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pair {
    /// At the source.
    pub source: String,
    /// At the destination.
    pub target: String,
    /// The driver of both.
    pub driver: String,
    /// The model of both.
    pub model: String,
    /// What the driver of the source's device has advertised.
    pub features: Features,
}

/// What a driver has advertised.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Features {
    /// STOP, STOP_COPY and RESUMING exist.
    pub stop_copy: bool,
    /// The `*_P2P` states exist.
    pub p2p: bool,
    /// The `PRE_COPY*` states exist.
    pub pre_copy: bool,
}

/// Why a journal's content is not an entry.
#[derive(Debug, thiserror::Error)]
#[error("it is not an entry of version {version}: {source}")]
pub struct ParseEntryError {
    /// The version of the file.
    version: u32,
    /// What is wrong, and where.
    source: serde_json::Error,
}

impl Entry {
    /// Reads an entry of this or an older version.
    ///
    /// # Errors
    /// [`ParseEntryError`], if it is not JSON, lacks a field, or has one that its version does not know.
    pub fn parse(content: &Content) -> Result<Self, ParseEntryError> {
        let parsed = match content.version {
            1 => version_1::parse(&content.bytes),
            _ => serde_json::from_slice(&content.bytes),
        };
        parsed.map_err(|source| ParseEntryError { version: content.version, source })
    }

    /// Why it failed, if it did. A name that cannot be a reason becomes TargetFailed.
    pub fn failure(&self) -> Option<Failure> {
        let entry = self.failure.as_ref()?;
        Some(Failure::new(
            Reason::parse(&entry.reason).unwrap_or(Reason::TargetFailed),
            entry.message.clone(),
        ))
    }

    /// The multi-device policy.
    pub fn peer_to_peer(&self) -> PeerToPeer {
        if self.assume_isolated { PeerToPeer::AssumeIsolated } else { PeerToPeer::Required }
    }

    /// What this end says of its journal.
    pub fn state(&self) -> JournalState {
        JournalState::from(&Word {
            record: Some(self.record),
            ended: self.ended.is_some(),
            failure: self.failure(),
            stated_because: self.stated_because.clone(),
        })
    }
}

impl Ended {
    /// How an attempt ended at the source.
    pub fn at_source(finished: &Finished) -> Self {
        Self {
            outcome: Outcome::from_proto(finished.outcome()),
            timings: finished.timings.map(Timings::from),
            device_bytes: finished.device_bytes.clone(),
            vmm_bytes: finished.vmm_bytes,
        }
    }

    /// The last event of an attempt that ended like this at the source, because of `failure`.
    pub fn to_finished(&self, failure: Option<&FailureEntry>) -> Finished {
        let FailureEntry { reason, message } = failure.cloned().unwrap_or_default();
        Finished {
            outcome: self.outcome.map_or(node::Outcome::Unspecified, node::Outcome::from).into(),
            reason,
            message,
            timings: Some(self.timings.unwrap_or_default().into()),
            device_bytes: self.device_bytes.clone(),
            vmm_bytes: self.vmm_bytes,
            dropped_events: 0,
        }
    }
}

impl Outcome {
    fn from_proto(outcome: node::Outcome) -> Option<Self> {
        match outcome {
            node::Outcome::Unspecified => None,
            node::Outcome::Succeeded => Some(Self::Succeeded),
            node::Outcome::RolledBack => Some(Self::RolledBack),
            node::Outcome::Refused => Some(Self::Refused),
            node::Outcome::Lost => Some(Self::Lost),
        }
    }
}

impl From<Outcome> for node::Outcome {
    fn from(outcome: Outcome) -> Self {
        match outcome {
            Outcome::Succeeded => Self::Succeeded,
            Outcome::RolledBack => Self::RolledBack,
            Outcome::Refused => Self::Refused,
            Outcome::Lost => Self::Lost,
        }
    }
}

impl From<node::Timings> for Timings {
    fn from(node::Timings { pre_copy_ns, blackout_ns, total_ns }: node::Timings) -> Self {
        Self { pre_copy_ns, blackout_ns, total_ns }
    }
}

impl From<Timings> for node::Timings {
    fn from(Timings { pre_copy_ns, blackout_ns, total_ns }: Timings) -> Self {
        Self { pre_copy_ns, blackout_ns, total_ns }
    }
}

impl From<&Failure> for FailureEntry {
    fn from(failure: &Failure) -> Self {
        Self { reason: failure.reason.as_str().to_owned(), message: failure.message.clone() }
    }
}

impl From<&ProcessIdentity> for Process {
    fn from(identity: &ProcessIdentity) -> Self {
        Self { boot_id: identity.boot_id.clone(), pid: identity.pid, start_ticks: identity.start_ticks }
    }
}

impl From<&Process> for ProcessIdentity {
    fn from(process: &Process) -> Self {
        Self { boot_id: process.boot_id.clone(), pid: process.pid, start_ticks: process.start_ticks }
    }
}

impl Process {
    /// Whether it is this one.
    pub fn is(&self, identity: &ProcessIdentity) -> bool {
        *self == Self::from(identity)
    }
}

impl From<&DevicePair> for Pair {
    fn from(pair: &DevicePair) -> Self {
        let MigrationFeatures { stop_copy, p2p, pre_copy } = pair.features.unwrap_or_default();
        Self {
            source: pair.source.clone(),
            target: pair.target.clone(),
            driver: pair.driver.clone(),
            model: pair.model.clone(),
            features: Features { stop_copy, p2p, pre_copy },
        }
    }
}

impl From<&Pair> for DevicePair {
    fn from(pair: &Pair) -> Self {
        let Features { stop_copy, p2p, pre_copy } = pair.features;
        Self {
            source: pair.source.clone(),
            target: pair.target.clone(),
            driver: pair.driver.clone(),
            model: pair.model.clone(),
            features: Some(MigrationFeatures { stop_copy, p2p, pre_copy }),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A source's entry, as tests need one.
    pub(crate) fn entry() -> Entry {
        Entry {
            migration_id: "3f".to_owned(),
            attempt: 1,
            record: Record::Saving,
            ended: None,
            failure: None,
            stated_because: None,
            recorded_unix_ns: 7,
            namespace: "demo".to_owned(),
            name: "counter".to_owned(),
            vmm: Some(Process { boot_id: "b".to_owned(), pid: 9, start_ticks: 11 }),
            assume_isolated: false,
            devices: vec![],
            end: EndEntry::Source {
                target_node: "node-b".to_owned(),
                target_address: "10.0.0.2:7443".to_owned(),
                cgroup: None,
                marks: Marks::default(),
                monitor: None,
            },
        }
    }

    fn written(entry: &Entry) -> Content {
        Content { version: 2, bytes: serde_json::to_vec(entry).unwrap() }
    }

    #[test]
    fn an_entry_is_read_as_it_was_written_and_a_field_of_a_newer_agent_is_refused() {
        assert_eq!(Entry::parse(&written(&entry())).unwrap(), entry());
        let newer = String::from_utf8(written(&entry()).bytes).unwrap().replacen('{', r#"{"quorum": 3, "#, 1);
        let error = Entry::parse(&Content { version: 2, bytes: newer.into_bytes() }).unwrap_err().to_string();
        assert!(error.starts_with("it is not an entry of version 2: unknown field `quorum`"), "{error}");
    }

    #[test]
    fn the_way_to_the_vmm_is_read_as_it_was_written_and_may_be_missing() {
        let mut with = entry();
        let EndEntry::Source { monitor, .. } = &mut with.end else { panic!("{with:?}") };
        *monitor = Some(Monitor {
            kind: VmmKind::Qemu,
            socket: "/run/slackwater/vms/demo.counter/qmp.sock".into(),
            devices: vec!["vf0".to_owned()],
        });
        assert_eq!(Entry::parse(&written(&with)).unwrap(), with);
        let text = String::from_utf8(written(&with).bytes).unwrap();
        let socket = "/run/slackwater/vms/demo.counter/qmp.sock";
        let field = format!(r#","monitor":{{"kind":"qemu","socket":"{socket}","devices":["vf0"]}}"#);
        let without = text.replace(&field, "");
        assert_ne!(without, text);
        assert_eq!(Entry::parse(&Content { version: 2, bytes: without.into_bytes() }).unwrap(), entry());
    }

    #[test]
    fn how_it_ended_stands_in_the_journal_by_name_and_becomes_the_last_event_again() {
        let finished = Finished {
            outcome: node::Outcome::RolledBack.into(),
            reason: "DeviceFailed".to_owned(),
            message: "EIO".to_owned(),
            timings: Some(node::Timings { pre_copy_ns: 1, blackout_ns: 2, total_ns: 3 }),
            device_bytes: vec![60],
            vmm_bytes: 4096,
            dropped_events: 0,
        };
        let ended = Ended::at_source(&finished);
        let failure = FailureEntry { reason: "DeviceFailed".to_owned(), message: "EIO".to_owned() };
        assert_eq!(ended.to_finished(Some(&failure)), finished);
        assert_eq!(
            serde_json::to_string(&ended).unwrap(),
            concat!(
                r#"{"outcome":"ROLLED_BACK","timings":{"pre_copy_ns":1,"blackout_ns":2,"total_ns":3},"#,
                r#""device_bytes":[60],"vmm_bytes":4096}"#
            )
        );
        let features = Features { stop_copy: true, p2p: true, pre_copy: false };
        assert_eq!(
            serde_json::to_string(&features).unwrap(),
            r#"{"stop_copy":true,"p2p":true,"pre_copy":false}"#
        );
    }

    #[test]
    fn the_other_end_reads_an_entry_as_it_was_written() {
        let mut entry = Entry { record: Record::Discarded, ..entry() };
        entry.failure = Some(FailureEntry { reason: "TwinFailed".to_owned(), message: "gone".to_owned() });
        let word = Word::try_from(&entry.state()).unwrap();
        assert_eq!(word.record, Some(Record::Discarded));
        assert_eq!(word.failure, Some(Failure::new(Reason::TwinFailed, "gone")));
    }
}
