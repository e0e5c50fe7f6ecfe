//! When a device's pre-copy is over, pure: it decides from what the driver says to be left, and from what was
//! read. A device that changes its state as fast as the wire carries it would be read for ever.
//!
//! Initial data is read to its end. What has changed since is read in rounds: each takes as many bytes as had
//! changed when it began. The pre-copy is over when nothing is left, or when a round has left more than half of
//! what it had begun with: another one would not shorten the blackout by much.

use crate::vfio::device::PrecopyInfo;

/// No pre-copy takes more rounds than this.
const ROUNDS: u32 = 16;

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Round {
    /// Read once more.
    Read,
    /// Nothing is left.
    Done,
    /// So much is left, and does not become less.
    GivesUp {
        /// Bytes that have changed since they were read.
        dirty_bytes: u64,
    },
}

/// The course of one device's pre-copy.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Rounds {
    /// Of the round under way: what had changed when it began, and what has been read since.
    round: Option<(u64, u64)>,
    rounds: u32,
    drained: bool,
}

impl Rounds {
    /// What to do, with so much left.
    pub(super) fn next(&mut self, left: PrecopyInfo) -> Round {
        let drained = std::mem::take(&mut self.drained);
        if left.initial_bytes > 0 {
            self.round = None;
            return Round::Read;
        }
        let dirty_bytes = left.dirty_bytes;
        if dirty_bytes == 0 {
            return Round::Done;
        }
        if let Some((began_with, read)) = self.round {
            // The driver may say so before the data is ready (mlx5): the round ends with what there was.
            if !drained && read < began_with {
                return Round::Read;
            }
            if self.rounds >= ROUNDS || dirty_bytes > began_with / 2 {
                return Round::GivesUp { dirty_bytes };
            }
        }
        self.round = Some((dirty_bytes, 0));
        self.rounds += 1;
        Round::Read
    }

    /// So many bytes were read.
    pub(super) fn sent(&mut self, bytes: usize) {
        if let Some((_, read)) = &mut self.round {
            *read = read.saturating_add(bytes as u64);
        }
    }

    /// There was nothing to read for now.
    pub(super) fn drained(&mut self) {
        self.drained = true;
    }

    /// How many rounds there have been.
    pub(super) fn rounds(&self) -> u32 {
        self.rounds
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PIECE: u64 = 100;

    /// Plays a device that has so much initial data, and of which `dirtied` bytes change while a piece is sent.
    /// The pieces that were read, and how it ended.
    fn play(initial: u64, mut dirty: u64, dirtied: impl Fn(u32) -> u64) -> (u32, Round) {
        let (mut rounds, mut initial, mut pieces) = (Rounds::default(), initial, 0);
        loop {
            match rounds.next(PrecopyInfo { initial_bytes: initial, dirty_bytes: dirty }) {
                Round::Read if pieces < 10_000 => {}
                end => return (pieces, end),
            }
            let from = if initial > 0 { &mut initial } else { &mut dirty };
            let bytes = (*from).min(PIECE);
            *from -= bytes;
            if bytes == 0 {
                rounds.drained()
            } else {
                rounds.sent(bytes as usize)
            }
            pieces += 1;
            dirty += dirtied(pieces);
        }
    }

    #[test]
    fn initial_data_is_read_to_its_end_however_much_changes() {
        let (pieces, end) = play(5_000, 0, |piece| if piece <= 50 { PIECE } else { 0 });
        assert_eq!((pieces, end), (100, Round::Done));
    }

    #[test]
    fn a_device_that_changes_as_fast_as_it_is_sent_ends_its_pre_copy_after_a_round() {
        let (pieces, end) = play(500, 0, |_| PIECE);
        assert_eq!((pieces, end), (10, Round::GivesUp { dirty_bytes: 500 }));
        let (pieces, end) = play(500, 0, |_| 3 * PIECE);
        assert_eq!((pieces, end), (20, Round::GivesUp { dirty_bytes: 4_500 }));
    }

    #[test]
    fn a_device_that_changes_slowly_is_read_until_nothing_is_left() {
        let (_, end) = play(10_000, 0, |_| PIECE / 4);
        assert!(matches!(end, Round::Done | Round::GivesUp { dirty_bytes: 0..=PIECE }), "{end:?}");
    }

    #[test]
    fn a_device_without_any_data_is_not_read() {
        assert_eq!(play(0, 0, |_| 0), (0, Round::Done));
    }

    #[test]
    fn dirty_bytes_that_cannot_be_read_yet_do_not_hold_up_the_pre_copy() {
        let mut rounds = Rounds::default();
        let left = PrecopyInfo { initial_bytes: 0, dirty_bytes: 40 };
        assert_eq!(rounds.next(left), Round::Read);
        rounds.drained();
        assert_eq!(rounds.next(left), Round::GivesUp { dirty_bytes: 40 });
    }

    #[test]
    fn no_pre_copy_goes_on_for_ever() {
        for initial in [0, 1, 999] {
            for rate in 0..300 {
                let (pieces, end) = play(initial, 1 << 16, |_| rate);
                assert!(pieces < 10_000 || end != Round::Read, "{rate}: {pieces} {end:?}");
            }
        }
    }
}
