//! A VMM for tests: it enforces the contract's order, records every call in a log that others may share, and
//! fails on demand.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::{StreamExt, stream};
use parking_lot::Mutex;
use slackwater_handover::policy::Driver;
use slackwater_handover::state::MigrationState;
use slackwater_proto::tonic::{Code, async_trait};
use tokio::sync::{Notify, mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;

use super::budget::{Budget, Copying};
use super::{Description, DirtyTracking, LoadStream, RunState, SaveStreams, Vmm, VmmDevice, VmmError};
use crate::vfio::worker::DeviceHandle;

/// Lines in the order in which they were added. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct SharedLog(Arc<Mutex<Vec<String>>>);

impl SharedLog {
    /// Adds a line.
    pub fn add(&self, line: impl Into<String>) {
        self.0.lock().push(line.into());
    }

    /// All lines so far.
    pub fn lines(&self) -> Vec<String> {
        self.0.lock().clone()
    }
}

/// A fake VMM. Its calls are logged as `<name> <call>`, with the calls in snake case: `vm pause`.
pub struct FakeVmm {
    name: String,
    log: SharedLog,
    inner: Mutex<Inner>,
    exit: watch::Sender<bool>,
}

/// How a call gets no answer, although the process lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// The connection breaks, and the VMM has not carried the call out.
    Before,
    /// The connection breaks, and the VMM has carried the call out.
    After,
    /// The deadline passes, and the VMM has not carried the call out.
    Silent,
}

struct Inner {
    run_state: RunState,
    devices: Vec<VmmDevice>,
    /// The pieces of a save.
    state: Vec<Bytes>,
    saving: Option<mpsc::Sender<Result<Bytes, VmmError>>>,
    loaded: Option<Bytes>,
    failures: HashSet<&'static str>,
    hangs: HashMap<&'static str, Arc<Notify>>,
    /// Calls that will get no answer.
    cuts: HashMap<&'static str, VecDeque<Cut>>,
    /// Devices that it drives itself, as QEMU does.
    driven: Vec<DeviceHandle>,
}

impl FakeVmm {
    /// A VMM whose VM runs, and whose save gives `state`.
    pub fn running(name: &str, log: SharedLog, state: Vec<Bytes>) -> Self {
        Self::new(name, log, RunState::Running, state)
    }

    /// A twin that waits for its state.
    pub fn incoming(name: &str, log: SharedLog) -> Self {
        Self::new(name, log, RunState::Incoming, Vec::new())
    }

    fn new(name: &str, log: SharedLog, run_state: RunState, state: Vec<Bytes>) -> Self {
        let inner = Inner {
            run_state,
            devices: Vec::new(),
            state,
            saving: None,
            loaded: None,
            failures: HashSet::new(),
            hangs: HashMap::new(),
            cuts: HashMap::new(),
            driven: Vec::new(),
        };
        Self { name: name.to_owned(), log, inner: Mutex::new(inner), exit: watch::Sender::new(false) }
    }

    /// Gives the VM these devices.
    pub fn with_devices(self, names: &[&str]) -> Self {
        let device = |(number, name): (i32, &&str)| VmmDevice {
            name: (*name).to_owned(),
            descriptor: 10 + number,
            guest_address: format!("fake {number}"),
        };
        self.inner.lock().devices = (0..).zip(names).map(device).collect();
        self
    }

    /// Makes it drive these devices itself, as QEMU does.
    pub fn drive(&self, devices: &[DeviceHandle]) {
        self.inner.lock().driven = devices.to_vec();
    }

    /// Takes the devices that it drives to a state, one after the other. A refusal shows in the state of the
    /// device.
    async fn lead(&self, to: MigrationState) {
        let devices = self.inner.lock().driven.clone();
        for device in devices {
            let _ = device.set_state(to).await;
        }
    }

    /// Makes every call of this name fail, until [`FakeVmm::mend`]: `pause`, `finish_save`, ...
    pub fn fail(&self, call: &'static str) {
        self.inner.lock().failures.insert(call);
    }

    /// Lets calls of this name succeed again.
    pub fn mend(&self, call: &'static str) {
        self.inner.lock().failures.remove(call);
    }

    /// Makes every call of this name wait, after it has been logged, for a notification.
    pub fn hang(&self, call: &'static str) -> Arc<Notify> {
        let release = Arc::new(Notify::new());
        self.inner.lock().hangs.insert(call, Arc::clone(&release));
        release
    }

    /// Leaves the next calls of this name without an answer, one after the other.
    pub fn cut(&self, call: &'static str, cuts: &[Cut]) {
        self.inner.lock().cuts.entry(call).or_default().extend(cuts);
    }

    /// The error of a call that gets no answer: before it is carried out, or after.
    fn unanswered(&self, call: &'static str, carried_out: bool) -> Result<(), VmmError> {
        let mut inner = self.inner.lock();
        let Some(cuts) = inner.cuts.get_mut(call) else { return Ok(()) };
        if cuts.front().is_none_or(|cut| (*cut == Cut::After) != carried_out) {
            return Ok(());
        }
        match cuts.pop_front() {
            None => Ok(()),
            Some(Cut::Silent) => Err(VmmError::Deadline { call, limit: Duration::from_secs(10) }),
            Some(Cut::Before | Cut::After) => {
                Err(VmmError::Lost { call, message: "the connection broke".to_owned() })
            }
        }
    }

    /// Ends its process: every later call is lost, and so is a save under way.
    pub fn kill(&self) {
        self.inner.lock().saving = None;
        self.exit.send_replace(true);
    }

    /// Whether the VM runs.
    pub fn run_state(&self) -> RunState {
        self.inner.lock().run_state
    }

    /// The state that a twin has loaded, once its load has ended.
    pub fn loaded(&self) -> Option<Bytes> {
        self.inner.lock().loaded.clone()
    }

    /// Logs the call; then waits, fails or passes, as scripted.
    async fn enter(&self, call: &'static str) -> Result<(), VmmError> {
        self.log.add(format!("{} {call}", self.name));
        let lost = || VmmError::Lost { call, message: "its process has ended".to_owned() };
        if *self.exit.borrow() {
            return Err(lost());
        }
        let hang = self.inner.lock().hangs.get(call).cloned();
        if let Some(release) = hang {
            tokio::select! {
                () = release.notified() => {}
                () = self.exited() => return Err(lost()),
            }
        }
        if self.inner.lock().failures.contains(call) {
            return Err(refusal(call, Code::Internal, "the test says so"));
        }
        self.unanswered(call, false)
    }

    /// Refuses a call out of order.
    fn require(&self, call: &'static str, state: RunState) -> Result<(), VmmError> {
        let now = self.run_state();
        if now == state {
            return Ok(());
        }
        Err(refusal(call, Code::FailedPrecondition, &format!("the VM is {now:?}, and must be {state:?}")))
    }
}

fn refusal(call: &'static str, code: Code, message: &str) -> VmmError {
    VmmError::Refused { call, code, message: message.to_owned() }
}

#[async_trait]
impl Vmm for FakeVmm {
    async fn describe(&self) -> Result<Description, VmmError> {
        self.enter("describe").await?;
        let inner = self.inner.lock();
        Ok(Description {
            run_state: inner.run_state,
            devices: inner.devices.clone(),
            ram_bytes: inner.state.iter().map(|piece| piece.len() as u64).sum(),
            dirty_tracking: DirtyTracking::None,
            vmm: "fake".to_owned(),
            blocked: Vec::new(),
        })
    }

    async fn start_save(&self, live: bool, _budget: Budget) -> Result<SaveStreams, VmmError> {
        self.enter("start_save").await?;
        if live {
            return Err(refusal("start_save", Code::FailedPrecondition, "dirty pages are not tracked"));
        }
        let (pieces, stream) = mpsc::channel(1);
        self.inner.lock().saving = Some(pieces);
        Ok(vec![ReceiverStream::new(stream).boxed()])
    }

    async fn converged(&self, _copy: Copying) -> Result<(), VmmError> {
        self.enter("converged").await?;
        self.inner.lock().run_state = RunState::Paused;
        self.lead(MigrationState::StopCopy).await;
        Ok(())
    }

    async fn pause(&self) -> Result<(), VmmError> {
        self.enter("pause").await?;
        if self.driver() == Driver::Vmm {
            return Ok(());
        }
        self.require("pause", RunState::Running)?;
        self.inner.lock().run_state = RunState::Paused;
        Ok(())
    }

    async fn finish_save(&self) -> Result<(), VmmError> {
        self.enter("finish_save").await?;
        self.require("finish_save", RunState::Paused)?;
        let (pieces, state) = {
            let mut inner = self.inner.lock();
            (inner.saving.take(), inner.state.clone())
        };
        let pieces =
            pieces.ok_or_else(|| refusal("finish_save", Code::FailedPrecondition, "no save is under way"))?;
        for piece in state {
            if pieces.send(Ok(piece)).await.is_err() {
                return Err(refusal("finish_save", Code::Cancelled, "the state is not read"));
            }
        }
        Ok(())
    }

    async fn abort_save(&self) -> Result<(), VmmError> {
        self.enter("abort_save").await?;
        let saving = self.inner.lock().saving.take();
        if let Some(pieces) = saving {
            // The reader may have gone.
            let _ = pieces.try_send(Err(refusal("start_save", Code::Aborted, "the save was aborted")));
            if self.driver() == Driver::Vmm {
                self.lead(MigrationState::Running).await;
                self.inner.lock().run_state = RunState::Running;
            }
        }
        self.unanswered("abort_save", true)
    }

    /// One stream after the other.
    async fn start_load(&self, state: Vec<LoadStream>) -> Result<(), VmmError> {
        self.enter("start_load").await?;
        self.require("start_load", RunState::Incoming)?;
        self.lead(MigrationState::Resuming).await;
        let mut all = BytesMut::new();
        let mut state = stream::iter(state).flatten();
        loop {
            tokio::select! {
                piece = state.next() => match piece {
                    Some(piece) => all.extend_from_slice(&piece),
                    None => break,
                },
                () = self.exited() => {
                    return Err(VmmError::Lost { call: "start_load", message: "its process has ended".to_owned() });
                }
            }
        }
        self.inner.lock().loaded = Some(all.freeze());
        self.log.add(format!("{} loaded", self.name));
        Ok(())
    }

    async fn finish_load(&self) -> Result<(), VmmError> {
        self.enter("finish_load").await?;
        self.require("finish_load", RunState::Incoming)?;
        let mut inner = self.inner.lock();
        if inner.loaded.is_none() {
            return Err(refusal("finish_load", Code::FailedPrecondition, "nothing has been loaded"));
        }
        inner.run_state = RunState::Paused;
        Ok(())
    }

    async fn resume(&self) -> Result<(), VmmError> {
        self.enter("resume").await?;
        if self.driver() == Driver::Vmm && self.run_state() == RunState::Running {
            return Ok(());
        }
        self.require("resume", RunState::Paused)?;
        if self.inner.lock().saving.is_some() {
            return Err(refusal("resume", Code::FailedPrecondition, "a save is under way"));
        }
        self.lead(MigrationState::Running).await;
        self.inner.lock().run_state = RunState::Running;
        self.unanswered("resume", true)
    }

    async fn quit(&self) -> Result<(), VmmError> {
        self.enter("quit").await?;
        self.kill();
        Ok(())
    }

    fn driver(&self) -> Driver {
        if self.inner.lock().driven.is_empty() { Driver::Agent } else { Driver::Vmm }
    }

    fn pid(&self) -> u32 {
        0
    }

    async fn exited(&self) {
        let mut exit = self.exit.subscribe();
        // The sender lives as long as this borrow.
        let _ = exit.wait_for(|exited| *exited).await;
    }
}

#[cfg(test)]
mod tests {

    use super::*;

    #[tokio::test]
    async fn what_one_fake_saves_another_loads_in_the_contracts_order() {
        let log = SharedLog::default();
        let state = vec![Bytes::from_static(b"ra"), Bytes::from_static(b"m")];
        let (vm, twin) = (FakeVmm::running("vm", log.clone(), state), FakeVmm::incoming("twin", log.clone()));

        let stream = vm.start_save(false, Budget::default()).await.unwrap().swap_remove(0);
        assert!(matches!(vm.finish_save().await, Err(VmmError::Refused { call: "finish_save", .. })));
        vm.pause().await.unwrap();
        let (saved, finished) = tokio::join!(stream.collect::<Vec<_>>(), vm.finish_save());
        finished.unwrap();
        let pieces: Vec<Bytes> = saved.into_iter().map(Result::unwrap).collect();
        twin.start_load(vec![stream::iter(pieces).boxed()]).await.unwrap();
        assert!(matches!(twin.resume().await, Err(VmmError::Refused { call: "resume", .. })));
        twin.finish_load().await.unwrap();
        twin.resume().await.unwrap();

        assert_eq!(twin.loaded().unwrap(), "ram");
        assert_eq!((vm.run_state(), twin.run_state()), (RunState::Paused, RunState::Running));
        assert_eq!(
            log.lines().join(", "),
            "vm start_save, vm finish_save, vm pause, vm finish_save, twin start_load, \
            twin loaded, twin resume, twin finish_load, twin resume"
        );
    }

    #[tokio::test]
    async fn scripted_failures_hangs_and_the_end_of_the_process_are_seen_by_the_caller() {
        let vm = Arc::new(FakeVmm::running("vm", SharedLog::default(), Vec::new()));
        vm.fail("pause");
        assert_eq!(vm.pause().await.unwrap_err().to_string(), "the VMM refused pause: the test says so");
        vm.mend("pause");
        let release = vm.hang("pause");
        let pausing = tokio::spawn({
            let vm = Arc::clone(&vm);
            async move { vm.pause().await }
        });
        release.notify_one();
        pausing.await.unwrap().unwrap();

        let mut stream = vm.start_save(false, Budget::default()).await.unwrap().swap_remove(0);
        vm.abort_save().await.unwrap();
        let ended = stream.next().await.unwrap().unwrap_err().to_string();
        assert_eq!(ended, "the VMM refused start_save: the save was aborted");
        assert!(stream.next().await.is_none());

        vm.quit().await.unwrap();
        vm.exited().await;
        let lost = vm.resume().await.unwrap_err().to_string();
        assert_eq!(lost, "the VMM was lost during resume: its process has ended");
    }
}
