//! A device that fails or hangs on demand, around one that does not.
//!
//! | fault | what it does |
//! |---|---|
//! | `device.error=<STATE>[@<device>]` | the request fails with EIO: the device stays in its state |
//! | `device.hang=<STATE>:<seconds>[@<device>]` | the request takes longer, or until the fault is cleared |
//! | `device.hang=<STATE>:forever[@<device>]` | the request does not return until the fault is cleared |
//!
//! In place of STATE: `read` (of final data, in STOP_COPY), `write`, `reset`, `state` (reads of the state,
//! except in RUNNING and RUNNING_P2P), and `probe` (of a free device; it can only hang). Without `@<device>` it applies
//! to every device of the node.

use std::time::Duration;

use rustix::io::Errno;
use slackwater_handover::state::{Features, MigrationState};
use tracing::warn;

use super::names::{DEVICE_ERROR, DEVICE_HANG};
use crate::vfio::device::{DataRead, Device, PrecopyInfo};
use crate::vfio::error::DeviceError;
use crate::vfio::os_error::OsError;

/// The current value of a fault, by its name.
type Faults = Box<dyn Fn(&str) -> Option<String> + Send>;

/// In place of the seconds that a call takes longer.
const FOREVER: &str = "forever";

/// A device with faults.
pub(crate) struct FaultyDevice {
    device: Box<dyn Device>,
    faults: Faults,
}

impl FaultyDevice {
    pub(super) fn new(device: impl Device + 'static) -> Self {
        Self { device: Box::new(device), faults: Box::new(super::value) }
    }

    /// The value of a fault if it is set for this call to this device, and the part of it between the call
    /// and the device.
    fn fault_for(&self, fault: &str, call: &str) -> Option<(String, String)> {
        applies((self.faults)(fault)?, self.device.name(), call)
    }

    /// Hangs before a call, or fails it, as the faults say.
    fn apply_faults(&self, call: &str) -> Result<(), OsError> {
        if let Some((value, seconds)) = self.fault_for(DEVICE_HANG, call) {
            hang(self.name(), call, &value, &seconds);
        }
        if self.fault_for(DEVICE_ERROR, call).is_some() {
            warn!(device = self.name(), "a fault: the device refuses {call}");
            return Err(OsError(Errno::IO));
        }
        Ok(())
    }
}

/// A fault with this value, and the part of it between the call and the device, if it is set for this call to
/// this device.
fn applies(value: String, name: &str, call: &str) -> Option<(String, String)> {
    let (what, device) = value.split_once('@').map_or((value.as_str(), None), |(w, d)| (w, Some(d)));
    if device.is_some_and(|device| device != name) {
        return None;
    }
    let (state, rest) = what.split_once(':').unwrap_or((what, ""));
    let rest = (state == call).then(|| rest.to_owned())?;
    Some((value, rest))
}

fn hang(device: &str, call: &str, value: &str, seconds: &str) {
    warn!(device, "a fault: the device hangs at {call}, for {seconds} (seconds)");
    let limit = (seconds != FOREVER).then(|| Duration::from_secs(seconds.parse().unwrap_or(0)));
    super::hang(DEVICE_HANG, value, limit);
}

pub(super) fn hang_in_probe(device: &str) {
    let set = super::value(DEVICE_HANG).and_then(|value| applies(value, device, "probe"));
    if let Some((value, seconds)) = set {
        hang(device, "probe", &value, &seconds);
    }
}

impl Device for FaultyDevice {
    fn name(&self) -> &str {
        self.device.name()
    }

    fn features(&self) -> Features {
        self.device.features()
    }

    fn state(&mut self) -> Result<MigrationState, DeviceError> {
        let state = self.device.state()?;
        if !matches!(state, MigrationState::Running | MigrationState::RunningP2p)
            && let Some((value, seconds)) = self.fault_for(DEVICE_HANG, "state")
        {
            hang(self.name(), "state", &value, &seconds);
        }
        Ok(state)
    }

    fn request(&mut self, to: MigrationState) -> Result<(), OsError> {
        self.apply_faults(to.name())?;
        self.device.request(to)
    }

    fn load_failed(&self) -> bool {
        self.device.load_failed()
    }

    fn read_data(&mut self, max_bytes: usize) -> Result<DataRead, DeviceError> {
        let is_set = (self.faults)(DEVICE_ERROR).is_some() || (self.faults)(DEVICE_HANG).is_some();
        if is_set && self.device.state()? == MigrationState::StopCopy {
            let failed = |errno| DeviceError::ReadData { device: self.name().to_owned(), errno };
            self.apply_faults("read").map_err(failed)?;
        }
        self.device.read_data(max_bytes)
    }

    fn write_data(&mut self, data: &[u8]) -> Result<(), DeviceError> {
        let (device, bytes) = (self.name().to_owned(), data.len());
        self.apply_faults("write").map_err(|errno| DeviceError::WriteData {
            device,
            taken: 0,
            bytes,
            errno,
        })?;
        self.device.write_data(data)
    }

    fn close_data(&mut self) {
        self.device.close_data();
    }

    fn estimate_bytes(&mut self) -> Result<Option<u64>, DeviceError> {
        self.device.estimate_bytes()
    }

    fn precopy_info(&mut self) -> Result<PrecopyInfo, DeviceError> {
        self.device.precopy_info()
    }

    fn trigger_intx(&mut self) -> Result<bool, DeviceError> {
        self.device.trigger_intx()
    }

    fn reset(&mut self) -> Result<(), DeviceError> {
        let failed = |errno| DeviceError::Reset { device: self.name().to_owned(), errno };
        self.apply_faults("reset").map_err(failed)?;
        self.device.reset()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vfio::error::SetStateError;
    use crate::vfio::fake::{CallLog, FakeDevice};
    use MigrationState::{PreCopy, Running, RunningP2p, Stop, StopCopy};

    fn faulty(name: &str, set: &'static str) -> (FaultyDevice, CallLog) {
        let log = CallLog::new();
        let mut device = FaultyDevice::new(FakeDevice::new(name).log(&log));
        device.faults = Box::new(|name| {
            let (key, value) = set.split_once('=')?;
            (key == name).then(|| value.to_owned())
        });
        (device, log)
    }

    #[test]
    fn a_change_with_an_error_is_not_carried_out_and_others_are() {
        let (mut device, log) = faulty("vf0", "device.error=STOP_COPY");
        device.set_state(RunningP2p).unwrap();
        let error = device.set_state(StopCopy).unwrap_err();
        assert!(matches!(error, SetStateError::Refused { errno: OsError(Errno::IO), .. }), "{error}");
        assert_eq!(error.found(), Some(RunningP2p));
        assert_eq!(log.changes(), ["vf0 asked RUNNING_P2P", "vf0 reached RUNNING_P2P"]);
        device.set_state(Stop).unwrap();
    }

    #[test]
    fn a_fault_of_another_device_or_of_a_state_with_the_same_prefix_does_not_apply() {
        for set in ["device.error=PRE_COPY@vf1", "device.error=PRE_COPY_P2P", "device.error="] {
            let (mut device, _) = faulty("vf0", set);
            assert!(device.set_state(PreCopy).is_ok(), "{set}");
        }
        assert!(faulty("vf1", "device.error=PRE_COPY@vf1").0.set_state(PreCopy).is_err());
    }

    #[test]
    fn a_device_that_hangs_still_reaches_the_state() {
        // There is no file of faults, so the hang ends as soon as it has begun.
        for set in ["device.hang=STOP:3600@vf0", "device.hang=STOP:forever@vf0", "device.hang=state:forever"]
        {
            let (mut device, log) = faulty("vf0", set);
            assert_eq!(device.set_state(Stop).unwrap().to, Stop);
            assert_eq!(log.changes(), ["vf0 asked STOP", "vf0 reached STOP"]);
        }
    }

    #[test]
    fn a_reset_ends_an_error_but_fails_by_its_own_fault() {
        let (mut device, _) = faulty("vf0", "device.error=RUNNING");
        device.set_state(Stop).unwrap();
        assert!(device.set_state(Running).is_err());
        device.reset().unwrap();
        assert_eq!(device.state().unwrap(), Running);
        assert!(matches!(faulty("vf0", "device.error=reset").0.reset(), Err(DeviceError::Reset { .. })));
    }

    #[test]
    fn reading_fails_only_for_the_final_data() {
        let (mut device, _) = faulty("vf0", "device.error=read");
        device.set_state(PreCopy).unwrap();
        device.read_data(1).unwrap();
        device.set_state(StopCopy).unwrap();
        assert!(matches!(device.read_data(1), Err(DeviceError::ReadData { errno: OsError(Errno::IO), .. })));
        let (mut device, _) = faulty("vf0", "device.error=write");
        device.set_state(MigrationState::Resuming).unwrap();
        assert!(matches!(device.write_data(b"x"), Err(DeviceError::WriteData { taken: 0, .. })));
    }
}
