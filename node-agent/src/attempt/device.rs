//! What both ends do to a device: set its state and read it back, look, reset it, and give it back; and how
//! each of these is traced, and described if it fails.

use std::fmt::Display;

use futures::future::join_all;
use slackwater_handover::state::MigrationState;
use slackwater_handover::{Failure, Reason, destination, source};
use slackwater_proto::node::DeviceStateChange;
use slackwater_proto::transfer::DeviceStep;
use tracing::{info, warn};

use super::tasks::Signals;
use crate::host::clock::Clock;
use crate::journal::Role;
use crate::vfio::error::{DeviceError, SetStateError, moved};
use crate::vfio::worker::{CallWatch, DeviceHandle, Hang, Reached};
use crate::vmm::DeviceSeen;

/// One of the VM's devices, at one end.
#[derive(Clone, Debug)]
pub(super) struct EndDevice {
    /// Which end: every failure names it.
    pub(super) end: Role,
    /// Its place in the VM's order.
    pub(super) index: usize,
    /// The device.
    pub(super) handle: DeviceHandle,
}

/// What came of an effect on a device: the state in which it was read back, or why it is not there.
#[derive(Debug)]
pub(super) struct DeviceOutcome {
    /// Its place in the VM's order.
    pub(super) index: usize,
    /// The state, read back.
    pub(super) result: Result<MigrationState, DeviceFailure>,
}

/// A device that is not where it should be.
#[derive(Debug)]
pub(super) struct DeviceFailure {
    /// Where it was found. None: its state could not be read.
    pub(super) found: Option<MigrationState>,
    /// Why, in words.
    pub(super) failure: Failure,
}

impl EndDevice {
    /// All devices of an end, in the VM's order.
    pub(super) fn all(end: Role, handles: &[DeviceHandle]) -> Vec<Self> {
        let handles = handles.iter().cloned().enumerate();
        handles.map(|(index, handle)| Self { end, index, handle }).collect()
    }

    /// The device at a place in the VM's order.
    pub(super) fn at(end: Role, handles: &[DeviceHandle], index: usize) -> Option<Self> {
        handles.get(index).cloned().map(|handle| Self { end, index, handle })
    }

    /// Sets a state and reads it back, if the device is where it was left. A change is traced before anything
    /// else can know of it.
    pub(super) async fn set_state(
        self,
        left_in: MigrationState,
        to: MigrationState,
        trace: impl FnOnce(DeviceChange) + Send,
    ) -> DeviceOutcome {
        let result = match self.handle.set_state_from(left_in, to).await {
            Ok(reached) => {
                trace(DeviceChange::from_reached(self.handle.name(), &reached));
                Ok(reached.to)
            }
            Err(error) => {
                let mut failure = self.failure(&error);
                if let SetStateError::Moved { found, .. } = &error {
                    failure.reason = reason_to_be_in(*found);
                }
                Err(DeviceFailure { found: error.found(), failure })
            }
        };
        DeviceOutcome { index: self.index, result }
    }

    /// Reads the state of a device that its VMM drives.
    pub(super) async fn look(&self) -> Result<DeviceSeen, DeviceFailure> {
        match self.handle.state().await {
            Ok(state) => Ok(DeviceSeen { index: self.index, state, at: Clock::now() }),
            Err(error) => Err(DeviceFailure { found: None, failure: self.failure(&error) }),
        }
    }

    /// Resets a device that cannot be brought back to RUNNING otherwise.
    pub(super) async fn reset(self) -> DeviceOutcome {
        warn!(device = self.handle.name(), "resetting a device that cannot be brought back otherwise");
        let result = match self.handle.reset().await {
            Ok(()) => Ok(MigrationState::Running),
            Err(error) => Err(DeviceFailure { found: None, failure: self.failure(&error) }),
        };
        DeviceOutcome { index: self.index, result }
    }

    /// Resets devices that hold the state of a VM that does not run here, and closes them. Some drivers keep
    /// a device's state past the last close, for the next program that opens it.
    ///
    /// One that hangs is not waited for: it is reset and closed when its call returns, and not free before.
    pub(super) async fn give_back(devices: Vec<Self>) {
        let reset_and_close = |Self { handle, .. }: Self| async move {
            if let Err(error) = handle.reset().await {
                warn!(%error, "a device that is given back could not be reset");
            }
            handle.release().await;
        };
        join_all(devices.into_iter().map(|device| leave(device.handle.watch(), reset_and_close(device))))
            .await;
    }

    /// Closes devices as they are. One that hangs is not waited for.
    pub(super) async fn close(handles: Vec<DeviceHandle>) {
        join_all(handles.into_iter().map(|handle| leave(handle.watch(), handle.release()))).await;
    }

    /// Passes on that a call to the device hangs, and that it has returned, until the device is closed or the
    /// attempt ends.
    pub(super) async fn report_hangs<S: From<Hanging>>(self, signals: Signals<S>) {
        let Self { end, index, handle } = self;
        let mut watch = handle.watch();
        // It must not keep the device open.
        drop(handle);
        let reports = async {
            while let Some(hang) = watch.hangs().await {
                warn!(%end, %hang, "a device hangs");
                signals.send(Hanging::Hangs(index, hangs(end, &hang)));
                watch.returns(&hang).await;
                info!(%end, device = watch.name(), "a device that hung answers");
                signals.send(Hanging::Answers(index));
            }
        };
        tokio::select! {
            () = reports => {}
            () = signals.closed() => {}
        }
    }

    /// The device has not answered a look in its time.
    pub(super) fn no_look(&self) -> Hanging {
        let message = format!("at the {}, device {} does not answer a look", self.end, self.handle.name());
        Hanging::Hangs(self.index, Failure::new(Reason::DeviceHangs, message))
    }

    /// The device is not where it was left.
    pub(super) fn astray(&self, left_in: MigrationState, found: MigrationState) -> Failure {
        let message = format!("at the {}, {}: {}", self.end, self.handle.name(), moved(left_in, found));
        Failure::new(reason_to_be_in(found), message)
    }

    /// What it means that a call failed to a device that was left in this state: it may have been reset.
    pub(super) async fn failed_in(&self, left_in: MigrationState, error: DeviceError) -> Failure {
        match self.handle.state().await {
            Ok(found) if found != left_in => self.astray(left_in, found).and(&format!(" ({error})")),
            _ => self.failure(error),
        }
    }

    /// A failure of the device, in words that name the end.
    pub(super) fn failure(&self, error: impl Display) -> Failure {
        Failure::new(Reason::DeviceFailed, format!("at the {}, {error}", self.end))
    }
}

/// Why a device is there, and not where it was left: only a reset leads to RUNNING without an order.
fn reason_to_be_in(found: MigrationState) -> Reason {
    match found {
        MigrationState::Running => Reason::DeviceReset,
        _ => Reason::DeviceFailed,
    }
}

/// A call to a device takes too long, or has returned after all.
#[derive(Debug)]
pub(super) enum Hanging {
    /// The device of this index hangs.
    Hangs(usize, Failure),
    /// It answers again.
    Answers(usize),
}

fn hangs(end: Role, hang: &Hang) -> Failure {
    Failure::new(Reason::DeviceHangs, format!("at the {end}, {hang}"))
}

/// Makes the last calls to a device, which are carried out in any case, and returns when that is done or the
/// device hangs.
async fn leave(watch: CallWatch, calls: impl Future<Output = ()> + Send + 'static) {
    if let Err(hang) = watch.unless_it_hangs(tokio::spawn(calls)).await {
        warn!(%hang, "a device is left as it is, and given back when it answers");
    }
}

impl From<Hanging> for source::Event {
    fn from(hanging: Hanging) -> Self {
        match hanging {
            Hanging::Hangs(index, failure) => Self::DeviceHangs(index, failure),
            Hanging::Answers(index) => Self::DeviceAnswers(index),
        }
    }
}

impl From<Hanging> for destination::Event {
    fn from(hanging: Hanging) -> Self {
        match hanging {
            Hanging::Hangs(index, failure) => Self::DeviceHangs(index, failure),
            Hanging::Answers(index) => Self::DeviceAnswers(index),
        }
    }
}

impl From<DeviceOutcome> for source::Event {
    fn from(DeviceOutcome { index, result }: DeviceOutcome) -> Self {
        match result {
            Ok(state) => Self::DeviceReached(index, state),
            Err(DeviceFailure { found, failure }) => Self::DeviceFailed(index, found, failure),
        }
    }
}

impl From<DeviceOutcome> for destination::Event {
    fn from(DeviceOutcome { index, result }: DeviceOutcome) -> Self {
        match result {
            Ok(state) => Self::DeviceReached(index, state),
            Err(DeviceFailure { found, failure }) => Self::DeviceFailed(index, found, failure),
        }
    }
}

/// A change of a device's state, for the trace: what, and when it was read back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct DeviceChange {
    /// When, on the clock of the node that reports it.
    pub(super) at: Clock,
    /// What.
    pub(super) change: DeviceStateChange,
}

impl DeviceChange {
    fn from_reached(device: &str, reached: &Reached) -> Self {
        let now = Clock::now();
        let since = now.monotonic_ns.saturating_sub(reached.at_ns);
        let at = Clock {
            monotonic_ns: reached.at_ns,
            unix_ns: now.unix_ns.saturating_sub(i64::try_from(since).unwrap_or(i64::MAX)),
        };
        let change = DeviceStateChange {
            device: device.to_owned(),
            from: reached.from.number(),
            to: reached.to.number(),
            took_ns: u64::try_from(reached.took.as_nanos()).unwrap_or(u64::MAX),
        };
        Self { at, change }
    }

    /// A change that the destination reports; `at` is its time as the source's clock has it.
    pub(super) fn from_step(step: DeviceStep, at: Clock) -> Self {
        let DeviceStep { device, from, to, took_ns, .. } = step;
        Self { at, change: DeviceStateChange { device, from, to, took_ns } }
    }

    /// As the destination reports it.
    pub(super) fn into_step(self) -> DeviceStep {
        let DeviceStateChange { device, from, to, took_ns } = self.change;
        DeviceStep { at: Some(self.at.into()), device, from, to, took_ns }
    }
}

/// The last known states of devices that their VMM drives: each change goes into the trace once, whether the
/// VMM reported it or the agent read it back.
#[derive(Debug)]
pub(super) struct LastStates(Vec<MigrationState>);

impl LastStates {
    /// All devices are in RUNNING.
    pub(super) fn running(devices: &[DeviceHandle]) -> Self {
        Self(vec![MigrationState::Running; devices.len()])
    }

    /// Takes what was seen of a device into account. The change, if it is one.
    pub(super) fn update(&mut self, device: &DeviceHandle, seen: DeviceSeen) -> Option<DeviceChange> {
        let last = self.0.get_mut(seen.index)?;
        let from = std::mem::replace(last, seen.state);
        let change = DeviceStateChange {
            device: device.name().to_owned(),
            from: from.number(),
            to: seen.state.number(),
            took_ns: 0,
        };
        (from != seen.state).then_some(DeviceChange { at: seen.at, change })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vfio::fake::FakeDevice;

    #[tokio::test]
    async fn a_change_that_is_seen_twice_is_traced_once() {
        let device = DeviceHandle::serve(Box::new(FakeDevice::new("a"))).unwrap();
        let mut states = LastStates::running(std::slice::from_ref(&device));
        let seen = |index, state| DeviceSeen { index, state, at: Clock::default() };
        assert_eq!(states.update(&device, seen(0, MigrationState::Running)), None);
        let change = states.update(&device, seen(0, MigrationState::Stop)).unwrap().change;
        assert_eq!(
            (change.from, change.to),
            (MigrationState::Running.number(), MigrationState::Stop.number())
        );
        assert_eq!(states.update(&device, seen(0, MigrationState::Stop)), None);
        assert_eq!(states.update(&device, seen(1, MigrationState::Stop)), None);
    }

    #[test]
    fn a_change_arrives_as_it_was_reported() {
        let at = Clock { monotonic_ns: 3, unix_ns: 5 };
        let change = DeviceStateChange { device: "a".to_owned(), from: 1, to: 2, took_ns: 7 };
        let change = DeviceChange { at, change };
        let step = change.clone().into_step();
        assert_eq!(step.at, Some(at.into()));
        assert_eq!(DeviceChange::from_step(step, at), change);
    }
}
