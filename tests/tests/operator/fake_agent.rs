//! An agent that follows a test's script, served like a real one: gRPC with mutual TLS.

use std::future::pending;
use std::net::TcpListener;
use std::path::Path;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::stream::{self, BoxStream};
use futures::{Stream, StreamExt};
use slackwater_lab::Pki;
use slackwater_proto::limits::node_server;
use slackwater_proto::node::migration_event::What;
use slackwater_proto::node::node_agent_server::NodeAgent;
use slackwater_proto::node::{
    AbortRequest, AbortResponse, AcknowledgeEndRequest, AcknowledgeEndResponse, DescribeRequest,
    DescribeResponse, DeviceDescription, DeviceStateChange, Doubt, Estimate, Finished, JournalRecord,
    JournalState, MigrateRequest, MigrateResponse, MigrationEvent, MigrationFeatures, MigrationRef,
    NodeDescription, Outcome, Phase, ReleaseRequest, ReleaseResponse, ReserveRequest, ReserveResponse,
    ResolveRequest, ResolveResponse, Timings, VmDescription, VmRef, VmState, WatchRequest, WatchResponse,
};
use slackwater_proto::server::serve;
use slackwater_proto::tls::Credentials;
use slackwater_proto::tonic::service::Routes;
use slackwater_proto::tonic::{Request, Response, Status};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::watch;

/// A request that the agent got.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Call {
    Reserve(ReserveRequest),
    Migrate(MigrateRequest),
    Abort(AbortRequest),
    Release(ReleaseRequest),
    /// Only relayed records: plain questions are frequent.
    Resolve(ResolveRequest),
}

/// What the agent answers to its next calls.
#[derive(Default)]
pub(crate) struct Script {
    pub(crate) reserve: Option<Status>,
    pub(crate) migrate: Option<Status>,
    pub(crate) abort: Option<Status>,
    pub(crate) release: Option<Status>,
    pub(crate) resolve: Option<Status>,
    /// It accepts Watch and never reports.
    pub(crate) silent: bool,
    /// It accepts Reserve and never answers.
    pub(crate) reserve_hangs: bool,
    /// The highest epoch that it has seen: a call with a lower one is refused.
    pub(crate) known_epoch: u64,
    pub(crate) acknowledge: Option<Status>,
    /// The content of its journal.
    pub(crate) journal: JournalState,
    /// The journal's identity; an agent of version 0.1.0 tells none.
    pub(crate) journal_id: String,
}

struct State {
    description: watch::Sender<NodeDescription>,
    calls: watch::Sender<Vec<Call>>,
    /// The events of the attempt.
    events: watch::Sender<Vec<MigrationEvent>>,
    /// A change of this number breaks every open stream of events.
    breaks: watch::Sender<u32>,
    script: Mutex<Script>,
    /// The attempts of which the operator has said that it knows the end.
    acknowledged: watch::Sender<Vec<(String, u32)>>,
    /// Its wall clock, in events.
    ticks: AtomicI64,
}

/// The agent of a node. It ends when it is dropped.
pub(crate) struct FakeAgent {
    pub(crate) node: String,
    pub(crate) address: String,
    state: Arc<State>,
    credentials: Arc<Credentials>,
    process: Option<Runtime>,
}

impl Drop for FakeAgent {
    fn drop(&mut self) {
        self.stop();
    }
}

pub(crate) fn vm(namespace: &str, name: &str, devices: &[&str]) -> VmDescription {
    VmDescription {
        vm: Some(VmRef { namespace: namespace.into(), name: name.into() }),
        state: VmState::Running.into(),
        vmm_kind: "contract".into(),
        devices: devices.iter().map(|device| (*device).to_owned()).collect(),
        vm_json: format!("{{\"name\": \"{name}\"}}"),
        ram_bytes: 64 << 20,
        ..Default::default()
    }
}

pub(crate) fn device(name: &str, model: &str, holder: &str) -> DeviceDescription {
    DeviceDescription {
        name: name.into(),
        cdev: format!("/dev/vfio/devices/{name}"),
        driver: "mtty".into(),
        model: model.into(),
        features: Some(MigrationFeatures { stop_copy: true, p2p: true, pre_copy: true }),
        free: holder.is_empty(),
        holder: holder.into(),
        ..Default::default()
    }
}

/// A journal with this record.
pub(crate) fn journal_state(record: JournalRecord) -> JournalState {
    JournalState { record: record.into(), ..Default::default() }
}

impl FakeAgent {
    pub(crate) fn start(pki: &Pki, folder: &Path, node: &str) -> Self {
        let description = NodeDescription {
            node: node.into(),
            agent_version: "0.1.0-fake".into(),
            kernel_release: "6.12.0".into(),
            boot_id: "b00t".into(),
            ..Default::default()
        };
        let state = Arc::new(State {
            description: watch::Sender::new(description),
            calls: watch::Sender::default(),
            events: watch::Sender::default(),
            breaks: watch::Sender::default(),
            script: Mutex::default(),
            acknowledged: watch::Sender::default(),
            ticks: AtomicI64::new(1),
        });
        let (certificate, key) = pki.agent(node).unwrap().write(folder, node).unwrap();
        let credentials = Credentials::read(&certificate, &key, &pki.write_ca(folder).unwrap()).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let mut agent =
            Self { node: node.into(), address, state, credentials: Arc::new(credentials), process: None };
        agent.serve(listener);
        agent
    }

    /// The agent has a runtime of its own in place of a process: all of its connections end with it.
    fn serve(&mut self, listener: TcpListener) {
        let process = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        listener.set_nonblocking(true).unwrap();
        let routes = Routes::new(node_server(Service(Arc::clone(&self.state))));
        let credentials = Arc::clone(&self.credentials);
        process.spawn(async move {
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            serve(listener, &credentials, routes, pending(), Duration::ZERO).await;
        });
        self.process = Some(process);
    }

    /// Ends the agent: its connections break, its address refuses. Its state is kept.
    pub(crate) fn stop(&mut self) {
        if let Some(process) = self.process.take() {
            process.shutdown_background();
        }
    }

    /// Starts it again at the same address.
    pub(crate) async fn start_again(&mut self) {
        self.stop();
        let listener = loop {
            // The old listener closes some time after its runtime was shut down.
            match TcpListener::bind(&self.address) {
                Ok(listener) => break listener,
                Err(_) => tokio::task::yield_now().await,
            }
        };
        self.serve(listener);
    }

    /// Changes the agent's description of its node, and notifies all watchers.
    pub(crate) fn describe(&self, change: impl FnOnce(&mut NodeDescription)) {
        self.state.description.send_modify(change);
    }

    pub(crate) fn script(&self, change: impl FnOnce(&mut Script)) {
        change(&mut self.state.script.lock().unwrap());
    }

    pub(crate) fn calls(&self) -> Vec<Call> {
        self.state.calls.borrow().clone()
    }

    /// Waits for the first call for which `is` returns a value.
    pub(crate) async fn until_called<T>(&self, what: &str, is: impl Fn(&Call) -> Option<T>) -> T {
        let mut calls = self.state.calls.subscribe();
        let found = async {
            loop {
                if let Some(found) = calls.borrow_and_update().iter().find_map(&is) {
                    return found;
                }
                calls.changed().await.unwrap();
            }
        };
        let found = tokio::time::timeout(Duration::from_secs(30), found).await;
        found.unwrap_or_else(|_| {
            panic!("{} got no call to {what}; its calls are {:#?}", self.node, self.calls())
        })
    }

    /// Waits until the operator has said that it knows how an attempt ended.
    pub(crate) async fn until_acknowledged(&self, id: &str, attempt: u32) {
        let mut acknowledged = self.state.acknowledged.subscribe();
        let end = (id.to_owned(), attempt);
        let heard = acknowledged.wait_for(|ends| ends.contains(&end));
        let in_time = tokio::time::timeout(Duration::from_secs(30), heard).await.is_ok();
        assert!(in_time, "{} has not heard that the end of {end:?} is known", self.node);
    }

    /// Sets the journal's record.
    pub(crate) fn set_journal(&self, record: JournalRecord) {
        self.script(|script| script.journal = journal_state(record));
    }

    /// Waits until the operator has relayed this record of the other end, and returns its journal.
    pub(crate) async fn until_relayed(&self, record: JournalRecord) -> JournalState {
        let is = |call: &Call| match call {
            Call::Resolve(ResolveRequest { peer: Some(peer), .. }) if peer.record() == record => {
                Some(peer.clone())
            }
            _ => None,
        };
        self.until_called(&format!("act upon {record:?}"), is).await
    }

    /// Asserts that the operator has relayed no record.
    pub(crate) fn assert_nothing_was_relayed(&self) {
        assert!(!self.calls().iter().any(|call| matches!(call, Call::Resolve(_))), "{:#?}", self.calls());
    }

    /// Waits until Migrate has been called `count` times.
    pub(crate) async fn until_joined(&self, count: usize) {
        let mut calls = self.state.calls.subscribe();
        let joins =
            |calls: &Vec<Call>| calls.iter().filter(|call| matches!(call, Call::Migrate(_))).count() >= count;
        let joined = tokio::time::timeout(Duration::from_secs(30), calls.wait_for(joins)).await;
        assert!(joined.is_ok(), "the calls of {} are {:#?}", self.node, self.calls());
    }

    /// Breaks every open stream of events; the migration continues.
    pub(crate) fn break_streams(&self) {
        self.state.breaks.send_modify(|breaks| *breaks += 1);
    }

    pub(crate) fn phase(&self, phase: Phase) {
        self.event(&self.node, What::Phase(phase.into()));
    }

    /// Reports a phase of another node.
    pub(crate) fn phase_of(&self, node: &str, phase: Phase) {
        self.event(node, What::Phase(phase.into()));
    }

    pub(crate) fn doubt(&self, reason: &str, message: &str) {
        self.event(&self.node, What::Doubt(Doubt { reason: reason.into(), message: message.into() }));
    }

    pub(crate) fn estimate(&self, downtime_ms: u64, allowed_ms: u64) {
        let nanoseconds = |milliseconds: u64| milliseconds * 1_000_000;
        let estimate =
            Estimate { downtime_ns: nanoseconds(downtime_ms), allowed_ns: nanoseconds(allowed_ms) };
        self.event(&self.node, What::Estimate(estimate));
    }

    /// Forgets past events, like a restarted agent: the next is number 1 again.
    pub(crate) fn forget_events(&self) {
        self.state.events.send_modify(Vec::clear);
    }

    pub(crate) fn device_state(&self, node: &str, device: &str, to: u32) {
        self.event(
            node,
            What::DeviceState(DeviceStateChange { device: device.into(), from: 2, to, took_ns: 1_000_000 }),
        );
    }

    pub(crate) fn finish(&self, outcome: Outcome, reason: &str, message: &str) {
        self.event(
            &self.node,
            What::Finished(Finished {
                outcome: outcome.into(),
                reason: reason.into(),
                message: message.into(),
                timings: Some(Timings {
                    pre_copy_ns: 5_000_000,
                    blackout_ns: 87_412_000,
                    total_ns: 1_250_000_000,
                }),
                device_bytes: vec![60, 61],
                vmm_bytes: 64 << 20,
                dropped_events: 0,
            }),
        );
    }

    fn event(&self, node: &str, what: What) {
        self.state.event(node, what);
    }
}

impl State {
    fn event(&self, node: &str, what: What) {
        self.events.send_modify(|events| {
            let sequence = events.len() as u64 + 1;
            events.push(MigrationEvent {
                sequence,
                node: node.into(),
                monotonic_ns: sequence * 1_000_000,
                unix_ns: 1_790_000_000_000_000_000 + self.ticks.fetch_add(1, Ordering::Relaxed) * 1_000_000,
                what: Some(what),
            });
        });
    }

    fn record(&self, call: Call) {
        self.calls.send_modify(|calls| calls.push(call));
    }

    /// Fences like a real agent: remembers the highest epoch, and refuses a lower one with an error that
    /// names it.
    fn fence(&self, migration: Option<&MigrationRef>) -> Result<(), Status> {
        let epoch = migration.map(|migration| migration.operator_epoch).unwrap_or_default();
        let mut script = self.script.lock().unwrap();
        if epoch >= script.known_epoch {
            script.known_epoch = epoch;
            return Ok(());
        }
        let mut status = Status::failed_precondition(format!("operator_epoch {epoch} is old"));
        let known = script.known_epoch.to_string().parse().unwrap();
        status.metadata_mut().insert("slackwater-known-epoch", known);
        Err(status)
    }

    fn answer(&self, of: impl Fn(&Script) -> &Option<Status>) -> Result<(), Status> {
        of(&self.script.lock().unwrap()).clone().map_or(Ok(()), Err)
    }

    /// All past and future events, up to the end of the migration or the next break.
    fn follow(self: &Arc<Self>) -> impl Stream<Item = Result<MigrateResponse, Status>> + use<> {
        let (events, mut breaks) = (self.events.subscribe(), self.breaks.subscribe());
        breaks.mark_unchanged();
        stream::unfold((events, breaks, 0_usize, false), |(mut events, mut breaks, sent, over)| async move {
            if over {
                return None;
            }
            loop {
                let next = events.borrow_and_update().get(sent).cloned();
                if let Some(event) = next {
                    let over = matches!(event.what, Some(What::Finished(_)));
                    let response = MigrateResponse { event: Some(event) };
                    return Some((Ok(response), (events, breaks, sent + 1, over)));
                }
                tokio::select! {
                    changed = events.changed() => changed.ok()?,
                    _ = breaks.changed() => {
                        let broken = Err(Status::unavailable("the test broke the stream"));
                        return Some((broken, (events, breaks, sent, true)));
                    }
                }
            }
        })
    }
}

struct Service(Arc<State>);

#[slackwater_proto::tonic::async_trait]
impl NodeAgent for Service {
    type WatchStream = BoxStream<'static, Result<WatchResponse, Status>>;
    type MigrateStream = BoxStream<'static, Result<MigrateResponse, Status>>;

    async fn describe(&self, _: Request<DescribeRequest>) -> Result<Response<DescribeResponse>, Status> {
        let node = self.0.description.borrow().clone();
        Ok(Response::new(DescribeResponse { node: Some(node) }))
    }

    async fn watch(&self, _: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        if self.0.script.lock().unwrap().silent {
            return Ok(Response::new(stream::pending().boxed()));
        }
        let descriptions = tokio_stream::wrappers::WatchStream::new(self.0.description.subscribe());
        Ok(Response::new(descriptions.map(|node| Ok(WatchResponse { node: Some(node) })).boxed()))
    }

    async fn reserve(&self, request: Request<ReserveRequest>) -> Result<Response<ReserveResponse>, Status> {
        let request = request.into_inner();
        self.0.fence(request.migration.as_ref())?;
        self.0.record(Call::Reserve(request));
        let hangs = self.0.script.lock().unwrap().reserve_hangs;
        if hangs {
            pending::<()>().await;
        }
        self.0.answer(|script| &script.reserve)?;
        let journal_id = self.0.script.lock().unwrap().journal_id.clone();
        Ok(Response::new(ReserveResponse { journal_id }))
    }

    async fn migrate(
        &self,
        request: Request<MigrateRequest>,
    ) -> Result<Response<Self::MigrateStream>, Status> {
        let request = request.into_inner();
        self.0.fence(request.migration.as_ref())?;
        self.0.record(Call::Migrate(request));
        self.0.answer(|script| &script.migrate)?;
        let mut script = self.0.script.lock().unwrap();
        if script.journal == JournalState::default() {
            script.journal = journal_state(JournalRecord::Saving);
        }
        drop(script);
        Ok(Response::new(self.0.follow().boxed()))
    }

    async fn abort(&self, request: Request<AbortRequest>) -> Result<Response<AbortResponse>, Status> {
        let request = request.into_inner();
        self.0.fence(request.migration.as_ref())?;
        self.0.record(Call::Abort(request));
        self.0.answer(|script| &script.abort)?;
        if self.0.script.lock().unwrap().journal == JournalState::default() {
            // It does not know the migration and has nothing to abort.
            return Ok(Response::new(AbortResponse {}));
        }
        self.0.script.lock().unwrap().journal =
            JournalState { ended: true, ..journal_state(JournalRecord::Aborted) };
        let node = self.0.description.borrow().node.clone();
        let finished = Finished {
            outcome: Outcome::RolledBack.into(),
            reason: "Aborted".into(),
            message: "it was asked to abort".into(),
            ..Default::default()
        };
        self.0.event(&node, What::Finished(finished));
        Ok(Response::new(AbortResponse {}))
    }

    async fn release(&self, request: Request<ReleaseRequest>) -> Result<Response<ReleaseResponse>, Status> {
        let request = request.into_inner();
        self.0.fence(request.migration.as_ref())?;
        self.0.record(Call::Release(request));
        self.0.answer(|script| &script.release).map(|()| Response::new(ReleaseResponse {}))
    }

    async fn acknowledge_end(
        &self,
        request: Request<AcknowledgeEndRequest>,
    ) -> Result<Response<AcknowledgeEndResponse>, Status> {
        let request = request.into_inner();
        self.0.fence(request.migration.as_ref())?;
        self.0.answer(|script| &script.acknowledge)?;
        let acknowledged = request.migration.unwrap_or_default();
        self.0.acknowledged.send_modify(|ends| ends.push((acknowledged.id, acknowledged.attempt)));
        Ok(Response::new(AcknowledgeEndResponse {}))
    }

    async fn resolve(&self, request: Request<ResolveRequest>) -> Result<Response<ResolveResponse>, Status> {
        let request = request.into_inner();
        self.0.fence(request.migration.as_ref())?;
        if request.peer.is_some() {
            self.0.record(Call::Resolve(request));
        }
        self.0.answer(|script| &script.resolve)?;
        let script = self.0.script.lock().unwrap();
        let (own, journal_id) = (Some(script.journal.clone()), script.journal_id.clone());
        Ok(Response::new(ResolveResponse { own, journal_id }))
    }
}
