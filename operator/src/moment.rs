//! Now, by two clocks.

use std::time::Instant;

use jiff::Timestamp;

/// Now: by the wall clock, for times that stand in a status; and by this process's own clock, for how long
/// something lasts. The wall clock may be set, and is another one where another operator leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moment {
    /// By the wall clock.
    pub time: Timestamp,
    /// By a clock that nobody sets.
    pub clock: Instant,
}

impl Moment {
    /// Now.
    pub fn now() -> Self {
        Self { time: Timestamp::now(), clock: Instant::now() }
    }
}
