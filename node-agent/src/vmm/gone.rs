//! A VMM whose process has ended: what an agent that begins again finds in the place of one.

use slackwater_proto::tonic::async_trait;

use super::budget::Budget;
use super::{Description, LoadStream, SaveStreams, Vmm, VmmError};

/// It refuses every call, since there is nobody to ask.
#[derive(Clone, Copy, Debug)]
pub struct GoneVmm;

fn gone<T>(call: &'static str) -> Result<T, VmmError> {
    Err(VmmError::Lost { call, message: "its process has ended".to_owned() })
}

#[async_trait]
impl Vmm for GoneVmm {
    async fn describe(&self) -> Result<Description, VmmError> {
        gone("Describe")
    }

    async fn start_save(&self, _live: bool, _budget: Budget) -> Result<SaveStreams, VmmError> {
        gone("StartSave")
    }

    async fn pause(&self) -> Result<(), VmmError> {
        gone("Pause")
    }

    async fn finish_save(&self) -> Result<(), VmmError> {
        gone("FinishSave")
    }

    async fn abort_save(&self) -> Result<(), VmmError> {
        gone("AbortSave")
    }

    async fn start_load(&self, _state: Vec<LoadStream>) -> Result<(), VmmError> {
        gone("StartLoad")
    }

    async fn finish_load(&self) -> Result<(), VmmError> {
        gone("FinishLoad")
    }

    async fn resume(&self) -> Result<(), VmmError> {
        gone("Resume")
    }

    async fn quit(&self) -> Result<(), VmmError> {
        gone("Quit")
    }

    fn pid(&self) -> u32 {
        0
    }

    async fn exited(&self) {}
}
