//! The seam to the kernel: the calls to a VFIO device, whatever implements them.
//!
//! Every call blocks, a state change for as long as the driver needs (mlx5: hundreds of milliseconds).
//! Dropping a device changes nothing in it: no reset, no detach, no unbind; a borrowed device goes on under
//! the VMM that owns it.
//!
//! A device keeps the data stream that a state change opens. The stream belongs to the state: the device
//! closes it as soon as it is read back in a state that has no data.

use bytes::Bytes;
use slackwater_handover::state::{Features, MigrationState, path};

use super::error::{DeviceError, Found, SetStateError};
use super::os_error::OsError;

/// The most that [`Device::read_data`] gives at once: 1 MiB, the size of a chunk on the wire.
pub const MAX_READ_BYTES: usize = 1 << 20;

/// What a read of the data stream gave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DataRead {
    /// At least one byte.
    Data(Bytes),
    /// Nothing for now: the temporary end of the stream in PRE_COPY and PRE_COPY_P2P. There may be more
    /// later, and there is more in STOP_COPY.
    Drained,
    /// Nothing any more: the whole state has been read in STOP_COPY.
    End,
}

/// What a driver estimates to be left in PRE_COPY (`struct vfio_precopy_info`). It says nothing about
/// STOP_COPY's data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PrecopyInfo {
    /// Bytes of the initial data not yet read. STOP_COPY had better wait until it is 0.
    pub initial_bytes: u64,
    /// Bytes that have changed since they were read.
    pub dirty_bytes: u64,
}

/// A state change that was read back from the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// The state before.
    pub from: MigrationState,
    /// The state now.
    pub to: MigrationState,
}

/// One VFIO device with migration v2, or a stand-in for one.
pub trait Device: Send {
    /// The device's name in errors, logs and traces: the PCI address, or the UUID of a mediated device.
    fn name(&self) -> &str;

    /// What the driver advertised when the device was opened.
    fn features(&self) -> Features;

    /// The state, read from the kernel now. Closes the data stream if the device is in a state that has none.
    ///
    /// # Errors
    /// [`DeviceError::ReadState`], [`DeviceError::UnknownState`].
    fn state(&mut self) -> Result<MigrationState, DeviceError>;

    /// Issues one state change to the driver and keeps the data stream that it opens. No check before, no
    /// read-back after: [`Device::set_state`] adds them, and is the only caller.
    ///
    /// # Errors
    /// What the kernel answered. The device may then be in any state along the path, or in ERROR.
    fn request(&mut self, to: MigrationState) -> Result<(), OsError>;

    /// Whether a write has failed since the device entered RESUMING.
    fn load_failed(&self) -> bool;

    /// Reads from the data stream: at most `max_bytes`, and at most [`MAX_READ_BYTES`]. Blocks until the
    /// driver answers.
    ///
    /// # Errors
    /// [`DeviceError::NoDataStream`], [`DeviceError::ReadData`], [`DeviceError::EndedIn`].
    fn read_data(&mut self, max_bytes: usize) -> Result<DataRead, DeviceError>;

    /// Writes all of `data` to the data stream in RESUMING. Where `data` is cut has no meaning to the driver.
    ///
    /// # Errors
    /// [`DeviceError::NoDataStream`], [`DeviceError::WriteData`]. After a failed write the device does not
    /// leave RESUMING but by a reset.
    fn write_data(&mut self, data: &[u8]) -> Result<(), DeviceError>;

    /// Closes the data stream, if one is open. The device's state stays as it is.
    fn close_data(&mut self);

    /// The driver's estimate of the bytes that STOP_COPY would give if it were entered now. Valid in every
    /// state. None: the driver does not know the question (VFIO_DEVICE_FEATURE_MIG_DATA_SIZE), which says
    /// nothing about the size.
    ///
    /// # Errors
    /// [`DeviceError::EstimateBytes`].
    fn estimate_bytes(&mut self) -> Result<Option<u64>, DeviceError>;

    /// What is left to pre-copy. Valid in PRE_COPY and PRE_COPY_P2P. Not without effect: with all data read,
    /// it is what makes mlx5 begin an incremental save.
    ///
    /// # Errors
    /// [`DeviceError::NoDataStream`], [`DeviceError::PrecopyInfo`].
    fn precopy_info(&mut self) -> Result<PrecopyInfo, DeviceError>;

    /// Signals the device's INTx to the VMM, as if the device had raised it. False: the VMM listens for no
    /// INTx of the device, as with MSI or MSI-X, and nothing was done.
    ///
    /// # Errors
    /// [`DeviceError::TriggerIntx`].
    fn trigger_intx(&mut self) -> Result<bool, DeviceError>;

    /// Resets the device, which ends any session, loses its state, and leads to RUNNING from every state, and
    /// reads that back.
    ///
    /// # Errors
    /// [`DeviceError::Reset`], [`DeviceError::AfterReset`], or what [`Device::state`] gives.
    fn reset(&mut self) -> Result<(), DeviceError>;

    /// Requests a state once, from whatever state the device is in, by a path that the driver's features
    /// allow, and reads the state back, also after a refusal.
    ///
    /// # Errors
    /// [`SetStateError`]. It says which state the device is in.
    fn set_state(&mut self, to: MigrationState) -> Result<Change, SetStateError> {
        self.set_state_from(None, to)
    }

    /// The same, only if the device is where it was left. A device that its guest has reset has forgotten its
    /// session, and the kernel would begin another one on the way.
    ///
    /// # Errors
    /// [`SetStateError`]. It says which state the device is in.
    fn set_state_from(
        &mut self,
        left_in: Option<MigrationState>,
        to: MigrationState,
    ) -> Result<Change, SetStateError> {
        let device = self.name().to_owned();
        let from = match self.state() {
            Ok(from) => from,
            Err(error) => {
                return Err(SetStateError::StateUnknown { device, asked: to, cause: Box::new(error) });
            }
        };
        if let Some(left_in) = left_in.filter(|left_in| *left_in != from) {
            return Err(SetStateError::Moved { device, left_in, found: from, asked: to });
        }
        if let Err(reason) = path(self.features(), from, to) {
            return Err(SetStateError::Impossible { device, from, asked: to, reason });
        }
        if from == MigrationState::Resuming && to != from && self.load_failed() {
            return Err(SetStateError::LoadFailed { device, asked: to });
        }
        let answer = self.request(to);
        let found = Found::from(self.state());
        match answer {
            Err(errno) => Err(SetStateError::Refused { device, from, asked: to, found, errno }),
            Ok(()) if found == Found::State(to) => Ok(Change { from, to }),
            Ok(()) => Err(SetStateError::Elsewhere { device, from, asked: to, found }),
        }
    }
}
