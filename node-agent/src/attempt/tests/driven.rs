//! VMMs that drive their devices by themselves, as QEMU does.

use std::sync::Arc;

use rustix::io::Errno;
use slackwater_handover::state::MigrationState::{Running, Stop, StopCopy};
use slackwater_proto::node::Outcome;

use super::rig::{only, rig_driven};
use super::vmm::asked_again;
use crate::vfio::fake::Call;
use crate::vmm::RunState;

#[tokio::test]
async fn a_twin_that_drives_its_devices_wakes_them_all_and_each_intx_is_signalled_after_that() {
    let mut rig = rig_driven(|device| device).await;
    let finished = rig.migrate().await;
    assert_eq!(finished.outcome(), Outcome::Succeeded, "{}", finished.message);
    assert_eq!((rig.vm.run_state(), rig.twin.run_state()), (RunState::Paused, RunState::Running));
    let woken = ["target 0", "target 1"].map(|device| rig.place(device, Call::Reached(Running)));
    for device in ["target 0", "target 1"] {
        let checked = rig.place(device, Call::Reached(Stop));
        assert!(woken.iter().all(|woken| checked < *woken), "{:#?}", rig.log.changes());
        let signalled = rig.place(device, Call::TriggerIntx);
        assert!(woken.iter().all(|woken| *woken < signalled), "{:#?}", rig.log.changes());
    }
    assert_eq!(rig.log.first("source 0", Call::TriggerIntx), None);
}

#[tokio::test]
async fn a_vmm_that_leaves_a_device_awake_at_the_gate_is_given_up_and_its_vm_runs_on() {
    let mut rig = rig_driven(only("source 1", |device| device.refuse(StopCopy, Errno::IO))).await;
    let finished = rig.migrate().await;
    assert_eq!(finished.outcome(), Outcome::RolledBack, "{}", finished.message);
    assert!(finished.message.contains("device 1 was read back in RUNNING"), "{}", finished.message);
    assert!(!rig.calls.lines().contains(&"vm finish_save".to_owned()), "{:?}", rig.calls.lines());
    rig.assert_rolled_back().await;
}

#[tokio::test]
async fn a_device_that_refuses_what_the_twin_has_loaded_is_found_by_the_check_and_rolled_back() {
    let mut rig = rig_driven(only("target 1", |device| device.refuse_load(Errno::FAULT))).await;
    let finished = rig.migrate().await;
    assert_eq!(finished.outcome(), Outcome::RolledBack, "{}", finished.message);
    assert!(finished.message.contains("target 1"), "{}", finished.message);
    rig.assert_rolled_back().await;
}

#[tokio::test]
async fn a_vmm_that_refuses_to_take_its_vm_back_is_asked_again_until_it_does() {
    let mut rig = rig_driven(only("target 1", |device| device.refuse_load(Errno::FAULT))).await;
    rig.vm.fail("resume");
    let vm = Arc::clone(&rig.vm);
    let run = rig.start().await;
    asked_again(&rig, "vm resume").await;
    assert!(run.log().end().is_none(), "its process lives");
    vm.mend("resume");
    run.ended().await;
    let finished = run.log().end().unwrap();
    assert_eq!(finished.outcome(), Outcome::RolledBack, "{}", finished.message);
    assert!(finished.message.contains("target 1"), "{}", finished.message);
    rig.assert_rolled_back().await;
}
