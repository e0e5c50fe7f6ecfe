use super::*;

#[test]
fn a_resolve_that_lacks_a_statement_or_does_not_fit_is_refused_with_a_message() {
    let mut draft = reserved();
    play(&mut draft, &FORWARD[..8], None);
    let good = resolve(RunOn::Source);
    let cases = [
        (good.clone(), Err(Unfit::NotInDoubt), "NotInDoubt", "not in doubt"),
        (good.clone(), Err(Unfit::CannotBeReached(End::Source)), "CannotBeTold", "Bring node-a back"),
        (good.clone(), Err(Unfit::OtherAnswers(End::Destination)), "DoesNotFit", "node-b answers"),
        (good.clone(), Err(Unfit::DoesNotWait(End::Source)), "DoesNotFit", "node-a does not wait"),
        (good.clone(), Err(Unfit::Started), "AlreadyStarted", "node-b says that it has started"),
        (
            Resolve { justification: "   because   ".into(), ..good.clone() },
            Ok(()),
            "JustificationMissing",
            "has 7 characters",
        ),
        (
            Resolve { destination_never_started: false, ..good.clone() },
            Ok(()),
            "StatementMissing",
            "destinationNeverStarted: true",
        ),
    ];
    for (resolve, fits, reason, words) in cases {
        let refused = draft.judge_resolve(&resolve, fits).unwrap_err();
        assert_eq!(refused.reason, reason);
        assert!(refused.message.contains(words), "{}", refused.message);
        let mut after = draft.clone();
        after.at(stamp(25)).refuse_resolve(&resolve, &refused);
        assert_eq!(condition(&after, RESOLVE_ACCEPTED), ("False".into(), reason.into()));
        assert_eq!(
            (after.status.phase, after.status.reservation),
            (draft.status.phase, draft.status.reservation)
        );
        assert!(after.notices.last().unwrap().warning);
        // It is judged once, and another one may take its place.
        let with = |resolve| VMMigrationSpec { resolve: Some(resolve), ..spec() };
        assert_eq!(after.unjudged_resolve(&with(resolve)), None);
        let another = Resolve { justification: "another justification".into(), ..good.clone() };
        assert!(after.unjudged_resolve(&with(another)).is_some());
        assert!(after.at(stamp(26)).note_spec(&spec()));
        assert_eq!(conditions::find(&after.status.conditions, RESOLVE_ACCEPTED), None);
    }
}

#[test]
fn an_accepted_resolve_is_reported_with_its_justification_and_is_final() {
    let mut draft = reserved();
    play(&mut draft, &FORWARD[..8], None);
    let stated = resolve(RunOn::Source);
    assert_eq!(draft.judge_resolve(&stated, Ok(())).unwrap().justification, stated.justification);
    draft.at(stamp(25)).accept_resolve(&stated);
    let notice = draft.notices.last().unwrap();
    assert_eq!(notice.reason, "ResolveAccepted");
    assert!(notice.note.contains(&stated.justification), "{}", notice.note);

    let other = VMMigrationSpec { resolve: Some(resolve(RunOn::Destination)), ..spec() };
    assert_eq!(draft.unjudged_resolve(&other), None);
    assert!(draft.at(stamp(26)).note_spec(&other));
    assert!(
        message(&draft, ACCEPTED).starts_with("spec.resolve was changed afterwards, and that is ignored")
    );
    assert_eq!(draft.status.observed_spec.as_ref().unwrap().resolve, Some(stated));
}
