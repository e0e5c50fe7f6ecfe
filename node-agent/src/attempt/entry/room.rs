//! The space that an attempt's journal takes at most. It is allocated with the first record, and an attempt
//! whose later records might not fit is refused there. Pure.

use slackwater_handover::Record;
use slackwater_handover::failure::{JUSTIFICATION_MAX_BYTES, MESSAGE_MAX_BYTES};
use strum::IntoEnumIterator;

use super::{EndEntry, Ended, Entry, FailureEntry, Marks, Outcome, Process, Timings};
use crate::journal::CONTENT_MAX_BYTES;

/// The longest reason (`Reason::parse`), and more than the kernel's boot id has.
const REASON_MAX_BYTES: usize = 128;
const BOOT_ID_MAX_BYTES: usize = 64;

/// The records of an attempt might not fit into its journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the journal of this migration could take up to {needed_bytes} bytes, and at most {CONTENT_MAX_BYTES} fit: the \
     VM's vm.json, or the names of its devices, would have to be shorter"
)]
pub struct NoRoom {
    needed_bytes: usize,
}

impl Entry {
    /// Whether every later record of this attempt fits into its journal.
    ///
    /// # Errors
    /// [`NoRoom`]
    pub fn check_room(&self) -> Result<(), NoRoom> {
        let largest = serde_json::to_vec(&self.largest_later());
        match largest.map_or(usize::MAX, |bytes| bytes.len()) {
            needed_bytes if needed_bytes > CONTENT_MAX_BYTES => Err(NoRoom { needed_bytes }),
            _ => Ok(()),
        }
    }

    /// This entry with the longest value of everything that may still change.
    fn largest_later(&self) -> Self {
        let numbers = u64::MAX;
        let longest = Record::iter().max_by_key(|record| format!("{record:?}").len());
        // In JSON, a quotation mark takes two bytes; nothing that is left in such a text takes more.
        let quotes = |bytes: usize| "\"".repeat(bytes);
        Self {
            record: longest.unwrap_or(self.record),
            ended: Some(Ended {
                outcome: Some(Outcome::RolledBack),
                timings: Some(Timings { pre_copy_ns: numbers, blackout_ns: numbers, total_ns: numbers }),
                device_bytes: vec![numbers; self.devices.len()],
                vmm_bytes: numbers,
            }),
            failure: Some(FailureEntry {
                reason: "R".repeat(REASON_MAX_BYTES),
                message: quotes(MESSAGE_MAX_BYTES),
            }),
            stated_because: Some(quotes(JUSTIFICATION_MAX_BYTES)),
            recorded_unix_ns: i64::MIN,
            vmm: Some(Process { boot_id: quotes(BOOT_ID_MAX_BYTES), pid: u32::MAX, start_ticks: numbers }),
            end: match self.end.clone() {
                EndEntry::Source { target_node, target_address, cgroup, monitor, .. } => {
                    let some = Some(numbers);
                    let marks = Marks { begun: some, pre_copy: some, pausing: some, guest_runs_again: some };
                    EndEntry::Source { target_node, target_address, cgroup, marks, monitor }
                }
                destination @ EndEntry::Destination { .. } => destination,
            },
            ..self.clone()
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use slackwater_handover::{Failure, Reason};

    use super::*;
    use crate::attempt::entry::tests::entry;
    use crate::attempt::entry::{Features, Pair};
    use crate::host::vm::VM_JSON_LIMIT_BYTES;

    fn pair(bytes: usize) -> Pair {
        let name = || "x".repeat(bytes);
        let features = Features { stop_copy: false, p2p: false, pre_copy: false };
        Pair { source: name(), target: name(), driver: name(), model: name(), features }
    }

    /// The largest that a request may ask for: see `service/request.rs`.
    fn largest() -> Entry {
        Entry {
            migration_id: "m".repeat(64),
            attempt: u32::MAX,
            namespace: "n".repeat(63),
            name: "n".repeat(63),
            devices: vec![pair(128); 256],
            end: EndEntry::Destination {
                source_node: "n".repeat(253),
                vm_json: "\"".repeat(VM_JSON_LIMIT_BYTES),
                claim: vec![255; 4096],
                silence_timeout_ms: u64::MAX,
                twin_user: Some(u32::MAX),
            },
            ..entry()
        }
    }

    #[test]
    fn whatever_a_request_may_ask_for_has_room() {
        assert_eq!(largest().check_room(), Ok(()));
    }

    #[test]
    fn an_attempt_whose_later_records_might_not_fit_is_refused_at_its_beginning() {
        let too_much = Entry { devices: vec![pair(128); 400], ..largest() };
        let error = too_much.check_room().unwrap_err().to_string();
        assert!(error.contains(&format!("at most {CONTENT_MAX_BYTES} fit")), "{error}");
    }

    #[test]
    fn an_attempt_that_fits_now_and_whose_later_records_would_not_is_refused() {
        let with = |devices| Entry { devices: vec![pair(128); devices], ..largest() };
        let fits_now =
            |devices: &usize| serde_json::to_vec(&with(*devices)).unwrap().len() <= CONTENT_MAX_BYTES;
        let most = (256..).take_while(fits_now).last().unwrap();
        with(most).check_room().unwrap_err();
    }

    #[test]
    fn the_longest_record_of_either_end_is_not_longer_than_what_was_reckoned_with() {
        let quotes = "\"".repeat(100_000);
        let failure = Failure::new(Reason::parse(&"R".repeat(128)).unwrap(), &quotes);
        let most = Some(u64::MAX);
        let marks = Marks { begun: most, pre_copy: most, pausing: most, guest_runs_again: most };
        let source = match entry().end {
            EndEntry::Source { target_node, target_address, cgroup, monitor, .. } => {
                EndEntry::Source { target_node, target_address, cgroup, marks, monitor }
            }
            destination @ EndEntry::Destination { .. } => destination,
        };
        for (before, end) in [(entry().end, source), (largest().end, largest().end)] {
            let first = Entry { vmm: None, end: before, ..largest() };
            for record in Record::iter() {
                let later = Entry {
                    record,
                    ended: Some(Ended {
                        outcome: Some(Outcome::RolledBack),
                        timings: Some(Timings {
                            pre_copy_ns: u64::MAX,
                            blackout_ns: u64::MAX,
                            total_ns: u64::MAX,
                        }),
                        device_bytes: vec![u64::MAX; first.devices.len()],
                        vmm_bytes: u64::MAX,
                    }),
                    failure: Some(FailureEntry::from(&failure)),
                    stated_because: Some(slackwater_handover::failure::cut(&quotes, JUSTIFICATION_MAX_BYTES)),
                    recorded_unix_ns: i64::MIN,
                    vmm: Some(Process { boot_id: "b".repeat(36), pid: u32::MAX, start_ticks: u64::MAX }),
                    end: end.clone(),
                    ..first.clone()
                };
                let bytes = |entry: &Entry| serde_json::to_vec(entry).unwrap().len();
                assert!(bytes(&later) <= bytes(&first.largest_later()), "{record:?}");
            }
        }
    }

    fn any_text() -> impl Strategy<Value = String> {
        prop_oneof![
            proptest::collection::vec(any::<char>(), 0..6000).prop_map(String::from_iter),
            Just("\"".repeat(100_000)),
            Just("\0".repeat(100_000)),
            Just("\u{2028}".repeat(100_000)),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

        /// A peer may say anything, and a VMM, and an administrator.
        #[test]
        fn every_later_record_fits_into_what_was_found_to_have_room(
            devices in 0_usize..256,
            message in any_text(),
            stated in any_text(),
            reason in "[A-Z][a-zA-Z0-9]{0,127}",
            numbers: u64,
            at_source: bool,
        ) {
            let end = if at_source { entry().end } else { largest().end };
            let first = Entry { devices: vec![pair(128); devices], end, ..largest() };
            prop_assert_eq!(first.check_room(), Ok(()));
            let failure = Failure::new(Reason::parse(&reason).unwrap(), message);
            let word = slackwater_proto::node::JournalState {
                stated_because: stated,
                ..Default::default()
            };
            let word = slackwater_handover::Word::try_from(&word).unwrap();
            let later = Entry {
                record: Record::Discarded,
                failure: Some(FailureEntry::from(&failure)),
                stated_because: word.stated_because,
                ended: Some(Ended {
                    outcome: Some(Outcome::RolledBack),
                    timings: None,
                    device_bytes: vec![numbers; devices],
                    vmm_bytes: numbers,
                }),
                ..first.clone()
            };
            let bytes = serde_json::to_vec(&later).unwrap().len();
            prop_assert!(bytes <= CONTENT_MAX_BYTES, "{}", bytes);
            prop_assert!(bytes <= serde_json::to_vec(&first.largest_later()).unwrap().len());
        }
    }
}
