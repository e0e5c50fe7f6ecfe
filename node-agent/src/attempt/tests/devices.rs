//! Devices that refuse, fail or hang.

use std::time::Duration;

use rustix::io::Errno;
use slackwater_handover::destination::End;
use slackwater_handover::state::MigrationState::{
    PreCopy, PreCopyP2p, Resuming, Running, RunningP2p, Stop, StopCopy,
};
use slackwater_proto::node::Outcome;

use super::rig::{only, rig};
use crate::vfio::device::Device;
use crate::vfio::fake::{Call, Gate};
use crate::vmm::RunState;

#[tokio::test]
async fn a_step_that_a_source_device_refuses_rolls_the_migration_back_and_the_message_names_the_device() {
    for refused in [PreCopy, PreCopyP2p, StopCopy] {
        let mut rig =
            rig(
                |device| {
                    if device.name() == "source 1" { device.refuse(refused, Errno::IO) } else { device }
                },
            )
            .await;
        let finished = rig.migrate().await;
        assert_eq!(finished.outcome(), Outcome::RolledBack, "{refused}: {finished:?}");
        assert_eq!(finished.reason, "DeviceFailed");
        assert!(
            finished.message.contains("source 1") && finished.message.contains(refused.name()),
            "{finished:?}"
        );
        rig.assert_rolled_back().await;
    }
}

#[tokio::test]
async fn a_target_device_that_refuses_to_prepare_is_named_in_the_answer_to_the_reservation() {
    let rig = rig(only("target 1", |device| device.refuse(Resuming, Errno::BUSY))).await;
    let failure = rig.destination.reserved().await.unwrap_err();
    assert!(failure.message.contains("target 1") && failure.message.contains("RESUMING"), "{failure}");
    assert!(matches!(rig.destination.ended().await, Some(End::Discarded(_))));
    assert_eq!(rig.log.first("source 0", Call::Asked(PreCopy)), None);
}

#[tokio::test]
async fn a_blob_that_a_target_device_refuses_rolls_the_migration_back_with_its_error() {
    let mut rig = rig(only("target 0", |device| device.refuse_load(Errno::INVAL))).await;
    let finished = rig.migrate().await;
    assert_eq!(finished.outcome(), Outcome::RolledBack, "{finished:?}");
    assert_eq!(finished.reason, "DeviceFailed");
    assert!(finished.message.contains("target 0") && finished.message.contains("EINVAL"), "{finished:?}");
    rig.assert_rolled_back().await;
}

#[tokio::test]
async fn a_write_that_a_target_device_refuses_rolls_the_migration_back_with_its_error() {
    let mut rig = rig(only("target 0", |device| device.write_fails_after(10, Errno::FAULT))).await;
    let finished = rig.migrate().await;
    assert_eq!(finished.outcome(), Outcome::RolledBack, "{finished:?}");
    assert!(finished.message.contains("target 0"), "{finished:?}");
    rig.assert_rolled_back().await;
}

#[tokio::test]
async fn a_source_device_that_refuses_the_way_back_is_reset_and_the_message_says_so() {
    for refused in [Stop, RunningP2p, Running] {
        let mut rig = rig(|device| match device.name() {
            "source 1" => device.refuse(refused, Errno::IO),
            "target 0" => device.refuse_load(Errno::INVAL),
            _ => device,
        })
        .await;
        let finished = rig.migrate().await;
        assert_eq!(finished.outcome(), Outcome::RolledBack, "{refused}: {finished:?}");
        assert!(finished.message.contains("had to be reset"), "{refused}: {finished:?}");
        rig.assert_rolled_back().await;
    }
}

#[tokio::test]
async fn a_source_device_that_cannot_even_be_reset_leaves_the_vm_paused_and_says_so() {
    let mut rig = rig(|device| match device.name() {
        "source 1" => device.refuse(RunningP2p, Errno::IO).refuse_reset(Errno::IO),
        "target 0" => device.refuse_load(Errno::INVAL),
        _ => device,
    })
    .await;
    let finished = rig.migrate().await;
    assert_eq!(finished.outcome(), Outcome::Lost, "{finished:?}");
    assert_eq!(finished.reason, "RollbackFailed");
    assert_eq!(rig.vm.run_state(), RunState::Paused);
}

#[tokio::test]
async fn a_target_device_that_refuses_to_start_once_is_asked_again() {
    let mut rig = rig(only("target 1", |device| device.refuse_nth(1, RunningP2p, Errno::AGAIN))).await;
    let finished = rig.migrate().await;
    assert_eq!(finished.outcome(), Outcome::Succeeded, "{finished:?}");
}

#[tokio::test]
async fn a_vm_that_cannot_start_after_the_commit_is_lost_and_never_resumed_at_the_source() {
    for refused in [RunningP2p, Running] {
        let mut rig =
            rig(
                |device| {
                    if device.name() == "target 1" { device.refuse(refused, Errno::IO) } else { device }
                },
            )
            .await;
        let finished = rig.migrate().await;
        assert_eq!(finished.outcome(), Outcome::Lost, "{refused}: {finished:?}");
        assert_eq!(finished.reason, "StartFailed");
        assert_eq!(rig.vm.run_state(), RunState::Paused);
        assert!(matches!(rig.destination.ended().await, Some(End::Stuck(_))));
    }
}

#[tokio::test]
async fn a_device_that_hangs_times_out_and_the_migration_is_rolled_back_when_it_answers() {
    let gate = Gate::new();
    let hanging = gate.clone();
    let mut rig = rig(
        move |device| {
            if device.name() == "source 0" { device.hang_at(StopCopy, &hanging) } else { device }
        },
    )
    .await;
    if let Some(parts) = &mut rig.parts {
        parts.pre_commit_timeout = Duration::from_millis(500);
    }
    let run = rig.start().await;
    gate.reached().await;
    // The destination hears of it at once: only the device itself is waited for.
    assert!(matches!(rig.destination.ended().await, Some(End::Discarded(_))));
    assert_eq!(run.log().end(), None);
    gate.open();
    run.ended().await;
    let finished = run.log().end().unwrap();
    assert_eq!((finished.outcome(), finished.reason.as_str()), (Outcome::RolledBack, "TimedOut"));
    rig.assert_rolled_back().await;
}
