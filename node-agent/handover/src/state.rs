//! The migration states of a VFIO device, and the ways between them. Pure: nothing here touches a device.
//!
//! ```text
//!                       ┌────────────────── saving group: one data stream ──────────────────┐
//!                       │  PRE_COPY ◀───────────▶ PRE_COPY_P2P ───────────────▶ STOP_COPY   │
//!                       └─────▲ │                     ▲ │                          ▲ │      ┘
//!                        (fd) │ ▼                (fd) │ ▼                     (fd) │ ▼
//!                          RUNNING ◀───────────▶ RUNNING_P2P ◀──────────────────▶ STOP
//!                                                                             (fd) │ ▲
//!                                                                                  ▼ │
//!   ERROR ── only a reset ──▶ RUNNING                                           RESUMING
//! ```
//!
//! An arc marked (fd) opens a data stream. Without P2P the two `*_P2P` states are left out (RUNNING ◀▶ STOP,
//! PRE_COPY ─▶ STOP_COPY), without PRE_COPY the two `PRE_COPY*` states.
//!
//! Source of the rules: `enum vfio_device_mig_state` in the kernel's include/uapi/linux/vfio.h, and
//! `vfio_mig_get_next_state` in drivers/vfio/vfio_main.c, with whose table the tests compare [`path`] for
//! every combination of features and every pair of states.

use std::fmt;

/// A device's migration state: `enum vfio_device_mig_state`, with the kernel's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u32)]
pub enum MigrationState {
    /// The device has failed; only a reset brings it back.
    Error = 0,
    /// It changes neither its own state nor anything outside it.
    Stop = 1,
    /// Fully operational.
    Running = 2,
    /// Stopped, and its state can be read out to the end.
    StopCopy = 3,
    /// Stopped, and taking in a new state.
    Resuming = 4,
    /// Running, but it begins no DMA towards its peers.
    RunningP2p = 5,
    /// Running, while what is known of its state can be read out.
    PreCopy = 6,
    /// PRE_COPY, but it begins no DMA towards its peers.
    PreCopyP2p = 7,
}

use MigrationState::{Error, PreCopy, PreCopyP2p, Resuming, Running, RunningP2p, Stop, StopCopy};

impl MigrationState {
    /// Every state, in the order of the kernel's numbers.
    pub const ALL: [Self; 8] = [Error, Stop, Running, StopCopy, Resuming, RunningP2p, PreCopy, PreCopyP2p];

    /// The kernel's number.
    #[must_use]
    pub const fn number(self) -> u32 {
        self as u32
    }

    /// The kernel's name, without `VFIO_DEVICE_STATE_`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Error => "ERROR",
            Stop => "STOP",
            Running => "RUNNING",
            StopCopy => "STOP_COPY",
            Resuming => "RESUMING",
            RunningP2p => "RUNNING_P2P",
            PreCopy => "PRE_COPY",
            PreCopyP2p => "PRE_COPY_P2P",
        }
    }

    /// Running, but quiesced towards its peers: RUNNING_P2P or PRE_COPY_P2P.
    #[must_use]
    pub const fn is_p2p(self) -> bool {
        matches!(self, RunningP2p | PreCopyP2p)
    }

    /// Stopped with its own state in place: STOP or STOP_COPY. (RESUMING is stopped, too, but holds no state
    /// yet.)
    #[must_use]
    pub const fn is_stopped(self) -> bool {
        matches!(self, Stop | StopCopy)
    }

    /// In PRE_COPY or PRE_COPY_P2P: the data stream may end for now and go on later.
    #[must_use]
    pub const fn is_pre_copy(self) -> bool {
        matches!(self, PreCopy | PreCopyP2p)
    }

    /// In the saving group, whose states share one data stream: PRE_COPY, PRE_COPY_P2P, STOP_COPY.
    #[must_use]
    pub const fn is_saving(self) -> bool {
        matches!(self, PreCopy | PreCopyP2p | StopCopy)
    }

    /// A data stream belongs to this state: the saving group and RESUMING.
    #[must_use]
    pub const fn has_data(self) -> bool {
        self.is_saving() || matches!(self, Resuming)
    }
}

impl fmt::Display for MigrationState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A number that names no migration state known here: a newer kernel, or not a state at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} is not the number of a migration state")]
pub struct UnknownState(pub u32);

impl TryFrom<u32> for MigrationState {
    type Error = UnknownState;

    fn try_from(number: u32) -> Result<Self, UnknownState> {
        Self::ALL.into_iter().find(|state| state.number() == number).ok_or(UnknownState(number))
    }
}

/// What a driver has advertised: `struct vfio_device_feature_migration`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Features {
    /// STOP, STOP_COPY and RESUMING exist. Without it a device cannot be migrated at all.
    pub stop_copy: bool,
    /// The `*_P2P` states exist.
    pub p2p: bool,
    /// The `PRE_COPY*` states exist.
    pub pre_copy: bool,
}

impl Features {
    /// Nothing but the mandatory part.
    pub const STOP_COPY: Self = Self { stop_copy: true, p2p: false, pre_copy: false };
    /// With every optional part, as mlx5, qat and mtty have it.
    pub const ALL: Self = Self { stop_copy: true, p2p: true, pre_copy: true };

    /// Whether a device with these features can be asked for `state`. ERROR cannot be asked for, whatever the
    /// features.
    #[must_use]
    pub const fn support(self, state: MigrationState) -> bool {
        match state {
            Error => false,
            Stop | Running | StopCopy | Resuming => self.stop_copy,
            RunningP2p => self.stop_copy && self.p2p,
            PreCopy => self.stop_copy && self.pre_copy,
            PreCopyP2p => self.stop_copy && self.p2p && self.pre_copy,
        }
    }
}

/// `STOP_COPY | P2P`, as in the kernel's flags; `none` if there is nothing.
impl fmt::Display for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts = [(self.stop_copy, "STOP_COPY"), (self.p2p, "P2P"), (self.pre_copy, "PRE_COPY")];
        let names: Vec<_> = parts.into_iter().filter(|(has, _)| *has).map(|(_, name)| name).collect();
        f.pad(&if names.is_empty() { "none".to_owned() } else { names.join(" | ") })
    }
}

/// When an arc exists, beyond that both of its ends are supported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum When {
    Always,
    /// The driver has no P2P states: the arc leaps over one.
    WithoutP2p,
}

/// What a driver implements: the arcs of the state machine. Everything else is a combination of them.
const ARCS: [(MigrationState, MigrationState, When); 18] = [
    (Resuming, Stop, When::Always),
    (Stop, Resuming, When::Always),
    (Stop, StopCopy, When::Always),
    (StopCopy, Stop, When::Always),
    (Running, Stop, When::WithoutP2p),
    (Stop, Running, When::WithoutP2p),
    (Running, RunningP2p, When::Always),
    (RunningP2p, Running, When::Always),
    (RunningP2p, Stop, When::Always),
    (Stop, RunningP2p, When::Always),
    (Running, PreCopy, When::Always),
    (PreCopy, Running, When::Always),
    (PreCopy, StopCopy, When::WithoutP2p),
    (PreCopy, PreCopyP2p, When::Always),
    (PreCopyP2p, PreCopy, When::Always),
    (PreCopyP2p, StopCopy, When::Always),
    (PreCopyP2p, RunningP2p, When::Always),
    (RunningP2p, PreCopyP2p, When::Always),
];

/// The arcs that a driver with these features has.
pub fn arcs(features: Features) -> impl Iterator<Item = (MigrationState, MigrationState)> {
    ARCS.into_iter().filter_map(move |(from, to, when)| {
        let exists = features.support(from)
            && features.support(to)
            && match when {
                When::Always => true,
                When::WithoutP2p => !features.p2p,
            };
        exists.then_some((from, to))
    })
}

/// Why a state cannot be reached. In each case the kernel answers EINVAL; nothing has been asked of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    /// Out of ERROR.
    #[error("the device is in ERROR, which only a reset leaves")]
    FromError,
    /// Into ERROR.
    #[error("ERROR cannot be asked for")]
    ToError,
    /// One end is a state that the driver has not advertised.
    #[error("the driver has no {0}")]
    Unsupported(MigrationState),
    /// Back inside the saving group: STOP_COPY to PRE_COPY or PRE_COPY_P2P.
    #[error("no way leads from {from} to {to}")]
    NoPath {
        /// Where the device is.
        from: MigrationState,
        /// Where it was to go.
        to: MigrationState,
    },
}

/// The states that a device passes when it is asked to go from `from` to `to`: the last one is `to`, and it
/// is empty if the device is there already. After a failed change the device may be in `from` or in any of
/// them.
///
/// It is the shortest path. States of the saving group do not lie in its interior, except that a path between
/// two of them stays inside the group: leaving it would end the data stream.
///
/// # Errors
/// [`PathError`] where the kernel answers EINVAL.
pub fn path(
    features: Features,
    from: MigrationState,
    to: MigrationState,
) -> Result<Vec<MigrationState>, PathError> {
    for (end, error) in [(from, PathError::FromError), (to, PathError::ToError)] {
        if end == Error {
            return Err(error);
        }
        if !features.support(end) {
            return Err(PathError::Unsupported(end));
        }
    }
    let inside_the_group = from.is_saving() && to.is_saving();
    let may_pass = |state: MigrationState| state == to || state.is_saving() == inside_the_group;

    // Breadth first. The graph has at most seven states: the shortest path has at most six arcs.
    let mut open = vec![Vec::new()];
    for _ in 0..MigrationState::ALL.len() {
        let mut longer = Vec::new();
        for walked in open {
            let here = walked.last().copied().unwrap_or(from);
            if here == to {
                return Ok(walked);
            }
            for (_, next) in arcs(features).filter(|(start, next)| *start == here && may_pass(*next)) {
                longer.push([walked.as_slice(), &[next]].concat());
            }
        }
        open = longer;
    }
    Err(PathError::NoPath { from, to })
}

/// Whether a change from `from` to `to`, whatever lies between, opens a new data stream.
///
/// The saving group's stream is opened on entering the group, RESUMING's on entering RESUMING; a change
/// inside the saving group keeps the stream that is there.
#[must_use]
pub const fn opens_data(from: MigrationState, to: MigrationState) -> bool {
    match to {
        Resuming => !matches!(from, Resuming),
        _ => to.is_saving() && !from.is_saving(),
    }
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
