use super::*;

#[test]
fn a_changed_spec_is_named_and_ignored_once() {
    let mut draft = reserved();
    let changed = VMMigrationSpec { pre_commit_timeout: "1h".into(), ..spec() };
    assert!(!draft.at(stamp(12)).note_spec(&spec()));
    assert!(draft.at(stamp(12)).note_spec(&changed));
    assert!(!draft.at(stamp(13)).note_spec(&changed));
    assert_eq!(condition(&draft, ACCEPTED), ("True".into(), "SpecChangeIgnored".into()));
    let said = message(&draft, ACCEPTED);
    assert!(said.starts_with("spec.preCommitTimeout was changed afterwards, and that is ignored"), "{said}");
    assert_eq!(draft.status.observed_spec, Some(spec()));
}

#[test]
fn a_budget_that_is_changed_afterwards_is_ignored_with_a_message() {
    let mut draft = reserved();
    let changed = VMMigrationSpec {
        downtime_budget: "1s".into(),
        on_budget_exceeded: slackwater_api::OnBudgetExceeded::Proceed,
        ..spec()
    };
    assert!(draft.at(stamp(20)).note_spec(&changed));
    let said = message(&draft, ACCEPTED);
    assert!(said.starts_with("spec.downtimeBudget, spec.onBudgetExceeded was changed afterwards"), "{said}");
}
