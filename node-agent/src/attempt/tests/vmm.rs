//! VMMs and twins that refuse a call, or die.

use std::sync::Arc;
use std::time::Duration;

use slackwater_handover::Record;
use slackwater_handover::destination::End;
use slackwater_proto::node::Outcome;

use super::rig::rig;
use crate::journal::Role;

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
