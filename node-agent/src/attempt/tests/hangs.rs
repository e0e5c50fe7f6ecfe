//! Devices that do not return from a call. What does not depend on one goes on, and it is named.

use std::time::Duration;

use futures::StreamExt;
use slackwater_handover::destination::End;
use slackwater_handover::policy::Driver;
use slackwater_handover::state::MigrationState::{Resuming, RunningP2p, Stop, StopCopy};
use slackwater_handover::{Reason, Record};
use slackwater_proto::node::migration_event::What;
use slackwater_proto::node::{Doubt, Outcome};
use tokio::time::timeout;

use super::rig::{IMPATIENT, Rig, rig_impatient};
use crate::attempt::source::SourceRun;
use crate::journal::Role;
use crate::vfio::device::Device;
use crate::vfio::fake::{FakeDevice, Gate};
use crate::vmm::RunState;

/// More than everything takes that does not wait for the device.
const SOON: Duration = Duration::from_secs(40);

/// A VM of which one device hangs as the test says.
async fn rig_with(
    driver: Driver,
    name: &'static str,
    hang: impl Fn(FakeDevice, &Gate) -> FakeDevice,
) -> (Rig, Gate) {
    let gate = Gate::new();
    let rig = rig_impatient(driver, |device| match device.name() == name {
        true => hang(device, &gate),
        false => device,
    })
    .await;
    (rig, gate)
}

/// The first doubt.
async fn doubt(run: &SourceRun) -> Doubt {
    let doubts = run.log().follow().filter_map(async |event| match event.what {
        Some(What::Doubt(doubt)) => Some(doubt),
        _ => None,
    });
    timeout(SOON, Box::pin(doubts).next()).await.expect("nothing is named").expect("it ended without a doubt")
}

async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    timeout(SOON, future).await.unwrap_or_else(|_| panic!("{what} waits for the device"))
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    soon(what, async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_device_that_hangs_before_the_commit_is_named_and_holds_up_only_its_own_vm() {
    let (mut rig, gate) = rig_with(Driver::Agent, "source 0", |d, gate| d.hang_at(StopCopy, gate)).await;
    let run = rig.start().await;
    let named = doubt(&run).await;
    assert_eq!(named.reason, "DeviceHangs");
    assert!(named.message.contains("source 0") && named.message.contains("STOP_COPY"), "{named:?}");
    assert!(named.message.contains("reset"), "it says what ends it: {named:?}");

    soon("the answer to Abort", run.abort("the user gives up".to_owned())).await.unwrap();
    assert_eq!(rig.books.read(Role::Source).record, Record::Aborted);
    let end = soon("the destination", rig.destination.ended()).await;
    assert!(matches!(end, Some(End::Discarded(_))));
    let other = rig.source_devices[1].clone();
    until("the other device", || other.state() == RunningP2p).await;
    assert!(rig.calls.lines().contains(&"vm abort_save".to_owned()), "{:?}", rig.calls.lines());
    assert_eq!(rig.vm.run_state(), RunState::Paused);
    assert_eq!(run.log().end(), None);

    gate.open();
    soon("the end", run.ended()).await;
    let finished = run.log().end().unwrap();
    assert_eq!((finished.outcome(), finished.reason.as_str()), (Outcome::RolledBack, "DeviceHangs"));
    rig.assert_rolled_back().await;
}

#[tokio::test]
async fn the_end_of_the_vmm_ends_a_migration_whose_device_hangs_for_good() {
    let (mut rig, _shut) = rig_with(Driver::Agent, "source 0", |d, gate| d.hang_at(StopCopy, gate)).await;
    let run = rig.start().await;
    doubt(&run).await;
    rig.vm.kill();
    soon("the end", run.ended()).await;
    let finished = run.log().end().unwrap();
    assert_eq!((finished.outcome(), finished.reason.as_str()), (Outcome::Lost, "VMMExited"));
}

#[tokio::test]
async fn a_read_that_hangs_is_named_and_the_rollback_goes_on_when_it_returns() {
    let (mut rig, gate) = rig_with(Driver::Agent, "source 1", |d, gate| d.hang_in_read(gate)).await;
    if let Some(parts) = &mut rig.parts {
        parts.pre_commit_timeout = IMPATIENT * 2;
    }
    let run = rig.start().await;
    let named = doubt(&run).await;
    assert!(named.message.contains("source 1") && named.message.contains("reading its data"), "{named:?}");
    gate.open();
    soon("the end", run.ended()).await;
    assert_eq!(run.log().end().unwrap().reason, "TimedOut");
    rig.assert_rolled_back().await;
}

#[tokio::test]
async fn a_read_at_the_gate_that_hangs_does_not_hold_up_a_vmm_that_drives_its_devices() {
    // A change by the agent reads twice; at the gate it is the first read.
    let (mut rig, _shut) = rig_with(Driver::Vmm, "source 1", |d, gate| d.hang_in_state(1, gate)).await;
    let run = rig.start().await;
    soon("the way back", run.ended()).await;
    let finished = run.log().end().unwrap();
    assert_eq!((finished.outcome(), finished.reason.as_str()), (Outcome::RolledBack, "DeviceHangs"));
    assert!(finished.message.contains("source 1"), "{finished:?}");
    assert!(finished.message.contains("whether its device 1 runs is not known"), "{finished:?}");
    rig.assert_rolled_back().await;
}

#[tokio::test]
async fn a_look_at_a_device_that_hangs_does_not_keep_running_from_being_recorded() {
    // The check: a look, a change, a look. The fifth read is the look before the start, and the sixth after it.
    let (mut rig, _shut) = rig_with(Driver::Vmm, "target 1", |d, gate| d.hang_in_state(6, gate)).await;
    let run = rig.start().await;
    soon("RUNNING", run.ended()).await;
    assert_eq!(run.log().end().unwrap().outcome(), Outcome::Succeeded);
    // It records its end after it has told the source.
    let end = soon("the end at the target", rig.destination.ended()).await;
    assert!(matches!(end, Some(End::Running)), "{end:?}");
    assert_eq!(*rig.site.done.lock(), ["identity", "kept"]);
}

#[tokio::test]
async fn a_reservation_whose_device_hangs_is_refused_by_name_and_the_rest_is_given_back() {
    let (rig, gate) = rig_with(Driver::Agent, "target 0", |d, gate| d.hang_at(Resuming, gate)).await;
    let failure = soon("the answer to Reserve", rig.destination.reserved()).await.unwrap_err();
    assert_eq!(failure.reason, Reason::DeviceHangs);
    assert!(failure.message.contains("target 0") && failure.message.contains("RESUMING"), "{failure}");
    soon("the discard", rig.destination.ended()).await;
    assert_eq!(*rig.site.done.lock(), ["discarded"]);
    soon("the other device", rig.target_devices[1].dropped()).await;
    gate.open();
    soon("the device", rig.target_devices[0].dropped()).await;
    assert_eq!(rig.log.changes().last().unwrap(), "target 0 reset");
}

#[tokio::test]
async fn a_target_that_hangs_before_loaded_is_named_and_holds_up_neither_end() {
    let (mut rig, _shut) = rig_with(Driver::Agent, "target 1", |d, gate| d.hang_at(Stop, gate)).await;
    let run = rig.start().await;
    let named = doubt(&run).await;
    assert_eq!(named.reason, "DeviceHangs");
    assert!(named.message.contains("target 1") && named.message.contains("node-b"), "{named:?}");
    soon("the answer to Abort", run.abort("enough".to_owned())).await.unwrap();
    assert_eq!(run.log().end().unwrap().outcome(), Outcome::RolledBack);
    rig.assert_rolled_back().await;
}

#[tokio::test]
async fn a_target_that_hangs_after_the_commit_is_named_at_both_ends_and_starts_when_it_answers() {
    let (mut rig, gate) = rig_with(Driver::Agent, "target 0", |d, gate| d.hang_at(RunningP2p, gate)).await;
    let run = rig.start().await;
    let named = doubt(&run).await;
    assert_eq!(named.reason, "DeviceHangs");
    assert!(named.message.contains("target 0") && named.message.contains("RUNNING_P2P"), "{named:?}");
    let word = rig.destination.journalled();
    assert_eq!((word.ended, word.reason.as_str()), (false, "DeviceHangs"));
    gate.open();
    soon("the start", run.ended()).await;
    assert_eq!(run.log().end().unwrap().outcome(), Outcome::Succeeded);
    rig.destination.ended().await;
    assert_eq!(rig.destination.journalled().reason, "");
}

#[tokio::test]
async fn a_device_whose_reset_hangs_does_not_keep_the_source_from_ending_its_vm() {
    let (mut rig, gate) = rig_with(Driver::Agent, "source 0", |d, gate| d.hang_in_reset(gate)).await;
    let run = rig.start().await;
    soon("the release", run.ended()).await;
    assert_eq!(run.log().end().unwrap().outcome(), Outcome::Succeeded);
    assert!(rig.calls.lines().contains(&"vm released".to_owned()), "{:?}", rig.calls.lines());
    gate.open();
    soon("the device", rig.source_devices[0].dropped()).await;
}
