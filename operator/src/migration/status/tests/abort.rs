use super::*;

#[test]
fn a_cancel_is_noted_cannot_be_taken_back_and_is_named() {
    let mut draft = reserved();
    let cancelled = VMMigrationSpec { cancel: true, ..spec() };
    assert!(draft.at(stamp(12)).note_spec(&cancelled));
    assert!(!draft.at(stamp(13)).note_spec(&cancelled));
    assert_eq!(reported(&draft), ["Accepted"]);
    draft.wish = Wish::Cancel;
    draft.at(stamp(14)).abort_requested();
    assert!(message(&draft, SUCCEEDED).starts_with("Since spec.cancel was set to true"));
    let mut late = draft.clone();
    late.at(stamp(15)).abort_too_late("committed");
    assert!(
        message(&late, SUCCEEDED).starts_with("The migration was cancelled too late"),
        "{}",
        message(&late, SUCCEEDED)
    );
    assert!(draft.at(stamp(16)).note_spec(&spec()));
    assert!(message(&draft, ACCEPTED).starts_with("spec.cancel was changed afterwards, and that is ignored"));
    draft.at(stamp(17)).settle(&Settlement::NeverBegan, None);
    assert_eq!(condition(&draft, SUCCEEDED), ("False".into(), "Aborted".into()));
}

#[test]
fn a_cancel_before_the_plan_between_attempts_and_after_the_end() {
    let mut draft = fresh();
    draft.wish = Wish::Cancel;
    draft.at(stamp(10)).give_up_before_asking();
    assert_eq!(condition(&draft, ACCEPTED), ("False".into(), "Aborted".into()));
    assert_eq!((condition(&draft, SUCCEEDED).0.as_str(), draft.status.reservation), ("False", None));

    let (mut draft, spec) = with_attempts(3);
    draft.at(stamp(10)).begin_attempt(&spec, &plan());
    draft.at(stamp(11)).reserve_failed("TargetUnreachable", "refused");
    draft.at(stamp(12)).target_released("given back");
    draft.wish = Wish::Cancel;
    draft.at(stamp(13)).give_up_before_asking();
    assert_eq!(condition(&draft, SUCCEEDED), ("False".into(), "Aborted".into()));
    assert_eq!(draft.status.attempts.len(), 1);
    assert!(draft.status.completion_time.is_some() && draft.status.next_attempt_time.is_none());

    assert!(draft.at(stamp(14)).note_spec(&VMMigrationSpec { cancel: true, ..spec }));
    assert_eq!(draft.notices.last().unwrap().reason, "CancelTooLate");
}

#[test]
fn a_deleted_migration_says_that_it_is_being_given_up_until_it_is_or_cannot_be() {
    let mut draft = reserved();
    play(&mut draft, &FORWARD[..2], None);
    draft.wish = Wish::Delete;
    draft.at(stamp(21)).abort_requested();
    draft.at(stamp(22)).abort_requested();
    play(&mut draft, &FORWARD[..6], None);
    assert_eq!(draft.status.phase, Some(MigrationPhase::Aborting));
    assert_eq!(condition(&draft, SUCCEEDED).1, "Aborting");

    let mut late = draft.clone();
    late.at(stamp(23)).abort_too_late("committed already");
    play(&mut late, &FORWARD, finished(Outcome::Succeeded, "", ""));
    assert_eq!(condition(&late, SUCCEEDED), ("True".into(), "VMRunsAtTarget".into()));

    draft.at(stamp(24)).settle(&Settlement::NeverBegan, None);
    assert_eq!(condition(&draft, SUCCEEDED), ("False".into(), "Aborted".into()));
    assert_eq!(draft.status.reservation, Some(Reservation::ReleasingAbortedAtSource));
    assert_eq!(draft.notices.iter().filter(|n| n.reason == "Aborting").count(), 1);
}
