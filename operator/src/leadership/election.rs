//! Whether a Lease may be taken: a pure function of what was seen of it, and when.

use std::time::Duration;

use slackwater_api::HIGHEST_ACCEPTED_EPOCH;

/// A Lease as it was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseState {
    /// The holder's identity; empty if there is no holder.
    pub holder: String,
    /// When the holder renewed it last, by the holder's clock. Only ever compared with itself.
    pub renewed: String,
    /// How long the holder's claim is good without a renewal, as the holder says.
    pub duration: Option<Duration>,
    /// How often it has changed hands.
    pub transitions: i32,
}

/// What to do about the Lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Move {
    /// Take it, with this number of transitions.
    Take {
        /// How often it will have changed hands then.
        transitions: i32,
    },
    /// Another operator has it.
    Wait {
        /// Which one.
        holder: String,
    },
}

/// An operator that wants the Lease.
#[derive(Debug)]
pub struct Candidate {
    /// A name that no other process ever has.
    pub identity: String,
    /// How long its own claim will be good without a renewal.
    pub duration: Duration,
    /// What was seen last, and when it was first seen so.
    last_seen: Option<(LeaseState, Duration)>,
}

impl Candidate {
    /// A candidate that has seen nothing yet.
    #[must_use]
    pub fn new(identity: String, duration: Duration) -> Self {
        Self { identity, duration, last_seen: None }
    }

    /// Decides. `now`: time since some fixed moment, by a clock that only goes forward.
    pub fn consider(&mut self, seen: Option<LeaseState>, now: Duration) -> Move {
        let Some(seen) = seen else { return Move::Take { transitions: 0 } };
        let since = match &self.last_seen {
            Some((before, since)) if *before == seen => *since,
            _ => now,
        };
        self.last_seen = Some((seen.clone(), since));
        let good_for = seen.duration.unwrap_or(self.duration);
        if seen.holder.is_empty() || now.saturating_sub(since) > good_for {
            return Move::Take { transitions: seen.transitions.saturating_add(1) };
        }
        Move::Wait { holder: seen.holder }
    }
}

/// The fewest transitions that are higher than `known`; so is their epoch, which is one more. `None`: that
/// would leave the Lease too little to count.
#[must_use]
pub fn transitions_above(known: u64) -> Option<i32> {
    let known = i64::try_from(known).ok().filter(|known| *known <= HIGHEST_ACCEPTED_EPOCH)?;
    i32::try_from(known.checked_add(1)?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TERM: Duration = Duration::from_secs(15);

    fn seen(holder: &str, renewed: &str) -> Option<LeaseState> {
        Some(LeaseState {
            holder: holder.into(),
            renewed: renewed.into(),
            duration: Some(TERM),
            transitions: 4,
        })
    }

    fn at(second: u64) -> Duration {
        Duration::from_secs(second)
    }

    #[test]
    fn a_lease_that_is_not_there_or_has_been_given_back_is_taken_at_once() {
        let mut candidate = Candidate::new("b".into(), TERM);
        assert_eq!(candidate.consider(None, at(0)), Move::Take { transitions: 0 });
        assert_eq!(candidate.consider(seen("", "9"), at(0)), Move::Take { transitions: 5 });
    }

    #[test]
    fn a_candidate_waits_as_long_as_the_holder_renews_whatever_its_clock_says() {
        let mut candidate = Candidate::new("b".into(), TERM);
        // Its clock is far behind, and goes on.
        for second in 0..100 {
            let renewed = format!("1999-{second}");
            let waits = Move::Wait { holder: "a".into() };
            assert_eq!(candidate.consider(seen("a", &renewed), at(10 * second)), waits);
        }
    }

    #[test]
    fn a_holder_that_does_not_renew_keeps_its_whole_term_from_when_that_was_seen() {
        let mut candidate = Candidate::new("b".into(), TERM);
        let waits = Move::Wait { holder: "a".into() };
        assert_eq!(candidate.consider(seen("a", "1"), at(100)), waits);
        assert_eq!(candidate.consider(seen("a", "2"), at(110)), waits);
        assert_eq!(candidate.consider(seen("a", "2"), at(125)), waits);
        assert_eq!(candidate.consider(seen("a", "2"), at(126)), Move::Take { transitions: 5 });
    }

    #[test]
    fn another_holder_begins_a_term_of_its_own() {
        let mut candidate = Candidate::new("c".into(), TERM);
        candidate.consider(seen("a", "1"), at(0));
        assert_eq!(candidate.consider(seen("b", "1"), at(16)), Move::Wait { holder: "b".into() });
    }

    #[test]
    fn the_epoch_rises_above_what_an_agent_knows_and_never_to_the_end_of_what_a_lease_can_count() {
        assert_eq!(transitions_above(7), Some(8));
        assert_eq!(transitions_above(u64::MAX), None);
        assert_eq!(transitions_above(1 << 31), None);
        assert_eq!(transitions_above((1 << 31) - 2), None);
        assert_eq!(transitions_above((1 << 31) - 1 - 1_000_000), Some(i32::MAX - 999_999));
    }
}
