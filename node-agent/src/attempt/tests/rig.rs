//! What the tests of an attempt run on: both ends, fake devices and fake VMMs, and the transport between
//! them.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use parking_lot::Mutex;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, SanType};
use slackwater_handover::Failure;
use slackwater_handover::destination::End;
use slackwater_handover::policy::{Driver, PeerToPeer, stop_plan};
use slackwater_handover::state::{Features, MigrationState};
use slackwater_proto::identity;
use slackwater_proto::node::{Finished, MigrationRef, ReserveRequest};
use slackwater_proto::server;
use slackwater_proto::tls::Credentials;
use slackwater_proto::tonic::service::Routes;
use slackwater_proto::transfer::Attempt;
use tokio::net::TcpListener;

use crate::attempt::destination::{DestinationParts, DestinationRun, Site, Twin};
use crate::attempt::entry::Entry;
use crate::attempt::entry::tests::entry;
use crate::attempt::events::EventLog;
use crate::attempt::ledger::Ledger;
use crate::attempt::link::Peer;
use crate::attempt::source::{SourceParts, SourceRun};
use crate::journal::{Journal, Key, Role};
use crate::service::registry::{LocalEnd, Registry};
use crate::service::transfer::TransferService;
use crate::vfio::device::Device;
use crate::vfio::fake::{Call, CallLog, FakeDevice, FakeWatch};
use crate::vfio::worker::DeviceHandle;
use crate::vmm::budget::Budget;
use crate::vmm::fake::{FakeVmm, SharedLog};
use crate::vmm::{RunState, Vmm};

const LONG: Duration = Duration::from_secs(60);
pub(super) const RAM: [&str; 2] = ["first page, ", "last page"];

/// Where the VM lands, in a test: it notes what it is asked to do.
pub(super) struct FakeSite {
    pub(super) twin: Arc<FakeVmm>,
    pub(super) devices: Mutex<Vec<DeviceHandle>>,
    pub(super) done: Mutex<Vec<&'static str>>,
    /// So many times, the VM cannot be made known.
    pub(super) full: Mutex<u32>,
}

impl FakeSite {
    fn note(&self, what: &'static str) -> BoxFuture<'_, ()> {
        self.done.lock().push(what);
        futures::future::ready(()).boxed()
    }
}

impl Site for FakeSite {
    fn start_twin(&self) -> BoxFuture<'_, Result<Twin, Failure>> {
        let devices = std::mem::take(&mut *self.devices.lock());
        let vmm: Arc<dyn Vmm> = Arc::<FakeVmm>::clone(&self.twin);
        futures::future::ready(Ok(Twin { vmm, devices, process: None })).boxed()
    }

    fn last_words(&self) -> String {
        "; its log ends in: no memory".to_owned()
    }

    fn activate_identity(&self) -> BoxFuture<'_, Result<(), Failure>> {
        self.note("identity").map(Ok).boxed()
    }

    fn keep(&self) -> BoxFuture<'_, Result<(), String>> {
        let mut full = self.full.lock();
        if *full > 0 {
            *full -= 1;
            return futures::future::ready(Err("No space left on device".to_owned())).boxed();
        }
        self.note("kept").map(Ok).boxed()
    }

    fn discard(&self) -> BoxFuture<'_, ()> {
        self.note("discarded")
    }
}

/// A CA and the certificates that it has issued.
pub(crate) struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    pub(crate) fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    pub(crate) fn agent(&self, node: &str) -> Arc<Credentials> {
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
        let certificate = write("tls.crt", certificate.pem());
        let (key, ca) = (write("tls.key", key.serialize_pem()), write("ca.crt", self.0.pem()));
        Arc::new(Credentials::read(&certificate, &key, &ca).unwrap())
    }
}

/// Both ends, and what is between them.
pub(super) struct Rig {
    pub(super) log: CallLog,
    pub(super) calls: SharedLog,
    pub(super) vm: Arc<FakeVmm>,
    pub(super) twin: Arc<FakeVmm>,
    pub(super) site: Arc<FakeSite>,
    pub(super) source_devices: Vec<FakeWatch>,
    pub(super) target_devices: Vec<FakeWatch>,
    pub(super) destination: DestinationRun,
    pub(super) parts: Option<SourceParts>,
    pub(super) books: Books,
}

/// The journals of both ends, in one folder.
pub(super) struct Books {
    _folder: tempfile::TempDir,
    journal: Arc<Journal>,
}

impl Books {
    pub(super) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let journal = Arc::new(Journal::open(folder.path()).unwrap());
        Self { _folder: folder, journal }
    }

    pub(super) fn ledger(&self, role: Role) -> Ledger {
        Ledger::new(Arc::clone(&self.journal), Key::new("m", role).unwrap(), entry())
    }

    /// What an agent that starts again would read.
    pub(super) fn read(&self, role: Role) -> Entry {
        let all = self.journal.read_all().unwrap();
        let (_, content) = all.into_iter().find(|(key, _)| key.role() == role).unwrap();
        Entry::parse(&content.unwrap()).unwrap()
    }
}

/// Devices of a VM: `source 0`, `source 1` and `target 0`, `target 1`, as the test changes them.
pub(super) async fn rig(change: impl Fn(FakeDevice) -> FakeDevice) -> Rig {
    rig_with(&[Features::ALL, Features::ALL], PeerToPeer::Required, "node-a", change).await
}

/// The same, with a VMM that drives them by itself, as QEMU does.
pub(super) async fn rig_driven(change: impl Fn(FakeDevice) -> FakeDevice) -> Rig {
    rig_of(&[Features::ALL, Features::ALL], PeerToPeer::Required, "node-a", Driver::Vmm, LONG, change).await
}

/// With devices of which each call hangs that takes longer than this: more than a call to a fake device takes on
/// a loaded machine.
pub(super) const IMPATIENT: Duration = Duration::from_secs(2);

/// Devices that must answer soon.
pub(super) async fn rig_impatient(driver: Driver, change: impl Fn(FakeDevice) -> FakeDevice) -> Rig {
    rig_of(&[Features::ALL, Features::ALL], PeerToPeer::Required, "node-a", driver, IMPATIENT, change).await
}

pub(super) async fn rig_with(
    features: &[Features],
    policy: PeerToPeer,
    caller: &str,
    change: impl Fn(FakeDevice) -> FakeDevice,
) -> Rig {
    rig_of(features, policy, caller, Driver::Agent, LONG, change).await
}

async fn rig_of(
    features: &[Features],
    policy: PeerToPeer,
    caller: &str,
    driver: Driver,
    hangs_after: Duration,
    change: impl Fn(FakeDevice) -> FakeDevice,
) -> Rig {
    let (log, calls, books) = (CallLog::new(), SharedLog::default(), Books::new());
    let serve = |end: &str| -> (Vec<(DeviceHandle, Option<DeviceHandle>)>, Vec<FakeWatch>) {
        let devices = features.iter().enumerate().map(|(index, features)| {
            let device = FakeDevice::new(format!("{end} {index}")).with_features(*features).log(&log);
            let device = match end {
                "source" if features.pre_copy => device.pre_copy(format!("early {index},")),
                "source" => device,
                _ => device,
            };
            let device = change(device.blob(format!("final {index}")));
            let watch = device.watch();
            let of_vmm = (driver == Driver::Vmm)
                .then(|| DeviceHandle::serve(Box::new(device.second_descriptor())).unwrap());
            ((DeviceHandle::serve_impatiently(Box::new(device), hangs_after).unwrap(), of_vmm), watch)
        });
        devices.unzip()
    };
    let (source, source_devices) = serve("source");
    let (target, target_devices) = serve("target");
    let (source, source_of_vmm): (Vec<_>, Vec<_>) = source.into_iter().unzip();
    let (target, target_of_vmm): (Vec<_>, Vec<_>) = target.into_iter().unzip();
    let ram = RAM.map(|page| Bytes::from_static(page.as_bytes())).to_vec();
    let vm = Arc::new(FakeVmm::running("vm", calls.clone(), ram));
    let twin = Arc::new(FakeVmm::incoming("twin", calls.clone()));
    if driver == Driver::Vmm {
        vm.drive(&source_of_vmm.into_iter().flatten().collect::<Vec<_>>());
        twin.drive(&target_of_vmm.into_iter().flatten().collect::<Vec<_>>());
    }
    let site = Arc::new(FakeSite {
        twin: Arc::clone(&twin),
        devices: Mutex::new(target),
        done: Mutex::default(),
        full: Mutex::default(),
    });

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
    registry.join(&reference, LocalEnd::Destination(destination.clone(), Box::new(reservation)));

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
    pub(super) async fn start(&mut self) -> SourceRun {
        self.destination.reserved().await.unwrap();
        SourceRun::start(self.parts.take().unwrap())
    }

    pub(super) async fn migrate(&mut self) -> Finished {
        let run = self.start().await;
        run.ended().await;
        run.log().end().unwrap()
    }

    /// The VM runs where it was, and nothing is left of the reservation.
    pub(super) async fn assert_rolled_back(&self) {
        assert_eq!(self.vm.run_state(), RunState::Running);
        for device in &self.source_devices {
            assert_eq!(device.state(), MigrationState::Running);
        }
        assert!(matches!(self.destination.ended().await, Some(End::Discarded(_))));
        assert_eq!(*self.site.done.lock(), ["discarded"]);
        assert_ne!(self.twin.run_state(), RunState::Running);
    }

    pub(super) fn place(&self, device: &str, call: Call) -> usize {
        self.log.first(device, call).unwrap_or_else(|| panic!("{device} {call:?}: {:#?}", self.log.changes()))
    }
}

pub(super) fn only(
    name: &'static str,
    change: fn(FakeDevice) -> FakeDevice,
) -> impl Fn(FakeDevice) -> FakeDevice {
    move |device| if device.name() == name { change(device) } else { device }
}
