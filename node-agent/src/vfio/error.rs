//! Errors of devices. Each names the device and the state that it is in now.

use std::fmt;

use slackwater_handover::state::{MigrationState, PathError};

use super::os_error::OsError;

/// A call other than a state change has failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// The driver did not report its features: it has no migration, or the device is not bound.
    #[error("{device}: the driver does not report its migration features: {errno}")]
    ReadFeatures {
        /// The device's name.
        device: String,
        /// What the kernel answered.
        errno: OsError,
    },
    /// The state could not be read.
    #[error("{device}: reading the migration state: {errno}")]
    ReadState {
        /// The device's name.
        device: String,
        /// What the kernel answered.
        errno: OsError,
    },
    /// The kernel reported a state that this agent does not know.
    #[error("{device}: the kernel reports the migration state {number}, which this agent does not know")]
    UnknownState {
        /// The device's name.
        device: String,
        /// The kernel's number.
        number: u32,
    },
    /// Data was to be read or written, but this process has no data stream of the device open.
    #[error("{device}: no data stream is open")]
    NoDataStream {
        /// The device's name.
        device: String,
    },
    /// Reading from the data stream.
    #[error("{device}: reading its state: {errno}")]
    ReadData {
        /// The device's name.
        device: String,
        /// What the kernel answered.
        errno: OsError,
    },
    /// The data stream has ended in a state in which it has no end.
    #[error("{device}: the data stream has ended while the device is in {state}")]
    EndedIn {
        /// The device's name.
        device: String,
        /// The state that it is in.
        state: MigrationState,
    },
    /// Writing to the data stream. Some of the bytes may have been taken: the load cannot be completed any
    /// more.
    #[error("{device}: loading its state: {errno} (after {taken} of {bytes} bytes of this piece)")]
    WriteData {
        /// The device's name.
        device: String,
        /// Bytes of this call that the driver had taken before.
        taken: usize,
        /// Bytes of this call.
        bytes: usize,
        /// What the kernel answered.
        errno: OsError,
    },
    /// The driver could not estimate the size of its data.
    #[error("{device}: estimating the size of its state: {errno}")]
    EstimateBytes {
        /// The device's name.
        device: String,
        /// What the kernel answered.
        errno: OsError,
    },
    /// The driver did not say what is left to pre-copy.
    #[error("{device}: asking what is left to pre-copy: {errno}")]
    PrecopyInfo {
        /// The device's name.
        device: String,
        /// What the kernel answered.
        errno: OsError,
    },
    /// The interrupt could not be signalled.
    #[error("{device}: signalling its INTx: {errno}")]
    TriggerIntx {
        /// The device's name.
        device: String,
        /// What the kernel answered.
        errno: OsError,
    },
    /// The reset was refused.
    #[error("{device}: resetting it: {errno}")]
    Reset {
        /// The device's name.
        device: String,
        /// What the kernel answered.
        errno: OsError,
    },
    /// The driver accepted the reset, but the device is not in RUNNING after it.
    #[error("{device}: after a reset the device is in {found}, not in RUNNING")]
    AfterReset {
        /// The device's name.
        device: String,
        /// The state that was read back.
        found: MigrationState,
    },
    /// The thread that serves the device has ended: the device was released, or its code panicked.
    #[error("{device}: the device is not being served any more")]
    WorkerEnded {
        /// The device's name.
        device: String,
    },
}

/// A state change has failed. The state was read back afterwards, whatever the reason: see
/// [`SetStateError::found`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SetStateError {
    /// The state before the change could not be read. Nothing was asked of the driver.
    #[error("{device}: not asked for {asked}, since the state that it is in is unknown: {cause}")]
    StateUnknown {
        /// The device's name.
        device: String,
        /// The state that was to be asked for.
        asked: MigrationState,
        /// Why it could not be read.
        cause: Box<DeviceError>,
    },
    /// The device is not where it was left. Nothing was asked of the driver.
    #[error("{device}: not asked for {asked}: {}", moved(*left_in, *found))]
    Moved {
        /// The device's name.
        device: String,
        /// Where it was left.
        left_in: MigrationState,
        /// The state that it is in.
        found: MigrationState,
        /// The state that was to be asked for.
        asked: MigrationState,
    },
    /// The state cannot be reached with this driver. Nothing was asked of it.
    #[error("{device}: {from} -> {asked} is impossible: {reason}")]
    Impossible {
        /// The device's name.
        device: String,
        /// The state that the device is in.
        from: MigrationState,
        /// The state that was to be asked for.
        asked: MigrationState,
        /// Why not.
        reason: PathError,
    },
    /// A write has failed in this RESUMING session: what was loaded is not what was sent. Nothing was asked
    /// of the driver, since not every driver would refuse (mtty loads the damaged data). Only a reset leads
    /// out.
    #[error(
        "{device}: not asked for RESUMING -> {asked}, since loading its state has failed; only a reset leads out"
    )]
    LoadFailed {
        /// The device's name.
        device: String,
        /// The state that was to be asked for.
        asked: MigrationState,
    },
    /// The driver refused.
    #[error("{device}: the driver refused {from} -> {asked}: {errno}; the device is in {found}")]
    Refused {
        /// The device's name.
        device: String,
        /// The state before.
        from: MigrationState,
        /// The state that was asked for.
        asked: MigrationState,
        /// The state that was read back: `from`, any state of the path, or ERROR.
        found: Found,
        /// What the kernel answered.
        errno: OsError,
    },
    /// The driver accepted, but another state was read back.
    #[error("{device}: the driver accepted {from} -> {asked}, but the device is in {found}")]
    Elsewhere {
        /// The device's name.
        device: String,
        /// The state before.
        from: MigrationState,
        /// The state that was asked for.
        asked: MigrationState,
        /// The state that was read back.
        found: Found,
    },
    /// The thread that serves the device has ended. Whether the driver was asked is unknown.
    #[error("{device}: asked for {asked}, but the device is not being served any more")]
    WorkerEnded {
        /// The device's name.
        device: String,
        /// The state that was asked for.
        asked: MigrationState,
    },
}

impl SetStateError {
    /// The device's name.
    #[must_use]
    pub fn device(&self) -> &str {
        match self {
            Self::StateUnknown { device, .. }
            | Self::Moved { device, .. }
            | Self::Impossible { device, .. }
            | Self::LoadFailed { device, .. }
            | Self::Refused { device, .. }
            | Self::Elsewhere { device, .. }
            | Self::WorkerEnded { device, .. } => device,
        }
    }

    /// The state that was, or was to be, asked for.
    #[must_use]
    pub fn asked(&self) -> MigrationState {
        match self {
            Self::StateUnknown { asked, .. }
            | Self::Moved { asked, .. }
            | Self::Impossible { asked, .. }
            | Self::LoadFailed { asked, .. }
            | Self::Refused { asked, .. }
            | Self::Elsewhere { asked, .. }
            | Self::WorkerEnded { asked, .. } => *asked,
        }
    }

    /// The state of the device after the failure, if it could be read.
    #[must_use]
    pub fn found(&self) -> Option<MigrationState> {
        match self {
            Self::Impossible { from, .. } => Some(*from),
            Self::Moved { found, .. } => Some(*found),
            Self::LoadFailed { .. } => Some(MigrationState::Resuming),
            Self::Refused { found, .. } | Self::Elsewhere { found, .. } => found.state(),
            Self::StateUnknown { .. } | Self::WorkerEnded { .. } => None,
        }
    }
}

/// That a device is not where it was left, in words. Only a reset leads to RUNNING without an order.
#[must_use]
pub fn moved(left_in: MigrationState, found: MigrationState) -> String {
    let by = match found {
        MigrationState::Running => {
            "it has been reset since, by its guest or on the node, and has forgotten what it was asked for"
        }
        MigrationState::Error => "it has failed since",
        _ => "something else has changed it since",
    };
    format!("it was left in {left_in} and is in {found}: {by}")
}

/// The state that was read back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// This one.
    State(MigrationState),
    /// It could not be read.
    Unreadable(Box<DeviceError>),
}

impl Found {
    /// The state, if it could be read.
    #[must_use]
    pub fn state(&self) -> Option<MigrationState> {
        match self {
            Self::State(state) => Some(*state),
            Self::Unreadable(_) => None,
        }
    }
}

impl From<Result<MigrationState, DeviceError>> for Found {
    fn from(read: Result<MigrationState, DeviceError>) -> Self {
        match read {
            Ok(state) => Self::State(state),
            Err(error) => Self::Unreadable(Box::new(error)),
        }
    }
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::State(state) => state.fmt(f),
            Self::Unreadable(error) => write!(f, "an unknown state ({error})"),
        }
    }
}
