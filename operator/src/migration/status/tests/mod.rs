//! What the status says, fact by fact. The files are those of the module that they test.

mod abort;
mod attempts;
mod doubt;
mod estimate;
mod outcome;
mod prepare;
mod progress;
mod resolve;
mod spec;

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use slackwater_api::condition::{ACCEPTED, PREPARED, STOPPED, SUCCEEDED};
use slackwater_api::{MigrationPhase, PeerToPeer, Reservation, Resolve, RunOn};
use slackwater_handover::resolver::{DoubtReason, End, Settlement, Unfit};
use slackwater_handover::{Failure, Reason};
use slackwater_proto::node::{Finished, MigrationEvent, Outcome, Phase, migration_event::What};

use super::*;
use crate::inventory::VmKey;
use crate::migration::trace::Trace;
use crate::plan::{Pair, Plan, Refusal};

fn stamp(second: i64) -> Stamp {
    Stamp { generation: Some(1), now: Timestamp::from_second(second).unwrap() }
}

fn spec() -> VMMigrationSpec {
    VMMigrationSpec::new("counter")
}

fn fresh() -> Draft {
    let mut object = VMMigration::new("move", spec());
    object.metadata.namespace = Some("demo".into());
    Draft::new(&object, stamp(0))
}

fn plan() -> Plan {
    let pair = |n: u8| Pair {
        source: format!("a{n}"),
        target: format!("b{n}"),
        driver: "mtty".into(),
        model: "mtty-1".into(),
        features: vec![],
    };
    Plan {
        source: "node-a".into(),
        target: "node-b".into(),
        target_address: "10.0.0.2:7443".into(),
        devices: vec![pair(1), pair(2)],
    }
}

fn reserved() -> Draft {
    let mut draft = fresh();
    draft.at(stamp(10)).begin_attempt(&spec(), &plan());
    draft.at(stamp(11)).target_reserved("journal-b");
    draft
}

fn reported(draft: &Draft) -> Vec<&str> {
    draft.notices.iter().map(|notice| notice.reason).collect()
}

fn resolve(run_on: RunOn) -> Resolve {
    Resolve {
        run_on,
        destination_never_started: true,
        source_never_resumes: true,
        justification: "node-b was powered off at 12:04".into(),
    }
}

fn condition(draft: &Draft, type_: &str) -> (String, String) {
    let condition = conditions::find(&draft.status.conditions, type_).unwrap();
    (condition.status.clone(), condition.reason.clone())
}

fn message(draft: &Draft, type_: &str) -> String {
    conditions::find(&draft.status.conditions, type_).unwrap().message.clone()
}

#[track_caller]
fn assert_conditions(draft: &Draft, expected: [(&str, &str, &str); 5]) {
    for (type_, status, reason) in expected {
        assert_eq!(condition(draft, type_), (status.to_owned(), reason.to_owned()), "{type_}");
    }
}

/// Plays phases and an end into the draft, as the agent of the source reports them.
fn play(draft: &mut Draft, phases: &[Phase], end: Option<Finished>) -> Vec<Phase> {
    let mut trace = Trace::default();
    let mut written = Vec::new();
    for (sequence, now) in (1_u64..).zip(phases) {
        trace.push(MigrationEvent {
            sequence,
            node: "node-a".into(),
            monotonic_ns: sequence * 1_000_000,
            unix_ns: 0,
            what: Some(What::Phase((*now).into())),
        });
        if draft.is_new(*now, "node-a") && draft.at(stamp(20)).reach(*now, &trace) {
            written.push(*now);
        }
    }
    if let Some(end) = end {
        draft.at(stamp(30)).finish(&trace, &end);
    }
    written
}

fn finished(outcome: Outcome, reason: &str, message: &str) -> Option<Finished> {
    Some(Finished {
        outcome: outcome.into(),
        reason: reason.into(),
        message: message.into(),
        timings: Some(slackwater_proto::node::Timings {
            pre_copy_ns: 1_000_000,
            blackout_ns: 87_412_345,
            total_ns: 2_013_000_000,
        }),
        device_bytes: vec![60, 61],
        vmm_bytes: 1 << 20,
        dropped_events: 0,
    })
}

const FORWARD: [Phase; 10] = [
    Phase::Connected,
    Phase::PreCopy,
    Phase::Pausing,
    Phase::Quiescing,
    Phase::Stopping,
    Phase::Capturing,
    Phase::Loaded,
    Phase::Committed,
    Phase::Starting,
    Phase::Started,
];

fn with_attempts(attempts: i32) -> (Draft, VMMigrationSpec) {
    let spec = VMMigrationSpec { attempts, ..spec() };
    let mut object = VMMigration::new("move", spec.clone());
    object.metadata.namespace = Some("demo".into());
    (Draft::new(&object, stamp(0)), spec)
}
