//! A destination that has not heard that the source keeps the VM.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::Stream;
use parking_lot::Mutex;
use slackwater_proto::limits::transfer_server;
use slackwater_proto::node::{JournalRecord, JournalState};
use slackwater_proto::server;
use slackwater_proto::tonic::service::Routes;
use slackwater_proto::tonic::{Request, Response, Status, Streaming, async_trait};
use slackwater_proto::transfer::transfer_server::Transfer;
use slackwater_proto::transfer::{
    Attempt, HandoverRequest, HandoverResponse, SendBlobRequest, SendBlobResponse, SettleRequest,
    SettleResponse,
};
use tokio::net::TcpListener;

use super::rig::Authority;
use crate::attempt::link::Peer;
use crate::attempt::unheard::{Unheard, tell_all};

/// No test takes longer.
const LONG: Duration = Duration::from_secs(60);

/// A destination that answers these, the last one for ever, and what it heard.
#[derive(Clone)]
struct Answers {
    left: Arc<Mutex<Vec<Option<JournalRecord>>>>,
    heard: Arc<Mutex<Vec<SettleRequest>>>,
}

#[async_trait]
impl Transfer for Answers {
    type HandoverStream = Pin<Box<dyn Stream<Item = Result<HandoverResponse, Status>> + Send>>;

    async fn handover(
        &self,
        _: Request<Streaming<HandoverRequest>>,
    ) -> Result<Response<Self::HandoverStream>, Status> {
        Err(Status::unimplemented("not here"))
    }

    async fn send_blob(
        &self,
        _: Request<Streaming<SendBlobRequest>>,
    ) -> Result<Response<SendBlobResponse>, Status> {
        Err(Status::unimplemented("not here"))
    }

    async fn settle(&self, request: Request<SettleRequest>) -> Result<Response<SettleResponse>, Status> {
        self.heard.lock().push(request.into_inner());
        let mut left = self.left.lock();
        let next = if left.len() > 1 { left.remove(0) } else { left[0] };
        let record = next.ok_or_else(|| Status::unavailable("it starts"))?;
        let destination = Some(JournalState { record: record.into(), ..JournalState::default() });
        Ok(Response::new(SettleResponse { destination }))
    }
}

#[tokio::test]
async fn a_source_that_keeps_the_vm_says_so_until_the_destination_has_given_everything_back() {
    let answers = Answers {
        left: Arc::new(Mutex::new(vec![None, Some(JournalRecord::Loaded), Some(JournalRecord::Discarded)])),
        heard: Arc::default(),
    };
    let authority = Authority::new();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (serving, routes) = (authority.agent("node-b"), Routes::new(transfer_server(answers.clone())));
    tokio::spawn(async move {
        server::serve(listener, &serving, routes, std::future::pending(), LONG).await;
    });
    let own = JournalState { record: JournalRecord::Aborted.into(), ended: true, ..JournalState::default() };
    let unheard = |id: &str, address: &str| {
        let peer = Peer {
            credentials: authority.agent("node-a"),
            node: "node-b".to_owned(),
            address: address.to_owned(),
            attempt: Attempt { migration_id: id.to_owned(), attempt: 1 },
        };
        Unheard::new(peer, own.clone())
    };
    // One that never answers does not keep the other from hearing it.
    let telling = tell_all(vec![unheard("dead", "127.0.0.1:1"), unheard("m", &address)]);
    let heard = async {
        while answers.heard.lock().len() < 3 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::select! {
        () = telling => panic!("the other one was never told"),
        told = tokio::time::timeout(LONG, heard) => told.unwrap(),
    }
    let said = answers.heard.lock()[0].clone();
    assert_eq!((said.attempt.unwrap().migration_id.as_str(), said.source), ("m", Some(own.clone())));
    tokio::time::timeout(LONG, unheard("m", &address).tell_until_heard()).await.unwrap();
    assert_eq!(answers.heard.lock().len(), 4);
}
