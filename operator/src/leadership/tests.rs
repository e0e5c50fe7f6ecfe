//! Keeping the Lease against an API server that only knows one Lease.

use std::convert::Infallible;
use std::sync::Arc;

use http::{Method, Request, Response};
use kube::client::Body;
use parking_lot::Mutex;
use tokio::time::timeout;
use tower::service_fn;

use super::*;
use crate::epoch::Raised;

const TERMS: (Duration, Duration, Duration) =
    (Duration::from_secs(1), Duration::from_millis(600), Duration::from_millis(200));

fn terms() -> Terms {
    let (duration, renew_deadline, retry) = TERMS;
    Terms { namespace: "slackwater".into(), name: "operator".into(), duration, renew_deadline, retry }
}

/// An API server with one Lease, which takes every write. While `hangs` is set it does not answer.
#[derive(Clone, Default)]
struct Server {
    lease: Arc<Mutex<Option<serde_json::Value>>>,
    writes: Arc<Mutex<u32>>,
    hangs: Arc<Mutex<bool>>,
}

impl Server {
    fn client(&self) -> Client {
        let server = self.clone();
        let service = service_fn(move |request: Request<Body>| {
            let server = server.clone();
            async move { Ok::<_, Infallible>(server.answer(request).await) }
        });
        Client::new(service, "slackwater")
    }

    async fn answer(&self, request: Request<Body>) -> Response<Body> {
        let write = request.method() == Method::POST || request.method() == Method::PUT;
        let sent = request.into_body().collect_bytes().await.unwrap();
        if *self.hangs.lock() {
            std::future::pending::<()>().await;
        }
        if write {
            *self.lease.lock() = Some(serde_json::from_slice(&sent).unwrap());
            *self.writes.lock() += 1;
        }
        let (code, body) = match &*self.lease.lock() {
            Some(lease) => (200, lease.clone()),
            None => {
                let status = serde_json::json!({
                    "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "code": 404,
                    "message": "not found", "reason": "NotFound",
                });
                (404, status)
            }
        };
        Response::builder().status(code).body(Body::from(serde_json::to_vec(&body).unwrap())).unwrap()
    }

    fn transitions(&self) -> i64 {
        self.lease.lock().as_ref().unwrap()["spec"]["leaseTransitions"].as_i64().unwrap()
    }
}

async fn lead(server: &Server) -> (Keeper, Epoch) {
    let server = server.clone();
    Keeper::start(move || Ok(server.client()), terms(), &CancellationToken::new()).await.unwrap().unwrap()
}

#[tokio::test]
async fn no_flood_of_epochs_delays_a_renewal_or_moves_the_lease() {
    let server = Server::default();
    let (mut keeper, epoch) = lead(&server).await;
    let flood = async {
        loop {
            assert!(matches!(epoch.above(2_147_483_646, Some(u64::MAX)).await, Raised::TooHigh(_)));
            // And past the judgement of what is believed, with what is lower and what cannot be.
            for known in [0, 2_147_483_646] {
                epoch.ask_for(known);
            }
            sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::select! {
        lost = keeper.lost() => panic!("{lost}"),
        result = timeout(3 * TERMS.0, flood) => assert!(result.is_err()),
    }
    assert!(*server.writes.lock() > 5, "{}", server.writes.lock());
    assert_eq!(server.transitions(), 0);
}

#[tokio::test]
async fn a_task_that_does_not_yield_delays_no_renewal() {
    let server = Server::default();
    let (mut keeper, epoch) = lead(&server).await;
    // The only thread of this runtime.
    std::thread::sleep(2 * TERMS.0);
    assert!(timeout(Duration::ZERO, keeper.lost()).await.is_err());
    assert!(epoch.is_in_force());
}

#[tokio::test]
async fn an_epoch_is_raised_above_what_an_agent_knows_within_the_distance_and_by_an_administrators_word() {
    let server = Server::default();
    let (keeper, epoch) = lead(&server).await;
    assert_eq!(epoch.above(41, None).await, Raised::Yes);
    assert_eq!((epoch.now(), server.transitions()), (43, 42));
    assert!(matches!(epoch.above(66, None).await, Raised::TooHigh(_)));
    assert_eq!(epoch.above(5000, Some(5000)).await, Raised::Yes);
    assert_eq!((epoch.now(), server.transitions()), (5002, 5001));
    keeper.release().await;
    assert_eq!(server.lease.lock().as_ref().unwrap()["spec"].get("holderIdentity"), None);
}

#[tokio::test]
async fn a_leader_that_cannot_renew_is_lost_before_another_may_begin_and_its_epoch_runs_out() {
    let server = Server::default();
    let (mut keeper, epoch) = lead(&server).await;
    *server.hangs.lock() = true;
    let lost = timeout(TERMS.0, keeper.lost()).await.expect("it goes on after its duration");
    assert!(matches!(lost, LeadershipLost::NotRenewed { .. }), "{lost}");
    sleep(TERMS.0).await;
    assert!(!epoch.is_in_force());
}
