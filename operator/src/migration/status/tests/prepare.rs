use super::*;

#[test]
fn a_plan_is_written_with_its_attempt_before_any_agent_is_asked() {
    let mut draft = fresh();
    draft.at(stamp(10)).begin_attempt(&spec(), &plan());
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
fn a_failed_reservation_ends_the_attempt_with_its_reason_and_leaves_the_source_untouched() {
    let mut draft = fresh();
    draft.at(stamp(10)).begin_attempt(&spec(), &plan());
    draft.at(stamp(11)).reserve_failed("TargetUnreachable", "connection refused");
    assert_eq!(condition(&draft, SUCCEEDED), ("False".into(), "TargetUnreachable".into()));
    assert_eq!(draft.status.reservation, Some(Reservation::ReleasingNeverStarted));
    draft.at(stamp(12)).target_released("given back");
    assert_eq!(condition(&draft, PREPARED), ("False".into(), "TargetUnreachable".into()));
}

#[test]
fn a_refusal_is_an_end_and_says_so_once() {
    let mut draft = fresh();
    draft.at(stamp(9)).wait_for_agents("node-a has not answered yet.");
    assert_eq!(condition(&draft, ACCEPTED), ("Unknown".into(), "WaitingForAgents".into()));
    let vm = VmKey { namespace: "demo".into(), name: "counter".into() };
    let refusal = Refusal::TargetIsSource { vm, node: "node-a".into() };
    draft.at(stamp(10)).refuse(&spec(), &refusal);
    draft.at(stamp(11)).refuse(&spec(), &refusal);
    assert_eq!(condition(&draft, ACCEPTED), ("False".into(), "TargetIsSource".into()));
    assert_eq!(condition(&draft, SUCCEEDED), ("False".into(), "TargetIsSource".into()));
    assert_eq!(reported(&draft), ["Refused"]);
    assert_eq!(draft.status.attempt, None);
}

#[test]
fn devices_that_are_stated_to_be_isolated_are_shown_with_a_warning() {
    let mut draft = fresh();
    let isolated = VMMigrationSpec { peer_to_peer: PeerToPeer::AssumeIsolated, ..spec() };
    draft.at(stamp(10)).begin_attempt(&isolated, &plan());
    assert!(message(&draft, ACCEPTED).contains("isolated from each other"));
    assert_eq!(reported(&draft), ["Accepted", "AssumeIsolated"]);
}

#[test]
fn a_copy_of_a_migration_that_was_accepted_is_refused_whatever_its_status_says() {
    let mut draft = reserved();
    draft.at(stamp(20)).refuse_copy("3f1c");
    assert_eq!(condition(&draft, SUCCEEDED), ("False".into(), "RestoredCopy".into()));
    assert_eq!(condition(&draft, ACCEPTED), ("False".into(), "RestoredCopy".into()));
    assert!(message(&draft, SUCCEEDED).starts_with(
        "metadata.annotations[slackwater.dev/accepted-as] is \"3f1c\", and not this object's UID"
    ));
    assert_eq!(draft.status.phase, Some(MigrationPhase::Refused));
    assert_eq!((draft.status.reservation, draft.status.attempt), (None, None));
    assert!(draft.status.completion_time.is_some());
}
