use super::*;

fn unreachable_target(remedy: Option<End>) -> Doubtful {
    Doubtful::AskedBoth { reason: DoubtReason::TargetUnreachable, why: "connection refused".into(), remedy }
}

#[test]
fn a_doubt_leaves_the_outcome_unknown_names_its_remedies_and_gives_one_event() {
    let mut draft = reserved();
    play(&mut draft, &FORWARD[..8], None);
    draft.at(stamp(21)).set_in_doubt(&unreachable_target(Some(End::Source)));
    draft.at(stamp(22)).set_in_doubt(&unreachable_target(Some(End::Source)));
    assert_eq!(condition(&draft, IN_DOUBT), ("True".into(), "TargetUnreachable".into()));
    assert_eq!(condition(&draft, SUCCEEDED), ("Unknown".into(), "TargetUnreachable".into()));
    assert_eq!((draft.status.phase, &draft.status.completion_time), (Some(MigrationPhase::InDoubt), &None));
    let said = message(&draft, IN_DOUBT);
    for words in [
        "node-b, which is to start it, cannot be asked: connection refused.",
        "Bring node-b back, or its link",
        "`spec.resolve: {runOn: Source, destinationNeverStarted: true, justification: ",
    ] {
        assert!(said.contains(words), "{said}");
    }
    assert_eq!(draft.notices.iter().filter(|notice| notice.reason == "InDoubt").count(), 1);

    draft.at(stamp(23)).clear_doubt();
    draft.at(stamp(24)).clear_doubt();
    assert_eq!(condition(&draft, IN_DOUBT), ("False".into(), "Settled".into()));
    assert_eq!(
        (draft.status.phase, condition(&draft, SUCCEEDED).1),
        (Some(MigrationPhase::Starting), "InProgress".into())
    );
    assert_eq!(draft.notices.iter().filter(|notice| notice.reason == "DoubtSettled").count(), 1);
}

#[test]
fn a_doubt_that_no_resolve_can_end_does_not_name_one() {
    let mut draft = reserved();
    draft.at(stamp(21)).set_in_doubt(&unreachable_target(None));
    assert!(!message(&draft, IN_DOUBT).contains("spec.resolve"));
}

#[test]
fn a_source_that_has_not_committed_needs_a_statement_before_the_destination_may_start() {
    let doubt = Doubtful::AskedBoth {
        reason: DoubtReason::SourceUnreachable,
        why: "no route".into(),
        remedy: Some(End::Destination),
    };
    let mut draft = reserved();
    draft.at(stamp(21)).set_in_doubt(&doubt);
    let yaml = "`spec.resolve: {runOn: Destination, sourceNeverResumes: true, justification: ";
    assert!(message(&draft, IN_DOUBT).contains(yaml), "{}", message(&draft, IN_DOUBT));
    let bare = Resolve { source_never_resumes: false, ..resolve(RunOn::Destination) };
    assert_eq!(draft.judge_resolve(&bare, Ok(())).unwrap_err().reason, "StatementMissing");

    play(&mut draft, &FORWARD[..8], None);
    draft.at(stamp(22)).set_in_doubt(&doubt);
    let yaml = "`spec.resolve: {runOn: Destination, justification: ";
    assert!(message(&draft, IN_DOUBT).contains(yaml), "{}", message(&draft, IN_DOUBT));
    assert_eq!(draft.judge_resolve(&bare, Ok(())).unwrap().run_on, End::Destination);
}

#[test]
fn a_deleted_migration_that_is_in_doubt_says_that_it_stays_and_how_to_remove_it() {
    let mut draft = reserved();
    draft.wish = Wish::Delete;
    draft.at(stamp(21)).set_in_doubt(&unreachable_target(None));
    let said = message(&draft, IN_DOUBT);
    assert!(said.contains("stays until this is settled") && said.contains("finalizers"), "{said}");
}

#[test]
fn what_the_source_says_about_its_doubt_is_shown_in_its_words() {
    let mut draft = reserved();
    let source_says =
        Doubtful::SourceSays { reason: "JournalFailed".into(), message: "no space left on device.".into() };
    draft.at(stamp(21)).set_in_doubt(&source_says);
    assert_eq!(condition(&draft, IN_DOUBT), ("True".into(), "JournalFailed".into()));
    let said = message(&draft, IN_DOUBT);
    assert!(
        said.starts_with("node-a says: no space left on device. VM demo/counter is kept paused there."),
        "{said}"
    );
    let odd = Doubtful::SourceSays { reason: "what?!".into(), message: "x".into() };
    draft.at(stamp(22)).set_in_doubt(&odd);
    assert_eq!(condition(&draft, IN_DOUBT).1, "SourceInDoubt");
}

#[test]
fn the_end_of_a_migration_ends_its_doubt() {
    for outcome in [Outcome::Succeeded, Outcome::RolledBack, Outcome::Lost] {
        let mut draft = reserved();
        draft.at(stamp(21)).set_in_doubt(&unreachable_target(None));
        play(&mut draft, &[], finished(outcome, "", "x"));
        assert_eq!(condition(&draft, IN_DOUBT), ("False".into(), "Settled".into()), "{outcome:?}");
        assert_ne!(draft.status.phase, Some(MigrationPhase::InDoubt));
        assert!(draft.status.completion_time.is_some());
    }
}
