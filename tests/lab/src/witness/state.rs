//! The migration states of a device, by the kernel's numbers (`enum vfio_device_mig_state`,
//! include/uapi/linux/vfio.h).
//!
//! The witness has its own list, so that it shares no table with the code that it judges.

use std::fmt;

use strum::{FromRepr, IntoStaticStr};

/// A device's migration state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, FromRepr, IntoStaticStr)]
#[strum(serialize_all = "SCREAMING_SNAKE_CASE")]
#[repr(u32)]
#[allow(missing_docs)]
pub enum State {
    Error,
    Stop,
    Running,
    StopCopy,
    Resuming,
    RunningP2p,
    PreCopy,
    PreCopyP2p,
}

impl State {
    /// The state of this number.
    #[must_use]
    pub fn from_number(number: u32) -> Option<Self> {
        Self::from_repr(number)
    }

    /// The kernel's name for it.
    #[must_use]
    pub fn name(self) -> &'static str {
        self.into()
    }

    /// Whether the device may start work by itself or access memory: true in all states in which it is not
    /// stopped.
    #[must_use]
    pub fn moves(self) -> bool {
        matches!(self, Self::Running | Self::RunningP2p | Self::PreCopy | Self::PreCopyP2p)
    }

    /// Whether it starts no new accesses to its peers: one of the P2P states, or stopped.
    #[must_use]
    pub fn is_quiet_to_peers(self) -> bool {
        !matches!(self, Self::Running | Self::PreCopy | Self::Error)
    }

    /// Whether it is stopped and holds its state: STOP or STOP_COPY.
    #[must_use]
    pub fn is_stopped(self) -> bool {
        matches!(self, Self::Stop | Self::StopCopy)
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_are_the_kernels() {
        let name = |number| State::from_number(number).map(State::name);
        assert_eq!(name(0), Some("ERROR"));
        assert_eq!(name(2), Some("RUNNING"));
        assert_eq!(name(3), Some("STOP_COPY"));
        assert_eq!(name(5), Some("RUNNING_P2P"));
        assert_eq!(name(7), Some("PRE_COPY_P2P"));
        assert_eq!(name(8), None);
    }
}
