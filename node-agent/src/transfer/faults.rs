//! Faults on the way, for tests: never part of a release. `blob.<index>` or `blob.vmm` is set to `corrupt`, `truncate`, `reorder`,
//! `extend` or `stall` (see [`crate::faults`]).

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use slackwater_handover::Blob;
use slackwater_proto::transfer::BlobChunk;

use crate::faults;

/// Between two looks at the file.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum BlobFault {
    Corrupt,
    Truncate,
    Reorder,
    Extend,
}

/// What is to go wrong with one blob.
#[derive(Debug, Default)]
pub(super) struct BlobFaults {
    name: String,
    fault: Option<BlobFault>,
    held_back: Option<BlobChunk>,
}

impl BlobFaults {
    /// As the file says now.
    pub(super) fn for_blob(blob: Blob) -> Self {
        let name = match blob {
            Blob::Device(index) => format!("blob.{index}"),
            Blob::Vmm => "blob.vmm".to_owned(),
        };
        let fault = faults::value(&name).and_then(|value| match value.as_str() {
            "corrupt" => Some(BlobFault::Corrupt),
            "truncate" => Some(BlobFault::Truncate),
            "reorder" => Some(BlobFault::Reorder),
            "extend" => Some(BlobFault::Extend),
            _ => None,
        });
        Self { name, fault, held_back: None }
    }

    /// Waits for as long as the blob is to stall.
    pub(super) async fn stall(&self) {
        while faults::value(&self.name).as_deref() == Some("stall") {
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    /// What is sent in place of a chunk.
    pub(super) fn chunk(&mut self, chunk: BlobChunk) -> Vec<BlobChunk> {
        match self.fault {
            // Only the last chunk is touched, when it is known to be the last: a driver may refuse a header by itself.
            Some(BlobFault::Corrupt | BlobFault::Truncate) => {
                self.held_back.replace(chunk).into_iter().collect()
            }
            Some(BlobFault::Reorder) => match self.held_back.take() {
                Some(first) => vec![chunk, first],
                None => {
                    self.held_back = Some(chunk);
                    Vec::new()
                }
            },
            Some(BlobFault::Extend) | None => vec![chunk],
        }
    }

    /// What is sent before the trailer of a blob of this length.
    pub(super) fn end(&mut self, length_bytes: u64) -> Vec<BlobChunk> {
        let extra = (self.fault == Some(BlobFault::Extend))
            .then(|| BlobChunk { offset: length_bytes, data: Bytes::from_static(b"!") });
        let mut last = self.held_back.take();
        if let Some(chunk) = &mut last {
            let mut data = BytesMut::from(chunk.data.as_ref());
            match (self.fault, data.last_mut()) {
                (Some(BlobFault::Corrupt), Some(byte)) => *byte ^= 0x01,
                (Some(BlobFault::Truncate), Some(_)) => data.truncate(data.len() - 1),
                _ => {}
            }
            chunk.data = data.freeze();
        }
        last.into_iter().chain(extra).collect()
    }
}
