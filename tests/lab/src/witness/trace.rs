//! The content of a node's trace: each device's path through its states, each access to its data, each run of
//! a vCPU.

use std::collections::BTreeMap;

use super::{parse::ParseError, state::State};
use crate::node::ClockRelation;

/// What the kernel of one node recorded. Times are nanoseconds of the node's CLOCK_MONOTONIC.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trace {
    /// The node.
    pub node: String,
    /// How its clock relates to the lab's.
    pub clock: ClockRelation,
    /// What happened to each device, by its name (the UUID of an mdev).
    pub devices: BTreeMap<String, DeviceTrace>,
    /// When vCPUs ran.
    pub vcpus: VcpuTrace,
}

/// What happened to one device, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceTrace {
    /// Every arc of the driver, including failed ones, and resets.
    pub changes: Vec<Change>,
    /// Every read and write of its migration data.
    pub accesses: Vec<Access>,
}

/// A change of state: one arc of the kernel's state machine, or a reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// The state that was left. `None`: a reset, in any state.
    pub from: Option<State>,
    /// The state that was reached. `None`: the arc failed, and the device kept its state.
    pub to: Option<State>,
    /// What the caller had asked for: the end of the path.
    pub wanted: State,
    /// When the driver began.
    pub began_ns: u64,
    /// When it had ended.
    pub ended_ns: u64,
}

/// An access to a device's migration data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// A read or a write.
    pub kind: AccessKind,
    /// When it began.
    pub at_ns: u64,
    /// How many bytes were read, or were to be written. A read that failed has none.
    pub bytes: u64,
}

/// Reading is saving, writing is loading.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum AccessKind {
    Read,
    Write,
}

/// When vCPUs were in KVM_RUN. Their buffers may have lost the middle of a long life.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VcpuTrace {
    /// The known runs, in order.
    pub runs: Vec<Run>,
    /// The period of which nothing is known.
    pub gap_ns: Option<(u64, u64)>,
}

/// A vCPU in KVM_RUN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The thread.
    pub thread: u32,
    /// The kernel's address of the vCPU.
    pub vcpu: u64,
    /// When it went in.
    pub began_ns: u64,
    /// When it came back. `None`: it was still in KVM_RUN when the trace was taken.
    pub ended_ns: Option<u64>,
}

impl Trace {
    /// The same with these devices only: those of one VM.
    ///
    /// # Errors
    /// When the trace has nothing of one of them.
    pub fn of_devices<S: AsRef<str>>(&self, devices: &[S]) -> Result<Self, ParseError> {
        let mut trace = Self { devices: BTreeMap::new(), ..self.clone() };
        for device in devices {
            let device = device.as_ref();
            let found = self.devices.get(device).ok_or_else(|| ParseError::Lost {
                what: format!("{}: the kernel saw nothing of device {device}", self.node),
            })?;
            trace.devices.insert(device.to_owned(), found.clone());
        }
        Ok(trace)
    }

    /// The final state of a device. `None`: no change of it was seen.
    #[must_use]
    pub fn final_state(&self, device: &str) -> Option<State> {
        self.devices.get(device)?.state_at(u64::MAX)
    }

    /// Every state that a device entered, with the time: an agent's reports can be compared with it.
    #[must_use]
    pub fn states_of(&self, device: &str) -> Vec<(State, u64)> {
        let changes = self.devices.get(device).map(|device| device.changes.as_slice()).unwrap_or_default();
        changes.iter().filter_map(|change| Some((change.to?, change.ended_ns))).collect()
    }
}

impl DeviceTrace {
    /// The state of the device at a time. `None`: it was changing, or the time is before the first change and
    /// that is a reset. A change that fails leaves the state it began in.
    #[must_use]
    pub fn state_at(&self, at_ns: u64) -> Option<State> {
        let mut state = self.changes.first().and_then(|change| change.from);
        for change in &self.changes {
            if change.began_ns > at_ns {
                break;
            }
            state = if at_ns < change.ended_ns { None } else { change.to.or(change.from) };
        }
        state
    }
}

impl DeviceTrace {
    /// Whether a predicate holds for the state of the device at a time or, while it was changing, for both
    /// the state that it left and the one that it went to. False if neither is known.
    #[must_use]
    pub fn holds_at(&self, at_ns: u64, what: impl Fn(State) -> bool) -> bool {
        let changing = self.changes.iter().find(|change| change.began_ns <= at_ns && at_ns < change.ended_ns);
        match changing {
            Some(change) => change.from.is_some_and(&what) && what(change.to.unwrap_or(change.wanted)),
            None => self.state_at(at_ns).is_some_and(what),
        }
    }
}

impl Run {
    /// Whether the vCPU was in at any time from one to the other.
    #[must_use]
    pub fn overlaps(&self, from_ns: u64, to_ns: u64) -> bool {
        self.began_ns <= to_ns && self.ended_ns.is_none_or(|ended| ended >= from_ns)
    }
}
