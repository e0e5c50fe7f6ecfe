//! What the journal holds of one attempt at one end: enough for an agent that begins again to find the VM and go on. JSON, so that
//! a person can read it, too.

use serde::{Deserialize, Serialize};
use slackwater_handover::policy::PeerToPeer;
use slackwater_handover::{Failure, Reason, Record, Word};
use slackwater_proto::node::{DevicePair, JournalState, MigrationFeatures};

use crate::vfio::borrow::ProcessIdentity;

/// One end of one attempt. A field that is not known here comes from a newer agent: the entry is then refused, not guessed at.
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
    /// The administrator's justification, where the last word of the other end was stated in its place.
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
        /// When the phases that the timings need were reached: CLOCK_MONOTONIC of the boot in which they were, in nanoseconds.
        marks: Marks,
    },
    /// The VM lands here.
    Destination {
        /// Where it comes from.
        source_node: String,
        /// Its vm.json.
        vm_json: String,
        /// Opaque, for whoever else hands out devices.
        claim: Vec<u8>,
        /// For so long the source may be silent before LOADED.
        silence_timeout_ms: u64,
    },
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
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ended {
    /// At the source: the number of slackwater.node.v1.Outcome. At the destination: 0.
    pub outcome: i32,
    /// Nanoseconds of pre-copy, of blackout, and in all.
    pub timings_ns: [u64; 3],
    /// Bytes of each device's blob.
    pub device_bytes: Vec<u64>,
    /// Bytes of RAM and machine state.
    pub vmm_bytes: u64,
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

/// A process, told from any other that had or will have its number.
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
    /// Of the source's: STOP_COPY, P2P, PRE_COPY.
    pub features: [bool; 3],
}

impl Entry {
    /// Why it failed, if it did. A reason that is not known here is another agent's version's.
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

    /// This end's word, as it is told.
    pub fn state(&self) -> JournalState {
        JournalState::from(&Word {
            record: Some(self.record),
            ended: self.ended.is_some(),
            failure: self.failure(),
            stated_because: self.stated_because.clone(),
        })
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

impl Process {
    /// Whether it is this one.
    pub fn is(&self, identity: &ProcessIdentity) -> bool {
        *self == Self::from(identity)
    }
}

impl From<&DevicePair> for Pair {
    fn from(pair: &DevicePair) -> Self {
        let features = pair.features.unwrap_or_default();
        Self {
            source: pair.source.clone(),
            target: pair.target.clone(),
            driver: pair.driver.clone(),
            model: pair.model.clone(),
            features: [features.stop_copy, features.p2p, features.pre_copy],
        }
    }
}

impl From<&Pair> for DevicePair {
    fn from(pair: &Pair) -> Self {
        let [stop_copy, p2p, pre_copy] = pair.features;
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
            },
        }
    }

    #[test]
    fn an_entry_is_read_as_it_was_written_and_a_field_of_a_newer_agent_is_refused() {
        let text = serde_json::to_string(&entry()).unwrap();
        assert_eq!(serde_json::from_str::<Entry>(&text).unwrap(), entry());
        let newer = text.replacen('{', r#"{"quorum": 3, "#, 1);
        assert!(serde_json::from_str::<Entry>(&newer).unwrap_err().to_string().contains("quorum"));
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
