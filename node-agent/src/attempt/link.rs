//! The source's connections to the destination: one for the decisions, and one for each blob. All are up
//! before the blackout.

use std::sync::Arc;
use std::time::Duration;

use slackwater_handover::{Blob, Failure, Reason, Word, blobs};
use slackwater_proto::channel::{connect, connect_for_hand_over, words};
use slackwater_proto::convert;
use slackwater_proto::limits::transfer_client;
use slackwater_proto::node::JournalState;
use slackwater_proto::tls::Credentials;
use slackwater_proto::tonic::Streaming;
use slackwater_proto::transfer::{
    Abort, Attempt, Commit, HandoverRequest, HandoverResponse, Hello, SettleRequest, handover_request,
    handover_response,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::answers::PeerClock;
use crate::host::clock::Clock;
use crate::transfer::channel::Channel;
use crate::transfer::flow::Flow;
use crate::transfer::outgoing::{self, Outgoing, Receipt};

/// Decisions that wait for the transport: Hello, and Commit or Abort.
const DECISIONS: usize = 4;

/// For one question to the destination, connecting included.
const SETTLE_LIMIT: Duration = Duration::from_secs(10);

/// The destination's agent, and the attempt in which it takes part.
#[derive(Clone, Debug)]
pub struct Peer {
    /// This agent's.
    pub credentials: Arc<Credentials>,
    /// The name of its node, which its certificate must carry.
    pub node: String,
    /// host:port
    pub address: String,
    /// The attempt.
    pub attempt: Attempt,
}

/// The stream of one blob, or of one channel of the VMM's.
#[derive(Debug)]
pub(super) struct BlobLink {
    /// Which blob.
    pub(super) blob: Blob,
    /// Where its bytes go.
    pub(super) outgoing: Outgoing,
    /// The destination's answer to it.
    pub(super) receipt: Receipt,
    /// How it gets on; the channels of one blob share it.
    pub(super) flow: Arc<Flow>,
}

/// The open hand-over.
#[derive(Debug)]
pub(super) struct Link {
    /// For what the source decides.
    pub(super) decisions: Decisions,
    /// In the order of [`blobs`]; the further channels of the VMM's blob come after its main one.
    pub(super) blobs: Vec<BlobLink>,
    /// What the destination says after Ready.
    pub(super) answers: AnswerStream,
}

/// What the destination says, and how to read its times.
#[derive(Debug)]
pub(super) struct AnswerStream {
    pub(super) messages: Streaming<HandoverResponse>,
    pub(super) clock: PeerClock,
}

impl Peer {
    /// Says Hello, waits for Ready, and opens a stream for each blob, and `channels` more for the VMM's own
    /// state.
    ///
    /// # Errors
    /// TargetUnreachable, or what the destination says instead of Ready.
    pub(super) async fn connect(&self, devices: usize, channels: u8) -> Result<Link, Failure> {
        let unreachable = |why: String| Failure::new(Reason::TargetUnreachable, why);
        let channel = || async {
            connect_for_hand_over(&self.credentials, &self.address, &self.node)
                .await
                .map_err(|error| unreachable(error.to_string()))
        };
        let (decisions, requests) = mpsc::channel(DECISIONS);
        let hello = Hello { attempt: Some(self.attempt.clone()) };
        send(&decisions, handover_request::Message::Hello(hello));
        let answers = transfer_client(channel().await?).handover(ReceiverStream::new(requests)).await;
        let mut answers = answers
            .map_err(|status| {
                unreachable(format!("{} refused the hand-over: {}", self.node, words(&status)))
            })?
            .into_inner();
        let clock = match answers.message().await {
            Ok(Some(HandoverResponse { message: Some(handover_response::Message::Ready(ready)) })) => {
                PeerClock::from_ready(ready.at, Clock::now())
            }
            Ok(Some(HandoverResponse { message: Some(handover_response::Message::Failed(failed)) })) => {
                return Err(convert::failure(&failed.reason, &format!("{}: {}", self.node, failed.message)));
            }
            Ok(_) => return Err(unreachable(format!("{} did not answer Hello with Ready", self.node))),
            Err(status) => return Err(unreachable(format!("{}: {}", self.node, words(&status)))),
        };
        let mut links = Vec::with_capacity(devices + 1 + usize::from(channels));
        for blob in blobs(devices) {
            let flow = Arc::<Flow>::default();
            let more = if blob == Blob::Vmm { channels } else { 0 };
            for each in Channel::all(more) {
                let (transport, attempt) = (channel().await?, self.attempt.clone());
                let (outgoing, receipt) = outgoing::open(transport, attempt, blob, each, Arc::clone(&flow));
                links.push(BlobLink { blob, outgoing, receipt, flow: Arc::clone(&flow) });
            }
        }
        let (decisions, answers) = (Decisions(decisions), AnswerStream { messages: answers, clock });
        Ok(Link { decisions, blobs: links, answers })
    }

    /// Exchanges words with the destination: each end says what it has journalled.
    ///
    /// # Errors
    /// PeerLost, if it does not answer in time.
    pub(super) async fn settle(&self, own: JournalState) -> Result<Word, Failure> {
        let silent = |why: String| {
            Failure::new(Reason::PeerLost, format!("the destination {} does not answer: {why}", self.node))
        };
        let asked = async {
            let channel = connect(&self.credentials, &self.address, &self.node)
                .await
                .map_err(|error| silent(error.to_string()))?;
            let request = SettleRequest { attempt: Some(self.attempt.clone()), source: Some(own) };
            let answer = transfer_client(channel).settle(request).await;
            Ok(answer.map_err(|status| silent(words(&status)))?.into_inner())
        };
        let answer = tokio::time::timeout(SETTLE_LIMIT, asked).await;
        let answer = answer.unwrap_or_else(|_| Err(silent(format!("not within {SETTLE_LIMIT:?}"))))?;
        Word::try_from(&answer.destination.unwrap_or_default()).map_err(|unknown| silent(unknown.to_string()))
    }
}

/// Where the source's decisions go.
#[derive(Debug)]
pub(super) struct Decisions(mpsc::Sender<HandoverRequest>);

impl Decisions {
    /// The point of no return has passed.
    pub(super) fn commit(&self) {
        send(&self.0, handover_request::Message::Commit(Commit {}));
    }

    /// The VM stays here.
    pub(super) fn abort(&self, why: String) {
        send(&self.0, handover_request::Message::Abort(Abort { why }));
    }
}

/// A full or closed channel means that the peer is gone; the stream of its answers reports that.
fn send(decisions: &mpsc::Sender<HandoverRequest>, message: handover_request::Message) {
    let _ = decisions.try_send(HandoverRequest { message: Some(message) });
}
