//! A VMM that serves the contract in tests, with scripted answers.

use std::future::pending;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use slackwater_proto::tonic::{Request, Response, Status, Streaming, async_trait};
use slackwater_proto::vmm::vmm_server::Vmm;
use slackwater_proto::vmm::{
    AbortSaveRequest, AbortSaveResponse, DescribeRequest, DescribeResponse, DirtyTracking, FinishLoadRequest,
    FinishLoadResponse, FinishSaveRequest, FinishSaveResponse, PauseRequest, PauseResponse, QuitRequest,
    QuitResponse, ResumeRequest, ResumeResponse, RunState, SaveProgressRequest, SaveProgressResponse,
    StartLoadRequest, StartLoadResponse, StartSaveRequest, StartSaveResponse,
};
use tokio_stream::wrappers::ReceiverStream;

/// Never answers Pause, and answers Quit without quitting.
#[derive(Clone, Default)]
pub(crate) struct Stub {
    pub(crate) description: DescribeResponse,
    pub(crate) loaded: Arc<Mutex<Vec<u8>>>,
}

impl Stub {
    /// A twin without devices.
    pub(crate) fn incoming() -> Self {
        Self::new(RunState::Incoming)
    }

    /// A VMM whose VM runs, without devices.
    pub(crate) fn running() -> Self {
        Self::new(RunState::Running)
    }

    fn new(run_state: RunState) -> Self {
        let description = DescribeResponse {
            run_state: run_state.into(),
            dirty_tracking: DirtyTracking::None.into(),
            vmm: "stub".to_owned(),
            ..DescribeResponse::default()
        };
        Self { description, ..Self::default() }
    }
}

#[async_trait]
impl Vmm for Stub {
    async fn describe(&self, _: Request<DescribeRequest>) -> Result<Response<DescribeResponse>, Status> {
        Ok(Response::new(self.description.clone()))
    }

    type StartSaveStream = ReceiverStream<Result<StartSaveResponse, Status>>;

    async fn start_save(
        &self,
        request: Request<StartSaveRequest>,
    ) -> Result<Response<Self::StartSaveStream>, Status> {
        if request.into_inner().live {
            return Err(Status::failed_precondition("the devices' writes are not tracked"));
        }
        let (sender, receiver) = tokio::sync::mpsc::channel(8);
        for data in ["ra", "", "m"] {
            sender.try_send(Ok(StartSaveResponse { data: Bytes::from_static(data.as_bytes()) })).unwrap();
        }
        sender.try_send(Err(Status::internal("the log broke"))).unwrap();
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn save_progress(
        &self,
        _: Request<SaveProgressRequest>,
    ) -> Result<Response<SaveProgressResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn pause(&self, _: Request<PauseRequest>) -> Result<Response<PauseResponse>, Status> {
        pending().await
    }

    async fn finish_save(
        &self,
        _: Request<FinishSaveRequest>,
    ) -> Result<Response<FinishSaveResponse>, Status> {
        Ok(Response::new(FinishSaveResponse {}))
    }

    async fn abort_save(&self, _: Request<AbortSaveRequest>) -> Result<Response<AbortSaveResponse>, Status> {
        Ok(Response::new(AbortSaveResponse {}))
    }

    async fn start_load(
        &self,
        request: Request<Streaming<StartLoadRequest>>,
    ) -> Result<Response<StartLoadResponse>, Status> {
        let mut stream = request.into_inner();
        while let Some(piece) = stream.message().await? {
            self.loaded.lock().unwrap().extend_from_slice(&piece.data);
        }
        Ok(Response::new(StartLoadResponse {}))
    }

    async fn finish_load(
        &self,
        _: Request<FinishLoadRequest>,
    ) -> Result<Response<FinishLoadResponse>, Status> {
        Err(Status::invalid_argument("17 bytes are missing"))
    }

    async fn resume(&self, _: Request<ResumeRequest>) -> Result<Response<ResumeResponse>, Status> {
        Ok(Response::new(ResumeResponse {}))
    }

    async fn quit(&self, _: Request<QuitRequest>) -> Result<Response<QuitResponse>, Status> {
        Ok(Response::new(QuitResponse {}))
    }
}
