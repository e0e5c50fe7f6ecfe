//! The contract `slackwater.vmm.v1` as this VMM implements it: stop-and-copy only.
//!
//! [`State`] defines which call is legal. A call that changes something is completed even if its caller
//! disconnects. Calls wait for each other; a save and a load run beside them.

mod load;
mod save;

use std::sync::Arc;
use std::time::Instant;

use slackwater_proto::tonic::{Request, Response, Status, Streaming, async_trait};
use slackwater_proto::vmm::vmm_server::Vmm;
use slackwater_proto::vmm::{
    AbortSaveRequest, AbortSaveResponse, DescribeRequest, DescribeResponse, Device, DirtyTracking,
    FinishLoadRequest, FinishLoadResponse, FinishSaveRequest, FinishSaveResponse, PauseRequest,
    PauseResponse, QuitRequest, QuitResponse, RamRange, ResumeRequest, ResumeResponse, RunState,
    SaveProgressRequest, SaveProgressResponse, StartLoadRequest, StartLoadResponse, StartSaveRequest,
};
use tokio::sync::Mutex;
use tokio::task::spawn_blocking;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use self::save::Save;
pub use self::save::SaveStream;
use super::lifecycle::{Call, OutOfOrder, State};
use super::machine_state::MachineState;
use super::ram::GuestRam;
use super::saved::Shape;
use super::vcpu::{Vcpu, VcpuError};

/// The VM that is served.
pub struct Vm {
    /// Its vCPU.
    pub vcpu: Vcpu,
    /// Its RAM.
    pub ram: Arc<GuestRam>,
    /// Its devices, as Describe shows them.
    pub devices: Vec<Device>,
}

/// The service. Clones share the VM.
#[derive(Clone)]
pub struct ReferenceVmm(Arc<Inner>);

struct Inner {
    vm: Vm,
    shape: Shape,
    quit: CancellationToken,
    progress: Mutex<Progress>,
}

struct Progress {
    state: State,
    save: Option<Save>,
    loaded: Option<Arc<MachineState>>,
}

impl ReferenceVmm {
    /// Serves `vm`, which is in `state`. Quit cancels `quit`.
    pub fn new(vm: Vm, state: State, quit: CancellationToken) -> Self {
        let shape = Shape { ram_bytes: vm.ram.bytes(), devices: vm.devices.len() as u32 };
        let progress = Mutex::new(Progress { state, save: None, loaded: None });
        Self(Arc::new(Inner { vm, shape, quit, progress }))
    }

    /// The vCPU.
    pub fn vcpu(&self) -> &Vcpu {
        &self.0.vm.vcpu
    }

    async fn describe(&self) -> DescribeResponse {
        let run_state = match self.0.progress.lock().await.state {
            State::Running | State::Saving { paused: false } => RunState::Running,
            State::Paused | State::Saving { paused: true } | State::Finishing => RunState::Paused,
            State::Incoming | State::Loading | State::Loaded => RunState::Incoming,
        };
        DescribeResponse {
            run_state: run_state.into(),
            devices: self.0.vm.devices.clone(),
            ram: vec![RamRange { gpa: 0, iova: 0, bytes: self.0.shape.ram_bytes }],
            dirty_tracking: DirtyTracking::None.into(),
            vmm: concat!("slackwater-reference-vmm ", env!("CARGO_PKG_VERSION")).to_owned(),
        }
    }

    async fn start_save(self, live: bool) -> Result<SaveStream, Status> {
        let mut progress = self.0.progress.lock().await;
        let next = progress.state.after(Call::StartSave).map_err(out_of_order)?;
        if live {
            return Err(Status::failed_precondition(
                "live is true, expected false: this VMM has no dirty tracking (DIRTY_TRACKING_NONE), \
                 so it sends RAM only after the pause",
            ));
        }
        let inner = Arc::clone(&self.0);
        let ended = || async move {
            let mut progress = inner.progress.lock().await;
            progress.state = progress.state.save_ended();
            progress.save = None;
        };
        let (save, stream) =
            Save::start(Arc::clone(&self.0.vm.ram), self.0.shape, self.0.quit.child_token(), ended);
        progress.save = Some(save);
        progress.state = next;
        Ok(stream)
    }

    async fn save_progress(&self) -> Result<SaveProgressResponse, Status> {
        let progress = self.0.progress.lock().await;
        progress.state.after(Call::SaveProgress).map_err(out_of_order)?;
        let remaining_bytes = progress.save.as_ref().map_or(0, Save::remaining_bytes);
        Ok(SaveProgressResponse { remaining_bytes, dirty_rate_bytes_per_second: 0 })
    }

    async fn pause(self) -> Result<(), Status> {
        let mut progress = self.0.progress.lock().await;
        let next = progress.state.after(Call::Pause).map_err(out_of_order)?;
        self.vcpu().pause().await.map_err(vcpu_error)?;
        progress.state = next;
        Ok(())
    }

    async fn resume(self) -> Result<(), Status> {
        let mut progress = self.0.progress.lock().await;
        let next = progress.state.after(Call::Resume).map_err(out_of_order)?;
        self.vcpu().resume().await.map_err(vcpu_error)?;
        progress.state = next;
        Ok(())
    }

    async fn finish_save(self) -> Result<(), Status> {
        let outcome = {
            let mut progress = self.0.progress.lock().await;
            let next = progress.state.after(Call::FinishSave).map_err(out_of_order)?;
            let machine = self.vcpu().state().await.map_err(vcpu_error)?;
            let Some(save) = progress.save.as_mut() else {
                return Err(Status::internal("a save has begun, but there is none"));
            };
            save.finish(machine);
            let outcome = save.outcome();
            progress.state = next;
            outcome
        };
        Ok(outcome.await?)
    }

    async fn abort_save(self) -> Result<(), Status> {
        let outcome = {
            let progress = self.0.progress.lock().await;
            progress.state.after(Call::AbortSave).map_err(out_of_order)?;
            let Some(save) = progress.save.as_ref() else { return Ok(()) };
            save.abort();
            save.outcome()
        };
        // The save has ended, with any result.
        drop(outcome.await);
        Ok(())
    }

    async fn start_load(self, stream: Streaming<StartLoadRequest>) -> Result<(), Status> {
        {
            let mut progress = self.0.progress.lock().await;
            progress.state = progress.state.after(Call::StartLoad).map_err(out_of_order)?;
        }
        let (feed, intake) = load::channel();
        let loading = tokio::spawn(async move {
            let (ram, shape, since) = (Arc::clone(&self.0.vm.ram), self.0.shape, Instant::now());
            let loaded = spawn_blocking(move || intake.load(shape, &ram)).await;
            let loaded = loaded.unwrap_or_else(|_| Err(Status::internal("the load failed")));
            let mut progress = self.0.progress.lock().await;
            match &loaded {
                Ok(_) => info!(milliseconds = since.elapsed().as_millis(), "a VM was received"),
                Err(status) => warn!(why = status.message(), "the received state is refused"),
            }
            progress.state = progress.state.load_ended(loaded.is_ok());
            progress.loaded = Some(Arc::new(loaded?));
            Ok(())
        });
        feed.forward(stream).await;
        loading.await.unwrap_or_else(|_| Err(Status::internal("the load failed")))
    }

    async fn finish_load(self) -> Result<(), Status> {
        let mut progress = self.0.progress.lock().await;
        let next = progress.state.after(Call::FinishLoad).map_err(out_of_order)?;
        let Some(machine) = progress.loaded.clone() else {
            return Err(Status::internal("a VM has been loaded, but there is none"));
        };
        self.vcpu().restore(machine).await.map_err(vcpu_error)?;
        progress.loaded = None;
        progress.state = next;
        Ok(())
    }

    async fn quit(self) -> Result<(), Status> {
        info!("asked to quit");
        // So that nothing runs any more when this is answered. A vCPU that has ended does not run, either.
        self.vcpu().pause().await.unwrap_or_default();
        self.0.quit.cancel();
        Ok(())
    }
}

fn out_of_order(error: OutOfOrder) -> Status {
    Status::failed_precondition(error.to_string())
}

fn vcpu_error(error: VcpuError) -> Status {
    Status::internal(crate::error_text::with_sources(&error))
}

/// Completes `call`, whether or not its caller still waits.
async fn run_to_completion<T: Send + 'static>(
    call: impl Future<Output = Result<T, Status>> + Send + 'static,
) -> Result<T, Status> {
    tokio::spawn(call).await.unwrap_or_else(|_| Err(Status::internal("the call was interrupted")))
}

#[async_trait]
impl Vmm for ReferenceVmm {
    async fn describe(&self, _: Request<DescribeRequest>) -> Result<Response<DescribeResponse>, Status> {
        Ok(Response::new(ReferenceVmm::describe(self).await))
    }

    type StartSaveStream = SaveStream;

    async fn start_save(&self, request: Request<StartSaveRequest>) -> Result<Response<SaveStream>, Status> {
        let stream = self.clone().start_save(request.into_inner().live).await?;
        Ok(Response::new(stream))
    }

    async fn save_progress(
        &self,
        _: Request<SaveProgressRequest>,
    ) -> Result<Response<SaveProgressResponse>, Status> {
        ReferenceVmm::save_progress(self).await.map(Response::new)
    }

    async fn pause(&self, _: Request<PauseRequest>) -> Result<Response<PauseResponse>, Status> {
        run_to_completion(self.clone().pause()).await?;
        Ok(Response::new(PauseResponse {}))
    }

    async fn finish_save(
        &self,
        _: Request<FinishSaveRequest>,
    ) -> Result<Response<FinishSaveResponse>, Status> {
        run_to_completion(self.clone().finish_save()).await?;
        Ok(Response::new(FinishSaveResponse {}))
    }

    async fn abort_save(&self, _: Request<AbortSaveRequest>) -> Result<Response<AbortSaveResponse>, Status> {
        run_to_completion(self.clone().abort_save()).await?;
        Ok(Response::new(AbortSaveResponse {}))
    }

    async fn start_load(
        &self,
        request: Request<Streaming<StartLoadRequest>>,
    ) -> Result<Response<StartLoadResponse>, Status> {
        // Not to completion: if the caller disconnects, the rest of the state does not arrive.
        self.clone().start_load(request.into_inner()).await?;
        Ok(Response::new(StartLoadResponse {}))
    }

    async fn finish_load(
        &self,
        _: Request<FinishLoadRequest>,
    ) -> Result<Response<FinishLoadResponse>, Status> {
        run_to_completion(self.clone().finish_load()).await?;
        Ok(Response::new(FinishLoadResponse {}))
    }

    async fn resume(&self, _: Request<ResumeRequest>) -> Result<Response<ResumeResponse>, Status> {
        run_to_completion(self.clone().resume()).await?;
        Ok(Response::new(ResumeResponse {}))
    }

    async fn quit(&self, _: Request<QuitRequest>) -> Result<Response<QuitResponse>, Status> {
        run_to_completion(self.clone().quit()).await?;
        Ok(Response::new(QuitResponse {}))
    }
}

#[cfg(test)]
mod tests;
