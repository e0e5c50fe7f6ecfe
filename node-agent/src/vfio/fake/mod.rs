//! A device in memory: it follows the state table for its features, records its calls, and fails as scripted.
//!
//! ```
//! # use slackwater_node_agent::vfio::device::Device;
//! # use slackwater_node_agent::vfio::fake::{CallLog, FakeDevice};
//! # use slackwater_handover::state::{Features, MigrationState};
//! let log = CallLog::new();
//! let mut vf0 = FakeDevice::new("vf0").with_features(Features::STOP_COPY).log(&log).blob("state");
//! vf0.set_state(MigrationState::StopCopy)?;
//! assert_eq!(log.changes(), ["vf0 asked STOP_COPY", "vf0 reached STOP_COPY"]);
//! # Ok::<(), slackwater_node_agent::vfio::error::SetStateError>(())
//! ```

mod build;
mod gate;
mod log;
mod script;

use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use rustix::io::Errno;
use slackwater_handover::state::{Features, MigrationState, opens_data, path};
use tokio::sync::watch;

pub use self::gate::Gate;
pub use self::log::{Call, CallLog, Entry};
use self::script::Script;
use super::device::{DataRead, Device, MAX_READ_BYTES, PrecopyInfo};
use super::error::DeviceError;
use super::os_error::OsError;

/// The fake device. Made by [`FakeDevice::new`] and the methods that follow it; RUNNING with all features and
/// no data if not configured otherwise.
#[derive(Debug)]
pub struct FakeDevice {
    name: String,
    features: Features,
    log: CallLog,
    script: Script,
    piece_bytes: usize,
    expects_bytes: Option<usize>,
    pre_copy: Bytes,
    blob: Bytes,
    inner: Arc<Mutex<Inner>>,
    alive: watch::Sender<()>,
    states_read: usize,
}

/// What the device is at the moment.
#[derive(Debug)]
struct Inner {
    state: MigrationState,
    stream_open: bool,
    load_failed: bool,
    read: usize,
    written: Vec<u8>,
    loaded: Option<Bytes>,
    /// How often each state was asked for, by its number.
    asked: [usize; 8],
}

impl Inner {
    fn reset(&mut self) {
        self.state = MigrationState::Running;
        self.stream_open = false;
        self.load_failed = false;
    }
}

/// Sees into a fake device that a worker has swallowed.
#[derive(Clone, Debug)]
pub struct FakeWatch {
    inner: Arc<Mutex<Inner>>,
    alive: watch::Receiver<()>,
}

impl FakeWatch {
    /// Where the device stands. Not recorded.
    #[must_use]
    pub fn state(&self) -> MigrationState {
        self.inner.lock().state
    }

    /// What has been written in the RESUMING session so far.
    #[must_use]
    pub fn written(&self) -> Bytes {
        Bytes::copy_from_slice(&self.inner.lock().written)
    }

    /// What the device had been given when it last left RESUMING for STOP.
    #[must_use]
    pub fn loaded(&self) -> Option<Bytes> {
        self.inner.lock().loaded.clone()
    }

    /// Returns when the device has been dropped.
    pub async fn dropped(&self) {
        // Nothing is ever sent: what ends the wait is that the sender is gone.
        let _ = self.alive.clone().changed().await;
    }

    /// How many bytes of the saving session have been read.
    #[must_use]
    pub fn read_bytes(&self) -> usize {
        self.inner.lock().read
    }
}

/// How it behaves.
impl FakeDevice {
    fn record(&self, call: Call) {
        let state = self.inner.lock().state;
        self.log.add(&self.name, call, state);
    }

    /// Goes the way to `to`, arc by arc, and stops where it goes wrong.
    fn walk(&self, to: MigrationState) -> Result<(), Errno> {
        let mut inner = self.inner.lock();
        let count = match inner.asked.get_mut(to.number() as usize) {
            Some(count) => {
                *count += 1;
                *count
            }
            None => 0,
        };
        if let Some(refusal) = self.script.refusal(to, count) {
            inner.state = refusal.left_in.unwrap_or(inner.state);
            return Err(refusal.errno);
        }
        if self.script.pretend == Some(to) {
            return Ok(());
        }
        for next in path(self.features, inner.state, to).map_err(|_| Errno::INVAL)? {
            let from = inner.state;
            if from == MigrationState::Resuming {
                if let Some(errno) = self.script.refuse_load {
                    return Err(errno);
                }
                if self.expects_bytes.is_some_and(|bytes| inner.written.len() < bytes) {
                    return Err(Errno::INVAL);
                }
                inner.loaded = Some(Bytes::copy_from_slice(&inner.written));
            }
            if opens_data(from, next) {
                inner.stream_open = true;
                inner.load_failed = false;
                inner.read = 0;
                inner.written.clear();
            }
            inner.state = next;
        }
        Ok(())
    }

    /// What the saving session has to give next, after `read` bytes: the rest of the pre-copy content, or
    /// else of the blob.
    fn readable(&self, state: MigrationState, read: usize) -> Bytes {
        let end = self.script.ends_after.unwrap_or(usize::MAX);
        let rest = |content: &Bytes, begin: usize| {
            let stop = content.len().min(end.saturating_sub(begin));
            content.slice(read.saturating_sub(begin).min(stop)..stop)
        };
        let early = rest(&self.pre_copy, 0);
        if early.is_empty() && !state.is_pre_copy() { rest(&self.blob, self.pre_copy.len()) } else { early }
    }

    fn read(&self, max_bytes: usize) -> Result<DataRead, DeviceError> {
        let mut inner = self.inner.lock();
        let device = || self.name.clone();
        if !inner.stream_open {
            return Err(DeviceError::NoDataStream { device: device() });
        }
        if !inner.state.is_saving() {
            return Err(DeviceError::ReadData { device: device(), errno: OsError(Errno::BADF) });
        }
        let rest = self.readable(inner.state, inner.read);
        let mut bytes = rest.len().min(max_bytes).min(MAX_READ_BYTES).min(self.piece_bytes);
        if let Some((after, errno)) = self.script.read_fails_after {
            if inner.read >= after {
                return Err(DeviceError::ReadData { device: device(), errno: OsError(errno) });
            }
            bytes = bytes.min(after - inner.read);
        }
        if bytes == 0 && inner.state.is_pre_copy() && self.script.dirties > 0 {
            return Ok(DataRead::Data(Bytes::from(vec![b'~'; self.script.dirties])));
        }
        inner.read += bytes;
        if self.script.reset_after_read.is_some_and(|after| inner.read >= after) {
            inner.reset();
        }
        Ok(match bytes {
            0 if inner.state.is_pre_copy() => DataRead::Drained,
            0 => DataRead::End,
            _ => DataRead::Data(rest.slice(..bytes)),
        })
    }

    fn write(&self, data: &[u8]) -> Result<(), DeviceError> {
        let mut inner = self.inner.lock();
        if !inner.stream_open {
            return Err(DeviceError::NoDataStream { device: self.name.clone() });
        }
        let room = |limit: Option<usize>| {
            limit.map_or(usize::MAX, |limit| limit.saturating_sub(inner.written.len()))
        };
        let fault = self.script.write_fails_after;
        let (taken, errno) = if inner.state != MigrationState::Resuming {
            (0, Errno::BADF)
        } else if data.len() > room(fault.map(|(after, _)| after)) {
            (room(fault.map(|(after, _)| after)), fault.map_or(Errno::IO, |(_, errno)| errno))
        } else if data.len() > room(self.expects_bytes) {
            (0, Errno::NOMEM)
        } else {
            inner.written.extend_from_slice(data);
            return Ok(());
        };
        inner.written.extend_from_slice(data.get(..taken).unwrap_or_default());
        inner.load_failed = true;
        Err(DeviceError::WriteData {
            device: self.name.clone(),
            taken,
            bytes: data.len(),
            errno: OsError(errno),
        })
    }
}

impl Device for FakeDevice {
    fn name(&self) -> &str {
        &self.name
    }

    fn features(&self) -> Features {
        self.features
    }

    fn state(&mut self) -> Result<MigrationState, DeviceError> {
        self.record(Call::ReadState);
        self.states_read += 1;
        if let Some((nth, gate)) = &self.script.hang_in_state
            && *nth == self.states_read
        {
            gate.pass();
        }
        if let Some((errno, times)) = self.script.refuse_state
            && self.states_read <= times
        {
            return Err(DeviceError::ReadState { device: self.name.clone(), errno: OsError(errno) });
        }
        let mut inner = self.inner.lock();
        if self.script.reset_at_state == Some(self.states_read) {
            inner.reset();
        }
        inner.stream_open &= inner.state.has_data();
        Ok(inner.state)
    }

    #[expect(clippy::panic, reason = "that a device's code panics is one of the faults")]
    fn request(&mut self, to: MigrationState) -> Result<(), OsError> {
        self.record(Call::Asked(to));
        for (_, gate) in self.script.hang_at.iter().filter(|(state, _)| *state == to) {
            gate.pass();
        }
        if self.script.panic_at == Some(to) {
            panic!("{} panics at {to}", self.name);
        }
        let result = self.walk(to);
        self.record(match result {
            Ok(()) => Call::Reached(to),
            Err(errno) => Call::Refused(to, errno),
        });
        result.map_err(OsError)
    }

    fn load_failed(&self) -> bool {
        self.inner.lock().load_failed
    }

    fn read_data(&mut self, max_bytes: usize) -> Result<DataRead, DeviceError> {
        if let Some(gate) = &self.script.hang_in_read {
            gate.pass();
        }
        let result = self.read(max_bytes);
        if let Ok(read) = &result {
            self.record(Call::Read(if let DataRead::Data(data) = read { data.len() } else { 0 }));
        }
        result
    }

    fn write_data(&mut self, data: &[u8]) -> Result<(), DeviceError> {
        if let Some(gate) = &self.script.hang_in_write {
            gate.pass();
        }
        let result = self.write(data);
        self.record(Call::Written(match &result {
            Ok(()) => data.len(),
            Err(DeviceError::WriteData { taken, .. }) => *taken,
            Err(_) => 0,
        }));
        result
    }

    fn close_data(&mut self) {
        self.inner.lock().stream_open = false;
        self.record(Call::CloseData);
    }

    fn estimate_bytes(&mut self) -> Result<Option<u64>, DeviceError> {
        self.record(Call::EstimateBytes);
        Ok((!self.script.without_size).then_some((self.pre_copy.len() + self.blob.len()) as u64))
    }

    fn precopy_info(&mut self) -> Result<PrecopyInfo, DeviceError> {
        self.record(Call::PrecopyInfo);
        let inner = self.inner.lock();
        let device = self.name.clone();
        if !inner.stream_open {
            return Err(DeviceError::NoDataStream { device });
        }
        if !inner.state.is_pre_copy() {
            return Err(DeviceError::PrecopyInfo { device, errno: OsError(Errno::INVAL) });
        }
        let initial_bytes = self.pre_copy.len().saturating_sub(inner.read) as u64;
        let dirty_bytes = if initial_bytes == 0 { self.script.dirties as u64 } else { 0 };
        Ok(PrecopyInfo { initial_bytes, dirty_bytes })
    }

    fn trigger_intx(&mut self) -> Result<bool, DeviceError> {
        self.record(Call::TriggerIntx);
        Ok(true)
    }

    fn reset(&mut self) -> Result<(), DeviceError> {
        if let Some(gate) = &self.script.hang_in_reset {
            gate.pass();
        }
        if let Some(errno) = self.script.refuse_reset {
            return Err(DeviceError::Reset { device: self.name.clone(), errno: OsError(errno) });
        }
        self.inner.lock().reset();
        self.record(Call::Reset);
        Ok(())
    }
}

impl Drop for FakeDevice {
    fn drop(&mut self) {
        self.record(Call::Dropped);
    }
}

#[cfg(test)]
mod tests;
