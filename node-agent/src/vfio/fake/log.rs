//! The calls to fake devices, in one order for all that share a log.

use std::sync::Arc;

use parking_lot::Mutex;
use rustix::io::Errno;
use slackwater_handover::state::MigrationState;

/// One call, or one end of a state change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// The state was read.
    ReadState,
    /// A state change begins. It ends with `Reached` or `Refused`.
    Asked(MigrationState),
    /// The state that was asked for has been reached.
    Reached(MigrationState),
    /// The change was refused.
    Refused(MigrationState, Errno),
    /// This many bytes were read; 0 at an end of the stream.
    Read(usize),
    /// This many bytes were written and taken.
    Written(usize),
    /// The data stream was closed.
    CloseData,
    /// The size was estimated.
    EstimateBytes,
    /// It was asked what is left to pre-copy.
    PrecopyInfo,
    /// Its INTx was signalled.
    TriggerIntx,
    /// The device was reset.
    Reset,
    /// The device was dropped.
    Dropped,
}

/// A line of the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The device's name.
    pub device: String,
    /// What was asked.
    pub call: Call,
    /// Where the device stands after the call.
    pub state: MigrationState,
}

/// The log. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct CallLog(Arc<Mutex<Vec<Entry>>>);

impl CallLog {
    /// An empty log.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Everything so far.
    #[must_use]
    pub fn entries(&self) -> Vec<Entry> {
        self.0.lock().clone()
    }

    /// Only the state changes so far: `vf0 asked RUNNING_P2P`, `vf0 reached RUNNING_P2P`, `vf1 refused
    /// STOP_COPY in STOP`.
    #[must_use]
    pub fn changes(&self) -> Vec<String> {
        let line = |entry: Entry| {
            let (device, state) = (entry.device, entry.state);
            match entry.call {
                Call::Asked(to) => Some(format!("{device} asked {to}")),
                Call::Reached(to) => Some(format!("{device} reached {to}")),
                Call::Refused(to, _) => Some(format!("{device} refused {to} in {state}")),
                Call::Reset => Some(format!("{device} reset")),
                _ => None,
            }
        };
        self.entries().into_iter().filter_map(line).collect()
    }

    /// The place of the first such call of a device. Smaller is earlier.
    #[must_use]
    pub fn first(&self, device: &str, call: Call) -> Option<usize> {
        self.entries().iter().position(|entry| entry.device == device && entry.call == call)
    }

    pub(super) fn add(&self, device: &str, call: Call, state: MigrationState) {
        let entry = Entry { device: device.to_owned(), call, state };
        self.0.lock().push(entry);
    }
}
