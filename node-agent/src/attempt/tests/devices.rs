//! Devices that refuse, fail or hang.

use std::time::Duration;

use rustix::io::Errno;
use slackwater_handover::destination::End;
use slackwater_handover::state::MigrationState::{
    PreCopy, PreCopyP2p, Resuming, Running, RunningP2p, Stop, StopCopy,
};
use slackwater_proto::node::Outcome;

use futures::StreamExt;
use slackwater_handover::policy::PeerToPeer;
use slackwater_handover::state::Features;
use slackwater_proto::node::migration_event::What;

use super::rig::{Rig, only, rig, rig_with};
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

/// What the guest's reset of a device makes of a migration: it ends before the commit, in these words.
async fn ends_as_reset(mut rig: Rig, says: &[&str]) {
    let finished = rig.migrate().await;
    assert_eq!(finished.outcome(), Outcome::RolledBack, "{says:?}: {finished:?}");
    assert_eq!(finished.reason, "DeviceReset", "{finished:?}");
    for says in says.iter().chain(&["is in RUNNING", "has been reset"]) {
        assert!(finished.message.contains(says), "{says}: {}", finished.message);
    }
    rig.assert_rolled_back().await;
}

#[tokio::test]
async fn a_device_that_its_guest_has_reset_since_its_last_change_is_asked_for_no_other_one() {
    // A change reads the state before and after.
    for (nth, left_in, asked) in [(3, PreCopy, PreCopyP2p), (5, PreCopyP2p, StopCopy)] {
        let rig = rig(|device| match device.name() {
            "source 1" => device.reset_by_guest_at(nth),
            _ => device,
        })
        .await;
        let log = rig.log.clone();
        ends_as_reset(rig, &["source 1", &format!("left in {left_in}"), &format!("not asked for {asked}")])
            .await;
        assert_eq!(log.first("source 1", Call::Asked(asked)), None, "{:#?}", log.changes());
    }
}

#[tokio::test]
async fn a_device_without_p2p_that_its_guest_has_reset_gives_no_second_session() {
    let features = Features { stop_copy: true, p2p: false, pre_copy: true };
    let rig = rig_with(&[features], PeerToPeer::Required, "node-a", |device| match device.name() {
        "source 0" => device.reset_by_guest_at(3),
        _ => device,
    })
    .await;
    ends_as_reset(rig, &["source 0", "left in PRE_COPY"]).await;
}

#[tokio::test]
async fn a_device_that_its_guest_resets_while_its_initial_data_is_read_is_named_as_reset() {
    for after in [4, 8] {
        let rig = rig(|device| match device.name() {
            "source 0" => device.piece_bytes(4).reset_by_guest_after(after),
            _ => device,
        })
        .await;
        ends_as_reset(rig, &["source 0", "left in PRE_COPY"]).await;
    }
}

#[tokio::test]
async fn a_device_that_is_reset_while_its_final_data_is_read_is_named_as_one_that_has_lost_its_state() {
    let rig = rig(only("source 1", |device| device.piece_bytes(4).reset_by_guest_after(12))).await;
    ends_as_reset(rig, &["source 1", "left in STOP_COPY", "have lost their state"]).await;
}

#[tokio::test]
async fn a_target_device_that_is_reset_before_the_start_leaves_the_vm_at_its_source() {
    // It loads: the third read. It is looked at before STARTING: the fifth.
    for (nth, left_in) in [(3, Resuming), (5, Stop)] {
        let rig = rig(|device| match device.name() {
            "target 0" => device.reset_by_guest_at(nth),
            _ => device,
        })
        .await;
        ends_as_reset(rig, &["target 0", &format!("left in {left_in}")]).await;
    }
}

#[tokio::test]
async fn a_target_device_that_is_reset_after_starting_is_named_and_the_vm_starts() {
    let mut rig = rig(only("target 0", |device| device.reset_by_guest_at(6))).await;
    let run = rig.start().await;
    run.ended().await;
    assert_eq!(run.log().end().unwrap().outcome(), Outcome::Succeeded);
    let doubts: Vec<_> = run
        .log()
        .follow()
        .filter_map(async |event| match event.what {
            Some(What::Doubt(doubt)) => Some(doubt),
            _ => None,
        })
        .collect()
        .await;
    let [doubt] = &doubts[..] else { panic!("{doubts:?}") };
    assert_eq!(doubt.reason, "DeviceReset");
    assert!(doubt.message.contains("target 0") && doubt.message.contains("left in STOP"), "{doubt:?}");
}

#[tokio::test]
async fn a_device_that_changes_as_fast_as_it_is_read_does_not_keep_its_vm_in_pre_copy() {
    let mut rig = rig(only("source 0", |device| device.dirties(1000))).await;
    let finished = rig.migrate().await;
    assert_eq!(finished.outcome(), Outcome::Succeeded, "{finished:?}");
    assert!(finished.device_bytes[0] >= 1015, "{finished:?}");
    assert!(finished.device_bytes[0] < 20_000, "{finished:?}");
}

#[tokio::test]
async fn a_device_without_any_state_is_taken_and_one_that_hides_its_state_is_not() {
    let features = Features { pre_copy: false, ..Features::ALL };
    // The driver says that there is none, or does not say.
    for says_its_size in [true, false] {
        let mut rig = rig_with(&[features], PeerToPeer::Required, "node-a", |device| match says_its_size {
            true => device.blob(""),
            false => device.without_size().ends_after(0),
        })
        .await;
        let finished = rig.migrate().await;
        assert_eq!(finished.outcome(), Outcome::Succeeded, "{finished:?}");
        assert_eq!(finished.device_bytes, [0]);
    }
    let mut rig = rig_with(&[features], PeerToPeer::Required, "node-a", |device| device.ends_after(0)).await;
    let finished = rig.migrate().await;
    assert_eq!(finished.outcome(), Outcome::RolledBack, "{finished:?}");
    assert_eq!(finished.reason, "DeviceFailed");
    for says in ["source 0", "7 bytes", "0 bytes"] {
        assert!(finished.message.contains(says), "{says}: {}", finished.message);
    }
    rig.assert_rolled_back().await;
}
