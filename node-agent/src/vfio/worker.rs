//! One thread per device, since the calls to a device block; and an async handle to it.
//!
//! ```text
//!   DeviceHandle ──┐
//!   DeviceHandle ──┼── one call at a time ──▶ thread vfio-<name> ── owns ──▶ Box<dyn Device>
//!   DeviceHandle ──┘◀──────── answer ────────┘
//! ```
//!
//! - Calls are carried out in the order in which they come; each has ended before the next begins.
//! - No call blocks the async runtime, whatever the device does. The caller sets a deadline by dropping the
//!   future.
//! - A call whose future is dropped before the call has begun is not carried out. One that has begun is
//!   finished, and the state that the device is then in must be read. Data that was read for a caller that
//!   has gone is kept for the next read: it is never lost.
//! - Each handle sees since when the device has been in a call: [`CallWatch`]. A call that takes longer than
//!   [`HANGS_AFTER`] counts as one that hangs. It may return all the same.
//! - The thread drops the device and ends when the last handle is dropped, or by [`DeviceHandle::release`];
//!   dropping a handle does not wait for that. A device that hangs keeps its thread.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use slackwater_handover::state::{Features, MigrationState, opens_data};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, timeout_at};

use super::device::{DataRead, Device, PrecopyInfo};
use super::error::{DeviceError, SetStateError};
use crate::host::clock::monotonic_ns;

/// A call to a device that takes longer than this hangs. Drivers take hundreds of milliseconds at worst
/// (mlx5); the rest is for a loaded node.
pub const HANGS_AFTER: Duration = Duration::from_secs(20);

/// A call to a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceCall {
    /// A state is requested, and read back.
    SetState(MigrationState),
    /// Its state is read.
    ReadState,
    /// Data is read.
    ReadData,
    /// Data is written.
    WriteData,
    /// Its data descriptor is closed.
    CloseData,
    /// The bytes of its state are estimated, or what is left to pre-copy is asked for.
    Estimate,
    /// Its interrupt line is signalled.
    TriggerIntx,
    /// It is reset.
    Reset,
    /// Its own descriptor is closed.
    Close,
}

impl fmt::Display for DeviceCall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SetState(to) => write!(f, "the change to {to}"),
            Self::ReadState => f.write_str("reading its state"),
            Self::ReadData => f.write_str("reading its data"),
            Self::WriteData => f.write_str("writing its data"),
            Self::CloseData => f.write_str("closing its data stream"),
            Self::Estimate => f.write_str("estimating its data"),
            Self::TriggerIntx => f.write_str("signalling its INTx"),
            Self::Reset => f.write_str("its reset"),
            Self::Close => f.write_str("closing it"),
        }
    }
}

/// A call that has not returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct InFlight {
    call: DeviceCall,
    since: Instant,
}

/// A call to a device that takes too long.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("device {device} hangs: it has not returned from {call} for {} s", for_how_long.as_secs())]
pub struct Hang {
    /// The device.
    pub device: Arc<str>,
    /// The call.
    pub call: DeviceCall,
    /// For how long, when that was noticed.
    pub for_how_long: Duration,
    since: Instant,
}

/// Watches the calls to one device, and does not keep it open.
#[derive(Clone, Debug)]
pub struct CallWatch {
    name: Arc<str>,
    hangs_after: Duration,
    in_flight: watch::Receiver<Option<InFlight>>,
}

impl CallWatch {
    /// The device's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    fn hang(&self, InFlight { call, since }: InFlight) -> Option<Hang> {
        let for_how_long = since.elapsed();
        let hang = || Hang { device: Arc::clone(&self.name), call, for_how_long, since };
        (for_how_long >= self.hangs_after).then(hang)
    }

    /// The call that hangs now; none to a device that has been closed.
    #[must_use]
    pub fn hangs_now(&self) -> Option<Hang> {
        let in_flight = *self.in_flight.borrow();
        // The last call to a device is to close it, and it has returned when nothing sends any more.
        if self.is_closed() {
            return None;
        }
        in_flight.and_then(|call| self.hang(call))
    }

    /// Whether the device has been closed.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.in_flight.has_changed().is_err()
    }

    /// Returns when the device has been closed.
    pub async fn closed(mut self) {
        while self.in_flight.changed().await.is_ok() {}
    }

    /// Returns when a call hangs; `None`: the device has been closed. May be cancelled.
    pub async fn hangs(&mut self) -> Option<Hang> {
        loop {
            let call = (*self.in_flight.wait_for(Option::is_some).await.ok()?)?;
            match timeout_at(call.since + self.hangs_after, self.in_flight.changed()).await {
                Ok(changed) => changed.ok()?,
                Err(_) => {
                    if let Some(hang) = self.hang(call) {
                        return Some(hang);
                    }
                }
            }
        }
    }

    /// What a future that makes calls to the device yields, unless one of them hangs before. The future is
    /// dropped then: a call of it that has begun is finished, and no other begins.
    ///
    /// # Errors
    /// [`Hang`].
    pub async fn unless_it_hangs<T>(mut self, calls: impl Future<Output = T>) -> Result<T, Hang> {
        let hangs = async {
            match self.hangs().await {
                Some(hang) => hang,
                // It has been closed, and every call says so.
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            done = calls => Ok(done),
            hang = hangs => Err(hang),
        }
    }

    /// Returns when that call has returned, or the device has been closed.
    pub async fn returns(&mut self, hang: &Hang) {
        let still = |now: &Option<InFlight>| now.is_some_and(|now| now.since == hang.since);
        let _ = self.in_flight.wait_for(|now| !still(now)).await;
    }
}

/// A state change that was read back, with its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reached {
    /// The state before.
    pub from: MigrationState,
    /// The state now.
    pub to: MigrationState,
    /// How long it took, reading back included, waiting for earlier calls not.
    pub took: Duration,
    /// When it had been read back: [`monotonic_ns`].
    pub at_ns: u64,
}

/// A device that is served by a thread. Clones are handles to the same device.
#[derive(Clone, Debug)]
pub struct DeviceHandle {
    name: Arc<str>,
    features: Features,
    calls: mpsc::Sender<Message>,
    watch: CallWatch,
}

/// Sent by a handle to the thread.
enum Message {
    Call(DeviceCall, Box<dyn FnOnce(&mut Served) + Send>),
    Release(oneshot::Sender<()>),
}

/// What the thread owns.
struct Served {
    device: Box<dyn Device>,
    unclaimed: Unclaimed,
}

/// Data that was read from the open stream for a caller that had gone, in the order of the stream. Each
/// stream has its own queue, so that data that comes back late does not get into another stream.
type Unclaimed = Arc<Mutex<VecDeque<Bytes>>>;

/// Data on its way to the caller. If the caller drops it unclaimed, it goes back to the head of the queue.
struct InTransit {
    data: Option<Bytes>,
    unclaimed: Unclaimed,
}

impl InTransit {
    fn claim(mut self) -> Bytes {
        self.data.take().unwrap_or_default()
    }
}

impl Drop for InTransit {
    fn drop(&mut self) {
        if let Some(data) = self.data.take() {
            self.unclaimed.lock().push_front(data);
        }
    }
}

/// A [`DataRead`] on its way to the caller.
enum Answer {
    Data(InTransit),
    Drained,
    End,
}

impl DeviceHandle {
    /// Starts the thread.
    ///
    /// # Errors
    /// If the system has no thread to give.
    pub fn serve(device: Box<dyn Device>) -> std::io::Result<Self> {
        let name: Arc<str> = device.name().into();
        let features = device.features();
        let (calls, mut called) = mpsc::channel(1);
        let mut served = Served { device, unclaimed: Unclaimed::default() };
        let (now, in_flight) = watch::channel(None);
        let begin = |now: &watch::Sender<Option<InFlight>>, call| {
            now.send_replace(Some(InFlight { call, since: Instant::now() }));
        };
        thread::Builder::new().name(format!("vfio-{name}")).spawn(move || {
            while let Some(message) = called.blocking_recv() {
                match message {
                    Message::Call(name, call) => {
                        begin(&now, name);
                        call(&mut served);
                        now.send_replace(None);
                    }
                    Message::Release(done) => {
                        begin(&now, DeviceCall::Close);
                        drop(served);
                        drop(called);
                        // The caller may have gone; the device is released all the same.
                        let _ = done.send(());
                        return;
                    }
                }
            }
            begin(&now, DeviceCall::Close);
            drop(served);
        })?;
        let watch = CallWatch { name: Arc::clone(&name), hangs_after: HANGS_AFTER, in_flight };
        Ok(Self { name, features, calls, watch })
    }

    /// As [`DeviceHandle::serve`], but a call counts as one that hangs after another time.
    ///
    /// # Errors
    /// The same.
    #[cfg(test)]
    pub fn serve_impatiently(device: Box<dyn Device>, hangs_after: Duration) -> std::io::Result<Self> {
        let mut handle = Self::serve(device)?;
        handle.watch.hangs_after = hangs_after;
        Ok(handle)
    }

    /// A view of the calls to the device.
    #[must_use]
    pub fn watch(&self) -> CallWatch {
        self.watch.clone()
    }

    /// The device's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What the driver advertised when the device was opened.
    #[must_use]
    pub fn features(&self) -> Features {
        self.features
    }

    /// The state, read from the kernel now.
    ///
    /// # Errors
    /// As [`Device::state`], and [`DeviceError::WorkerEnded`].
    pub async fn state(&self) -> Result<MigrationState, DeviceError> {
        self.call(DeviceCall::ReadState, |served| served.device.state()).await
    }

    /// Requests a state once, from whatever state the device is in, and reads it back, also after a refusal.
    ///
    /// # Errors
    /// As [`Device::set_state`], and [`SetStateError::WorkerEnded`].
    pub async fn set_state(&self, to: MigrationState) -> Result<Reached, SetStateError> {
        self.change(None, to).await
    }

    /// The same, only if the device is where it was left.
    ///
    /// # Errors
    /// As [`Device::set_state_from`], and [`SetStateError::WorkerEnded`].
    pub async fn set_state_from(
        &self,
        left_in: MigrationState,
        to: MigrationState,
    ) -> Result<Reached, SetStateError> {
        self.change(Some(left_in), to).await
    }

    async fn change(
        &self,
        left_in: Option<MigrationState>,
        to: MigrationState,
    ) -> Result<Reached, SetStateError> {
        let answer = self.answer(DeviceCall::SetState(to), move |served| served.set_state(left_in, to)).await;
        answer.unwrap_or_else(|| Err(SetStateError::WorkerEnded { device: self.name.to_string(), asked: to }))
    }

    /// Reads from the data stream: at most `max_bytes`, and at most [`super::device::MAX_READ_BYTES`]. The
    /// bytes are handed on without a copy. May be cancelled: the next read then gives what this one has read.
    ///
    /// # Errors
    /// As [`Device::read_data`], and [`DeviceError::WorkerEnded`].
    pub async fn read_data(&self, max_bytes: usize) -> Result<DataRead, DeviceError> {
        Ok(match self.call(DeviceCall::ReadData, move |served| served.read_data(max_bytes)).await? {
            // Claimed in the same poll in which it arrives: from here on it is the caller's.
            Answer::Data(data) => DataRead::Data(data.claim()),
            Answer::Drained => DataRead::Drained,
            Answer::End => DataRead::End,
        })
    }

    /// Writes all of `data` to the data stream in RESUMING. If it is cancelled, whether `data` was written is
    /// unknown: the load has failed then.
    ///
    /// # Errors
    /// As [`Device::write_data`], and [`DeviceError::WorkerEnded`].
    pub async fn write_data(&self, data: Bytes) -> Result<(), DeviceError> {
        self.call(DeviceCall::WriteData, move |served| served.device.write_data(&data)).await
    }

    /// Closes the data stream, if one is open.
    ///
    /// # Errors
    /// [`DeviceError::WorkerEnded`].
    pub async fn close_data(&self) -> Result<(), DeviceError> {
        self.call(DeviceCall::CloseData, |served| {
            served.unclaimed = Unclaimed::default();
            served.device.close_data();
            Ok(())
        })
        .await
    }

    /// The driver's estimate of the bytes that STOP_COPY would give if it were entered now. None: it does not
    /// know the question.
    ///
    /// # Errors
    /// As [`Device::estimate_bytes`], and [`DeviceError::WorkerEnded`].
    pub async fn estimate_bytes(&self) -> Result<Option<u64>, DeviceError> {
        self.call(DeviceCall::Estimate, |served| served.device.estimate_bytes()).await
    }

    /// What is left to pre-copy.
    ///
    /// # Errors
    /// As [`Device::precopy_info`], and [`DeviceError::WorkerEnded`].
    pub async fn precopy_info(&self) -> Result<PrecopyInfo, DeviceError> {
        self.call(DeviceCall::Estimate, |served| served.device.precopy_info()).await
    }

    /// Signals the device's INTx to the VMM. False: the VMM listens for none.
    ///
    /// # Errors
    /// As [`Device::trigger_intx`], and [`DeviceError::WorkerEnded`].
    pub async fn trigger_intx(&self) -> Result<bool, DeviceError> {
        self.call(DeviceCall::TriggerIntx, |served| served.device.trigger_intx()).await
    }

    /// Resets the device, which leads to RUNNING from every state, and reads that back.
    ///
    /// # Errors
    /// As [`Device::reset`], and [`DeviceError::WorkerEnded`].
    pub async fn reset(&self) -> Result<(), DeviceError> {
        self.call(DeviceCall::Reset, |served| {
            served.unclaimed = Unclaimed::default();
            served.device.reset()
        })
        .await
    }

    /// Drops the device after the calls that came before, and returns when that is done: its descriptor is
    /// closed then. The device's state does not change. Later calls by other handles fail with `WorkerEnded`.
    pub async fn release(self) {
        let (done, released) = oneshot::channel();
        if self.calls.send(Message::Release(done)).await.is_ok() {
            // It fails if the thread has ended otherwise, which drops the device, too.
            let _ = released.await;
        }
    }

    async fn call<T: Send + 'static>(
        &self,
        name: DeviceCall,
        call: impl FnOnce(&mut Served) -> Result<T, DeviceError> + Send + 'static,
    ) -> Result<T, DeviceError> {
        let ended = || Err(DeviceError::WorkerEnded { device: self.name.to_string() });
        self.answer(name, call).await.unwrap_or_else(ended)
    }

    /// Runs `call` on the thread, unless the caller has gone before its turn. `None`: the thread has ended.
    async fn answer<T: Send + 'static>(
        &self,
        name: DeviceCall,
        call: impl FnOnce(&mut Served) -> T + Send + 'static,
    ) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        let call = Box::new(move |served: &mut Served| {
            if !reply.is_closed() {
                // If the caller has gone meanwhile, the answer is dropped here.
                let _ = reply.send(call(served));
            }
        });
        self.calls.send(Message::Call(name, call)).await.ok()?;
        answer.await.ok()
    }
}

impl Served {
    fn set_state(
        &mut self,
        left_in: Option<MigrationState>,
        to: MigrationState,
    ) -> Result<Reached, SetStateError> {
        let started_ns = monotonic_ns();
        let result = self.device.set_state_from(left_in, to);
        let at_ns = monotonic_ns();
        // Unclaimed data belongs to the stream that it came from.
        let same_stream = match &result {
            Ok(change) => change.to.is_saving() && !opens_data(change.from, change.to),
            Err(error) => error.found().is_some_and(MigrationState::is_saving),
        };
        if !same_stream {
            self.unclaimed = Unclaimed::default();
        }
        let took = Duration::from_nanos(at_ns.saturating_sub(started_ns));
        result.map(|change| Reached { from: change.from, to: change.to, took, at_ns })
    }

    fn read_data(&mut self, max_bytes: usize) -> Result<Answer, DeviceError> {
        let unclaimed = self.unclaimed.lock().pop_front();
        let data = match unclaimed {
            Some(mut data) => {
                if data.len() > max_bytes {
                    self.unclaimed.lock().push_front(data.split_off(max_bytes));
                }
                data
            }
            None => match self.device.read_data(max_bytes)? {
                DataRead::Data(data) => data,
                DataRead::Drained => return Ok(Answer::Drained),
                DataRead::End => return Ok(Answer::End),
            },
        };
        Ok(Answer::Data(InTransit { data: Some(data), unclaimed: Arc::clone(&self.unclaimed) }))
    }
}

#[cfg(test)]
#[path = "worker_tests.rs"]
mod tests;
