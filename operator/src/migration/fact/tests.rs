use jiff::Timestamp;
use slackwater_api::{Resolve, RunOn, VMMigration, VmKind, VmReference};
use slackwater_handover::{Failure, Reason};
use slackwater_proto::node::{Finished, MigrationEvent, Outcome, Phase, migration_event::What};

use super::*;
use crate::inventory::VmKey;
use crate::migration::resolver::{DoubtReason, End, Settlement, Unfit};
use crate::plan::Pair;

fn stamp(second: i64) -> Stamp {
    Stamp { generation: Some(1), now: Timestamp::from_second(second).unwrap() }
}

fn spec() -> VMMigrationSpec {
    VMMigrationSpec {
        vm_ref: VmReference { kind: VmKind::AssignedVM, name: "counter".into() },
        target: None,
        peer_to_peer: PeerToPeer::Required,
        pre_commit_timeout: "5m".into(),
        downtime_budget: "300ms".into(),
        on_budget_exceeded: Default::default(),
        attempts: 1,
        cancel: false,
        resolve: None,
    }
}

fn fresh() -> Draft {
    let mut object = VMMigration::new("move", spec());
    object.metadata.namespace = Some("demo".into());
    Draft::new(&object)
}

fn plan() -> Plan {
    let pair = |n: u8| Pair {
        source: format!("a{n}"),
        target: format!("b{n}"),
        driver: "mtty".into(),
        model: "mtty-1".into(),
        features: vec![],
    };
    Plan {
        source: "node-a".into(),
        target: "node-b".into(),
        target_address: "10.0.0.2:7443".into(),
        devices: vec![pair(1), pair(2)],
    }
}

fn held() -> Draft {
    let mut draft = fresh();
    planned(&mut draft, &spec(), &plan(), stamp(10));
    reserved(&mut draft, stamp(11));
    draft
}

fn told(draft: &Draft) -> Vec<&str> {
    draft.notices.iter().map(|notice| notice.reason).collect()
}

fn resolve(run_on: RunOn) -> Resolve {
    Resolve {
        run_on,
        destination_never_started: true,
        source_never_resumes: true,
        justification: "node-b was powered off at 12:04".into(),
    }
}

fn seen(draft: &Draft, type_: &str) -> (String, String) {
    let condition = conditions::find(&draft.status.conditions, type_).unwrap();
    (condition.status.clone(), condition.reason.clone())
}

fn message(draft: &Draft, type_: &str) -> String {
    conditions::find(&draft.status.conditions, type_).unwrap().message.clone()
}

#[track_caller]
fn assert_conditions(draft: &Draft, expected: [(&str, &str, &str); 5]) {
    for (type_, status, reason) in expected {
        assert_eq!(seen(draft, type_), (status.to_owned(), reason.to_owned()), "{type_}");
    }
}

/// Plays phases and an end into the draft, as the agent of the source tells them.
fn play(draft: &mut Draft, phases: &[Phase], end: Option<Finished>) -> Vec<Phase> {
    let mut trace = Trace::default();
    let mut written = Vec::new();
    for (sequence, now) in (1_u64..).zip(phases) {
        trace.push(MigrationEvent {
            sequence,
            node: "node-a".into(),
            monotonic_ns: sequence * 1_000_000,
            unix_ns: 0,
            what: Some(What::Phase((*now).into())),
        });
        if is_news(draft, *now, "node-a") && phase(draft, &trace, *now, stamp(20)) {
            written.push(*now);
        }
    }
    if let Some(end) = end {
        finished(draft, &trace, &end, stamp(30));
    }
    written
}

fn ended(outcome: Outcome, reason: &str, message: &str) -> Option<Finished> {
    Some(Finished {
        outcome: outcome.into(),
        reason: reason.into(),
        message: message.into(),
        timings: Some(slackwater_proto::node::Timings {
            pre_copy_ns: 1_000_000,
            blackout_ns: 87_412_345,
            total_ns: 2_013_000_000,
        }),
        device_bytes: vec![60, 61],
        vmm_bytes: 1 << 20,
    })
}

const FORWARD: [Phase; 10] = [
    Phase::Connected,
    Phase::PreCopy,
    Phase::Pausing,
    Phase::Quiescing,
    Phase::Stopping,
    Phase::Capturing,
    Phase::Loaded,
    Phase::Committed,
    Phase::Starting,
    Phase::Started,
];

#[test]
fn a_plan_is_written_with_its_attempt_before_anybody_is_asked() {
    let mut draft = fresh();
    planned(&mut draft, &spec(), &plan(), stamp(10));
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
fn a_success_has_all_five_conditions_true_its_figures_and_one_notice_each() {
    let mut draft = held();
    let written = play(&mut draft, &FORWARD, ended(Outcome::Succeeded, "", ""));
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
    assert_eq!(told(&draft), ["Accepted", "Prepared", "Stopped", "Committed", "Succeeded"]);

    // An operator that joins again hears all of it again.
    play(&mut draft, &FORWARD, ended(Outcome::Succeeded, "", ""));
    assert_eq!(told(&draft).len(), 5);
}

#[test]
fn a_success_that_was_not_measured_is_told_without_figures() {
    let mut draft = held();
    let mut end = ended(Outcome::Succeeded, "", "").unwrap();
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
        let mut draft = held();
        let mut end = ended(Outcome::Succeeded, "", "").unwrap();
        end.timings.as_mut().unwrap().blackout_ns = blackout_ns;
        play(&mut draft, &FORWARD, Some(end));
        let said = message(&draft, SUCCEEDED);
        assert_eq!(told(&draft).contains(&"BudgetExceeded"), words.is_some(), "{said}");
        assert!(said.ends_with(words.unwrap_or("stood still for 300ms at most.")), "{said}");
    }
}

#[test]
fn an_operator_that_joins_late_still_ends_with_all_conditions_true() {
    let mut draft = held();
    play(&mut draft, &[], ended(Outcome::Succeeded, "", ""));
    for type_ in [STOPPED, COMMITTED, SUCCEEDED] {
        assert_eq!(seen(&draft, type_).0, "True", "{type_}");
    }
}

#[test]
fn a_rollback_carries_the_agents_reason_and_words_and_frees_the_target() {
    let mut draft = held();
    let end = ended(Outcome::RolledBack, "BlobRejected", "device b2 did not take its state (EIO).");
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
        "VM demo/counter runs on node-a again, with its devices. The migration was given up: device b2 did not take its state \
         (EIO)."
    );
    assert_eq!(draft.status.reservation, Some(Reservation::ReleasingAbortedAtSource));
    assert!(draft.status.completion_time.is_some());
    assert!(draft.notices.last().unwrap().warning);

    release_failed(&mut draft, "connection refused", stamp(31));
    assert_eq!(seen(&draft, PREPARED), ("Unknown".into(), "Releasing".into()));
    released(&mut draft, "node-b has given back what it reserved.", stamp(32));
    assert_eq!(seen(&draft, PREPARED), ("False".into(), "Released".into()));
    assert_eq!(draft.status.reservation, Some(Reservation::Released));
    assert_eq!(seen(&draft, SUCCEEDED), ("False".into(), "BlobRejected".into()));
}

#[test]
fn an_agents_reason_that_is_no_reason_is_replaced() {
    let mut draft = held();
    play(&mut draft, &[], ended(Outcome::RolledBack, "device failed!", "x"));
    assert_eq!(seen(&draft, SUCCEEDED).1, "RolledBack");
}

fn unreachable_target(remedy: Option<End>) -> Doubtful {
    Doubtful::Asked { reason: DoubtReason::TargetUnreachable, why: "connection refused".into(), remedy }
}

#[test]
fn a_doubt_is_unknown_without_an_end_names_its_remedies_and_is_told_once() {
    let mut draft = held();
    play(&mut draft, &FORWARD[..8], None);
    in_doubt(&mut draft, &unreachable_target(Some(End::Source)), stamp(21));
    in_doubt(&mut draft, &unreachable_target(Some(End::Source)), stamp(22));
    assert_eq!(seen(&draft, IN_DOUBT), ("True".into(), "TargetUnreachable".into()));
    assert_eq!(seen(&draft, SUCCEEDED), ("Unknown".into(), "TargetUnreachable".into()));
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

    doubt_cleared(&mut draft, stamp(23));
    doubt_cleared(&mut draft, stamp(24));
    assert_eq!(seen(&draft, IN_DOUBT), ("False".into(), "Settled".into()));
    assert_eq!(
        (draft.status.phase, seen(&draft, SUCCEEDED).1),
        (Some(MigrationPhase::Starting), "InProgress".into())
    );
    assert_eq!(draft.notices.iter().filter(|notice| notice.reason == "DoubtSettled").count(), 1);
}

#[test]
fn a_doubt_without_a_remedy_by_word_does_not_name_one() {
    let mut draft = held();
    in_doubt(&mut draft, &unreachable_target(None), stamp(21));
    assert!(!message(&draft, IN_DOUBT).contains("spec.resolve"));
}

#[test]
fn a_source_that_has_not_committed_needs_a_statement_before_the_destination_may_start() {
    let doubt = Doubtful::Asked {
        reason: DoubtReason::SourceUnreachable,
        why: "no route".into(),
        remedy: Some(End::Destination),
    };
    let mut draft = held();
    in_doubt(&mut draft, &doubt, stamp(21));
    let yaml = "`spec.resolve: {runOn: Destination, sourceNeverResumes: true, justification: ";
    assert!(message(&draft, IN_DOUBT).contains(yaml), "{}", message(&draft, IN_DOUBT));
    let bare = Resolve { source_never_resumes: false, ..resolve(RunOn::Destination) };
    assert_eq!(judge(&draft, &bare, Ok(())).unwrap_err().0, "StatementMissing");

    play(&mut draft, &FORWARD[..8], None);
    in_doubt(&mut draft, &doubt, stamp(22));
    let yaml = "`spec.resolve: {runOn: Destination, justification: ";
    assert!(message(&draft, IN_DOUBT).contains(yaml), "{}", message(&draft, IN_DOUBT));
    assert_eq!(judge(&draft, &bare, Ok(())).unwrap().run_on, End::Destination);
}

#[test]
fn a_deleted_migration_that_is_in_doubt_says_that_it_stays_and_how_it_would_go() {
    let mut draft = held();
    draft.wish = Wish::Delete;
    in_doubt(&mut draft, &unreachable_target(None), stamp(21));
    let said = message(&draft, IN_DOUBT);
    assert!(said.contains("stays until this is settled") && said.contains("finalizers"), "{said}");
}

#[test]
fn what_the_source_says_of_its_doubt_is_shown_in_its_words() {
    let mut draft = held();
    let told = Doubtful::Told { reason: "JournalFailed".into(), message: "no space left on device.".into() };
    in_doubt(&mut draft, &told, stamp(21));
    assert_eq!(seen(&draft, IN_DOUBT), ("True".into(), "JournalFailed".into()));
    let said = message(&draft, IN_DOUBT);
    assert!(
        said.starts_with("node-a says: no space left on device. VM demo/counter is kept paused there."),
        "{said}"
    );
    let odd = Doubtful::Told { reason: "what?!".into(), message: "x".into() };
    in_doubt(&mut draft, &odd, stamp(22));
    assert_eq!(seen(&draft, IN_DOUBT).1, "SourceInDoubt");
}

#[test]
fn the_end_of_a_migration_ends_its_doubt() {
    for outcome in [Outcome::Succeeded, Outcome::RolledBack, Outcome::Lost] {
        let mut draft = held();
        in_doubt(&mut draft, &unreachable_target(None), stamp(21));
        play(&mut draft, &[], ended(outcome, "", "x"));
        assert_eq!(seen(&draft, IN_DOUBT), ("False".into(), "Settled".into()), "{outcome:?}");
        assert_ne!(draft.status.phase, Some(MigrationPhase::InDoubt));
        assert!(draft.status.completion_time.is_some());
    }
}

#[test]
fn a_resolve_that_lacks_what_it_must_state_or_does_not_fit_is_refused_in_words() {
    let mut draft = held();
    play(&mut draft, &FORWARD[..8], None);
    let good = resolve(RunOn::Source);
    let cases = [
        (good.clone(), Err(Unfit::NotInDoubt), "NotInDoubt", "not in doubt"),
        (good.clone(), Err(Unfit::CannotBeTold(End::Source)), "CannotBeTold", "Bring node-a back"),
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
        let refused = judge(&draft, &resolve, fits).unwrap_err();
        assert_eq!(refused.0, reason);
        assert!(refused.1.contains(words), "{}", refused.1);
        let mut after = draft.clone();
        resolve_refused(&mut after, &resolve, &refused, stamp(25));
        assert_eq!(seen(&after, RESOLVE_ACCEPTED), ("False".into(), reason.into()));
        assert_eq!(
            (after.status.phase, after.status.reservation),
            (draft.status.phase, draft.status.reservation)
        );
        assert!(after.notices.last().unwrap().warning);
        // It is judged once, and another one may take its place.
        let with = |resolve| VMMigrationSpec { resolve: Some(resolve), ..spec() };
        assert_eq!(unjudged(&after, &with(resolve)), None);
        let another = Resolve { justification: "another justification".into(), ..good.clone() };
        assert!(unjudged(&after, &with(another)).is_some());
        assert!(spec_changed(&mut after, &spec(), stamp(26)));
        assert_eq!(conditions::find(&after.status.conditions, RESOLVE_ACCEPTED), None);
    }
}

#[test]
fn an_accepted_resolve_is_told_with_its_justification_and_is_final() {
    let mut draft = held();
    play(&mut draft, &FORWARD[..8], None);
    let stated = resolve(RunOn::Source);
    assert_eq!(judge(&draft, &stated, Ok(())).unwrap().justification, stated.justification);
    resolve_accepted(&mut draft, &stated, stamp(25));
    let notice = draft.notices.last().unwrap();
    assert_eq!(notice.reason, "ResolveAccepted");
    assert!(notice.note.contains(&stated.justification), "{}", notice.note);

    let other = VMMigrationSpec { resolve: Some(resolve(RunOn::Destination)), ..spec() };
    assert_eq!(unjudged(&draft, &other), None);
    assert!(spec_changed(&mut draft, &other, stamp(26)));
    assert!(
        message(&draft, ACCEPTED).starts_with("spec.resolve was changed afterwards, and that is ignored")
    );
    assert_eq!(draft.status.observed_spec.as_ref().unwrap().resolve, Some(stated));
}

fn patient(attempts: i32) -> (Draft, VMMigrationSpec) {
    let spec = VMMigrationSpec { attempts, ..spec() };
    let mut object = VMMigration::new("move", spec.clone());
    object.metadata.namespace = Some("demo".into());
    (Draft::new(&object), spec)
}

#[test]
fn an_attempt_that_was_rolled_back_is_followed_by_another_with_a_new_number_after_a_pause() {
    let (mut draft, spec) = patient(3);
    for attempt in 1..=3 {
        planned(&mut draft, &spec, &plan(), stamp(10 * i64::from(attempt)));
        assert_eq!(draft.status.attempt, Some(attempt));
        assert_eq!((draft.status.timeline.len(), &draft.status.next_attempt_time), (0, &None));
        reserved(&mut draft, stamp(11));
        play(&mut draft, &FORWARD[..6], ended(Outcome::RolledBack, "BlobRejected", "EIO"));
        let last = attempt == 3;
        assert_eq!(seen(&draft, SUCCEEDED).0, if last { "False" } else { "Unknown" });
        released(&mut draft, "given back", stamp(100));
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
    assert_eq!(told(&draft).iter().filter(|reason| **reason == "AttemptFailed").count(), 2);
    assert_eq!(told(&draft).iter().filter(|reason| **reason == "NextAttempt").count(), 2);
}

#[test]
fn a_pause_between_attempts_doubles_up_to_a_minute() {
    let (mut draft, _) = patient(10);
    let pauses: Vec<_> = (1..=7)
        .map(|attempt| {
            draft.status.attempt = Some(attempt);
            paused_before_the_next(&mut draft, stamp(0));
            draft.status.next_attempt_time.as_ref().unwrap().0.as_second()
        })
        .collect();
    assert_eq!(pauses, [5, 10, 20, 40, 60, 60, 60]);
}

#[test]
fn a_plan_that_does_not_come_about_again_counts_as_an_attempt() {
    let (mut draft, spec) = patient(3);
    planned(&mut draft, &spec, &plan(), stamp(10));
    reserve_failed(&mut draft, "TargetUnreachable", "refused", stamp(11));
    released(&mut draft, "given back", stamp(12));
    let refusal = Refusal::TargetNotReady { target: "node-b".into(), error: "refused".into() };
    no_plan_this_time(&mut draft, &spec, &refusal, stamp(20));
    assert_eq!((draft.status.attempt, seen(&draft, SUCCEEDED).0.as_str()), (Some(2), "Unknown"));
    assert_eq!(draft.status.next_attempt_time, Some(Time(stamp(30).now)));
    no_plan_this_time(&mut draft, &spec, &refusal, stamp(30));
    assert_eq!(seen(&draft, SUCCEEDED), ("False".into(), "TargetNotReady".into()));
    assert_eq!(draft.status.attempts.iter().map(|ended| ended.attempt).collect::<Vec<_>>(), [1, 2, 3]);
    assert!(draft.status.completion_time.is_some());
}

#[test]
fn nothing_is_tried_again_that_was_given_up_resolved_or_lost() {
    let end = || ended(Outcome::RolledBack, "Aborted", "it was asked to");
    let again = |change: fn(&mut Draft), end| {
        let (mut draft, spec) = patient(3);
        planned(&mut draft, &spec, &plan(), stamp(10));
        reserved(&mut draft, stamp(11));
        change(&mut draft);
        play(&mut draft, &[], end);
        draft.status.completion_time.is_none()
    };
    assert!(again(|_| {}, end()));
    assert!(!again(|draft| draft.wish = Wish::Cancel, end()));
    assert!(!again(|draft| draft.wish = Wish::Delete, end()));
    assert!(!again(|draft| resolve_accepted(draft, &resolve(RunOn::Source), stamp(12)), end()));
    assert!(!again(|_| {}, ended(Outcome::Lost, "VMMExited", "gone")));
}

#[test]
fn a_cancel_is_noted_cannot_be_taken_back_and_is_named() {
    let mut draft = held();
    let cancelled = VMMigrationSpec { cancel: true, ..spec() };
    assert!(spec_changed(&mut draft, &cancelled, stamp(12)));
    assert!(!spec_changed(&mut draft, &cancelled, stamp(13)));
    assert_eq!(told(&draft), ["Accepted", "Prepared"]);
    draft.wish = Wish::Cancel;
    aborting(&mut draft, stamp(14));
    assert!(message(&draft, SUCCEEDED).starts_with("Since spec.cancel was set to true"));
    let mut late = draft.clone();
    abort_too_late(&mut late, "committed", stamp(15));
    assert!(
        message(&late, SUCCEEDED).starts_with("The migration was cancelled too late"),
        "{}",
        message(&late, SUCCEEDED)
    );
    assert!(spec_changed(&mut draft, &spec(), stamp(16)));
    assert!(message(&draft, ACCEPTED).starts_with("spec.cancel was changed afterwards, and that is ignored"));
    settled(&mut draft, &Settlement::NeverBegan, None, stamp(17));
    assert_eq!(seen(&draft, SUCCEEDED), ("False".into(), "Aborted".into()));
}

#[test]
fn a_cancel_before_the_plan_between_attempts_and_after_the_end() {
    let mut draft = fresh();
    draft.wish = Wish::Cancel;
    gave_up_before_asking(&mut draft, stamp(10));
    assert_eq!(seen(&draft, ACCEPTED), ("False".into(), "Aborted".into()));
    assert_eq!((seen(&draft, SUCCEEDED).0.as_str(), draft.status.reservation), ("False", None));

    let (mut draft, spec) = patient(3);
    planned(&mut draft, &spec, &plan(), stamp(10));
    reserve_failed(&mut draft, "TargetUnreachable", "refused", stamp(11));
    released(&mut draft, "given back", stamp(12));
    draft.wish = Wish::Cancel;
    gave_up_before_asking(&mut draft, stamp(13));
    assert_eq!(seen(&draft, SUCCEEDED), ("False".into(), "Aborted".into()));
    assert_eq!(draft.status.attempts.len(), 1);
    assert!(draft.status.completion_time.is_some() && draft.status.next_attempt_time.is_none());

    assert!(spec_changed(&mut draft, &VMMigrationSpec { cancel: true, ..spec }, stamp(14)));
    assert_eq!(draft.notices.last().unwrap().reason, "CancelTooLate");
}

#[test]
fn an_end_that_only_the_journals_tell_is_said_with_no_more_than_they_say() {
    let failure = || Some(Failure::new(Reason::Other("TwinExited".into()), "the twin has exited."));
    let after = |how: &Settlement| {
        let mut draft = held();
        settled(&mut draft, how, Some("its stream is gone."), stamp(20));
        draft
    };
    let began = after(&Settlement::NeverBegan);
    assert_eq!(seen(&began, SUCCEEDED), ("False".into(), "SourceRefused".into()));
    assert!(message(&began, SUCCEEDED).contains("its stream is gone. Nothing was touched there"));
    let given_up = after(&Settlement::GivenUp(failure()));
    assert_eq!(seen(&given_up, SUCCEEDED), ("False".into(), "TwinExited".into()));
    assert!(message(&given_up, SUCCEEDED).contains("look whether it runs"));
    let there = after(&Settlement::RunsAtDestination);
    assert_eq!(message(&there, SUCCEEDED), "VM demo/counter runs on node-b.");
    assert_eq!(
        (seen(&there, COMMITTED).0.as_str(), there.status.reservation),
        ("True", Some(Reservation::Used))
    );
    let lost = after(&Settlement::Lost(failure()));
    assert_eq!(
        (lost.status.phase, lost.status.reservation),
        (Some(MigrationPhase::Lost), Some(Reservation::Kept))
    );
}

#[test]
fn a_lost_vm_has_failed_and_nothing_is_given_back() {
    let mut draft = held();
    play(&mut draft, &[], ended(Outcome::Lost, "VmmGone", "its VMM has exited"));
    assert_eq!(seen(&draft, SUCCEEDED), ("False".into(), "VmmGone".into()));
    assert_eq!(draft.status.reservation, Some(Reservation::Kept));
    assert_eq!(message(&draft, SUCCEEDED), "VM demo/counter runs nowhere: its VMM has exited.");
}

#[test]
fn a_reservation_that_fails_ends_it_with_the_reason_and_the_source_untouched() {
    let mut draft = fresh();
    planned(&mut draft, &spec(), &plan(), stamp(10));
    reserve_failed(&mut draft, "TargetUnreachable", "connection refused", stamp(11));
    assert_eq!(seen(&draft, SUCCEEDED), ("False".into(), "TargetUnreachable".into()));
    assert_eq!(draft.status.reservation, Some(Reservation::ReleasingNeverStarted));
    released(&mut draft, "given back", stamp(12));
    assert_eq!(seen(&draft, PREPARED), ("False".into(), "TargetUnreachable".into()));
}

#[test]
fn a_refusal_is_an_end_and_says_so_once() {
    let mut draft = fresh();
    waiting(&mut draft, "node-a has not answered yet.", stamp(9));
    assert_eq!(seen(&draft, ACCEPTED), ("Unknown".into(), "WaitingForAgents".into()));
    let vm = VmKey { namespace: "demo".into(), name: "counter".into() };
    let refusal = Refusal::TargetIsSource { vm, node: "node-a".into() };
    refused(&mut draft, &spec(), &refusal, stamp(10));
    refused(&mut draft, &spec(), &refusal, stamp(11));
    assert_eq!(seen(&draft, ACCEPTED), ("False".into(), "TargetIsSource".into()));
    assert_eq!(seen(&draft, SUCCEEDED), ("False".into(), "TargetIsSource".into()));
    assert_eq!(told(&draft), ["Refused"]);
    assert_eq!(draft.status.attempt, None);
}

#[test]
fn a_deleted_migration_says_that_it_is_being_given_up_until_it_is_or_cannot_be() {
    let mut draft = held();
    play(&mut draft, &FORWARD[..2], None);
    draft.wish = Wish::Delete;
    aborting(&mut draft, stamp(21));
    aborting(&mut draft, stamp(22));
    play(&mut draft, &FORWARD[..6], None);
    assert_eq!(draft.status.phase, Some(MigrationPhase::Aborting));
    assert_eq!(seen(&draft, SUCCEEDED).1, "Aborting");

    let mut late = draft.clone();
    abort_too_late(&mut late, "committed already", stamp(23));
    play(&mut late, &FORWARD, ended(Outcome::Succeeded, "", ""));
    assert_eq!(seen(&late, SUCCEEDED), ("True".into(), "VMRunsAtTarget".into()));

    settled(&mut draft, &Settlement::NeverBegan, None, stamp(24));
    assert_eq!(seen(&draft, SUCCEEDED), ("False".into(), "Aborted".into()));
    assert_eq!(draft.status.reservation, Some(Reservation::ReleasingAbortedAtSource));
    assert_eq!(draft.notices.iter().filter(|n| n.reason == "Aborting").count(), 1);
}

#[test]
fn a_changed_spec_is_named_and_ignored_once() {
    let mut draft = held();
    let changed = VMMigrationSpec { pre_commit_timeout: "1h".into(), ..spec() };
    assert!(!spec_changed(&mut draft, &spec(), stamp(12)));
    assert!(spec_changed(&mut draft, &changed, stamp(12)));
    assert!(!spec_changed(&mut draft, &changed, stamp(13)));
    assert_eq!(seen(&draft, ACCEPTED), ("True".into(), "SpecChangeIgnored".into()));
    let said = message(&draft, ACCEPTED);
    assert!(said.starts_with("spec.preCommitTimeout was changed afterwards, and that is ignored"), "{said}");
    assert_eq!(draft.status.observed_spec, Some(spec()));
}

#[test]
fn devices_that_are_stated_to_be_isolated_are_shown_and_warned_of() {
    let mut draft = fresh();
    let isolated = VMMigrationSpec { peer_to_peer: PeerToPeer::AssumeIsolated, ..spec() };
    planned(&mut draft, &isolated, &plan(), stamp(10));
    assert!(message(&draft, ACCEPTED).contains("isolated from each other"));
    assert_eq!(told(&draft), ["Accepted", "AssumeIsolated"]);
}

const SECOND: i64 = 1_000_000_000;

fn estimate(downtime_ms: u64, allowed_ms: u64) -> slackwater_proto::node::Estimate {
    slackwater_proto::node::Estimate {
        downtime_ns: downtime_ms * 1_000_000,
        allowed_ns: allowed_ms * 1_000_000,
    }
}

#[test]
fn what_the_vmm_expects_is_shown_while_it_copies_and_stays_when_it_has_ended() {
    let mut draft = held();
    play(&mut draft, &FORWARD[..2], None);
    assert!(estimated(&mut draft, &estimate(412, 0), 20 * SECOND + 1_999, stamp(20)));
    let shown = serde_json::to_value(draft.status.estimate.as_ref().unwrap()).unwrap();
    assert_eq!(shown, serde_json::json!({"downtime": "412ms", "time": "1970-01-01T00:00:20.000001Z"}));
    let message = "412ms is too long.";
    play(&mut draft, &[], ended(Outcome::RolledBack, "BudgetExceeded", message));
    assert_eq!(seen(&draft, SUCCEEDED), ("False".to_owned(), "BudgetExceeded".to_owned()));
    assert_eq!(draft.status.estimate.as_ref().unwrap().downtime, "412ms");
    assert!(!estimated(&mut draft, &estimate(1, 0), 40 * SECOND, stamp(40)), "it has ended");
    // Another attempt knows nothing yet.
    planned(&mut draft, &spec(), &plan(), stamp(50));
    assert_eq!(draft.status.estimate, None);
}

#[test]
fn an_estimate_that_is_told_again_changes_nothing_whoever_kept_the_status_meanwhile() {
    let mut draft = held();
    play(&mut draft, &FORWARD[..2], None);
    let told_at = 20 * SECOND + 1_999;
    assert!(estimated(&mut draft, &estimate(900, 1800), told_at, stamp(20)));
    let kept = serde_json::to_value(&draft.status).unwrap();
    draft.status = serde_json::from_value(kept).unwrap();
    draft.notices.clear();
    assert!(!estimated(&mut draft, &estimate(412, 0), told_at - SECOND, stamp(21)));
    assert!(!estimated(&mut draft, &estimate(900, 1800), told_at, stamp(21)));
    assert!(estimated(&mut draft, &estimate(700, 1800), told_at + SECOND, stamp(22)));
    assert_eq!(told(&draft), [""; 0], "no more was allowed than before");
}

#[test]
fn what_is_allowed_beyond_the_budget_is_told_by_an_event_each_time_that_it_is_raised() {
    let mut draft = held();
    play(&mut draft, &FORWARD[..2], None);
    draft.notices.clear();
    for (second, downtime, allowed) in [(20, 412, 0), (25, 412, 824), (26, 500, 824), (31, 1500, 3000)] {
        assert!(estimated(&mut draft, &estimate(downtime, allowed), second * SECOND, stamp(second)));
    }
    assert_eq!(told(&draft), ["BudgetExceeded", "BudgetExceeded"]);
    assert!(draft.notices.iter().all(|notice| notice.warning));
    let expected = "The guest is expected to stand still for 1.5s, and spec.downtimeBudget is 300ms. Since spec.onBudgetExceeded \
                    is Proceed, up to 3s is allowed now.";
    assert_eq!(draft.notices[1].note, expected);
    assert_eq!(message(&draft, SUCCEEDED), format!("State is being copied; the guest runs. {expected}"));
    assert_eq!(draft.status.estimate.unwrap().allowed.as_deref(), Some("3s"));
}

#[test]
fn a_budget_that_is_changed_afterwards_is_ignored_in_words() {
    let mut draft = held();
    let changed = VMMigrationSpec {
        downtime_budget: "1s".into(),
        on_budget_exceeded: slackwater_api::OnBudgetExceeded::Proceed,
        ..spec()
    };
    assert!(spec_changed(&mut draft, &changed, stamp(20)));
    let said = message(&draft, ACCEPTED);
    assert!(said.starts_with("spec.downtimeBudget, spec.onBudgetExceeded was changed afterwards"), "{said}");
}
