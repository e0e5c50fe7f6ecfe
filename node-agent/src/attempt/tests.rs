//! Both shells with fake devices and fake VMMs, over the real transport with mutual TLS.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, SanType};
use rustix::io::Errno;
use slackwater_handover::destination::End;
use slackwater_handover::policy::{Driver, PeerToPeer, stop_plan};
use slackwater_handover::state::{Features, MigrationState};
use slackwater_handover::{Failure, Record};
use slackwater_proto::identity;
use slackwater_proto::node::{Finished, MigrationRef, Outcome, ReserveRequest};
use slackwater_proto::server;
use slackwater_proto::tls::Credentials;
use slackwater_proto::tonic::service::Routes;
use slackwater_proto::transfer::Attempt;
use tokio::net::TcpListener;

use super::destination::{DestinationParts, DestinationRun, Site, Twin};
use super::events::EventLog;
use super::ledger::Ledger;
use super::link::Peer;
use super::source::{PastTheCommit, SourceParts, SourceRun};
use crate::attempt::entry::Entry;
use crate::attempt::entry::tests::entry;
use crate::journal::{Journal, Key, Role};
use crate::service::registry::{Part, Registry};
use crate::service::transfer::TransferService;
use crate::vfio::fake::{Call, CallLog, FakeDevice, FakeWatch, Gate};
use crate::vfio::worker::DeviceHandle;
use crate::vmm::budget::Budget;
use crate::vmm::fake::{FakeVmm, SharedLog};
use crate::vmm::{RunState, Vmm};

use MigrationState::{PreCopy, PreCopyP2p, Resuming, Running, RunningP2p, Stop, StopCopy};

const LONG: Duration = Duration::from_secs(60);
const RAM: [&str; 2] = ["first page, ", "last page"];

/// What becomes of a twin.
struct FakeSite {
    twin: Arc<FakeVmm>,
    devices: Mutex<Vec<DeviceHandle>>,
    done: Mutex<Vec<&'static str>>,
}

impl FakeSite {
    fn note(&self, what: &'static str) -> BoxFuture<'_, ()> {
        self.done.lock().unwrap().push(what);
        futures::future::ready(()).boxed()
    }
}

impl Site for FakeSite {
    fn start_twin(&self) -> BoxFuture<'_, Result<Twin, Failure>> {
        let devices = std::mem::take(&mut *self.devices.lock().unwrap());
        let vmm: Arc<dyn Vmm> = Arc::<FakeVmm>::clone(&self.twin);
        futures::future::ready(Ok(Twin { vmm, devices, process: None })).boxed()
    }

    fn last_words(&self) -> String {
        "; its log ends in: no memory".to_owned()
    }

    fn activate_identity(&self) -> BoxFuture<'_, Result<(), Failure>> {
        self.note("identity").map(Ok).boxed()
    }

    fn keep(&self) -> BoxFuture<'_, ()> {
        self.note("kept")
    }

    fn discard(&self) -> BoxFuture<'_, ()> {
        self.note("discarded")
    }
}

/// A CA and the certificates that it has issued.
struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    fn agent(&self, node: &str) -> Arc<Credentials> {
        let role = identity::Role::Agent { node: node.to_owned() };
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new([node.to_owned()]).unwrap();
        params.subject_alt_names.push(SanType::URI(role.uri().try_into().unwrap()));
        let certificate = params.signed_by(&key, &self.0).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: String| {
            let path = folder.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let paths = (
            write("tls.crt", certificate.pem()),
            write("tls.key", key.serialize_pem()),
            write("ca.crt", self.0.pem()),
        );
        Arc::new(Credentials::read(&paths.0, &paths.1, &paths.2).unwrap())
    }
}

/// Two ends and what lies between them.
struct Rig {
    log: CallLog,
    calls: SharedLog,
    vm: Arc<FakeVmm>,
    twin: Arc<FakeVmm>,
    site: Arc<FakeSite>,
    source_devices: Vec<FakeWatch>,
    target_devices: Vec<FakeWatch>,
    destination: DestinationRun,
    parts: Option<SourceParts>,
    books: Books,
}

/// The journals of both ends, in one folder.
struct Books {
    _folder: tempfile::TempDir,
    journal: Arc<Journal>,
}

impl Books {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let journal = Arc::new(Journal::open(folder.path()).unwrap());
        Self { _folder: folder, journal }
    }

    fn ledger(&self, role: Role) -> Ledger {
        Ledger::new(Arc::clone(&self.journal), Key::new("m", role).unwrap(), entry())
    }

    /// What an agent that begins again would read.
    fn read(&self, role: Role) -> Entry {
        let all = self.journal.read_all().unwrap();
        let (_, content) = all.into_iter().find(|(key, _)| key.role() == role).unwrap();
        Entry::parse(&content.unwrap()).unwrap()
    }
}

/// Devices of a VM: `source 0`, `source 1` and `target 0`, `target 1`, as the test changes them.
async fn rig(change: impl Fn(FakeDevice) -> FakeDevice) -> Rig {
    rig_with(&[Features::ALL, Features::ALL], PeerToPeer::Required, "node-a", change).await
}

/// The same, with a VMM that drives them by itself, as QEMU does.
async fn rig_driven(change: impl Fn(FakeDevice) -> FakeDevice) -> Rig {
    rig_of(&[Features::ALL, Features::ALL], PeerToPeer::Required, "node-a", Driver::Vmm, change).await
}

async fn rig_with(
    features: &[Features],
    policy: PeerToPeer,
    caller: &str,
    change: impl Fn(FakeDevice) -> FakeDevice,
) -> Rig {
    rig_of(features, policy, caller, Driver::Agent, change).await
}

async fn rig_of(
    features: &[Features],
    policy: PeerToPeer,
    caller: &str,
    driver: Driver,
    change: impl Fn(FakeDevice) -> FakeDevice,
) -> Rig {
    let (log, calls, books) = (CallLog::new(), SharedLog::default(), Books::new());
    let serve = |end: &str| -> (Vec<DeviceHandle>, Vec<FakeWatch>) {
        let devices = features.iter().enumerate().map(|(index, features)| {
            let device = FakeDevice::new(format!("{end} {index}")).with_features(*features).log(&log);
            let device = match end {
                "source" if features.pre_copy => device.pre_copy(format!("early {index},")),
                "source" => device,
                _ => device,
            };
            let device = change(device.blob(format!("final {index}")));
            let watch = device.watch();
            (DeviceHandle::serve(Box::new(device)).unwrap(), watch)
        });
        devices.unzip()
    };
    let (source, source_devices) = serve("source");
    let (target, target_devices) = serve("target");
    let ram = RAM.map(|page| Bytes::from_static(page.as_bytes())).to_vec();
    let vm = Arc::new(FakeVmm::running("vm", calls.clone(), ram));
    let twin = Arc::new(FakeVmm::incoming("twin", calls.clone()));
    if driver == Driver::Vmm {
        vm.drive(&source);
        twin.drive(&target);
    }
    let site =
        Arc::new(FakeSite { twin: Arc::clone(&twin), devices: Mutex::new(target), done: Mutex::default() });

    let destination_site: Arc<dyn Site> = Arc::<FakeSite>::clone(&site);
    let destination = DestinationRun::start(DestinationParts {
        migration_id: "m".to_owned(),
        features: features.to_vec(),
        driver,
        site: destination_site,
        silence_timeout: LONG,
        ledger: books.ledger(Role::Destination),
        recovered: None,
    });
    let registry = Arc::new(Registry::default());
    let reference = MigrationRef { id: "m".to_owned(), attempt: 1, operator_epoch: 0 };
    let reservation = ReserveRequest { source_node: "node-a".to_owned(), ..ReserveRequest::default() };
    registry.join(&reference, Part::Destination(destination.clone(), Box::new(reservation)));

    let authority = Authority::new();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let serving = authority.agent("node-b");
    let service = slackwater_proto::limits::transfer_server(TransferService::new(registry));
    tokio::spawn(async move {
        server::serve(listener, &serving, Routes::new(service), std::future::pending(), LONG).await
    });

    let released = calls.clone();
    let leaving: Arc<dyn Vmm> = Arc::<FakeVmm>::clone(&vm);
    let parts = SourceParts {
        peer: Peer {
            credentials: authority.agent(caller),
            node: "node-b".to_owned(),
            address,
            attempt: Attempt { migration_id: "m".to_owned(), attempt: 1 },
        },
        vmm: leaving,
        devices: source,
        features: features.to_vec(),
        plan: stop_plan(features, policy).unwrap(),
        ledger: books.ledger(Role::Source),
        recovered: None,
        pre_commit_timeout: LONG,
        budget: Budget::default(),
        release: Box::new(move || async move { released.add("vm released") }.boxed()),
        log: EventLog::new("node-a"),
    };
    Rig { log, calls, vm, twin, site, source_devices, target_devices, destination, parts: Some(parts), books }
}

impl Rig {
    async fn start(&mut self) -> SourceRun {
        self.destination.reserved().await.unwrap();
        SourceRun::start(self.parts.take().unwrap())
    }

    async fn migrate(&mut self) -> Finished {
        let run = self.start().await;
        run.ended().await;
        run.log().end().unwrap()
    }

    /// The VM runs where it was, and nothing is left of the reservation.
    async fn assert_rolled_back(&self) {
        assert_eq!(self.vm.run_state(), RunState::Running);
        for device in &self.source_devices {
            assert_eq!(device.state(), Running);
        }
        assert!(matches!(self.destination.ended().await, Some(End::Discarded(_))));
        assert_eq!(*self.site.done.lock().unwrap(), ["discarded"]);
        assert_ne!(self.twin.run_state(), RunState::Running);
    }

    fn place(&self, device: &str, call: Call) -> usize {
        self.log.first(device, call).unwrap_or_else(|| panic!("{device} {call:?}: {:#?}", self.log.changes()))
    }
}

fn only(name: &'static str, change: fn(FakeDevice) -> FakeDevice) -> impl Fn(FakeDevice) -> FakeDevice {
    use crate::vfio::device::Device;
    move |device| if device.name() == name { change(device) } else { device }
}

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
    assert_eq!(*rig.site.done.lock().unwrap(), ["identity", "kept"]);
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
async fn a_source_device_that_refuses_any_step_is_rolled_back_and_named() {
    for refused in [PreCopy, PreCopyP2p, StopCopy] {
        let mut rig = rig(|device| {
            use crate::vfio::device::Device;
            if device.name() == "source 1" { device.refuse(refused, Errno::IO) } else { device }
        })
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
async fn a_target_device_that_refuses_its_blob_is_rolled_back_with_its_words() {
    let mut rig = rig(only("target 0", |device| device.refuse_load(Errno::INVAL))).await;
    let finished = rig.migrate().await;
    assert_eq!(finished.outcome(), Outcome::RolledBack, "{finished:?}");
    assert_eq!(finished.reason, "DeviceFailed");
    assert!(finished.message.contains("target 0") && finished.message.contains("EINVAL"), "{finished:?}");
    rig.assert_rolled_back().await;
}

#[tokio::test]
async fn a_write_that_a_target_device_refuses_is_rolled_back_with_its_words() {
    let mut rig = rig(only("target 0", |device| device.write_fails_after(10, Errno::FAULT))).await;
    let finished = rig.migrate().await;
    assert_eq!(finished.outcome(), Outcome::RolledBack, "{finished:?}");
    assert!(finished.message.contains("target 0"), "{finished:?}");
    rig.assert_rolled_back().await;
}

#[tokio::test]
async fn a_source_device_that_refuses_the_way_back_is_reset_and_the_message_says_so() {
    for refused in [Stop, RunningP2p, Running] {
        let mut rig = rig(|device| {
            use crate::vfio::device::Device;
            match device.name() {
                "source 1" => device.refuse(refused, Errno::IO),
                "target 0" => device.refuse_load(Errno::INVAL),
                _ => device,
            }
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
    let mut rig = rig(|device| {
        use crate::vfio::device::Device;
        match device.name() {
            "source 1" => device.refuse(RunningP2p, Errno::IO).refuse_reset(Errno::IO),
            "target 0" => device.refuse_load(Errno::INVAL),
            _ => device,
        }
    })
    .await;
    let finished = rig.migrate().await;
    assert_eq!(finished.outcome(), Outcome::Lost, "{finished:?}");
    assert_eq!(finished.reason, "RollbackFailed");
    assert_eq!(rig.vm.run_state(), RunState::Paused);
}

#[tokio::test]
async fn a_target_device_that_starts_only_when_told_again_is_told_again() {
    let mut rig = rig(only("target 1", |device| device.refuse_nth(1, RunningP2p, Errno::AGAIN))).await;
    let finished = rig.migrate().await;
    assert_eq!(finished.outcome(), Outcome::Succeeded, "{finished:?}");
}

#[tokio::test]
async fn a_target_that_cannot_start_after_the_commit_is_lost_and_never_resumed_at_the_source() {
    for refused in [RunningP2p, Running] {
        let mut rig = rig(|device| {
            use crate::vfio::device::Device;
            if device.name() == "target 1" { device.refuse(refused, Errno::IO) } else { device }
        })
        .await;
        let finished = rig.migrate().await;
        assert_eq!(finished.outcome(), Outcome::Lost, "{refused}: {finished:?}");
        assert_eq!(finished.reason, "StartFailed");
        assert_eq!(rig.vm.run_state(), RunState::Paused);
        assert!(matches!(rig.destination.ended().await, Some(End::Stuck(_))));
    }
}

#[tokio::test]
async fn a_device_that_hangs_is_timed_out_and_rolled_back_when_it_answers() {
    let gate = Gate::new();
    let hanging = gate.clone();
    let mut rig = rig(move |device| {
        use crate::vfio::device::Device;
        if device.name() == "source 0" { device.hang_at(StopCopy, &hanging) } else { device }
    })
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

#[tokio::test]
async fn an_abort_before_the_commit_is_rolled_back_and_one_after_it_is_refused() {
    let gate = Gate::new();
    let hanging = gate.clone();
    let mut rig = rig(move |device| {
        use crate::vfio::device::Device;
        if device.name() == "source 0" { device.hang_at(PreCopy, &hanging) } else { device }
    })
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
        use slackwater_proto::node::{Phase, migration_event::What};
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
async fn a_twin_that_dies_before_the_commit_is_rolled_back_and_told_with_its_last_words() {
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
async fn a_vmm_that_refuses_a_call_before_the_commit_is_rolled_back_in_its_words() {
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

#[tokio::test]
async fn an_agent_that_the_reservation_does_not_name_is_refused() {
    let mut rig = rig_with(&[Features::ALL], PeerToPeer::Required, "node-c", |device| device).await;
    let finished = rig.migrate().await;
    assert_eq!(finished.outcome(), Outcome::Refused, "{finished:?}");
    assert!(finished.message.contains("node-c") && finished.message.contains("node-a"), "{finished:?}");
    assert_eq!(rig.log.first("source 0", Call::Asked(PreCopy)), None);
}

#[tokio::test]
async fn a_reservation_that_nobody_uses_is_given_back() {
    let (log, calls, books) = (CallLog::new(), SharedLog::default(), Books::new());
    let device = FakeDevice::new("target 0").log(&log);
    let watch = device.watch();
    let site = Arc::new(FakeSite {
        twin: Arc::new(FakeVmm::incoming("twin", calls)),
        devices: Mutex::new(vec![DeviceHandle::serve(Box::new(device)).unwrap()]),
        done: Mutex::default(),
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

#[tokio::test]
async fn a_vm_whose_vmm_drives_its_devices_wakes_there_with_them_all_and_each_intx_is_signalled_after_that() {
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
async fn a_vmm_that_cannot_take_its_vm_back_is_told_as_a_rollback_that_failed() {
    let mut rig = rig_driven(only("target 1", |device| device.refuse_load(Errno::FAULT))).await;
    rig.vm.fail("resume");
    let finished = rig.migrate().await;
    assert_eq!(finished.outcome(), Outcome::Lost, "{}", finished.message);
    assert_ne!(rig.twin.run_state(), RunState::Running);
}
