use jiff::Timestamp;
use slackwater_api::{VMMigration, VmKind, VmReference};
use slackwater_proto::node::{Finished, MigrationEvent, Outcome, Phase, migration_event::What};

use super::*;
use crate::inventory::VmKey;
use crate::plan::Pair;

fn stamp(second: i64) -> Stamp {
    Stamp { generation: Some(1), now: Timestamp::from_second(second).unwrap() }
}

fn spec() -> VMMigrationSpec {
    VMMigrationSpec {
        vm_ref: VmReference { kind: VmKind::AssignedVM, name: "counter".into() },
        target: None,
        peer_to_peer: PeerToPeer::Required,
        pre_commit_timeout: "5m".into(),
            attempts: 1,
            cancel: false,
            resolve: None,
    }
}

fn fresh() -> Draft {
    let mut object = VMMigration::new("move", spec());
    object.metadata.namespace = Some("demo".into());
    Draft::new(&object)
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

fn held() -> Draft {
    let mut draft = fresh();
    planned(&mut draft, &spec(), &plan(), stamp(10));
    reserved(&mut draft, stamp(11));
    draft
}

fn told(draft: &Draft) -> Vec<&str> {
    draft.notices.iter().map(|notice| notice.reason).collect()
}

fn seen(draft: &Draft, type_: &str) -> (String, String) {
    let condition = conditions::find(&draft.status.conditions, type_).unwrap();
    (condition.status.clone(), condition.reason.clone())
}

fn message(draft: &Draft, type_: &str) -> String {
    conditions::find(&draft.status.conditions, type_).unwrap().message.clone()
}

#[track_caller]
fn assert_conditions(draft: &Draft, expected: [(&str, &str, &str); 5]) {
    for (type_, status, reason) in expected {
        assert_eq!(seen(draft, type_), (status.to_owned(), reason.to_owned()), "{type_}");
    }
}

/// Plays phases and an end into the draft, as the agent of the source tells them.
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
        if phase(draft, &trace, *now, stamp(20)) {
            written.push(*now);
        }
    }
    if let Some(end) = end {
        finished(draft, &trace, &end, stamp(30));
    }
    written
}

fn ended(outcome: Outcome, reason: &str, message: &str) -> Option<Finished> {
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

#[test]
fn a_plan_is_written_with_its_attempt_before_anybody_is_asked() {
    let mut draft = fresh();
    planned(&mut draft, &spec(), &plan(), stamp(10));
    assert_eq!(draft.status.attempt, Some(1));
    assert_eq!(draft.status.reservation, Some(Reservation::Requested));
    assert_conditions(
        &draft,
        [
            (ACCEPTED, "True", "Planned"),
            (PREPARED, "Unknown", "Reserving"),
            (STOPPED, "False", "GuestRuns"),
            (COMMITTED, "False", "NotYet"),
            (SUCCEEDED, "Unknown", "InProgress"),
        ],
    );
    assert_eq!(
        message(&draft, ACCEPTED),
        "VM demo/counter goes from node-a to node-b, its devices a1 -> b1 (mtty-1), a2 -> b2 (mtty-1)."
    );
}

#[test]
fn a_success_has_all_five_conditions_true_its_figures_and_one_notice_each() {
    let mut draft = held();
    let written = play(&mut draft, &FORWARD, ended(Outcome::Succeeded, "", ""));
    assert_eq!(written, [Phase::PreCopy, Phase::Capturing, Phase::Committed]);
    assert_conditions(
        &draft,
        [
            (ACCEPTED, "True", "Planned"),
            (PREPARED, "True", "TargetReserved"),
            (STOPPED, "True", "SlackWater"),
            (COMMITTED, "True", "PointOfNoReturn"),
            (SUCCEEDED, "True", "VMRunsAtTarget"),
        ],
    );
    let status = &draft.status;
    assert_eq!(status.timings.as_ref().unwrap().blackout, "87.412ms");
    assert_eq!(status.bytes, Some(slackwater_api::TransferredBytes { devices: 121, vmm: 1 << 20 }));
    assert_eq!(status.devices.iter().map(|d| d.bytes).collect::<Vec<_>>(), [Some(60), Some(61)]);
    assert_eq!(status.timeline.len(), FORWARD.len());
    assert_eq!(
        (status.phase, status.reservation),
        (Some(MigrationPhase::Succeeded), Some(Reservation::Used))
    );
    assert_eq!(status.completion_time, Some(Time(stamp(30).now)));
    assert_eq!(told(&draft), ["Accepted", "Prepared", "Stopped", "Committed", "Succeeded"]);

    // An operator that joins again hears all of it again.
    play(&mut draft, &FORWARD, ended(Outcome::Succeeded, "", ""));
    assert_eq!(told(&draft).len(), 5);
}

#[test]
fn an_operator_that_joins_late_still_ends_with_all_conditions_true() {
    let mut draft = held();
    play(&mut draft, &[], ended(Outcome::Succeeded, "", ""));
    for type_ in [STOPPED, COMMITTED, SUCCEEDED] {
        assert_eq!(seen(&draft, type_).0, "True", "{type_}");
    }
}

#[test]
fn a_rollback_carries_the_agents_reason_and_words_and_frees_the_target() {
    let mut draft = held();
    let end = ended(Outcome::RolledBack, "BlobRejected", "device b2 did not take its state (EIO).");
    play(&mut draft, &FORWARD[..6], end);
    assert_conditions(
        &draft,
        [
            (ACCEPTED, "True", "Planned"),
            (PREPARED, "True", "TargetReserved"),
            (STOPPED, "False", "GuestRuns"),
            (COMMITTED, "False", "GivenUp"),
            (SUCCEEDED, "False", "BlobRejected"),
        ],
    );
    assert_eq!(
        message(&draft, SUCCEEDED),
        "The migration was given up: device b2 did not take its state (EIO). VM demo/counter runs on node-a again, with \
         its devices."
    );
    assert_eq!(draft.status.reservation, Some(Reservation::ReleasingAbortedAtSource));
    assert!(draft.status.completion_time.is_some());
    assert!(draft.notices.last().unwrap().warning);

    release_failed(&mut draft, "connection refused", stamp(31));
    assert_eq!(seen(&draft, PREPARED), ("Unknown".into(), "Releasing".into()));
    released(&mut draft, "node-b has given back what it reserved.", stamp(32));
    assert_eq!(seen(&draft, PREPARED), ("False".into(), "Released".into()));
    assert_eq!(draft.status.reservation, Some(Reservation::Released));
    assert_eq!(seen(&draft, SUCCEEDED), ("False".into(), "BlobRejected".into()));
}

#[test]
fn an_agents_reason_that_is_no_reason_is_replaced() {
    let mut draft = held();
    play(&mut draft, &[], ended(Outcome::RolledBack, "device failed!", "x"));
    assert_eq!(seen(&draft, SUCCEEDED).1, "RolledBack");
}

#[test]
fn in_doubt_is_unknown_without_an_end_and_nothing_is_given_back() {
    let mut draft = held();
    play(&mut draft, &FORWARD[..8], ended(Outcome::InDoubt, "", "the link is down"));
    assert_eq!(seen(&draft, SUCCEEDED), ("Unknown".into(), "InDoubt".into()));
    assert_eq!(seen(&draft, COMMITTED).0, "True");
    assert_eq!((draft.status.reservation, &draft.status.completion_time), (Some(Reservation::Kept), &None));
    assert!(message(&draft, SUCCEEDED).contains("Do not resume it there"));
}

#[test]
fn a_lost_vm_has_failed_and_nothing_is_given_back() {
    let mut draft = held();
    play(&mut draft, &[], ended(Outcome::Lost, "VmmGone", "its VMM has exited"));
    assert_eq!(seen(&draft, SUCCEEDED), ("False".into(), "VmmGone".into()));
    assert_eq!(draft.status.reservation, Some(Reservation::Kept));
    assert_eq!(message(&draft, SUCCEEDED), "VM demo/counter runs nowhere: its VMM has exited.");
}

#[test]
fn a_reservation_that_fails_ends_it_with_the_reason_and_the_source_untouched() {
    let mut draft = fresh();
    planned(&mut draft, &spec(), &plan(), stamp(10));
    reserve_failed(&mut draft, "TargetUnreachable", "connection refused", stamp(11));
    assert_eq!(seen(&draft, SUCCEEDED), ("False".into(), "TargetUnreachable".into()));
    assert_eq!(draft.status.reservation, Some(Reservation::ReleasingNeverStarted));
    released(&mut draft, "given back", stamp(12));
    assert_eq!(seen(&draft, PREPARED), ("False".into(), "TargetUnreachable".into()));
}

#[test]
fn a_refusal_is_an_end_and_says_so_once() {
    let mut draft = fresh();
    waiting(&mut draft, "node-a has not answered yet.", stamp(9));
    assert_eq!(seen(&draft, ACCEPTED), ("Unknown".into(), "WaitingForAgents".into()));
    let vm = VmKey { namespace: "demo".into(), name: "counter".into() };
    let refusal = Refusal::TargetIsSource { vm, node: "node-a".into() };
    refused(&mut draft, &spec(), &refusal, stamp(10));
    refused(&mut draft, &spec(), &refusal, stamp(11));
    assert_eq!(seen(&draft, ACCEPTED), ("False".into(), "TargetIsSource".into()));
    assert_eq!(seen(&draft, SUCCEEDED), ("False".into(), "TargetIsSource".into()));
    assert_eq!(told(&draft), ["Refused"]);
    assert_eq!(draft.status.attempt, None);
}

#[test]
fn a_deleted_migration_says_that_it_is_being_given_up_until_it_is_or_cannot_be() {
    let mut draft = held();
    play(&mut draft, &FORWARD[..2], None);
    aborting(&mut draft, stamp(21));
    aborting(&mut draft, stamp(22));
    play(&mut draft, &FORWARD[..6], None);
    assert_eq!(draft.status.phase, Some(MigrationPhase::Aborting));
    assert_eq!(seen(&draft, SUCCEEDED).1, "Aborting");

    let mut late = draft.clone();
    abort_too_late(&mut late, "committed already", stamp(23));
    play(&mut late, &FORWARD, ended(Outcome::Succeeded, "", ""));
    assert_eq!(seen(&late, SUCCEEDED), ("True".into(), "VMRunsAtTarget".into()));

    aborted(&mut draft, stamp(24));
    assert_eq!(seen(&draft, SUCCEEDED), ("False".into(), "Aborted".into()));
    assert_eq!(draft.status.reservation, Some(Reservation::ReleasingAbortedAtSource));
    assert_eq!(draft.notices.iter().filter(|n| n.reason == "Aborting").count(), 1);
}

#[test]
fn a_changed_spec_is_named_and_ignored_once() {
    let mut draft = held();
    let changed = VMMigrationSpec { pre_commit_timeout: "1h".into(), ..spec() };
    assert!(!spec_changed(&mut draft, &spec(), stamp(12)));
    assert!(spec_changed(&mut draft, &changed, stamp(12)));
    assert!(!spec_changed(&mut draft, &changed, stamp(13)));
    assert_eq!(seen(&draft, ACCEPTED), ("True".into(), "SpecChangeIgnored".into()));
    let said = message(&draft, ACCEPTED);
    assert!(said.starts_with("spec.preCommitTimeout was changed afterwards, and that is ignored"), "{said}");
    assert_eq!(draft.status.observed_spec, Some(spec()));
}

#[test]
fn devices_that_are_stated_to_be_isolated_are_shown_and_warned_of() {
    let mut draft = fresh();
    let isolated = VMMigrationSpec { peer_to_peer: PeerToPeer::AssumeIsolated, ..spec() };
    planned(&mut draft, &isolated, &plan(), stamp(10));
    assert!(message(&draft, ACCEPTED).contains("isolated from each other"));
    assert_eq!(told(&draft), ["Accepted", "AssumeIsolated"]);
}
