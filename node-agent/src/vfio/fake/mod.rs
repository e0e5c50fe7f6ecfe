//! A device in memory: it follows the state table for its features, records what it is asked, and goes wrong as it is told.
//!
//! ```
//! # use slackwater_node_agent::vfio::{device::Device, fake::{CallLog, FakeDevice}, state::{Features, MigrationState}};
//! let log = CallLog::new();
//! let mut vf0 = FakeDevice::new("vf0").with_features(Features::STOP_COPY).log(&log).blob("state");
//! vf0.set_state(MigrationState::StopCopy)?;
//! assert_eq!(log.changes(), ["vf0 asked STOP_COPY", "vf0 reached STOP_COPY"]);
//! # Ok::<(), slackwater_node_agent::vfio::error::SetStateError>(())
//! ```

mod gate;
mod log;
mod script;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use rustix::io::Errno;

pub use self::gate::Gate;
pub use self::log::{Call, CallLog, Entry};
use self::script::{Refusal, Script};
use super::device::{DataRead, Device, MAX_READ_BYTES, PrecopyInfo};
use super::error::DeviceError;
use super::os_error::OsError;
use super::state::{Features, MigrationState, opens_data, path};

/// The fake device. Made by [`FakeDevice::new`] and the methods that follow it; RUNNING with all features and no data if
/// nothing else is said.
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

/// Sees into a fake device that a worker has swallowed.
#[derive(Clone, Debug)]
pub struct FakeWatch(Arc<Mutex<Inner>>);

impl FakeWatch {
    /// Where the device stands. Not recorded.
    #[must_use]
    pub fn state(&self) -> MigrationState {
        lock(&self.0).state
    }

    /// What has been written in the RESUMING session so far.
    #[must_use]
    pub fn written(&self) -> Bytes {
        Bytes::copy_from_slice(&lock(&self.0).written)
    }

    /// What the device had been given when it last left RESUMING for STOP.
    #[must_use]
    pub fn loaded(&self) -> Option<Bytes> {
        lock(&self.0).loaded.clone()
    }

    /// How many bytes of the saving session have been read.
    #[must_use]
    pub fn read_bytes(&self) -> usize {
        lock(&self.0).read
    }
}

fn lock(inner: &Mutex<Inner>) -> MutexGuard<'_, Inner> {
    inner.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How it is made.
impl FakeDevice {
    /// A sound device, RUNNING, with every feature and nothing to tell.
    #[must_use]
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            features: Features::ALL,
            log: CallLog::new(),
            script: Script::default(),
            piece_bytes: MAX_READ_BYTES,
            expects_bytes: None,
            pre_copy: Bytes::new(),
            blob: Bytes::new(),
            inner: Arc::new(Mutex::new(Inner {
                state: MigrationState::Running,
                stream_open: false,
                load_failed: false,
                read: 0,
                written: Vec::new(),
                loaded: None,
                asked: [0; 8],
            })),
        }
    }

    /// What the driver advertises.
    #[must_use]
    pub fn with_features(mut self, features: Features) -> Self {
        self.features = features;
        self
    }

    /// Where it stands at first.
    #[must_use]
    pub fn in_state(self, state: MigrationState) -> Self {
        let mut inner = lock(&self.inner);
        inner.state = state;
        inner.stream_open = state.has_data();
        drop(inner);
        self
    }

    /// Records in `log`, which other devices may share.
    #[must_use]
    pub fn log(mut self, log: &CallLog) -> Self {
        self.log = log.clone();
        self
    }

    /// What can be read while it still runs.
    #[must_use]
    pub fn pre_copy(mut self, content: impl Into<Bytes>) -> Self {
        self.pre_copy = content.into();
        self
    }

    /// What can be read in STOP_COPY, after what [`FakeDevice::pre_copy`] gave.
    #[must_use]
    pub fn blob(mut self, content: impl Into<Bytes>) -> Self {
        self.blob = content.into();
        self
    }

    /// A read gives at most so many bytes.
    #[must_use]
    pub fn piece_bytes(mut self, bytes: usize) -> Self {
        self.piece_bytes = bytes;
        self
    }

    /// As mtty: a load of fewer bytes is refused on leaving RESUMING (EINVAL), a byte more on writing it (ENOMEM). Without
    /// it, as mlx5: everything is taken.
    #[must_use]
    pub fn expects_bytes(mut self, bytes: usize) -> Self {
        self.expects_bytes = Some(bytes);
        self
    }

    /// Refuses every request for `to` and stays where it was.
    #[must_use]
    pub fn refuse(self, to: MigrationState, errno: Errno) -> Self {
        self.refusing(Refusal { to, nth: None, errno, left_in: None })
    }

    /// Refuses every request for `to`, and stands in `left_in` afterwards.
    #[must_use]
    pub fn refuse_leaving_in(self, to: MigrationState, errno: Errno, left_in: MigrationState) -> Self {
        self.refusing(Refusal { to, nth: None, errno, left_in: Some(left_in) })
    }

    /// Refuses only the `nth` request for `to`, from 1, and stays where it was.
    #[must_use]
    pub fn refuse_nth(self, nth: usize, to: MigrationState, errno: Errno) -> Self {
        self.refusing(Refusal { to, nth: Some(nth), errno, left_in: None })
    }

    /// Says that it went to `to`, and stays where it was.
    #[must_use]
    pub fn pretend(mut self, to: MigrationState) -> Self {
        self.script.pretend = Some(to);
        self
    }

    /// Refuses to leave RESUMING, whatever for: a blob that the driver does not like.
    #[must_use]
    pub fn refuse_load(mut self, errno: Errno) -> Self {
        self.script.refuse_load = Some(errno);
        self
    }

    /// Refuses a reset.
    #[must_use]
    pub fn refuse_reset(mut self, errno: Errno) -> Self {
        self.script.refuse_reset = Some(errno);
        self
    }

    /// Does not tell its state.
    #[must_use]
    pub fn refuse_state(mut self, errno: Errno) -> Self {
        self.script.refuse_state = Some(errno);
        self
    }

    /// Hangs at the gate when it is asked for `to`, before anything changes.
    #[must_use]
    pub fn hang_at(mut self, to: MigrationState, gate: &Gate) -> Self {
        self.script.hang_at.push((to, gate.clone()));
        self
    }

    /// Hangs at the gate in each read.
    #[must_use]
    pub fn hang_in_read(mut self, gate: &Gate) -> Self {
        self.script.hang_in_read = Some(gate.clone());
        self
    }

    /// Hangs at the gate in each write.
    #[must_use]
    pub fn hang_in_write(mut self, gate: &Gate) -> Self {
        self.script.hang_in_write = Some(gate.clone());
        self
    }

    /// Panics when it is asked for `to`.
    #[must_use]
    pub fn panic_at(mut self, to: MigrationState) -> Self {
        self.script.panic_at = Some(to);
        self
    }

    /// Gives `bytes` and then fails to read.
    #[must_use]
    pub fn read_fails_after(mut self, bytes: usize, errno: Errno) -> Self {
        self.script.read_fails_after = Some((bytes, errno));
        self
    }

    /// Gives only the first `bytes` of what it has and says that this was all.
    #[must_use]
    pub fn ends_after(mut self, bytes: usize) -> Self {
        self.script.ends_after = Some(bytes);
        self
    }

    /// Takes `bytes` and then refuses to be written to.
    #[must_use]
    pub fn write_fails_after(mut self, bytes: usize, errno: Errno) -> Self {
        self.script.write_fails_after = Some((bytes, errno));
        self
    }

    /// To look into it later.
    #[must_use]
    pub fn watch(&self) -> FakeWatch {
        FakeWatch(Arc::clone(&self.inner))
    }

    fn refusing(mut self, refusal: Refusal) -> Self {
        self.script.refusals.push(refusal);
        self
    }
}

/// How it behaves.
impl FakeDevice {
    fn record(&self, call: Call) {
        let state = lock(&self.inner).state;
        self.log.add(&self.name, call, state);
    }

    /// Goes the way to `to`, arc by arc, and stops where it goes wrong.
    fn walk(&self, to: MigrationState) -> Result<(), Errno> {
        let mut inner = lock(&self.inner);
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

    /// What the saving session has to give in its state, and in all.
    fn readable(&self, state: MigrationState) -> Bytes {
        let all: Bytes = if state.is_pre_copy() {
            self.pre_copy.clone()
        } else {
            [self.pre_copy.as_ref(), self.blob.as_ref()].concat().into()
        };
        match self.script.ends_after {
            Some(bytes) if bytes < all.len() => all.slice(..bytes),
            _ => all,
        }
    }

    fn read(&self, max_bytes: usize) -> Result<DataRead, DeviceError> {
        let mut inner = lock(&self.inner);
        let device = || self.name.clone();
        if !inner.stream_open {
            return Err(DeviceError::NoDataStream { device: device() });
        }
        if !inner.state.is_saving() {
            return Err(DeviceError::ReadData { device: device(), errno: OsError(Errno::BADF) });
        }
        let rest = {
            let all = self.readable(inner.state);
            all.slice(inner.read.min(all.len())..)
        };
        let mut bytes = rest.len().min(max_bytes).min(MAX_READ_BYTES).min(self.piece_bytes);
        if let Some((after, errno)) = self.script.read_fails_after {
            if inner.read >= after {
                return Err(DeviceError::ReadData { device: device(), errno: OsError(errno) });
            }
            bytes = bytes.min(after - inner.read);
        }
        inner.read += bytes;
        Ok(match bytes {
            0 if inner.state.is_pre_copy() => DataRead::Drained,
            0 => DataRead::End,
            _ => DataRead::Data(rest.slice(..bytes)),
        })
    }

    fn write(&self, data: &[u8]) -> Result<(), DeviceError> {
        let mut inner = lock(&self.inner);
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
        if let Some(errno) = self.script.refuse_state {
            return Err(DeviceError::ReadState { device: self.name.clone(), errno: OsError(errno) });
        }
        let mut inner = lock(&self.inner);
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
            panic!("{} was told to panic at {to}", self.name);
        }
        let result = self.walk(to);
        self.record(match result {
            Ok(()) => Call::Reached(to),
            Err(errno) => Call::Refused(to, errno),
        });
        result.map_err(OsError)
    }

    fn load_failed(&self) -> bool {
        lock(&self.inner).load_failed
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
        lock(&self.inner).stream_open = false;
        self.record(Call::CloseData);
    }

    fn estimate_bytes(&mut self) -> Result<u64, DeviceError> {
        self.record(Call::EstimateBytes);
        Ok((self.pre_copy.len() + self.blob.len()) as u64)
    }

    fn precopy_info(&mut self) -> Result<PrecopyInfo, DeviceError> {
        self.record(Call::PrecopyInfo);
        let inner = lock(&self.inner);
        let device = self.name.clone();
        if !inner.stream_open {
            return Err(DeviceError::NoDataStream { device });
        }
        if !inner.state.is_pre_copy() {
            return Err(DeviceError::PrecopyInfo { device, errno: OsError(Errno::INVAL) });
        }
        let initial_bytes = self.pre_copy.len().saturating_sub(inner.read) as u64;
        Ok(PrecopyInfo { initial_bytes, dirty_bytes: 0 })
    }

    fn reset(&mut self) -> Result<(), DeviceError> {
        if let Some(errno) = self.script.refuse_reset {
            return Err(DeviceError::Reset { device: self.name.clone(), errno: OsError(errno) });
        }
        let mut inner = lock(&self.inner);
        inner.state = MigrationState::Running;
        inner.stream_open = false;
        inner.load_failed = false;
        drop(inner);
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
