//! A migration without faults: all of the VM arrives, in the order that the devices need.

use slackwater_handover::destination::End;
use slackwater_handover::policy::PeerToPeer;
use slackwater_handover::state::Features;
use slackwater_handover::state::MigrationState::{PreCopyP2p, Running, RunningP2p, Stop, StopCopy};
use slackwater_handover::{Failure, Reason, Record};
use slackwater_proto::node::Outcome;

use super::rig::{RAM, rig, rig_with};
use crate::attempt::destination::MayHaveRun;
use crate::journal::Role;
use crate::vfio::fake::Call;
use crate::vmm::RunState;

#[tokio::test]
async fn a_vm_arrives_whole_with_both_devices_and_runs_there_only() {
    let mut rig = rig(|device| device).await;
    let finished = rig.migrate().await;
    assert_eq!(finished.outcome(), Outcome::Succeeded, "{finished:?}");
    assert_eq!(rig.destination.ended().await, Some(End::Running));
    for (index, device) in rig.target_devices.iter().enumerate() {
        assert_eq!(device.loaded().unwrap(), format!("early {index},final {index}"));
        assert_eq!(device.state(), Running);
    }
    assert_eq!(rig.twin.loaded().unwrap(), RAM.concat());
    assert_eq!((rig.vm.run_state(), rig.twin.run_state()), (RunState::Paused, RunState::Running));
    assert_eq!(*rig.site.done.lock(), ["identity", "kept"]);
    assert_eq!(finished.device_bytes, [15, 15]);
    assert_eq!(finished.vmm_bytes, RAM.concat().len() as u64);
    assert!(rig.calls.lines().contains(&"vm released".to_owned()));
    for (role, record) in [(Role::Source, Record::Released), (Role::Destination, Record::Running)] {
        let entry = rig.books.read(role);
        assert_eq!((entry.record, entry.ended.is_some()), (record, true), "{entry:?}");
    }
    for device in rig.source_devices.iter().chain(&rig.target_devices) {
        device.dropped().await;
    }
}

#[tokio::test]
async fn the_devices_quiesce_stop_and_wake_together() {
    let mut rig = rig(|device| device).await;
    assert_eq!(rig.migrate().await.outcome(), Outcome::Succeeded);
    for (first, then) in [
        (("source", Call::Reached(PreCopyP2p)), ("source", Call::Asked(StopCopy))),
        (("target", Call::Reached(Stop)), ("target", Call::Asked(RunningP2p))),
        (("target", Call::Reached(RunningP2p)), ("target", Call::Asked(Running))),
        (("source", Call::Reached(StopCopy)), ("target", Call::Asked(Stop))),
    ] {
        for before in 0..2 {
            for after in 0..2 {
                let before = rig.place(&format!("{} {before}", first.0), first.1);
                let after = rig.place(&format!("{} {after}", then.0), then.1);
                assert!(before < after, "{first:?} {then:?}: {:#?}", rig.log.changes());
            }
        }
    }
}

#[tokio::test]
async fn devices_without_p2p_that_are_assumed_isolated_all_stop_before_any_is_captured() {
    let features = [Features { p2p: false, ..Features::ALL }, Features::ALL];
    let mut rig = rig_with(&features, PeerToPeer::AssumeIsolated, "node-a", |device| device).await;
    assert_eq!(rig.migrate().await.outcome(), Outcome::Succeeded);
    for before in 0..2 {
        for after in 0..2 {
            let stopped = rig.place(&format!("source {before}"), Call::Reached(Stop));
            let captured = rig.place(&format!("source {after}"), Call::Asked(StopCopy));
            assert!(stopped < captured, "{:#?}", rig.log.changes());
        }
    }
}

#[tokio::test]
async fn a_vm_that_runs_is_made_known_until_that_succeeds_and_only_then_the_attempt_has_ended() {
    let mut rig = rig(|device| device).await;
    *rig.site.full.lock() = u32::MAX;
    let run = rig.start().await;
    run.ended().await;
    assert_eq!(run.log().end().unwrap().outcome(), Outcome::Succeeded, "the source does not wait for that");
    let released = rig.destination.release(Failure::new(Reason::Released, "")).await;
    assert_eq!(released, Err(MayHaveRun), "and an answer does not, either");
    assert_eq!(rig.destination.end(), None);
    assert_eq!(rig.books.read(Role::Destination).ended, None, "an agent that starts now makes it known");
    *rig.site.full.lock() = 3;
    assert_eq!(rig.destination.ended().await, Some(End::Running));
    assert_eq!(*rig.site.done.lock(), ["identity", "kept"]);
    assert!(rig.books.read(Role::Destination).ended.is_some());
}
