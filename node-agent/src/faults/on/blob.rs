//! Blobs that are damaged on the way, or stall: `blob.<index>` or `blob.vmm` is set to `corrupt`, `truncate`,
//! `reorder`, `extend` or `stall`.

use bytes::{Bytes, BytesMut};
use slackwater_handover::Blob;
use slackwater_proto::transfer::BlobChunk;

use super::{REREAD_AFTER, names, value};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum BlobFault {
    Corrupt,
    Truncate,
    Reorder,
    Extend,
}

/// The faults of one blob.
#[derive(Debug, Default)]
pub(crate) struct BlobFaults {
    name: String,
    fault: Option<BlobFault>,
    held_back: Option<BlobChunk>,
}

impl BlobFaults {
    /// The faults that are set now.
    pub(crate) fn for_blob(blob: Blob) -> Self {
        let name = match blob {
            Blob::Device(index) => format!("{}{index}", names::BLOB),
            Blob::Vmm => names::BLOB_VMM.to_owned(),
        };
        let fault = value(&name).and_then(|value| match value.as_str() {
            "corrupt" => Some(BlobFault::Corrupt),
            "truncate" => Some(BlobFault::Truncate),
            "reorder" => Some(BlobFault::Reorder),
            "extend" => Some(BlobFault::Extend),
            _ => None,
        });
        Self { name, fault, held_back: None }
    }

    /// Waits while the blob stalls.
    pub(crate) async fn stall(&self) {
        while value(&self.name).as_deref() == Some("stall") {
            tokio::time::sleep(REREAD_AFTER).await;
        }
    }

    /// The chunks to send in place of this one.
    pub(crate) fn chunk(&mut self, chunk: BlobChunk) -> Vec<BlobChunk> {
        match self.fault {
            // Only the last chunk is touched, once it is known to be the last: a driver may refuse a damaged
            // header itself.
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

    /// The chunks to send before the trailer of a blob of this length.
    pub(crate) fn end(&mut self, length_bytes: u64) -> Vec<BlobChunk> {
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
