use super::*;

#[test]
fn an_attempt_that_was_rolled_back_is_followed_by_another_with_a_new_number_after_a_pause() {
    let (mut draft, spec) = with_attempts(3);
    for attempt in 1..=3 {
        draft.at(stamp(10 * i64::from(attempt))).begin_attempt(&spec, &plan());
        assert_eq!(draft.status.attempt, Some(attempt));
        assert_eq!((draft.status.timeline.len(), &draft.status.next_attempt_time), (0, &None));
        draft.at(stamp(11)).target_reserved("journal-b");
        play(&mut draft, &FORWARD[..6], finished(Outcome::RolledBack, "BlobRejected", "EIO"));
        let last = attempt == 3;
        assert_eq!(condition(&draft, SUCCEEDED).0, if last { "False" } else { "Unknown" });
        draft.at(stamp(100)).target_released("given back");
        assert_eq!(draft.status.completion_time.is_some(), last);
        let pause = [5, 10][usize::try_from(attempt - 1).unwrap().min(1)];
        let next = (!last).then(|| Time(stamp(100 + pause).now));
        assert_eq!(draft.status.next_attempt_time, next);
        assert_eq!(draft.status.attempts.len(), usize::try_from(attempt).unwrap());
    }
    assert_eq!(draft.status.start_time, Some(Time(stamp(10).now)));
    assert_eq!(
        (draft.status.attempts[1].attempt, draft.status.attempts[1].reason.as_str()),
        (2, "BlobRejected")
    );
    assert_eq!(reported(&draft).iter().filter(|reason| **reason == "AttemptFailed").count(), 2);
    assert_eq!(reported(&draft).iter().filter(|reason| **reason == "NextAttempt").count(), 2);
}

#[test]
fn a_pause_between_attempts_doubles_up_to_a_minute() {
    let (mut draft, _) = with_attempts(10);
    let pauses: Vec<_> = (1..=7)
        .map(|attempt| {
            draft.status.attempt = Some(attempt);
            draft.at(stamp(0)).schedule_next_attempt();
            draft.status.next_attempt_time.as_ref().unwrap().0.as_second()
        })
        .collect();
    assert_eq!(pauses, [5, 10, 20, 40, 60, 60, 60]);
}

#[test]
fn a_next_attempt_that_cannot_be_planned_counts_as_an_attempt() {
    let (mut draft, spec) = with_attempts(3);
    draft.at(stamp(10)).begin_attempt(&spec, &plan());
    draft.at(stamp(11)).reserve_failed("TargetUnreachable", "refused");
    draft.at(stamp(12)).target_released("given back");
    let refusal = Refusal::TargetNotReady { target: "node-b".into(), error: "refused".into() };
    draft.at(stamp(20)).next_plan_failed(&spec, &refusal);
    assert_eq!((draft.status.attempt, condition(&draft, SUCCEEDED).0.as_str()), (Some(2), "Unknown"));
    assert_eq!(draft.status.next_attempt_time, Some(Time(stamp(30).now)));
    draft.at(stamp(30)).next_plan_failed(&spec, &refusal);
    assert_eq!(condition(&draft, SUCCEEDED), ("False".into(), "TargetNotReady".into()));
    assert_eq!(draft.status.attempts.iter().map(|ended| ended.attempt).collect::<Vec<_>>(), [1, 2, 3]);
    assert!(draft.status.completion_time.is_some());
}

#[test]
fn no_attempt_follows_one_that_was_given_up_resolved_or_lost() {
    let end = || finished(Outcome::RolledBack, "Aborted", "it was asked to");
    let again = |change: fn(&mut Draft), end| {
        let (mut draft, spec) = with_attempts(3);
        draft.at(stamp(10)).begin_attempt(&spec, &plan());
        draft.at(stamp(11)).target_reserved("journal-b");
        change(&mut draft);
        play(&mut draft, &[], end);
        draft.status.completion_time.is_none()
    };
    assert!(again(|_| {}, end()));
    assert!(!again(|draft| draft.wish = Wish::Cancel, end()));
    assert!(!again(|draft| draft.wish = Wish::Delete, end()));
    assert!(!again(|draft| draft.at(stamp(12)).accept_resolve(&resolve(RunOn::Source)), end()));
    assert!(!again(|_| {}, finished(Outcome::Lost, "VMMExited", "gone")));
}

#[test]
fn the_next_attempt_does_not_wait_longer_than_its_pause_whoever_wrote_its_time() {
    let (mut draft, spec) = with_attempts(3);
    draft.at(stamp(1000)).begin_attempt(&spec, &plan());
    draft.at(stamp(1000)).schedule_next_attempt();
    let wait = |second| draft.wait_for_next_attempt(stamp(second).now).as_secs();
    assert_eq!((wait(1000), wait(1003), wait(1005), wait(9999)), (5, 2, 0, 0));
    // This operator's clock is behind that of the one before.
    assert_eq!(wait(400), 5);
}
