//! How often the leadership has changed: the number by which the agents fence operators.

use std::fmt;
use std::time::Duration;

use slackwater_api::HIGHEST_ACCEPTED_EPOCH;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, timeout};

/// How long raising the epoch may take: as long as the API server may.
const RAISE_TIMEOUT: Duration = Duration::from_secs(20);

/// How far the epoch is raised in one leadership, in sum, on the word of agents alone. An agent has seen a
/// higher epoch than the Lease's only if the Lease was deleted or restored, or if it lies; and a Lease counts
/// to 2^31 only, and never back.
pub const RAISE_DISTANCE: u64 = 64;

/// The epoch of this operator's leadership, `leaseTransitions` of the Lease plus 1. It goes into every call
/// that an agent acts upon, so that an agent that has seen a newer leader's epoch refuses an older one.
#[derive(Debug, Clone)]
pub struct Epoch {
    /// With which this leadership began.
    first: u64,
    now: watch::Receiver<u64>,
    valid_until: watch::Receiver<Instant>,
    raises: mpsc::Sender<u64>,
}

/// The other end of an [`Epoch`], for the code that holds the Lease.
pub(crate) struct EpochSource {
    pub(crate) now: watch::Sender<u64>,
    /// When another operator may begin, if the Lease is not renewed before.
    pub(crate) valid_until: watch::Sender<Instant>,
    /// Epochs that an agent has seen and that this operator accepts. Its own must be higher.
    pub(crate) raises: mpsc::Receiver<u64>,
}

/// What came of asking for a higher epoch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Raised {
    /// It is in force.
    Yes,
    /// The Lease could not be written.
    No,
    /// The agent has seen more than this operator believes. Nothing was raised.
    TooHigh(EpochClaim),
}

/// An agent's epoch that this operator does not raise its own above.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EpochClaim {
    /// What the agent says that it has seen.
    pub known: u64,
    /// The operator's, then.
    pub own: u64,
    /// The highest that it would have raised its own above.
    pub limit: u64,
}

impl fmt::Display for EpochClaim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { known, own, limit } = self;
        write!(
            f,
            "its agent has seen the operator epoch {known}, this operator has {own}, and believes an agent up to \
             {limit}. "
        )?;
        if *known <= HIGHEST_ACCEPTED_EPOCH.unsigned_abs() {
            write!(
                f,
                "If the operator's Lease was deleted or restored, set spec.acceptEpochUpTo of this MigrationNode to \
                 {known}. If not, the agent"
            )?;
        } else {
            write!(f, "No Lease may come to more than {HIGHEST_ACCEPTED_EPOCH}: the agent")?;
        }
        write!(
            f,
            " is wrong: stop it, run `slackwater-node-agent forget-epoch` on its host, and start it again"
        )
    }
}

impl Epoch {
    /// An epoch that is valid until then without a renewal, and the end that renews and raises it.
    pub(crate) fn new(first: u64, valid_until: Instant) -> (Self, EpochSource) {
        let (sender, now) = watch::channel(first);
        let (renewals, valid_until) = watch::channel(valid_until);
        let (raises, requests) = mpsc::channel(16);
        let source = EpochSource { now: sender, valid_until: renewals, raises: requests };
        (Self { first, now, valid_until, raises }, source)
    }

    /// The current epoch.
    #[must_use]
    pub fn now(&self) -> u64 {
        *self.now.borrow()
    }

    /// No other operator can have begun. A process that was stopped for a while learns of it by this alone.
    #[must_use]
    pub fn is_in_force(&self) -> bool {
        Instant::now() < *self.valid_until.borrow()
    }

    /// Why an epoch that an agent has seen is more than this operator believes. `accepted`: what an
    /// administrator has accepted from that agent.
    #[must_use]
    pub fn doubt(&self, known: u64, accepted: Option<u64>) -> Option<EpochClaim> {
        let own = self.now();
        let limit = believed(self.first, accepted);
        (known > own && known > limit).then_some(EpochClaim { known, own, limit })
    }

    /// Asks for an epoch above one that an agent knows, and returns when it is in force. `accepted`: what an
    /// administrator has accepted from that agent.
    pub async fn above(&self, known: u64, accepted: Option<u64>) -> Raised {
        if let Some(claim) = self.doubt(known, accepted) {
            return Raised::TooHigh(claim);
        }
        let mut now = self.now.clone();
        let raised = async {
            self.ask_for(known);
            now.wait_for(|now| *now > known).await.is_ok()
        };
        if timeout(RAISE_TIMEOUT, raised).await.unwrap_or(false) { Raised::Yes } else { Raised::No }
    }

    pub(crate) fn ask_for(&self, known: u64) {
        // Full: other calls ask for the same, and one answer serves all.
        self.raises.try_send(known).ok();
    }
}

/// The highest epoch that an agent is believed to have seen, in a leadership that began with `first`.
fn believed(first: u64, accepted: Option<u64>) -> u64 {
    let alone = first.saturating_add(RAISE_DISTANCE);
    alone.max(accepted.unwrap_or_default()).min(HIGHEST_ACCEPTED_EPOCH.unsigned_abs())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn epoch(first: u64) -> (Epoch, EpochSource) {
        Epoch::new(first, Instant::now() + Duration::from_secs(60))
    }

    #[test]
    fn an_agent_is_believed_a_small_distance_in_one_leadership_and_as_far_as_an_administrator_says() {
        const END: u64 = i32::MAX as u64;
        for (first, now, known, accepted, believed) in [
            (1, 1, 1, None, true),
            (1, 1, 65, None, true),
            (1, 1, 66, None, false),
            // What was raised already does not make the distance longer.
            (1, 60, 65, None, true),
            (1, 60, 66, None, false),
            // Lower than the operator's own: nothing has to be raised.
            (1, 100, 99, None, true),
            // An agent reports what this operator has told it.
            (1, 5002, 5002, None, true),
            (1, 1, 5000, Some(4999), false),
            (1, 1, 5000, Some(5000), true),
            (1, 1, END - 1, None, false),
            (1, 1, END - 1_000_000, Some(END), true),
            (1, 1, END - 999_999, Some(END), false),
            (1, 1, u64::MAX, Some(u64::MAX), false),
        ] {
            let (epoch, source) = epoch(first);
            source.now.send_replace(now);
            assert_eq!(
                epoch.doubt(known, accepted).is_none(),
                believed,
                "{first} {now} {known} {accepted:?}"
            );
        }
    }

    #[tokio::test]
    async fn a_claim_that_is_not_believed_raises_nothing_and_gives_both_numbers_and_the_remedy() {
        let (epoch, mut source) = epoch(1);
        let Raised::TooHigh(claim) = epoch.above(2_147_483_646, None).await else {
            panic!("2147483646 was believed")
        };
        let text = claim.to_string();
        for words in ["2147483646", "this operator has 1", "up to 65", "forget-epoch"] {
            assert!(text.contains(words), "{text}");
        }
        assert!(!text.contains("acceptEpochUpTo"), "nothing that the API server refuses is advised: {text}");
        let Raised::TooHigh(claim) = epoch.above(66, None).await else { panic!("66 was believed") };
        assert!(
            claim.to_string().contains("set spec.acceptEpochUpTo of this MigrationNode to 66"),
            "{claim}"
        );
        assert!(source.raises.try_recv().is_err());
    }

    #[test]
    fn an_epoch_is_in_force_until_another_operator_may_begin() {
        let (epoch, source) = Epoch::new(1, Instant::now());
        assert!(!epoch.is_in_force());
        source.valid_until.send_replace(Instant::now() + Duration::from_secs(60));
        assert!(epoch.is_in_force());
    }
}
