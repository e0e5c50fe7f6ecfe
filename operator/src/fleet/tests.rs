//! The fleet against agents that do not do what they should, over mutual TLS.

use std::collections::BTreeSet;
use std::future::pending;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use futures::StreamExt;
use futures::stream::{self, BoxStream};
use parking_lot::Mutex;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, SanType};
use slackwater_proto::node::node_agent_server::{NodeAgent, NodeAgentServer};
use slackwater_proto::node::*;
use slackwater_proto::server::serve;
use slackwater_proto::tonic::service::Routes;
use slackwater_proto::tonic::{Request, Response, Status};
use std::time::Duration;
use tokio::net::TcpListener;

use super::*;
use crate::inventory::Link;

/// Longer than anything here takes that does not hang.
const LONG: Duration = Duration::from_secs(20);

/// The limits of the tests.
fn short() -> Limits {
    let soon = Duration::from_millis(300);
    Limits {
        first_report: soon,
        report_pause: Duration::from_millis(50),
        migrate: soon,
        first_event: soon,
        abort: soon,
        release: soon,
        resolve: soon,
        ..Limits::default()
    }
}

/// An agent in which the calls that are named never return.
#[derive(Clone, Default)]
struct Fake {
    hangs: BTreeSet<&'static str>,
    /// Sends a report with each of these boot ids, without a pause.
    boot_ids: Vec<String>,
    /// The highest epoch that it says it has seen.
    known_epoch: Arc<Mutex<u64>>,
}

impl Fake {
    fn hanging(call: &'static str) -> Self {
        Self { hangs: BTreeSet::from([call]), ..Self::default() }
    }

    async fn maybe_hang(&self, call: &'static str) {
        if self.hangs.contains(call) {
            pending::<()>().await;
        }
    }
}

#[slackwater_proto::tonic::async_trait]
impl NodeAgent for Fake {
    type WatchStream = BoxStream<'static, Result<WatchResponse, Status>>;
    type MigrateStream = BoxStream<'static, Result<MigrateResponse, Status>>;

    async fn describe(&self, _: Request<DescribeRequest>) -> Result<Response<DescribeResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn watch(&self, _: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        self.maybe_hang("Watch").await;
        if self.hangs.contains("first report") {
            return Ok(Response::new(stream::pending().boxed()));
        }
        let boot_ids = if self.boot_ids.is_empty() { vec!["b00t".to_owned()] } else { self.boot_ids.clone() };
        let reports = boot_ids.into_iter().map(|boot_id| {
            let node = NodeDescription { node: "node-a".into(), boot_id, ..Default::default() };
            Ok(WatchResponse { node: Some(node) })
        });
        Ok(Response::new(stream::iter(reports).chain(stream::pending()).boxed()))
    }

    async fn reserve(&self, _: Request<ReserveRequest>) -> Result<Response<ReserveResponse>, Status> {
        Ok(Response::new(ReserveResponse::default()))
    }

    async fn migrate(&self, _: Request<MigrateRequest>) -> Result<Response<Self::MigrateStream>, Status> {
        self.maybe_hang("Migrate").await;
        if self.hangs.contains("first event") {
            return Ok(Response::new(stream::pending().boxed()));
        }
        let event = MigrateResponse { event: Some(MigrationEvent { sequence: 1, ..Default::default() }) };
        Ok(Response::new(stream::iter([Ok(event)]).chain(stream::pending()).boxed()))
    }

    async fn abort(&self, _: Request<AbortRequest>) -> Result<Response<AbortResponse>, Status> {
        self.maybe_hang("Abort").await;
        Ok(Response::new(AbortResponse {}))
    }

    async fn release(&self, _: Request<ReleaseRequest>) -> Result<Response<ReleaseResponse>, Status> {
        self.maybe_hang("Release").await;
        Ok(Response::new(ReleaseResponse {}))
    }

    // An older agent has no such call.
    async fn acknowledge_end(
        &self,
        _: Request<AcknowledgeEndRequest>,
    ) -> Result<Response<AcknowledgeEndResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn resolve(&self, request: Request<ResolveRequest>) -> Result<Response<ResolveResponse>, Status> {
        self.maybe_hang("Resolve").await;
        let epoch = request.into_inner().migration.unwrap_or_default().operator_epoch;
        let known = *self.known_epoch.lock();
        if epoch < known {
            let mut status = Status::failed_precondition(format!("operator epoch {epoch} is over"));
            status.metadata_mut().insert("slackwater-known-epoch", known.to_string().parse().unwrap());
            return Err(status);
        }
        Ok(Response::new(ResolveResponse::default()))
    }
}

fn credentials(folder: &Path, name: &str, issuer: &Issuer<'static, KeyPair>, uri: &str) -> Credentials {
    let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
    params.subject_alt_names.push(SanType::URI(uri.try_into().unwrap()));
    let key = KeyPair::generate().unwrap();
    let path = |suffix: &str| folder.join(format!("{name}.{suffix}"));
    std::fs::write(path("pem"), params.signed_by(&key, issuer).unwrap().pem()).unwrap();
    std::fs::write(path("key"), key.serialize_pem()).unwrap();
    Credentials::read(&path("pem"), &path("key"), &folder.join("ca.pem")).unwrap()
}

/// The agent of node-a, and a fleet that follows it.
async fn follow(fake: Fake, epoch: Epoch) -> Arc<Fleet> {
    let folder = tempfile::tempdir().unwrap();
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    std::fs::write(folder.path().join("ca.pem"), params.self_signed(&key).unwrap().pem()).unwrap();
    let issuer = Issuer::new(params, key);
    let agent = credentials(folder.path(), "node-a", &issuer, "spiffe://slackwater.dev/agent/node-a");
    let operator = credentials(folder.path(), "operator", &issuer, "spiffe://slackwater.dev/operator");

    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let own = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        let routes = Routes::new(NodeAgentServer::new(fake));
        serve(listener, &agent, routes, pending(), Duration::ZERO).await;
    });
    let fleet = Fleet::with_limits(operator, epoch, TaskTracker::new(), short());
    fleet.follow(&BTreeMap::from([(
        "node-a".to_owned(),
        Address { peers: own.clone(), own, accepted_epoch: None },
    )]));
    fleet
}

async fn until(fleet: &Fleet, is: impl Fn(&Link) -> bool) -> Link {
    let mut changes = fleet.changes();
    let changed = async {
        loop {
            let link = fleet.inventory()["node-a"].link.clone();
            if is(&link) {
                return link;
            }
            changes.next().await;
        }
    };
    tokio::time::timeout(LONG, changed).await.expect("the link does not come to the wanted state")
}

fn epoch() -> Epoch {
    Epoch::new(1, tokio::time::Instant::now() + LONG).0
}

#[tokio::test]
async fn an_agent_that_never_reports_counts_as_down_and_planning_goes_on() {
    for hang in ["Watch", "first report"] {
        let fleet = follow(Fake::hanging(hang), epoch()).await;
        assert_eq!(fleet.undecided(), Some(vec!["node-a".to_owned()]));
        let link = until(&fleet, |link| *link != Link::Connecting).await;
        let error = "it is connected and has reported nothing within 0.3 s".to_owned();
        assert_eq!(link, Link::Down { reason: "AgentSilent", error }, "{hang}");
        assert_eq!(fleet.undecided(), Some(vec![]));
        // It can still be asked to give up, and what it has journalled; not to take a VM.
        fleet.resolve("node-a", ResolveRequest::default()).await.unwrap();
        fleet.abort("node-a", AbortRequest::default()).await.unwrap();
        let refused = fleet.reserve("node-a", ReserveRequest::default()).await.unwrap_err();
        assert!(refused.was_not_asked(), "{refused}");
    }
}

#[tokio::test]
async fn an_agent_that_stops_after_its_first_report_counts_as_down() {
    // A peer that is stopped keeps its connection open and answers no ping.
    let fleet = follow(Fake::default(), epoch()).await;
    until(&fleet, |link| *link == Link::Ready).await;
    let proxy = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (through, behind) =
        (proxy.local_addr().unwrap().to_string(), fleet.inventory()["node-a"].address.clone());
    let forward = tokio::spawn(async move {
        let (mut near, _) = proxy.accept().await.unwrap();
        let mut far = tokio::net::TcpStream::connect(behind).await.unwrap();
        let copy = tokio::io::copy_bidirectional(&mut near, &mut far);
        tokio::time::timeout(Duration::from_secs(1), copy).await.ok();
        // Open, and silent.
        pending::<(tokio::net::TcpStream, tokio::net::TcpStream)>().await;
        drop((near, far));
    });
    fleet.follow(&BTreeMap::from([(
        "node-a".to_owned(),
        Address { peers: through.clone(), own: through, accepted_epoch: None },
    )]));
    until(&fleet, |link| *link == Link::Ready).await;
    let link = until(&fleet, |link| matches!(link, Link::Down { .. })).await;
    assert!(matches!(link, Link::Down { reason: "AgentUnreachable", .. }), "{link:?}");
    forward.abort();
}

#[tokio::test]
async fn of_many_reports_at_once_the_newest_counts_and_few_are_taken_in() {
    let boot_ids: Vec<String> = (0..500).map(|n| n.to_string()).collect();
    let fleet = follow(Fake { boot_ids, ..Fake::default() }, epoch()).await;
    let mut changes = fleet.changes();
    let mut taken_in = 0;
    let newest = async {
        loop {
            changes.next().await;
            taken_in += 1;
            let inventory = fleet.inventory();
            if inventory["node-a"].report.as_ref().is_some_and(|report| report.boot_id == "499") {
                return;
            }
        }
    };
    tokio::time::timeout(LONG, newest).await.unwrap();
    assert!(taken_in < 50, "{taken_in} reports were taken in");
}

#[tokio::test]
async fn every_call_to_an_agent_that_does_not_answer_ends_with_an_error_that_names_the_call() {
    let began = Instant::now();
    for call in ["Abort", "Release", "Resolve", "Migrate", "first event"] {
        let fleet = follow(Fake::hanging(call), epoch()).await;
        until(&fleet, |link| *link == Link::Ready).await;
        let asked = async {
            match call {
                "Abort" => fleet.abort("node-a", AbortRequest::default()).await.map(drop),
                "Release" => fleet.release("node-a", ReleaseRequest::default()).await.map(drop),
                "Resolve" => fleet.resolve("node-a", ResolveRequest::default()).await.map(drop),
                _ => match fleet.migrate("node-a", MigrateRequest::default()).await {
                    Ok(mut events) => events.next().await.unwrap().map(drop),
                    Err(error) => Err(error),
                },
            }
        };
        let error = tokio::time::timeout(LONG, asked).await.expect(call).unwrap_err();
        let words = match call {
            "first event" => "no event of the migration within 0.3 s".to_owned(),
            call => format!("no answer to {call} within 0.3 s"),
        };
        assert_eq!(error.to_string(), words);
        assert!(!error.is_refusal() && !error.was_not_asked());
    }
    assert!(began.elapsed() < LONG);
}

#[tokio::test]
async fn after_the_first_event_a_migration_may_be_silent_for_any_time() {
    let fleet = follow(Fake::default(), epoch()).await;
    until(&fleet, |link| *link == Link::Ready).await;
    let mut events = fleet.migrate("node-a", MigrateRequest::default()).await.unwrap();
    assert_eq!(events.next().await.unwrap().unwrap().sequence, 1);
    let quiet = tokio::time::timeout(3 * short().first_event, events.next()).await;
    assert!(quiet.is_err(), "{quiet:?}");
}

#[tokio::test]
async fn an_agent_that_claims_the_end_of_the_epochs_is_set_aside_and_the_epoch_stays() {
    let (epoch, mut source) = Epoch::new(1, tokio::time::Instant::now() + LONG);
    let fake = Fake::default();
    *fake.known_epoch.lock() = 2_147_483_646;
    let fleet = follow(fake, epoch).await;
    until(&fleet, |link| *link == Link::Ready).await;
    let error =
        fleet.resolve("node-a", ResolveRequest { migration: Some(MigrationRef::default()), peer: None });
    let error = tokio::time::timeout(Duration::from_secs(5), error).await.unwrap().unwrap_err();
    assert!(
        error.to_string().contains("has seen the operator epoch 2147483646, this operator has 1"),
        "{error}"
    );
    // A journal that could not be read would be a precondition.
    assert!(!error.is_precondition() && !error.is_refusal() && error.was_not_asked());
    assert_eq!(error.target_reason(), "EpochTooHigh");
    assert!(!fleet.inventory()["node-a"].is_ready());
    assert!(source.raises.try_recv().is_err(), "the Lease was to be raised");
}

#[tokio::test]
async fn an_operator_whose_lease_has_run_out_asks_nothing_of_an_agent() {
    let (epoch, source) = Epoch::new(1, tokio::time::Instant::now() + LONG);
    let fleet = follow(Fake::default(), epoch).await;
    until(&fleet, |link| *link == Link::Ready).await;
    fleet.resolve("node-a", ResolveRequest::default()).await.unwrap();
    source.valid_until.send_replace(tokio::time::Instant::now());
    let error = fleet.resolve("node-a", ResolveRequest::default()).await.unwrap_err();
    assert!(matches!(error, CallError::NotLeading), "{error}");
}

#[tokio::test]
async fn an_agent_without_the_call_counts_as_having_heard_that_the_end_is_known() {
    let fleet = follow(Fake::default(), epoch()).await;
    until(&fleet, |link| *link == Link::Ready).await;
    let migration = Some(MigrationRef { id: "m".into(), attempt: 1, operator_epoch: 0 });
    fleet.acknowledge_end("node-a", AcknowledgeEndRequest { migration }).await.unwrap();
}
