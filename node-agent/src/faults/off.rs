//! The fault points of a program without the feature `faults`: they do nothing.

use std::fmt::Debug;

use slackwater_handover::Blob;
use slackwater_proto::transfer::BlobChunk;

use super::End;
use crate::vfio::device::Device;

#[inline(always)]
pub(crate) async fn halt(_end: End, _phase: impl Debug) {}

#[inline(always)]
pub(crate) fn hang_in_probe(_device: &str) {}

#[inline(always)]
pub(crate) fn ignores_device_model() -> bool {
    false
}

#[inline(always)]
pub(crate) fn serve_device<D: Device + 'static>(device: D) -> D {
    device
}

#[derive(Debug)]
pub(crate) struct BlobFaults;

impl BlobFaults {
    #[inline(always)]
    pub(crate) fn for_blob(_blob: Blob) -> Self {
        Self
    }

    #[inline(always)]
    pub(crate) async fn stall(&self) {}

    #[inline(always)]
    pub(crate) fn chunk(&mut self, chunk: BlobChunk) -> [BlobChunk; 1] {
        [chunk]
    }

    #[inline(always)]
    pub(crate) fn end(&mut self, _length_bytes: u64) -> [BlobChunk; 0] {
        []
    }
}
