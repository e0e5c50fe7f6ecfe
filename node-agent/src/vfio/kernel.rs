//! A device of the kernel, by VFIO migration v2.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use slackwater_handover::state::{Features, MigrationState, UnknownState};

use super::device::{DataRead, Device, MAX_READ_BYTES, PrecopyInfo};
use super::error::DeviceError;
use super::os_error::OsError;
use super::{stream, sys, uapi};

/// A device behind an open, bound VFIO device descriptor: the agent's own, or borrowed from a VMM.
///
/// Dropping it closes this process's descriptors and does nothing else. If they were the last ones, the
/// kernel closes the device as it does for any process that ends.
#[derive(Debug)]
pub struct KernelDevice {
    name: String,
    device: OwnedFd,
    features: Features,
    data: Option<OwnedFd>,
    load_failed: bool,
}

impl KernelDevice {
    /// Takes over a descriptor, and asks the driver for its features.
    ///
    /// # Errors
    /// [`DeviceError::ReadFeatures`]: ENOTTY if the driver has no migration, EINVAL if a character device has
    /// not been bound.
    pub fn new(name: impl Into<String>, device: OwnedFd) -> Result<Self, DeviceError> {
        let name = name.into();
        match sys::migration_flags(device.as_fd()) {
            Ok(flags) => {
                let features = uapi::features(flags);
                Ok(Self { name, device, features, data: None, load_failed: false })
            }
            Err(errno) => Err(DeviceError::ReadFeatures { device: name, errno: OsError(errno) }),
        }
    }

    /// Whether a data stream is open here.
    #[must_use]
    pub fn has_data_stream(&self) -> bool {
        self.data.is_some()
    }

    fn data(&self) -> Result<BorrowedFd<'_>, DeviceError> {
        match &self.data {
            Some(data) => Ok(data.as_fd()),
            None => Err(DeviceError::NoDataStream { device: self.name.clone() }),
        }
    }

    fn read_failed(&self, errno: Errno) -> DeviceError {
        DeviceError::ReadData { device: self.name.clone(), errno: OsError(errno) }
    }
}

impl Device for KernelDevice {
    fn name(&self) -> &str {
        &self.name
    }

    fn features(&self) -> Features {
        self.features
    }

    fn state(&mut self) -> Result<MigrationState, DeviceError> {
        let number = sys::mig_state(self.device.as_fd())
            .map_err(|errno| DeviceError::ReadState { device: self.name.clone(), errno: OsError(errno) })?;
        let state = MigrationState::try_from(number).map_err(|UnknownState(number)| {
            DeviceError::UnknownState { device: self.name.clone(), number }
        })?;
        if !state.has_data() {
            self.data = None;
            self.load_failed = false;
        }
        Ok(state)
    }

    fn request(&mut self, to: MigrationState) -> Result<(), OsError> {
        let opened = sys::set_mig_state(self.device.as_fd(), to.number())?;
        if opened.is_some() {
            self.data = opened;
            self.load_failed = false;
        }
        Ok(())
    }

    fn load_failed(&self) -> bool {
        self.load_failed
    }

    fn read_data(&mut self, max_bytes: usize) -> Result<DataRead, DeviceError> {
        // There are two signs of a temporary end: ENOMSG (vfio.h) and 0 bytes (mtty).
        let errno = match stream::read_piece(self.data()?, max_bytes.clamp(1, MAX_READ_BYTES)) {
            Ok(piece) if !piece.is_empty() => return Ok(DataRead::Data(piece)),
            Ok(_) => None,
            Err(Errno::NOMSG) => Some(Errno::NOMSG),
            Err(errno) => return Err(self.read_failed(errno)),
        };
        match (self.state()?, errno) {
            (state, _) if state.is_pre_copy() => Ok(DataRead::Drained),
            (_, Some(errno)) => Err(self.read_failed(errno)),
            (MigrationState::StopCopy, None) => Ok(DataRead::End),
            (state, None) => Err(DeviceError::EndedIn { device: self.name.clone(), state }),
        }
    }

    fn write_data(&mut self, data: &[u8]) -> Result<(), DeviceError> {
        let written = stream::write_all(self.data()?, data);
        written.map_err(|(taken, errno)| {
            self.load_failed = true;
            let (device, bytes) = (self.name.clone(), data.len());
            DeviceError::WriteData { device, taken, bytes, errno: OsError(errno) }
        })
    }

    fn close_data(&mut self) {
        self.data = None;
    }

    fn estimate_bytes(&mut self) -> Result<Option<u64>, DeviceError> {
        match sys::mig_data_bytes(self.device.as_fd()) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(Errno::NOTTY) => Ok(None),
            Err(errno) => {
                Err(DeviceError::EstimateBytes { device: self.name.clone(), errno: OsError(errno) })
            }
        }
    }

    fn precopy_info(&mut self) -> Result<PrecopyInfo, DeviceError> {
        sys::precopy_info(self.data()?)
            .map_err(|errno| DeviceError::PrecopyInfo { device: self.name.clone(), errno: OsError(errno) })
    }

    fn trigger_intx(&mut self) -> Result<bool, DeviceError> {
        match sys::trigger_intx(self.device.as_fd()) {
            Ok(()) => Ok(true),
            Err(Errno::INVAL) => Ok(false),
            Err(errno) => Err(DeviceError::TriggerIntx { device: self.name.clone(), errno: OsError(errno) }),
        }
    }

    fn reset(&mut self) -> Result<(), DeviceError> {
        sys::reset(self.device.as_fd())
            .map_err(|errno| DeviceError::Reset { device: self.name.clone(), errno: OsError(errno) })?;
        self.data = None;
        self.load_failed = false;
        match self.state()? {
            MigrationState::Running => Ok(()),
            found => Err(DeviceError::AfterReset { device: self.name.clone(), found }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_descriptor_that_is_not_a_vfio_device_is_refused() {
        let null = std::fs::File::open("/dev/null").unwrap();
        let error = KernelDevice::new("vf0", null.into()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "vf0: the driver does not report its migration features: Inappropriate ioctl for device (ENOTTY)"
        );
    }
}
