//! Entries of version 1. They had numbers and arrays where version 2 has names:
//!
//! | field | version 1 | version 2 |
//! |---|---|---|
//! | `ended.outcome` | the number of `slackwater.node.v1.Outcome`; 0 at the destination | its name, or null |
//! | `ended.timings` | `timings_ns`: pre-copy, blackout, total; zeroes at the destination | an object, or null |
//! | `devices[].features` | three booleans: STOP_COPY, P2P, PRE_COPY | an object |

use serde::Deserialize;
use slackwater_handover::Record;
use slackwater_proto::node;

use super::{EndEntry, Ended, Entry, FailureEntry, Features, Outcome, Pair, Process, Timings};

/// [`Entry`] as version 1 had it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry1 {
    migration_id: String,
    attempt: u32,
    record: Record,
    ended: Option<Ended1>,
    failure: Option<FailureEntry>,
    stated_because: Option<String>,
    recorded_unix_ns: i64,
    namespace: String,
    name: String,
    vmm: Option<Process>,
    assume_isolated: bool,
    devices: Vec<Pair1>,
    end: EndEntry,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Ended1 {
    outcome: i32,
    timings_ns: [u64; 3],
    device_bytes: Vec<u64>,
    vmm_bytes: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Pair1 {
    source: String,
    target: String,
    driver: String,
    model: String,
    features: [bool; 3],
}

/// Reads an entry of version 1.
pub(super) fn parse(bytes: &[u8]) -> serde_json::Result<Entry> {
    serde_json::from_slice::<Entry1>(bytes).map(Entry::from)
}

impl From<Entry1> for Entry {
    fn from(old: Entry1) -> Self {
        let at_source = matches!(old.end, EndEntry::Source { .. });
        Self {
            migration_id: old.migration_id,
            attempt: old.attempt,
            record: old.record,
            ended: old.ended.map(|ended| ended.upgrade(at_source)),
            failure: old.failure,
            stated_because: old.stated_because,
            recorded_unix_ns: old.recorded_unix_ns,
            namespace: old.namespace,
            name: old.name,
            vmm: old.vmm,
            assume_isolated: old.assume_isolated,
            devices: old.devices.into_iter().map(Pair::from).collect(),
            end: old.end,
        }
    }
}

impl Ended1 {
    fn upgrade(self, at_source: bool) -> Ended {
        let [pre_copy_ns, blackout_ns, total_ns] = self.timings_ns;
        Ended {
            outcome: node::Outcome::try_from(self.outcome).ok().and_then(Outcome::from_proto),
            timings: at_source.then_some(Timings { pre_copy_ns, blackout_ns, total_ns }),
            device_bytes: self.device_bytes,
            vmm_bytes: self.vmm_bytes,
        }
    }
}

impl From<Pair1> for Pair {
    fn from(old: Pair1) -> Self {
        let Pair1 { source, target, driver, model, features: [stop_copy, p2p, pre_copy] } = old;
        Self { source, target, driver, model, features: Features { stop_copy, p2p, pre_copy } }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Marks;
    use super::*;
    use crate::journal::Content;

    // As agents of that version wrote them, but for the line breaks. Never change these.
    const SOURCE: &str = r#"{"migration_id":"3f","attempt":1,"record":"ABORTED","ended":{"outcome":2,
"timings_ns":[11,22,33],"device_bytes":[60,64],"vmm_bytes":4096},"failure":{"reason":"DeviceFailed",
"message":"at the source, EIO"},"stated_because":"node-b is off","recorded_unix_ns":7,"namespace":"demo",
"name":"counter","vmm":{"boot_id":"b","pid":9,"start_ticks":11},"assume_isolated":true,
"devices":[{"source":"0000:3b:00.2","target":"0000:86:00.5","driver":"mlx5_vfio_pci","model":"15b3:101e",
"features":[true,false,true]}],"end":{"role":"Source","target_node":"node-b","target_address":"10.0.0.2:7443",
"cgroup":"demo.counter-3f","marks":{"begun":1,"pre_copy":2,"pausing":null,"guest_runs_again":4}}}"#;
    const DESTINATION: &str = r#"{"migration_id":"3f","attempt":1,"record":"RUNNING","ended":{"outcome":0,
"timings_ns":[0,0,0],"device_bytes":[],"vmm_bytes":0},"failure":null,"stated_because":null,
"recorded_unix_ns":7,"namespace":"demo","name":"counter","vmm":null,"assume_isolated":false,
"devices":[{"source":"0000:3b:00.2","target":"0000:86:00.5","driver":"mlx5_vfio_pci","model":"15b3:101e",
"features":[true,false,true]}],"end":{"role":"Destination","source_node":"node-a","vm_json":"{}","claim":[1,
2],"silence_timeout_ms":9}}"#;
    const OPEN: &str = r#"{"migration_id":"3f","attempt":1,"record":"SAVING","ended":null,"failure":null,
"stated_because":null,"recorded_unix_ns":7,"namespace":"demo","name":"counter","vmm":{"boot_id":"b","pid":9,
"start_ticks":11},"assume_isolated":false,"devices":[],"end":{"role":"Source","target_node":"node-b",
"target_address":"10.0.0.2:7443","cgroup":null,"marks":{"begun":null,"pre_copy":null,"pausing":null,
"guest_runs_again":null}}}"#;

    fn parse(text: &str) -> Entry {
        Entry::parse(&Content { version: 1, bytes: text.as_bytes().to_vec() }).unwrap()
    }

    fn devices() -> Vec<Pair> {
        vec![Pair {
            source: "0000:3b:00.2".to_owned(),
            target: "0000:86:00.5".to_owned(),
            driver: "mlx5_vfio_pci".to_owned(),
            model: "15b3:101e".to_owned(),
            features: Features { stop_copy: true, p2p: false, pre_copy: true },
        }]
    }

    #[test]
    fn every_field_of_a_source_is_read() {
        let expected = Entry {
            migration_id: "3f".to_owned(),
            attempt: 1,
            record: Record::Aborted,
            ended: Some(Ended {
                outcome: Some(Outcome::RolledBack),
                timings: Some(Timings { pre_copy_ns: 11, blackout_ns: 22, total_ns: 33 }),
                device_bytes: vec![60, 64],
                vmm_bytes: 4096,
            }),
            failure: Some(FailureEntry {
                reason: "DeviceFailed".to_owned(),
                message: "at the source, EIO".to_owned(),
            }),
            stated_because: Some("node-b is off".to_owned()),
            recorded_unix_ns: 7,
            namespace: "demo".to_owned(),
            name: "counter".to_owned(),
            vmm: Some(Process { boot_id: "b".to_owned(), pid: 9, start_ticks: 11 }),
            assume_isolated: true,
            devices: devices(),
            end: EndEntry::Source {
                target_node: "node-b".to_owned(),
                target_address: "10.0.0.2:7443".to_owned(),
                cgroup: Some("demo.counter-3f".to_owned()),
                marks: Marks { begun: Some(1), pre_copy: Some(2), pausing: None, guest_runs_again: Some(4) },
                monitor: None,
            },
        };
        assert_eq!(parse(SOURCE), expected);
    }

    #[test]
    fn every_field_of_a_destination_is_read() {
        let expected = Entry {
            record: Record::Running,
            vmm: None,
            ended: Some(Ended::default()),
            devices: devices(),
            end: EndEntry::Destination {
                source_node: "node-a".to_owned(),
                vm_json: "{}".to_owned(),
                claim: vec![1, 2],
                silence_timeout_ms: 9,
                twin_user: None,
            },
            ..super::super::tests::entry()
        };
        assert_eq!(parse(DESTINATION), expected);
    }

    #[test]
    fn an_open_entry_is_read_and_goes_on_in_the_newest_version() {
        let entry = parse(OPEN);
        assert_eq!(entry, super::super::tests::entry());
        let written = Content { version: 2, bytes: serde_json::to_vec(&entry).unwrap() };
        assert_eq!(Entry::parse(&written).unwrap(), entry);
    }

    #[test]
    fn what_version_1_did_not_have_is_refused() {
        for (old, new) in [
            (r#""timings_ns":[11,22,33]"#, r#""timings":null"#),
            (r#"[true,false,true]"#, r#"{"stop_copy":true,"p2p":false,"pre_copy":true}"#),
            (r#""attempt":1,"#, r#""attempt":1,"quorum":3,"#),
        ] {
            let changed = SOURCE.replace(old, new);
            assert_ne!(changed, SOURCE);
            let error = Entry::parse(&Content { version: 1, bytes: changed.into_bytes() }).unwrap_err();
            assert!(error.to_string().starts_with("it is not an entry of version 1: "), "{error}");
        }
    }
}
