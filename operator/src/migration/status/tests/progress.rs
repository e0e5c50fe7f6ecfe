use super::*;

#[test]
fn a_success_has_all_five_conditions_true_its_figures_and_one_notice_each() {
    let mut draft = reserved();
    let written = play(&mut draft, &FORWARD, finished(Outcome::Succeeded, "", ""));
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
    assert_eq!(reported(&draft), ["Accepted", "Succeeded"]);

    // An operator that joins again gets all of it again.
    play(&mut draft, &FORWARD, finished(Outcome::Succeeded, "", ""));
    assert_eq!(reported(&draft).len(), 2);
}

#[test]
fn a_success_that_was_not_measured_is_reported_without_figures() {
    let mut draft = reserved();
    let mut end = finished(Outcome::Succeeded, "", "").unwrap();
    end.timings = Some(slackwater_proto::node::Timings::default());
    play(&mut draft, &FORWARD, Some(end));
    assert_eq!(draft.status.timings, None);
    assert!(message(&draft, SUCCEEDED).ends_with("runs on node-b."), "{}", message(&draft, SUCCEEDED));
}

#[test]
fn a_success_that_took_longer_than_its_budget_says_so() {
    for (blackout_ns, words) in [
        (300_001_000, Some("300.001ms at most. That is more than spec.downtimeBudget (300ms) allows.")),
        (1_431_000_000, Some("1.431s at most. That is more than spec.downtimeBudget (300ms) allows.")),
        (300_000_000, None),
    ] {
        let mut draft = reserved();
        let mut end = finished(Outcome::Succeeded, "", "").unwrap();
        end.timings.as_mut().unwrap().blackout_ns = blackout_ns;
        play(&mut draft, &FORWARD, Some(end));
        let said = message(&draft, SUCCEEDED);
        assert_eq!(reported(&draft).contains(&"BudgetExceeded"), words.is_some(), "{said}");
        assert!(said.ends_with(words.unwrap_or("stood still for 300ms at most.")), "{said}");
    }
}

#[test]
fn an_operator_that_joins_late_still_ends_with_all_conditions_true() {
    let mut draft = reserved();
    play(&mut draft, &[], finished(Outcome::Succeeded, "", ""));
    for type_ in [STOPPED, COMMITTED, SUCCEEDED] {
        assert_eq!(condition(&draft, type_).0, "True", "{type_}");
    }
}
