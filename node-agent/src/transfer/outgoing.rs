//! The sending half of a blob's stream.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use slackwater_handover::Blob;
use slackwater_proto::limits::transfer_client;
use slackwater_proto::tonic::transport::Channel as Transport;
use slackwater_proto::tonic::{Request, Status};
use slackwater_proto::transfer::{
    Attempt, BlobChunk, BlobHeader, BlobTrailer, SendBlobRequest, blob_header, send_blob_request,
};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;

use super::channel::Channel;
use super::check::{Summary, Tally};
use super::flow::Flow;
use crate::faults::BlobFaults;

/// Chunks that wait for the transport: enough to read the next while one is being sent.
const CHUNKS_IN_FLIGHT: usize = 2;

/// A wait is counted while it lasts, and not only when it is over.
const COUNT_WAIT_EVERY: Duration = Duration::from_millis(100);

/// The stream has ended before the blob did; its [`Receipt`] says why.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the stream to the destination has ended")]
pub struct StreamEnded;

/// The sending end of a blob. Dropped without [`Outgoing::finish`], it ends the stream without a trailer: the
/// destination then knows that the source gave the blob up.
#[derive(Debug)]
pub struct Outgoing {
    messages: mpsc::Sender<SendBlobRequest>,
    tally: Tally,
    flow: Arc<Flow>,
    faults: BlobFaults,
}

/// The destination's answer to a blob.
#[derive(Debug)]
pub struct Receipt(JoinHandle<Result<(), Status>>);

impl Receipt {
    /// Waits until the destination has verified the blob and handed all of it on.
    ///
    /// # Errors
    /// What the destination, or the transport, said instead.
    pub async fn verified(self) -> Result<(), Status> {
        match self.0.await {
            Ok(answer) => answer,
            Err(error) => Err(Status::internal(format!("the stream's task ended early: {error}"))),
        }
    }
}

/// Opens a blob's stream on a connection of its own, so that no blob waits behind another. `flow` counts its
/// progress.
pub fn open(
    transport: Transport,
    attempt: Attempt,
    blob: Blob,
    channel: Channel,
    flow: Arc<Flow>,
) -> (Outgoing, Receipt) {
    let (messages, stream) = mpsc::channel(CHUNKS_IN_FLIGHT);
    let header = BlobHeader {
        attempt: Some(attempt),
        blob: Some(match blob {
            Blob::Device(index) => blob_header::Blob::Device(u32::try_from(index).unwrap_or(u32::MAX)),
            Blob::Vmm => blob_header::Blob::Vmm(channel.to_proto()),
        }),
    };
    let first = SendBlobRequest { message: Some(send_blob_request::Message::Header(header)) };
    let receipt = tokio::spawn(async move {
        let stream = tokio_stream::StreamExt::chain(tokio_stream::once(first), ReceiverStream::new(stream));
        transfer_client(transport).send_blob(Request::new(stream)).await.map(|_| ())
    });
    let outgoing = Outgoing { messages, tally: Tally::default(), flow, faults: BlobFaults::for_blob(blob) };
    (outgoing, Receipt(receipt))
}

impl Outgoing {
    /// Sends the blob's next bytes, at most [`CHUNK_MAX_BYTES`](super::CHUNK_MAX_BYTES) of them. Waits while
    /// the destination is slower.
    ///
    /// # Errors
    /// If the stream has ended.
    pub async fn send(&mut self, data: Bytes) -> Result<(), StreamEnded> {
        if data.is_empty() {
            return Ok(());
        }
        self.faults.stall().await;
        let length = data.len() as u64;
        let offset = self.tally.add(&data);
        for chunk in self.faults.chunk(BlobChunk { offset, data }) {
            self.transmit(send_blob_request::Message::Chunk(chunk)).await?;
        }
        self.flow.add_bytes(length);
        Ok(())
    }

    /// Ends the blob: sends its length and digest.
    ///
    /// # Errors
    /// If the stream has ended.
    pub async fn finish(mut self) -> Result<Summary, StreamEnded> {
        for chunk in self.faults.end(self.tally.length_bytes()) {
            self.transmit(send_blob_request::Message::Chunk(chunk)).await?;
        }
        let summary = self.tally.summary();
        let trailer = BlobTrailer {
            length_bytes: summary.length_bytes,
            blake3: Bytes::copy_from_slice(summary.digest.as_bytes()),
        };
        self.transmit(send_blob_request::Message::Trailer(trailer)).await?;
        Ok(summary)
    }

    async fn transmit(&self, message: send_blob_request::Message) -> Result<(), StreamEnded> {
        let message = SendBlobRequest { message: Some(message) };
        let sending = self.messages.send(message);
        tokio::pin!(sending);
        loop {
            let began = Instant::now();
            let sent = tokio::time::timeout(COUNT_WAIT_EVERY, &mut sending).await;
            self.flow.add_wait(began.elapsed());
            if let Ok(sent) = sent {
                return sent.map_err(|_| StreamEnded);
            }
        }
    }
}
