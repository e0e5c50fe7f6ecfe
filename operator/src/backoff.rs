//! Pauses between retries: each is twice as long as the one before, up to a longest one, until a success
//! resets them.

use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};

/// The first and the longest pause.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pauses(ExponentialBuilder);

impl Pauses {
    pub(crate) const fn new(first: Duration, longest: Duration) -> Self {
        Self(ExponentialBuilder::new().with_min_delay(first).with_max_delay(longest).without_max_times())
    }

    /// The pause after that many failures without a success; the first for none or one.
    pub(crate) fn after(self, failures: u32) -> Duration {
        // More doublings than any longest pause needs.
        let index = usize::try_from(failures.saturating_sub(1).min(32)).unwrap_or_default();
        self.0.build().nth(index).unwrap_or_default()
    }

    /// Begins with the first pause.
    pub(crate) fn begin(self) -> Backoff {
        Backoff { pauses: self, delays: self.0.build() }
    }
}

/// The pauses of one series of retries.
#[derive(Debug)]
pub(crate) struct Backoff {
    pauses: Pauses,
    delays: ExponentialBackoff,
}

impl Backoff {
    /// The pause before the next try. The one after it is longer.
    pub(crate) fn next_pause(&mut self) -> Duration {
        self.delays.next().unwrap_or_default()
    }

    /// The next pause is the first again.
    pub(crate) fn reset(&mut self) {
        self.delays = self.pauses.0.build();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAUSES: Pauses = Pauses::new(Duration::from_millis(500), Duration::from_secs(3));

    #[test]
    fn a_pause_doubles_up_to_the_longest_and_begins_again_after_a_reset() {
        let mut backoff = PAUSES.begin();
        let pauses: Vec<u128> = (0..5).map(|_| backoff.next_pause().as_millis()).collect();
        assert_eq!(pauses, [500, 1000, 2000, 3000, 3000]);
        backoff.reset();
        assert_eq!(backoff.next_pause(), Duration::from_millis(500));
    }

    #[test]
    fn the_pause_after_several_failures_is_the_one_that_a_series_would_have_come_to() {
        let pauses: Vec<u128> = (0..6).map(|failures| PAUSES.after(failures).as_millis()).collect();
        assert_eq!(pauses, [500, 500, 1000, 2000, 3000, 3000]);
    }
}
