//! What a hand-over knows about its devices: where each was last read back, and where it is going.

use crate::Failure;
use crate::state::{Features, MigrationState};

/// One device, by its index in the VM's order.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Track {
    /// What its driver has advertised.
    pub features: Features,
    /// Where it was last read back.
    pub at: MigrationState,
    /// Where it is going, until it is read back.
    pub moving_to: Option<MigrationState>,
    /// It has failed in a way that only a reset mends.
    pub broken: bool,
    /// It has not returned from a call for too long: which one, in words.
    pub hangs: Option<Failure>,
}

/// A state change that a device is ordered to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Move {
    /// The device, by its index in the VM's order.
    pub index: usize,
    /// Where it was left: it was last read back there. If it is found anywhere else, it is not asked.
    pub from: MigrationState,
    /// Where it is to go.
    pub to: MigrationState,
}

/// The devices of one VM. They move together: [`Devices::order`] starts a step, [`Devices::settled`] is its
/// barrier, and [`Devices::settled_but_hanging`] that of the devices that answer.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Devices(Vec<Track>);

impl Devices {
    /// Devices that have all been read back in `at`.
    pub fn new(features: &[Features], at: MigrationState) -> Self {
        let track = |features: &Features| Track {
            features: *features,
            at,
            moving_to: None,
            broken: false,
            hangs: None,
        };
        Self(features.iter().map(track).collect())
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether the VM has none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Each device with its index.
    pub fn iter(&self) -> impl Iterator<Item = (usize, &Track)> {
        self.0.iter().enumerate()
    }

    /// Starts a step: every device for which `target` names another state than its own is now moving there.
    /// Returns those moves. A broken device is passed over: it does not move until it has been reset.
    pub fn order(&mut self, target: impl Fn(&Track) -> Option<MigrationState>) -> Vec<Move> {
        let mut moves = Vec::new();
        for (index, track) in self.0.iter_mut().enumerate().filter(|(_, track)| !track.broken) {
            if let Some(to) = target(track).filter(|to| *to != track.at) {
                track.moving_to = Some(to);
                moves.push(Move { index, from: track.at, to });
            }
        }
        moves
    }

    /// The device has been read back in `state`, and no move of it is under way any more.
    pub fn read_back(&mut self, index: usize, state: MigrationState) {
        if let Some(track) = self.0.get_mut(index) {
            track.at = state;
            track.moving_to = None;
            track.broken = state == MigrationState::Error;
            track.hangs = None;
        }
    }

    /// The device does not follow its orders: only a reset helps.
    pub fn mark_broken(&mut self, index: usize) {
        if let Some(track) = self.0.get_mut(index) {
            track.moving_to = None;
            track.broken = true;
            track.hangs = None;
        }
    }

    /// A call to the device has not returned in its time. True if that is news.
    pub fn hang(&mut self, index: usize, why: Failure) -> bool {
        match self.0.get_mut(index) {
            Some(track) if track.hangs.is_none() => {
                track.hangs = Some(why);
                true
            }
            _ => false,
        }
    }

    /// The call has returned. What the device has been ordered since may still be under way.
    pub fn answered(&mut self, index: usize) {
        if let Some(track) = self.0.get_mut(index) {
            track.hangs = None;
        }
    }

    /// Which devices hang, in words: `None` if none does.
    pub fn hanging(&self) -> Option<String> {
        let hanging: Vec<&str> =
            self.0.iter().filter_map(|track| Some(track.hangs.as_ref()?.message.as_str())).collect();
        (!hanging.is_empty()).then(|| hanging.join("; "))
    }

    /// The device, broken or not, is now on its way to `to` by a reset.
    pub fn expect(&mut self, index: usize, to: MigrationState) {
        if let Some(track) = self.0.get_mut(index) {
            track.moving_to = Some(to);
            track.broken = false;
        }
    }

    /// The device is ordered once more, from where it was read back.
    pub fn order_again(&mut self, index: usize, to: MigrationState) -> Option<Move> {
        self.expect(index, to);
        self.0.get(index).map(|track| Move { index, from: track.at, to })
    }

    /// Where the device was last read back.
    pub fn left_in(&self, index: usize) -> Option<MigrationState> {
        self.0.get(index).map(|track| track.at)
    }

    /// Where the device is going, if it is on its way.
    pub fn wanted(&self, index: usize) -> Option<MigrationState> {
        self.0.get(index).and_then(|track| track.moving_to)
    }

    /// No device is on its way.
    pub fn settled(&self) -> bool {
        self.0.iter().all(|track| track.moving_to.is_none())
    }

    /// No device is on its way but those that hang.
    pub fn settled_but_hanging(&self) -> bool {
        self.0.iter().all(|track| track.moving_to.is_none() || track.hangs.is_some())
    }

    /// No device is on its way, and all are where `holds` says.
    pub fn all_at(&self, holds: impl Fn(MigrationState) -> bool) -> bool {
        self.settled() && self.0.iter().all(|track| holds(track.at))
    }
}
