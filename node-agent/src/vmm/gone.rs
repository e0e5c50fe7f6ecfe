//! A VMM whose process has ended, for an agent that restarted meanwhile.

use slackwater_proto::tonic::async_trait;

use super::budget::Budget;
use super::{Description, LoadStream, SaveStreams, Vmm, VmmError};

/// Every call fails: there is no process.
#[derive(Clone, Copy, Debug)]
pub struct GoneVmm;

fn lost<T>(call: &'static str) -> Result<T, VmmError> {
    Err(VmmError::Lost { call, message: "its process has ended".to_owned() })
}

#[async_trait]
impl Vmm for GoneVmm {
    async fn describe(&self) -> Result<Description, VmmError> {
        lost("Describe")
    }

    async fn start_save(&self, _live: bool, _budget: Budget) -> Result<SaveStreams, VmmError> {
        lost("StartSave")
    }

    async fn pause(&self) -> Result<(), VmmError> {
        lost("Pause")
    }

    async fn finish_save(&self) -> Result<(), VmmError> {
        lost("FinishSave")
    }

    async fn abort_save(&self) -> Result<(), VmmError> {
        lost("AbortSave")
    }

    async fn start_load(&self, _state: Vec<LoadStream>) -> Result<(), VmmError> {
        lost("StartLoad")
    }

    async fn finish_load(&self) -> Result<(), VmmError> {
        lost("FinishLoad")
    }

    async fn resume(&self) -> Result<(), VmmError> {
        lost("Resume")
    }

    async fn quit(&self) -> Result<(), VmmError> {
        lost("Quit")
    }

    fn pid(&self) -> u32 {
        0
    }

    async fn exited(&self) {}
}
