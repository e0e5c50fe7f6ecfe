//! Building a fake device, and scripting its failures.

use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use rustix::io::Errno;
use slackwater_handover::state::{Features, MigrationState};
use tokio::sync::watch;

use super::script::{Refusal, Script};
use super::{CallLog, FakeDevice, FakeWatch, Gate, Inner};
use crate::vfio::device::MAX_READ_BYTES;

impl FakeDevice {
    /// A device that works, in RUNNING, with every feature and without data.
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
            alive: watch::Sender::new(()),
            states_read: 0,
        }
    }

    /// What the driver advertises.
    #[must_use]
    pub fn with_features(mut self, features: Features) -> Self {
        self.features = features;
        self
    }

    /// Its first state.
    #[must_use]
    pub fn in_state(self, state: MigrationState) -> Self {
        let mut inner = self.inner.lock();
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

    /// As mtty: a load of fewer bytes is refused on leaving RESUMING (EINVAL), a byte more on writing it
    /// (ENOMEM). Without it, as mlx5: everything is taken.
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

    /// Refuses every request for `to`, and is in `left_in` afterwards.
    #[must_use]
    pub fn refuse_leaving_in(self, to: MigrationState, errno: Errno, left_in: MigrationState) -> Self {
        self.refusing(Refusal { to, nth: None, errno, left_in: Some(left_in) })
    }

    /// Refuses only the `nth` request for `to`, from 1, and stays where it was.
    #[must_use]
    pub fn refuse_nth(self, nth: usize, to: MigrationState, errno: Errno) -> Self {
        self.refusing(Refusal { to, nth: Some(nth), errno, left_in: None })
    }

    /// Accepts the change to `to`, and stays where it was.
    #[must_use]
    pub fn pretend(mut self, to: MigrationState) -> Self {
        self.script.pretend = Some(to);
        self
    }

    /// Refuses to leave RESUMING for any state: the driver rejects the blob.
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

    /// Fails to report its state the first `times`.
    #[must_use]
    pub fn refuse_state(mut self, errno: Errno, times: usize) -> Self {
        self.script.refuse_state = Some((errno, times));
        self
    }

    /// Hangs at the gate when it is asked for `to`, before anything changes.
    #[must_use]
    pub fn hang_at(mut self, to: MigrationState, gate: &Gate) -> Self {
        self.script.hang_at.push((to, gate.clone()));
        self
    }

    /// Hangs at the gate when its state is read for the `nth` time, from 1: a change reads it twice.
    #[must_use]
    pub fn hang_in_state(mut self, nth: usize, gate: &Gate) -> Self {
        self.script.hang_in_state = Some((nth, gate.clone()));
        self
    }

    /// Its guest resets it just before its state is read for the `nth` time, from 1: a change reads it twice.
    #[must_use]
    pub fn reset_by_guest_at(mut self, nth: usize) -> Self {
        self.script.reset_at_state = Some(nth);
        self
    }

    /// Its guest resets it once it has given so many bytes.
    #[must_use]
    pub fn reset_by_guest_after(mut self, bytes: usize) -> Self {
        self.script.reset_after_read = Some(bytes);
        self
    }

    /// In PRE_COPY, so many bytes have changed after each read of its initial data, and of these.
    #[must_use]
    pub fn dirties(mut self, bytes: usize) -> Self {
        self.script.dirties = bytes;
        self
    }

    /// Its driver does not know the question how large its state is.
    #[must_use]
    pub fn without_size(mut self) -> Self {
        self.script.without_size = true;
        self
    }

    /// The same device by another descriptor, as a VMM that drives it has it: only reads of its state do not
    /// hang.
    #[must_use]
    pub fn second_descriptor(&self) -> Self {
        let script = Script { hang_in_state: None, reset_at_state: None, ..self.script.clone() };
        Self {
            name: self.name.clone(),
            log: self.log.clone(),
            script,
            pre_copy: self.pre_copy.clone(),
            blob: self.blob.clone(),
            inner: Arc::clone(&self.inner),
            alive: self.alive.clone(),
            features: self.features,
            piece_bytes: self.piece_bytes,
            expects_bytes: self.expects_bytes,
            states_read: 0,
        }
    }

    /// Hangs at the gate when it is reset.
    #[must_use]
    pub fn hang_in_reset(mut self, gate: &Gate) -> Self {
        self.script.hang_in_reset = Some(gate.clone());
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

    /// Gives only the first `bytes` of its data and reports the end.
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

    /// A view into it for later.
    #[must_use]
    pub fn watch(&self) -> FakeWatch {
        FakeWatch { inner: Arc::clone(&self.inner), alive: self.alive.subscribe() }
    }

    fn refusing(mut self, refusal: Refusal) -> Self {
        self.script.refusals.push(refusal);
        self
    }
}
