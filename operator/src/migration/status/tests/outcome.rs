use super::*;
use crate::migration::step::holds_claim;

#[test]
fn a_rollback_carries_the_agents_reason_and_message_and_frees_the_target() {
    let mut draft = reserved();
    let end = finished(Outcome::RolledBack, "BlobRejected", "device b2 did not take its state (EIO).");
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
        "VM demo/counter runs on node-a again, with its devices. The migration was given up: device b2 did \
         not take its state (EIO)."
    );
    assert_eq!(draft.status.reservation, Some(Reservation::ReleasingAbortedAtSource));
    assert!(draft.status.completion_time.is_some());
    assert!(draft.notices.last().unwrap().warning);

    draft.at(stamp(31)).release_failed("connection refused");
    assert_eq!(condition(&draft, PREPARED), ("Unknown".into(), "Releasing".into()));
    draft.at(stamp(32)).target_released("node-b has given back what it reserved.");
    assert_eq!(condition(&draft, PREPARED), ("False".into(), "Released".into()));
    assert_eq!(draft.status.reservation, Some(Reservation::Released));
    assert_eq!(condition(&draft, SUCCEEDED), ("False".into(), "BlobRejected".into()));
}

#[test]
fn an_agents_reason_that_is_no_reason_is_replaced() {
    let mut draft = reserved();
    play(&mut draft, &[], finished(Outcome::RolledBack, "device failed!", "x"));
    assert_eq!(condition(&draft, SUCCEEDED).1, "RolledBack");
}

#[test]
fn an_end_that_only_the_journals_show_is_reported_with_no_more_than_they_say() {
    let failure = || Some(Failure::new(Reason::Other("TwinExited".into()), "the twin has exited."));
    let after = |how: &Settlement| {
        let mut draft = reserved();
        draft.at(stamp(20)).settle(how, Some(("SourceRefused", "its stream is gone.")));
        draft
    };
    let began = after(&Settlement::NeverBegan);
    assert_eq!(condition(&began, SUCCEEDED), ("False".into(), "SourceRefused".into()));
    assert!(message(&began, SUCCEEDED).contains("its stream is gone. Nothing was touched there"));
    let given_up = after(&Settlement::GivenUp(failure()));
    assert_eq!(condition(&given_up, SUCCEEDED), ("False".into(), "TwinExited".into()));
    assert!(message(&given_up, SUCCEEDED).contains("look whether it runs"));
    let there = after(&Settlement::RunsAtDestination);
    assert_eq!(message(&there, SUCCEEDED), "VM demo/counter runs on node-b.");
    assert_eq!(
        (condition(&there, COMMITTED).0.as_str(), there.status.reservation),
        ("True", Some(Reservation::Used))
    );
    let lost = after(&Settlement::Lost(failure()));
    assert_eq!(
        (lost.status.phase, lost.status.reservation),
        (Some(MigrationPhase::Lost), Some(Reservation::Kept))
    );
}

#[test]
fn a_source_that_is_lost_ends_the_migration_and_nothing_is_claimed_about_its_vm() {
    let (mut draft, spec) = with_attempts(3);
    draft.at(stamp(10)).begin_attempt(&spec, &plan());
    draft.at(stamp(11)).target_reserved("journal-b");
    play(&mut draft, &FORWARD[..5], None);
    draft.at(stamp(400)).settle(&Settlement::SourceLost { why: "connection refused.".into() }, None);
    assert_conditions(
        &draft,
        [
            (ACCEPTED, "True", "Planned"),
            (PREPARED, "False", "Released"),
            (STOPPED, "Unknown", "SourceLost"),
            (COMMITTED, "False", "NotYet"),
            (SUCCEEDED, "False", "SourceLost"),
        ],
    );
    assert_eq!(
        message(&draft, SUCCEEDED),
        "node-b never started VM demo/counter, and never will. Whether the VM runs on node-a is not known: node-a \
         cannot be asked (connection refused). When it is back, its agent keeps the VM, and has it run on if it still \
         can; if the node is gone for good, so is the VM."
    );
    // Nobody knows where the VM is, so no other attempt follows; and nothing holds its name any more.
    assert_eq!(draft.status.phase, Some(MigrationPhase::SourceLost));
    assert!(draft.status.completion_time.is_some() && !holds_claim(&draft.status));
}

#[test]
fn a_source_that_never_began_has_its_own_reason_if_it_named_one() {
    let mut draft = reserved();
    draft.at(stamp(20)).settle(&Settlement::NeverBegan, Some(("VMMUnreachable", "the VMM does not answer")));
    assert_eq!(condition(&draft, SUCCEEDED), ("False".into(), "VMMUnreachable".into()));
    let mut draft = reserved();
    draft.at(stamp(20)).source_refused("VMPaused", "the VM does not run");
    assert_eq!(condition(&draft, SUCCEEDED), ("False".into(), "VMPaused".into()));
    assert!(message(&draft, SUCCEEDED).contains("the VM does not run. Nothing was touched there"));
}

#[test]
fn a_lost_vm_has_failed_and_nothing_is_given_back() {
    let mut draft = reserved();
    play(&mut draft, &[], finished(Outcome::Lost, "VmmGone", "its VMM has exited"));
    assert_eq!(condition(&draft, SUCCEEDED), ("False".into(), "VmmGone".into()));
    assert_eq!(draft.status.reservation, Some(Reservation::Kept));
    assert_eq!(message(&draft, SUCCEEDED), "VM demo/counter runs nowhere: its VMM has exited.");
}

#[test]
fn a_vm_that_its_owner_has_stopped_is_not_said_to_run() {
    let mut draft = reserved();
    let end =
        finished(Outcome::RolledBack, "VMStopped", "the VM is paused: resume it. It stays as it is now");
    play(&mut draft, &FORWARD[..2], end);
    assert_eq!(condition(&draft, STOPPED), ("False".into(), "LeftAsItIs".into()));
    for condition in [STOPPED, SUCCEEDED] {
        assert!(!message(&draft, condition).contains("runs"), "{}", message(&draft, condition));
    }
    assert!(message(&draft, SUCCEEDED).contains("stays on node-a, as it is"));
}

#[test]
fn devices_that_gave_no_state_are_named_in_the_status_and_by_an_event() {
    for (bytes, named) in [(vec![60, 61], None), (vec![60, 0], Some("a2")), (vec![], None)] {
        let mut draft = reserved();
        let end = finished(Outcome::Succeeded, "", "").map(|end| Finished { device_bytes: bytes, ..end });
        play(&mut draft, &FORWARD, end);
        let event = draft.notices.iter().find(|notice| notice.reason == "DeviceWithoutState");
        assert_eq!(event.is_some(), named.is_some());
        let said = message(&draft, SUCCEEDED);
        assert_eq!(said.contains("gave no state (0 bytes)"), named.is_some(), "{said}");
        if let (Some(named), Some(event)) = (named, event) {
            assert!(said.ends_with(&format!("{named}.")) && event.note.contains(named), "{said}");
        }
    }
}
