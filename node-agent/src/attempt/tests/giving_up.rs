//! Migrations that are given up from outside, or never begin.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use slackwater_handover::destination::End;
use slackwater_handover::policy::{Driver, PeerToPeer};
use slackwater_handover::state::Features;
use slackwater_handover::state::MigrationState::PreCopy;
use slackwater_proto::node::migration_event::What;
use slackwater_proto::node::{Outcome, Phase};

use super::rig::{Books, FakeSite, rig, rig_with};
use crate::attempt::destination::{DestinationParts, DestinationRun};
use crate::attempt::source::PastTheCommit;
use crate::journal::Role;
use crate::vfio::device::Device;
use crate::vfio::fake::{Call, CallLog, FakeDevice, Gate};
use crate::vfio::worker::DeviceHandle;
use crate::vmm::fake::{FakeVmm, SharedLog};

#[tokio::test]
async fn an_abort_before_the_commit_is_rolled_back_and_one_after_it_is_refused() {
    let gate = Gate::new();
    let hanging = gate.clone();
    let mut rig = rig(
        move |device| {
            if device.name() == "source 0" { device.hang_at(PreCopy, &hanging) } else { device }
        },
    )
    .await;
    let run = rig.start().await;
    gate.reached().await;
    let (aborted, ()) = tokio::join!(run.abort("the node is needed".to_owned()), async { gate.open() });
    assert_eq!(aborted, Ok(()));
    let finished = run.log().end().unwrap();
    assert_eq!(finished.outcome(), Outcome::RolledBack);
    assert_eq!((finished.reason.as_str(), finished.message.as_str()), ("Aborted", "the node is needed"));
    rig.assert_rolled_back().await;
    assert_eq!(run.abort("again".to_owned()).await, Ok(()));

    let mut committed = rig_with(&[Features::ALL], PeerToPeer::Required, "node-a", |device| device).await;
    let resuming = committed.twin.hang("resume");
    let run = committed.start().await;
    let mut events = Box::pin(run.log().follow());
    while let Some(event) = futures::StreamExt::next(&mut events).await {
        if event.what == Some(What::Phase(Phase::Committed.into())) {
            break;
        }
    }
    assert_eq!(run.abort("too late".to_owned()).await, Err(PastTheCommit));
    resuming.notify_one();
    run.ended().await;
    assert_eq!(run.log().end().unwrap().outcome(), Outcome::Succeeded);
}

#[tokio::test]
async fn an_agent_that_the_reservation_does_not_name_is_refused() {
    let mut rig = rig_with(&[Features::ALL], PeerToPeer::Required, "node-c", |device| device).await;
    let finished = rig.migrate().await;
    assert_eq!(finished.outcome(), Outcome::Refused, "{finished:?}");
    assert!(finished.message.contains("node-c") && finished.message.contains("node-a"), "{finished:?}");
    assert_eq!(rig.log.first("source 0", Call::Asked(PreCopy)), None);
}

#[tokio::test]
async fn an_unused_reservation_is_given_back() {
    let (log, calls, books) = (CallLog::new(), SharedLog::default(), Books::new());
    let device = FakeDevice::new("target 0").log(&log);
    let watch = device.watch();
    let site = Arc::new(FakeSite {
        twin: Arc::new(FakeVmm::incoming("twin", calls)),
        devices: Mutex::new(vec![DeviceHandle::serve(Box::new(device)).unwrap()]),
        done: Mutex::default(),
        full: Mutex::default(),
    });
    let run = DestinationRun::start(DestinationParts {
        migration_id: "m".to_owned(),
        features: vec![Features::ALL],
        driver: Driver::Agent,
        site: Arc::<FakeSite>::clone(&site),
        silence_timeout: Duration::from_millis(50),
        ledger: books.ledger(Role::Destination),
        recovered: None,
    });
    run.reserved().await.unwrap();
    let Some(End::Discarded(failure)) = run.ended().await else { panic!("kept") };
    assert_eq!(failure.reason.as_str(), "SourceSilent");
    watch.dropped().await;
    assert_eq!(log.changes().last().unwrap(), "target 0 reset");
}
