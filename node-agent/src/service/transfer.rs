//! `slackwater.transfer.v1`, served at the destination: only the agent that the reservation names as source
//! may call.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::Stream;
use slackwater_handover::{Blob, Word};
use slackwater_proto::identity;
use slackwater_proto::limits::FIRST_MESSAGE_TIMEOUT;
use slackwater_proto::node::JournalState;
use slackwater_proto::refusal::Refusal;
use slackwater_proto::tonic::{Code, Request, Response, Status, Streaming, async_trait};
use slackwater_proto::transfer::transfer_server::Transfer;
use slackwater_proto::transfer::{
    Attempt, HandoverRequest, HandoverResponse, SendBlobRequest, SendBlobResponse, SettleRequest,
    SettleResponse, blob_header, handover_request, send_blob_request,
};

use super::reason::ServiceReason;
use super::registry::{LocalEnd, Registry};
use super::whole::to_its_end;
use crate::attempt::destination::DestinationRun;
use crate::transfer::channel::Channel;

/// The service.
#[derive(Debug)]
pub struct TransferService {
    registry: Arc<Registry>,
}

impl TransferService {
    /// Serves what `registry` has reserved.
    pub fn new(registry: Arc<Registry>) -> Self {
        Self { registry }
    }

    /// The reservation that a caller may use.
    fn reservation(&self, caller: &str, attempt: Option<Attempt>) -> Result<DestinationRun, Status> {
        let Attempt { migration_id, attempt } = attempt.ok_or_else(|| invalid("attempt is absent"))?;
        match self.registry.usable_part(&migration_id, attempt)? {
            Some(LocalEnd::Destination(run, request)) => {
                identity::require_node(caller, &request.source_node)?;
                Ok(run)
            }
            _ => {
                let message =
                    format!("nothing is reserved here for attempt {attempt} of migration {migration_id}");
                Err(Refusal::not_found(ServiceReason::NotReserved, message).into())
            }
        }
    }
}

fn invalid(message: &str) -> Status {
    Refusal::invalid_argument(ServiceReason::InvalidRequest, message).into()
}

/// The first message of a stream, which says what it is for: until then the stream is nobody's.
async fn first<T>(limit: Duration, message: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    tokio::time::timeout(limit, message).await.unwrap_or_else(|_| {
        let message = format!("the first message has not come within {limit:?}");
        Err(Refusal::new(Code::DeadlineExceeded, ServiceReason::InvalidRequest, message).into())
    })
}

#[async_trait]
impl Transfer for TransferService {
    type HandoverStream = Pin<Box<dyn Stream<Item = Result<HandoverResponse, Status>> + Send>>;

    async fn handover(
        &self,
        request: Request<Streaming<HandoverRequest>>,
    ) -> Result<Response<Self::HandoverStream>, Status> {
        let caller = identity::require_agent(&request)?;
        let mut requests = request.into_inner();
        let hello =
            match first(FIRST_MESSAGE_TIMEOUT, requests.message()).await?.and_then(|request| request.message)
            {
                Some(handover_request::Message::Hello(hello)) => hello,
                _ => return Err(invalid("the first message of a hand-over is Hello")),
            };
        let run = self.reservation(&caller, hello.attempt)?;
        Ok(Response::new(Box::pin(run.handover(requests))))
    }

    async fn send_blob(
        &self,
        request: Request<Streaming<SendBlobRequest>>,
    ) -> Result<Response<SendBlobResponse>, Status> {
        let caller = identity::require_agent(&request)?;
        let mut stream = request.into_inner();
        let header =
            match first(FIRST_MESSAGE_TIMEOUT, stream.message()).await?.and_then(|request| request.message) {
                Some(send_blob_request::Message::Header(header)) => header,
                _ => return Err(invalid("the first message of a blob is its header")),
            };
        let (blob, channel) = match header.blob {
            Some(blob_header::Blob::Device(index)) => {
                (Blob::Device(usize::try_from(index).unwrap_or(usize::MAX)), Channel::default())
            }
            Some(blob_header::Blob::Vmm(state)) => (Blob::Vmm, Channel::from_proto(state)?),
            None => return Err(invalid("header.blob is absent: a device's index, or vmm")),
        };
        let run = self.reservation(&caller, header.attempt)?;
        // A blob that is given up half-way is one that did not arrive, and the machine has to hear of that.
        to_its_end(async move { run.receive(blob, channel, stream).await }).await?;
        Ok(Response::new(SendBlobResponse {}))
    }

    async fn settle(&self, request: Request<SettleRequest>) -> Result<Response<SettleResponse>, Status> {
        let caller = identity::require_agent(&request)?;
        let given = request.into_inner();
        let destination = match self.reservation(&caller, given.attempt) {
            Ok(run) => {
                // A record that only a newer agent knows says nothing here, but the question is answered.
                if let Ok(word) = Word::try_from(&given.source.unwrap_or_default()) {
                    run.peer_says(word);
                }
                run.journalled()
            }
            Err(status) if status.code() == Code::NotFound => JournalState::default(),
            Err(status) => return Err(status),
        };
        Ok(Response::new(SettleResponse { destination: Some(destination) }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_stream_that_does_not_say_what_it_is_for_is_ended() {
        let status =
            first(Duration::from_millis(5), std::future::pending::<Result<(), Status>>()).await.unwrap_err();
        assert_eq!(status.code(), Code::DeadlineExceeded);
        assert_eq!(first(Duration::from_secs(60), std::future::ready(Ok(7))).await.unwrap(), 7);
    }
}
