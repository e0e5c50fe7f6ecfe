//! VMMs and twins that refuse a call, or die.

use std::sync::Arc;
use std::time::Duration;

use slackwater_handover::Record;
use slackwater_handover::destination::End;
use slackwater_proto::node::Outcome;

use super::rig::{Rig, rig, rig_driven};
use crate::journal::Role;
use crate::vmm::RunState;
use crate::vmm::fake::Cut;

#[tokio::test]
async fn a_twin_that_dies_before_the_commit_rolls_the_migration_back_with_the_end_of_its_log() {
    for call in ["start_load", "finish_load"] {
        let mut rig = rig(|device| device).await;
        let _never = rig.twin.hang(call);
        let twin = Arc::clone(&rig.twin);
        let run = rig.start().await;
        let mut lines = tokio::time::interval(Duration::from_millis(5));
        while !rig.calls.lines().contains(&format!("twin {call}")) {
            lines.tick().await;
        }
        twin.kill();
        run.ended().await;
        let finished = run.log().end().unwrap();
        assert_eq!((finished.outcome(), finished.reason.as_str()), (Outcome::RolledBack, "TwinFailed"));
        assert!(finished.message.ends_with("; its log ends in: no memory"), "{call}: {}", finished.message);
        rig.assert_rolled_back().await;
    }
}

#[tokio::test]
async fn a_twin_that_gives_no_sign_of_life_after_the_commit_is_given_up_and_the_source_takes_the_vm_back() {
    let mut rig = rig(|device| device).await;
    rig.twin.fail("describe");
    let finished = rig.migrate().await;
    assert_eq!(finished.outcome(), Outcome::RolledBack, "{finished:?}");
    assert!(finished.message.contains("the VMM refused describe"), "{finished:?}");
    assert_eq!(rig.books.read(Role::Destination).record, Record::Discarded);
    rig.assert_rolled_back().await;
}

#[tokio::test]
async fn a_vm_whose_vmm_dies_is_lost_and_the_end_says_so() {
    let mut rig = rig(|device| device).await;
    let _never = rig.vm.hang("finish_save");
    let run = rig.start().await;
    let mut lines = tokio::time::interval(Duration::from_millis(5));
    while !rig.calls.lines().contains(&"vm finish_save".to_owned()) {
        lines.tick().await;
    }
    rig.vm.kill();
    run.ended().await;
    let finished = run.log().end().unwrap();
    assert_eq!((finished.outcome(), finished.reason.as_str()), (Outcome::Lost, "VMMExited"));
    assert!(matches!(rig.destination.ended().await, Some(End::Discarded(_))));
}

#[tokio::test]
async fn a_twin_that_gives_no_answer_when_it_is_resumed_is_asked_again_and_its_vm_runs() {
    for cuts in [&[Cut::Before][..], &[Cut::After], &[Cut::Silent, Cut::Before, Cut::After]] {
        for driven in [false, true] {
            let mut rig = if driven { rig_driven(|device| device).await } else { rig(|device| device).await };
            rig.twin.cut("resume", cuts);
            let finished = rig.migrate().await;
            assert_eq!(finished.outcome(), Outcome::Succeeded, "{cuts:?} {driven}: {finished:?}");
            assert_eq!(rig.twin.run_state(), RunState::Running, "{cuts:?} {driven}");
            assert_eq!(rig.books.read(Role::Destination).record, Record::Running, "{cuts:?} {driven}");
        }
    }
}

/// Returns when a call has been made twice.
pub(super) async fn asked_again(rig: &Rig, call: &str) {
    let twice = async {
        let mut lines = tokio::time::interval(Duration::from_millis(5));
        while rig.calls.lines().iter().filter(|line| *line == call).count() < 2 {
            lines.tick().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), twice).await.expect("it should be asked again");
}

#[tokio::test]
async fn a_twin_that_dies_before_it_has_answered_is_the_end() {
    let mut rig = rig(|device| device).await;
    let always = [Cut::Before; 100];
    rig.twin.cut("resume", &always);
    let twin = Arc::clone(&rig.twin);
    let run = rig.start().await;
    asked_again(&rig, "twin resume").await;
    twin.kill();
    run.ended().await;
    assert_eq!(run.log().end().unwrap().outcome(), Outcome::Lost);
    assert!(matches!(rig.destination.ended().await, Some(End::Stuck(_))));
}

#[tokio::test]
async fn a_twin_that_refuses_to_resume_is_asked_again_until_it_does() {
    let mut rig = rig(|device| device).await;
    rig.twin.fail("resume");
    let twin = Arc::clone(&rig.twin);
    let run = rig.start().await;
    asked_again(&rig, "twin resume").await;
    assert!(run.log().end().is_none(), "its process lives");
    assert_eq!(rig.books.read(Role::Destination).record, Record::Starting);
    twin.mend("resume");
    run.ended().await;
    assert_eq!(run.log().end().unwrap().outcome(), Outcome::Succeeded);
    assert_eq!(rig.twin.run_state(), RunState::Running);
    assert_eq!(rig.books.read(Role::Destination).record, Record::Running);
}

#[tokio::test]
async fn a_vmm_that_gives_no_answer_during_the_rollback_is_asked_again_and_its_vm_runs() {
    for cuts in [&[Cut::Before][..], &[Cut::After], &[Cut::Silent, Cut::Before, Cut::After]] {
        for driven in [false, true] {
            for call in ["abort_save", "resume"] {
                let what = format!("{cuts:?} {driven} {call}");
                let mut rig =
                    if driven { rig_driven(|device| device).await } else { rig(|device| device).await };
                // The VM is stopped by then, and its save is under way.
                rig.vm.fail("finish_save");
                rig.vm.cut(call, cuts);
                let finished = rig.migrate().await;
                assert_eq!(finished.outcome(), Outcome::RolledBack, "{what}: {finished:?}");
                assert_eq!(finished.message, "the VMM refused finish_save: the test says so", "{what}");
                rig.assert_rolled_back().await;
            }
        }
    }
}

#[tokio::test]
async fn a_vmm_that_dies_before_it_has_answered_during_the_rollback_is_lost_with_its_vm() {
    let mut rig = rig(|device| device).await;
    rig.twin.fail("finish_load");
    rig.vm.cut("resume", &[Cut::Before; 100]);
    let vm = Arc::clone(&rig.vm);
    let run = rig.start().await;
    asked_again(&rig, "vm resume").await;
    vm.kill();
    run.ended().await;
    let finished = run.log().end().unwrap();
    assert_eq!((finished.outcome(), finished.reason.as_str()), (Outcome::Lost, "VMMExited"));
}

#[tokio::test]
async fn a_call_that_a_vmm_refuses_before_the_commit_rolls_the_migration_back_with_its_message() {
    for call in ["start_save", "pause", "finish_save"] {
        let mut rig = rig(|device| device).await;
        rig.vm.fail(call);
        let finished = rig.migrate().await;
        assert_eq!(finished.outcome(), Outcome::RolledBack, "{call}: {finished:?}");
        assert_eq!(finished.message, format!("the VMM refused {call}: the test says so"));
        rig.assert_rolled_back().await;
    }
    for call in ["start_load", "finish_load"] {
        let mut rig = rig(|device| device).await;
        rig.twin.fail(call);
        let finished = rig.migrate().await;
        assert_eq!(finished.outcome(), Outcome::RolledBack, "{call}: {finished:?}");
        assert!(finished.message.contains(&format!("the VMM refused {call}")), "{finished:?}");
        rig.assert_rolled_back().await;
    }
}
