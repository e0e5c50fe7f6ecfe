//! The receiving half of a blob's stream: everything is checked, in order, before it goes on.

use std::future::Future;

use bytes::Bytes;
use futures::{Stream, StreamExt};
use slackwater_handover::Failure;
use slackwater_proto::tonic::Status;
use slackwater_proto::transfer::{SendBlobRequest, send_blob_request};

use super::check::{Mismatch, Summary, Tally};

/// Takes the bytes of a blob: a device in RESUMING, or the twin.
pub trait Sink: Send {
    /// Takes the next bytes. Returns when there is room for more.
    fn write(&mut self, data: Bytes) -> impl Future<Output = Result<(), Failure>> + Send;

    /// All bytes have been verified and written. Returns when they have been taken.
    fn finish(&mut self) -> impl Future<Output = Result<(), Failure>> + Send;
}

/// Why a blob did not arrive.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    /// It is not what its sender announced.
    #[error(transparent)]
    Mismatch(#[from] Mismatch),
    /// The sender broke the order of header, chunks and trailer.
    #[error("the stream is out of order: {0}")]
    Order(&'static str),
    /// The sender, or the link, ended the stream.
    #[error("the stream from the source broke off after {received_bytes} bytes: {}", status.message())]
    Broken {
        /// What had arrived.
        received_bytes: u64,
        /// The status of the transport.
        status: Box<Status>,
    },
    /// The blob was given up by its sender.
    #[error(
        "the stream from the source ended after {received_bytes} bytes, without the blob's length and digest"
    )]
    GivenUp {
        /// What had arrived.
        received_bytes: u64,
    },
    /// The device, or the twin, did not take it.
    #[error(transparent)]
    Sink(Failure),
}

/// Receives what follows a blob's header, and hands it on as it arrives.
///
/// # Errors
/// If the blob is not whole. What has been handed on by then must not be used.
pub async fn receive(
    mut stream: impl Stream<Item = Result<SendBlobRequest, Status>> + Send + Unpin,
    mut sink: impl Sink,
) -> Result<Summary, ReceiveError> {
    let mut tally = Tally::default();
    let summary = loop {
        let received_bytes = tally.length_bytes();
        let message = match stream.next().await {
            Some(Ok(message)) => message.message,
            Some(Err(status)) => {
                return Err(ReceiveError::Broken { received_bytes, status: Box::new(status) });
            }
            None => return Err(ReceiveError::GivenUp { received_bytes }),
        };
        match message {
            Some(send_blob_request::Message::Chunk(chunk)) => {
                tally.accept(chunk.offset, &chunk.data)?;
                sink.write(chunk.data).await.map_err(ReceiveError::Sink)?;
            }
            Some(send_blob_request::Message::Trailer(trailer)) => {
                break tally.verify(trailer.length_bytes, &trailer.blake3)?;
            }
            Some(send_blob_request::Message::Header(_)) => {
                return Err(ReceiveError::Order("a second header"));
            }
            None => {
                return Err(ReceiveError::Order("an empty message, or one of an unknown kind"));
            }
        }
    };
    match stream.next().await {
        None => {}
        Some(_) => return Err(ReceiveError::Order("something after the trailer")),
    }
    sink.finish().await.map_err(ReceiveError::Sink)?;
    Ok(summary)
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use slackwater_proto::transfer::{BlobChunk, BlobTrailer};
    use tokio_stream::iter;

    use super::*;

    #[derive(Clone, Default)]
    struct Written(Arc<Mutex<(Vec<u8>, bool)>>);

    impl Sink for Written {
        async fn write(&mut self, data: Bytes) -> Result<(), Failure> {
            self.0.lock().unwrap().0.extend_from_slice(&data);
            Ok(())
        }

        async fn finish(&mut self) -> Result<(), Failure> {
            self.0.lock().unwrap().1 = true;
            Ok(())
        }
    }

    fn chunk(offset: u64, data: &'static [u8]) -> Result<SendBlobRequest, Status> {
        let data = Bytes::from_static(data);
        Ok(SendBlobRequest { message: Some(send_blob_request::Message::Chunk(BlobChunk { offset, data })) })
    }

    fn trailer(of: &[u8]) -> Result<SendBlobRequest, Status> {
        let blake3 = Bytes::copy_from_slice(blake3::hash(of).as_bytes());
        let trailer = BlobTrailer { length_bytes: of.len() as u64, blake3 };
        Ok(SendBlobRequest { message: Some(send_blob_request::Message::Trailer(trailer)) })
    }

    async fn run(messages: Vec<Result<SendBlobRequest, Status>>) -> (Result<Summary, ReceiveError>, Written) {
        let written = Written::default();
        (receive(iter(messages), written.clone()).await, written)
    }

    #[tokio::test]
    async fn a_whole_blob_is_written_in_order_and_finished() {
        let (result, written) =
            run(vec![chunk(0, b"slack"), chunk(5, b"water"), trailer(b"slackwater")]).await;
        assert_eq!(result.unwrap().length_bytes, 10);
        assert_eq!(*written.0.lock().unwrap(), (b"slackwater".to_vec(), true));
    }

    #[tokio::test]
    async fn a_blob_that_is_not_what_was_announced_is_never_finished() {
        let cases = [
            vec![chunk(0, b"slack"), chunk(6, b"water"), trailer(b"slackwater")],
            vec![chunk(5, b"water"), chunk(0, b"slack"), trailer(b"slackwater")],
            vec![chunk(0, b"slack"), trailer(b"slackwater")],
            vec![chunk(0, b"slack"), chunk(5, b"water!"), trailer(b"slackwater")],
            vec![chunk(0, b"slack"), chunk(5, b"wader"), trailer(b"slackwater")],
            vec![chunk(0, b"slack"), chunk(5, b"water")],
            vec![chunk(0, b"slack"), Err(Status::unavailable("link down"))],
            vec![chunk(0, b"slackwater"), trailer(b"slackwater"), chunk(10, b"!")],
            vec![chunk(0, b"slackwater"), Ok(SendBlobRequest { message: None }), trailer(b"slackwater")],
        ];
        for messages in cases {
            let (result, written) = run(messages.clone()).await;
            assert!(result.is_err(), "{messages:?}");
            assert!(!written.0.lock().unwrap().1, "{messages:?}");
        }
    }

    #[tokio::test]
    async fn a_broken_stream_says_how_many_bytes_arrived() {
        let (result, _) = run(vec![chunk(0, b"slack"), Err(Status::unavailable("link down"))]).await;
        assert_eq!(
            result.unwrap_err().to_string(),
            "the stream from the source broke off after 5 bytes: link down"
        );
    }
}
