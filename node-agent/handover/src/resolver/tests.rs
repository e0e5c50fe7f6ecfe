use super::*;
use crate::Reason;

const SOURCE: [Option<Record>; 5] =
    [None, Some(Record::Saving), Some(Record::Committed), Some(Record::Released), Some(Record::Aborted)];
const TARGET: [Option<Record>; 6] = [
    None,
    Some(Record::Reserved),
    Some(Record::Loaded),
    Some(Record::Starting),
    Some(Record::Running),
    Some(Record::Discarded),
];

/// All that an end can answer, and its silence.
fn all_of(records: &[Option<Record>]) -> Vec<Answer> {
    let mut all = vec![Answer::Silent("unreachable".into()), Answer::Unreadable("bad CRC".into())];
    for record in records {
        for ended in [false, true] {
            for failure in [None, Some(Failure::new(Reason::TargetFailed, "x"))] {
                all.push(Answer::Says(Word { record: *record, ended, failure, stated_because: None }));
            }
        }
    }
    all
}

fn journal(record: Option<Record>) -> Journal {
    record.map_or(Journal::Empty, Journal::At)
}

fn source(heard: &Answer) -> Event {
    match heard.clone() {
        Answer::Says(word) => Event::SourceSays(word),
        Answer::Silent(why) => Event::SourceSilent(why),
        Answer::Unreadable(why) => Event::SourceUnreadable(why),
    }
}

fn target(heard: &Answer) -> Event {
    match heard.clone() {
        Answer::Says(word) => Event::TargetSays { word, same_journal: false },
        Answer::Silent(why) => Event::TargetSilent(why),
        Answer::Unreadable(why) => Event::TargetUnreadable(why),
    }
}

fn decided(run_on: End) -> Event {
    Event::Decided(Decision { run_on, justification: "the node is off".into() })
}

fn steps(resolver: Resolver, events: impl IntoIterator<Item = Event>) -> (Resolver, Vec<Effect>) {
    events.into_iter().fold((resolver, Vec::new()), |(resolver, mut all), event| {
        let (resolver, effects) = resolver.step(event);
        all.extend(effects);
        (resolver, all)
    })
}

fn round(resolver: Resolver, s: &Answer, d: &Answer) -> (Resolver, Vec<Effect>) {
    steps(resolver, [source(s), target(d)])
}

fn says(record: Record) -> Answer {
    Answer::Says(Word::at(record))
}

fn nothing() -> Answer {
    Answer::Says(Word::without_record())
}

fn silent() -> Answer {
    Answer::Silent("no route".into())
}

fn ended(record: Record) -> Answer {
    Answer::Says(Word { ended: true, ..Word::at(record) })
}

fn doubt(reason: DoubtReason) -> Effect {
    let why = match reason {
        DoubtReason::TargetUnreachable | DoubtReason::SourceUnreachable => "no route",
        DoubtReason::AgentsUnreachable => "no route; no route",
        _ => "",
    };
    Effect::Doubt { reason, why: why.into() }
}

/// Every resolver that comes out of up to two rounds of anything, with every decision before, between and
/// after.
fn reachable() -> Vec<Resolver> {
    let (sources, targets) = (all_of(&SOURCE), all_of(&TARGET));
    let mut seen = std::collections::HashSet::from([Resolver::default()]);
    for _ in 0..2 {
        for resolver in seen.clone() {
            let told =
                [Event::SourceReported { committed: false }, Event::SourceReported { committed: true }];
            let before = [decided(End::Source), decided(End::Destination)].into_iter().chain(told);
            seen.extend(before.map(|event| resolver.clone().step(event).0));
            for (s, d) in sources.iter().flat_map(|s| targets.iter().map(move |d| (s, d))) {
                seen.insert(round(resolver.clone(), s, d).0);
            }
        }
    }
    seen.into_iter().collect()
}

#[test]
fn whatever_was_heard_before_only_a_fresh_word_or_a_decision_is_ever_relayed() {
    let (sources, targets) = (all_of(&SOURCE), all_of(&TARGET));
    let mut looked_at = 0;
    for resolver in reachable() {
        for (s, d) in sources.iter().flat_map(|s| targets.iter().map(move |d| (s, d))) {
            let (after, effects) = round(resolver.clone(), s, d);
            looked_at += 1;
            let case = format!("{resolver:?}: {s:?}, {d:?}: {effects:?}");
            for effect in &effects {
                match effect {
                    Effect::RelayToTarget(Word { stated_because: None, record, .. }) => {
                        assert_eq!(s.journal(), journal(*record), "{case}");
                        assert!(matches!(record, Some(Record::Committed | Record::Aborted)), "{case}");
                    }
                    Effect::RelayToSource(Word { stated_because: None, record, .. }) => {
                        assert_eq!(
                            (s.journal(), d.journal()),
                            (Journal::At(Record::Committed), journal(*record)),
                            "{case}"
                        );
                    }
                    Effect::RelayToSource(Word { stated_because: Some(_), record, .. }) => {
                        assert_eq!(
                            (*record, s.journal()),
                            (Some(Record::Discarded), Journal::At(Record::Committed)),
                            "{case}"
                        );
                        assert!(matches!(d.journal(), Journal::NotRead | Journal::Empty), "{case}");
                        assert!(after.decided_for_source() && after.doubt().is_some(), "{case}");
                    }
                    Effect::RelayToTarget(Word {
                        stated_because: Some(_),
                        record: Some(Record::Committed),
                        ..
                    }) => {
                        assert_eq!(d.journal(), Journal::At(Record::Loaded), "{case}");
                        assert!(matches!(s.journal(), Journal::NotRead | Journal::Empty), "{case}");
                        assert!(!after.decided_for_source() && after.doubt().is_some(), "{case}");
                    }
                    Effect::RelayToTarget(Word { stated_because: Some(_), record, .. }) => {
                        assert_eq!(*record, Some(Record::Aborted), "{case}");
                        assert_eq!(
                            (s.journal(), d.journal()),
                            (Journal::At(Record::Committed), Journal::At(Record::Loaded)),
                            "{case}"
                        );
                        assert!(after.decided_for_source(), "{case}");
                    }
                    Effect::Doubt { .. } | Effect::NoDoubt | Effect::Settled(_) => {}
                }
            }
            let told =
                |effect: &&Effect| matches!(effect, Effect::RelayToSource(_) | Effect::RelayToTarget(_));
            assert!(effects.iter().filter(told).count() <= 1, "{case}");
            let settled = effects.iter().any(|effect| matches!(effect, Effect::Settled(_)));
            assert!(!(settled && after.doubt().is_some()), "{case}");
            if after.doubt() == Some(DoubtReason::Forked) {
                assert!(!effects.iter().any(|effect| told(&effect)), "{case}");
            }
        }
    }
    assert!(looked_at > 100_000, "{looked_at}");
}

impl Resolver {
    fn decided_for_source(&self) -> bool {
        self.decision.as_ref().is_some_and(|decision| decision.run_on == End::Source)
    }
}

#[test]
fn the_table_holds() {
    use DoubtReason::*;
    let relay_to_source = |heard: &Answer| {
        let Answer::Says(word) = heard else { panic!("{heard:?}") };
        vec![Effect::RelayToSource(word.clone())]
    };
    let relay_to_target = |record| vec![Effect::RelayToTarget(Word::at(record))];
    let lost = Word {
        ended: true,
        failure: Some(Failure::new(Reason::TwinFailed, "it is gone")),
        ..Word::at(Record::Starting)
    };
    let lost = Answer::Says(lost);
    let expected = [
        (says(Record::Committed), says(Record::Running), relay_to_source(&says(Record::Running))),
        (says(Record::Committed), ended(Record::Running), relay_to_source(&ended(Record::Running))),
        (says(Record::Committed), says(Record::Discarded), relay_to_source(&says(Record::Discarded))),
        (says(Record::Committed), lost.clone(), relay_to_source(&lost)),
        (says(Record::Committed), says(Record::Starting), vec![]),
        (says(Record::Committed), says(Record::Reserved), vec![]),
        (says(Record::Committed), says(Record::Loaded), relay_to_target(Record::Committed)),
        (says(Record::Committed), silent(), vec![doubt(TargetUnreachable)]),
        (says(Record::Committed), nothing(), vec![doubt(TargetForgot)]),
        (says(Record::Aborted), says(Record::Reserved), relay_to_target(Record::Aborted)),
        (says(Record::Aborted), says(Record::Loaded), relay_to_target(Record::Aborted)),
        (says(Record::Aborted), says(Record::Starting), vec![doubt(Forked)]),
        (ended(Record::Aborted), says(Record::Running), vec![doubt(Forked)]),
        (says(Record::Aborted), says(Record::Discarded), vec![]),
        (ended(Record::Aborted), nothing(), vec![Effect::Settled(Settlement::GivenUp(None))]),
        (silent(), says(Record::Loaded), vec![doubt(SourceUnreachable)]),
        (silent(), says(Record::Reserved), vec![]),
        (silent(), says(Record::Running), vec![]),
        (silent(), silent(), vec![]),
        (nothing(), says(Record::Reserved), vec![Effect::Settled(Settlement::NeverBegan)]),
        (nothing(), nothing(), vec![Effect::Settled(Settlement::NeverBegan)]),
        (nothing(), says(Record::Loaded), vec![doubt(SourceForgot)]),
        (nothing(), says(Record::Starting), vec![]),
        (nothing(), silent(), vec![]),
        (nothing(), says(Record::Running), vec![Effect::Settled(Settlement::RunsAtDestination)]),
        (says(Record::Saving), says(Record::Loaded), vec![]),
        (says(Record::Saving), silent(), vec![]),
        (says(Record::Released), silent(), vec![]),
        (ended(Record::Released), silent(), vec![Effect::Settled(Settlement::RunsAtDestination)]),
        (ended(Record::Committed), lost, vec![Effect::Settled(Settlement::Lost(None))]),
    ];
    for (s, d, effects) in expected {
        assert_eq!(round(Resolver::default(), &s, &d).1, effects, "{s:?}, {d:?}");
    }
}

#[test]
fn a_source_that_gave_it_up_and_is_done_is_settled_and_the_destination_hears_of_it() {
    let (_, effects) = round(Resolver::default(), &ended(Record::Aborted), &says(Record::Loaded));
    let said = Word { ended: true, ..Word::at(Record::Aborted) };
    assert_eq!(effects, [Effect::RelayToTarget(said), Effect::Settled(Settlement::GivenUp(None))]);
}

#[test]
fn nothing_is_decided_by_a_word_of_an_earlier_round() {
    let (resolver, _) = round(Resolver::default(), &says(Record::Committed), &silent());
    // The destination is back, and the source has not been asked again.
    let (resolver, effects) = resolver.step(target(&says(Record::Loaded)));
    assert_eq!(effects, []);
    // Meanwhile it has been resolved otherwise.
    let (_, effects) = resolver.step(Event::SourceSays(Word::at(Record::Aborted)));
    assert_eq!(effects, [Effect::NoDoubt, Effect::RelayToTarget(Word::at(Record::Aborted))]);
}

#[test]
fn a_silent_source_is_lost_only_if_the_destination_is_known_never_to_start_the_vm() {
    let lost = |d: &Answer, same_journal: bool, events: &[Event]| {
        let target = match d {
            Answer::Says(word) => Event::TargetSays { word: word.clone(), same_journal },
            _ => target(d),
        };
        let events = events.iter().cloned().chain([source(&silent()), target]);
        steps(Resolver::default(), events)
            .1
            .contains(&Effect::Settled(Settlement::SourceLost { why: "no route".into() }))
    };
    let committed = [Event::SourceReported { committed: true }];
    for d in all_of(&TARGET) {
        for same_journal in [false, true] {
            let discarded = d.journal() == Journal::At(Record::Discarded);
            let never_reserved = d.journal() == Journal::Empty && same_journal;
            assert_eq!(lost(&d, same_journal, &[]), discarded || never_reserved, "{d:?} {same_journal}");
            // A source that has committed waits for the destination, which has to have said it.
            assert_eq!(lost(&d, same_journal, &committed), discarded, "{d:?} {same_journal}");
        }
    }
}

#[test]
fn what_the_journal_was_in_an_earlier_round_counts_no_more() {
    let nothing = |same_journal| Event::TargetSays { word: Word::without_record(), same_journal };
    let first = steps(Resolver::default(), [nothing(true), source(&says(Record::Saving))]);
    let (_, effects) = steps(first.0, [source(&silent()), nothing(false)]);
    assert_eq!(effects, []);
}

#[test]
fn a_journal_that_cannot_be_read_is_a_doubt_where_an_end_waits_for_it() {
    let unreadable = || Answer::Unreadable("1.journal: bad CRC".into());
    let doubt = |s: &Answer, d: &Answer| {
        let (resolver, effects) = round(Resolver::default(), s, d);
        if resolver.doubt().is_some() {
            let [Effect::Doubt { why, .. }] = &effects[..] else { panic!("{effects:?}") };
            assert!(why.contains("1.journal: bad CRC"), "{why}");
        }
        resolver.doubt()
    };
    for d in all_of(&TARGET) {
        assert_eq!(doubt(&unreadable(), &d), Some(DoubtReason::SourceJournalUnreadable), "{d:?}");
    }
    let waits = says(Record::Committed);
    assert_eq!(doubt(&waits, &unreadable()), Some(DoubtReason::TargetJournalUnreadable));
    // Before the commit the source gives up by itself, and after the release neither end waits.
    for s in [Record::Saving, Record::Aborted, Record::Released] {
        assert_eq!(doubt(&says(s), &unreadable()), None, "{s:?}");
    }
}

#[test]
fn what_has_started_is_said_to_have_started() {
    let unreadable = Answer::Unreadable("bad CRC".into());
    for record in [Record::Starting, Record::Running] {
        let (resolver, _) = round(Resolver::default(), &unreadable, &says(record));
        assert_eq!(resolver.fits(End::Source), Err(Unfit::Started));
        assert_eq!(resolver.fits(End::Destination), Err(Unfit::Started));
    }
}

#[test]
fn a_doubt_that_clears_says_so_once() {
    let (resolver, effects) = round(Resolver::default(), &says(Record::Committed), &silent());
    assert_eq!((resolver.doubt(), effects.len()), (Some(DoubtReason::TargetUnreachable), 1));
    let (resolver, effects) = round(resolver, &says(Record::Committed), &says(Record::Starting));
    assert_eq!((resolver.doubt(), effects), (None, vec![Effect::NoDoubt]));
    assert_eq!(round(resolver, &says(Record::Committed), &says(Record::Starting)).1, []);
}

#[test]
fn a_source_that_had_begun_and_has_no_record_has_forgotten_it() {
    for (told, d) in [(false, nothing()), (false, silent()), (true, says(Record::Reserved))] {
        let began = Resolver::default().step(Event::SourceReported { committed: told }).0;
        let (resolver, _) = round(began, &nothing(), &d);
        assert_eq!(resolver.doubt(), Some(DoubtReason::SourceForgot), "{d:?}");
    }
    // What it said in an earlier round counts, too.
    let (resolver, _) = round(Resolver::default(), &says(Record::Saving), &says(Record::Reserved));
    assert_eq!(
        round(resolver, &nothing(), &says(Record::Reserved)).0.doubt(),
        Some(DoubtReason::SourceForgot)
    );
}

#[test]
fn when_neither_can_be_asked_it_is_in_doubt_only_after_the_commit() {
    assert_eq!(round(Resolver::default(), &silent(), &silent()).0.doubt(), None);
    let committed = Resolver::default().step(Event::SourceReported { committed: true }).0;
    let (resolver, effects) = round(committed, &silent(), &silent());
    assert_eq!(effects, [doubt(DoubtReason::AgentsUnreachable)]);
    assert_eq!(resolver.fits(End::Source), Err(Unfit::CannotBeReached(End::Source)));
    assert_eq!(resolver.fits(End::Destination), Err(Unfit::CannotBeReached(End::Destination)));
}

#[test]
fn a_decision_for_the_source_is_stated_to_it_in_every_round_until_it_is_heard() {
    let (resolver, _) = round(Resolver::default(), &says(Record::Committed), &silent());
    assert_eq!(resolver.fits(End::Source), Ok(()));
    assert_eq!(resolver.fits(End::Destination), Err(Unfit::OtherAnswers(End::Source)));
    let (mut resolver, effects) = resolver.step(decided(End::Source));
    assert_eq!(effects, []);
    for _ in 0..2 {
        let (next, effects) = round(resolver, &says(Record::Committed), &silent());
        let stated = Word { stated_because: Some("the node is off".into()), ..Word::at(Record::Discarded) };
        assert_eq!(effects, [doubt(DoubtReason::TargetUnreachable), Effect::RelayToSource(stated)]);
        resolver = next;
    }
    let (_, effects) = round(resolver, &ended(Record::Aborted), &silent());
    assert_eq!(effects, [Effect::NoDoubt, Effect::Settled(Settlement::GivenUp(None))]);
}

#[test]
fn after_a_decision_for_the_source_a_loaded_destination_is_never_told_to_start() {
    let (resolver, _) = round(Resolver::default(), &says(Record::Committed), &silent());
    let (resolver, _) = resolver.step(decided(End::Source));
    let (resolver, _) = round(resolver, &says(Record::Committed), &silent());
    let (resolver, effects) = round(resolver, &says(Record::Committed), &says(Record::Loaded));
    let stated = Word { stated_because: Some("the node is off".into()), ..Word::at(Record::Aborted) };
    assert_eq!(effects, [Effect::NoDoubt, Effect::RelayToTarget(stated)]);
    // And what it has journalled upon that goes to the source as its own word.
    let (_, effects) = round(resolver, &says(Record::Committed), &says(Record::Discarded));
    assert_eq!(effects, [Effect::RelayToSource(Word::at(Record::Discarded))]);
}

#[test]
fn a_decision_for_the_destination_needs_one_that_waits_and_a_source_that_has_nothing_to_say() {
    let (resolver, _) = round(Resolver::default(), &silent(), &says(Record::Loaded));
    assert_eq!(resolver.fits(End::Destination), Ok(()));
    assert_eq!(resolver.fits(End::Source), Err(Unfit::OtherAnswers(End::Destination)));
    let (resolver, _) = resolver.step(decided(End::Destination));
    let (resolver, effects) = round(resolver, &silent(), &says(Record::Loaded));
    let stated = Word { stated_because: Some("the node is off".into()), ..Word::at(Record::Committed) };
    assert_eq!(effects, [doubt(DoubtReason::SourceUnreachable), Effect::RelayToTarget(stated)]);
    // The source is back, and has given it up: its word counts.
    let (_, effects) = round(resolver, &says(Record::Aborted), &says(Record::Loaded));
    assert_eq!(effects, [Effect::NoDoubt, Effect::RelayToTarget(Word::at(Record::Aborted))]);
}

#[test]
fn a_destination_that_has_started_is_never_overruled() {
    let begun = Resolver::default().step(Event::SourceReported { committed: true }).0;
    for d in [says(Record::Starting), says(Record::Running), ended(Record::Starting)] {
        for s in all_of(&SOURCE) {
            for run_on in [End::Source, End::Destination] {
                let (resolver, _) = round(begun.clone(), &says(Record::Committed), &silent());
                let (resolver, _) = resolver.step(decided(run_on));
                let (_, effects) = round(resolver, &s, &d);
                let stated = |effect: &Effect| match effect {
                    Effect::RelayToSource(word) | Effect::RelayToTarget(word) => {
                        word.stated_because.is_some()
                    }
                    _ => false,
                };
                assert!(!effects.iter().any(stated), "{s:?}, {d:?}: {effects:?}");
            }
        }
    }
}
