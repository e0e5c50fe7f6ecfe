//! The scripted failures of a fake device.

use rustix::io::Errno;
use slackwater_handover::state::MigrationState;

use super::gate::Gate;

/// A state change that the device refuses.
#[derive(Clone, Copy, Debug)]
pub(super) struct Refusal {
    /// The state asked for.
    pub(super) to: MigrationState,
    /// Which of the requests for it: the first is 1; `None`: every one.
    pub(super) nth: Option<usize>,
    /// What the driver answers.
    pub(super) errno: Errno,
    /// Where the device is left: `None` leaves it where it was.
    pub(super) left_in: Option<MigrationState>,
}

/// All failures of one device.
#[derive(Clone, Debug, Default)]
pub(super) struct Script {
    pub(super) refusals: Vec<Refusal>,
    pub(super) pretend: Option<MigrationState>,
    pub(super) refuse_load: Option<Errno>,
    pub(super) refuse_reset: Option<Errno>,
    pub(super) refuse_state: Option<(Errno, usize)>,
    pub(super) hang_at: Vec<(MigrationState, Gate)>,
    pub(super) hang_in_state: Option<(usize, Gate)>,
    pub(super) reset_at_state: Option<usize>,
    pub(super) reset_after_read: Option<usize>,
    pub(super) dirties: usize,
    pub(super) without_size: bool,
    pub(super) hang_in_reset: Option<Gate>,
    pub(super) hang_in_read: Option<Gate>,
    pub(super) hang_in_write: Option<Gate>,
    pub(super) panic_at: Option<MigrationState>,
    pub(super) read_fails_after: Option<(usize, Errno)>,
    pub(super) ends_after: Option<usize>,
    pub(super) write_fails_after: Option<(usize, Errno)>,
}

impl Script {
    /// The refusal of the `count`-th request for `to`.
    pub(super) fn refusal(&self, to: MigrationState, count: usize) -> Option<Refusal> {
        self.refusals
            .iter()
            .find(|refusal| refusal.to == to && refusal.nth.is_none_or(|nth| nth == count))
            .copied()
    }
}
