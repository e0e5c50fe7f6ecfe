use super::*;

const SECOND: i64 = 1_000_000_000;

fn estimate(downtime_ms: u64, allowed_ms: u64) -> slackwater_proto::node::Estimate {
    slackwater_proto::node::Estimate {
        downtime_ns: downtime_ms * 1_000_000,
        allowed_ns: allowed_ms * 1_000_000,
    }
}

#[test]
fn what_the_vmm_expects_is_shown_while_it_copies_and_stays_when_it_has_ended() {
    let mut draft = reserved();
    play(&mut draft, &FORWARD[..2], None);
    assert!(draft.at(stamp(20)).update_estimate(&estimate(412, 0), 20 * SECOND + 1_999));
    let shown = serde_json::to_value(draft.status.estimate.as_ref().unwrap()).unwrap();
    assert_eq!(shown, serde_json::json!({"downtime": "412ms", "time": "1970-01-01T00:00:20.000001Z"}));
    let message = "412ms is too long.";
    play(&mut draft, &[], finished(Outcome::RolledBack, "BudgetExceeded", message));
    assert_eq!(condition(&draft, SUCCEEDED), ("False".to_owned(), "BudgetExceeded".to_owned()));
    assert_eq!(draft.status.estimate.as_ref().unwrap().downtime, "412ms");
    assert!(!draft.at(stamp(40)).update_estimate(&estimate(1, 0), 40 * SECOND), "it has ended");
    // Another attempt knows nothing yet.
    draft.at(stamp(50)).begin_attempt(&spec(), &plan());
    assert_eq!(draft.status.estimate, None);
}

#[test]
fn an_estimate_that_an_agent_repeats_changes_nothing_even_after_the_status_was_stored() {
    let mut draft = reserved();
    play(&mut draft, &FORWARD[..2], None);
    let told_at = 20 * SECOND + 1_999;
    assert!(draft.at(stamp(20)).update_estimate(&estimate(900, 1800), told_at));
    let kept = serde_json::to_value(&draft.status).unwrap();
    draft.status = serde_json::from_value(kept).unwrap();
    draft.notices.clear();
    assert!(!draft.at(stamp(21)).update_estimate(&estimate(412, 0), told_at - SECOND));
    assert!(!draft.at(stamp(21)).update_estimate(&estimate(900, 1800), told_at));
    assert!(draft.at(stamp(22)).update_estimate(&estimate(700, 1800), told_at + SECOND));
    assert_eq!(reported(&draft), [""; 0], "no more was allowed than before");
}

#[test]
fn each_raise_of_what_is_allowed_beyond_the_budget_gives_an_event() {
    let mut draft = reserved();
    play(&mut draft, &FORWARD[..2], None);
    draft.notices.clear();
    for (second, downtime, allowed) in [(20, 412, 0), (25, 412, 824), (26, 500, 824), (31, 1500, 3000)] {
        assert!(draft.at(stamp(second)).update_estimate(&estimate(downtime, allowed), second * SECOND));
    }
    assert_eq!(reported(&draft), ["BudgetExceeded", "BudgetExceeded"]);
    assert!(draft.notices.iter().all(|notice| notice.warning));
    let expected = "The guest is expected to stand still for 1.5s, and spec.downtimeBudget is 300ms. Since \
                    spec.onBudgetExceeded is Proceed, up to 3s is allowed now.";
    assert_eq!(draft.notices[1].note, expected);
    assert_eq!(message(&draft, SUCCEEDED), format!("State is being copied; the guest runs. {expected}"));
    assert_eq!(draft.status.estimate.unwrap().allowed.as_deref(), Some("3s"));
}
