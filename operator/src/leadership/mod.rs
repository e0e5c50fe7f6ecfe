//! Which of several operators acts: the holder of a `coordination.k8s.io/v1` Lease.
//!
//! [`election`] decides (pure), `lease` reads and writes. As in client-go, this process judges by its own
//! monotonic clock whether another holder's Lease has run out: from when it saw the Lease change last, never
//! by the times in the Lease. So clocks that disagree do no harm.
//!
//! ```text
//!  wait ──(free, or not renewed for its duration)──▶ lead and renew ──(not renewed for `renew_deadline`)──▶ lost
//! ```
//! The deadline is shorter than the duration: a leader that cannot renew has stopped before another may
//! begin. An operator that loses the Lease ends; it does not try again in the same process, where something
//! of the old leadership might live on.

pub mod election;
mod lease;

use std::time::Duration;

use kube::{Api, Client};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use crate::epoch::{Epoch, EpochSource};
use election::{Candidate, Move};
use lease::{HeldLease, LeaseError};

/// Where the Lease is, and the times by which it is held.
#[derive(Debug, Clone)]
pub struct Terms {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// How long others wait after the last renewal. Whole seconds.
    pub duration: Duration,
    /// How long the leader goes on without a renewal.
    pub renew_deadline: Duration,
    /// The pause between two renewals, and between two looks of an operator that waits.
    pub retry: Duration,
}

/// Times that contradict each other.
#[derive(Debug, thiserror::Error)]
pub enum TermsError {
    /// A second leader could begin before the first has stopped.
    #[error(
        "the lease's renew deadline ({deadline:?}) must be shorter than its duration ({duration:?}), which \
         is whole seconds, and longer than the pause between two tries ({retry:?})"
    )]
    Order {
        /// The duration.
        duration: Duration,
        /// The renew deadline.
        deadline: Duration,
        /// The pause between two tries.
        retry: Duration,
    },
}

impl Terms {
    /// # Errors
    /// [`TermsError`]
    pub fn check(&self) -> Result<(), TermsError> {
        let whole = self.duration.subsec_nanos() == 0 && i32::try_from(self.duration.as_secs()).is_ok();
        if whole && self.retry < self.renew_deadline && self.renew_deadline < self.duration {
            return Ok(());
        }
        let (duration, deadline, retry) = (self.duration, self.renew_deadline, self.retry);
        Err(TermsError::Order { duration, deadline, retry })
    }
}

/// The leadership is lost. All that acts by it must have ended when this is returned.
#[derive(Debug, thiserror::Error)]
pub enum LeadershipLost {
    /// The API server did not take a renewal in time.
    #[error("the Lease {name} could not be renewed within {} ms: {error}", deadline.as_millis())]
    NotRenewed {
        /// The Lease.
        name: String,
        /// The time.
        deadline: Duration,
        /// How the last try failed.
        error: String,
    },
    /// Another operator holds the Lease.
    #[error("the Lease {name} is held by {holder} now")]
    Taken {
        /// The Lease.
        name: String,
        /// The other operator.
        holder: String,
    },
}

/// This operator leads.
pub struct Leadership {
    terms: Terms,
    api: Api<lease::Lease>,
    held: HeldLease,
    /// When the last renewal that was taken had been sent.
    renewed: Instant,
    epoch: EpochSource,
}

impl Leadership {
    /// Waits until this operator leads. `None`: `stop` came first.
    pub async fn acquire(client: &Client, terms: Terms, stop: &CancellationToken) -> Option<(Self, Epoch)> {
        let api = Api::namespaced(client.clone(), &terms.namespace);
        let identity = lease::identity();
        let mut candidate = Candidate::new(identity.clone(), terms.duration);
        let began = Instant::now();
        let mut reported = String::new();
        loop {
            let asked = Instant::now();
            let state = match try_to_lead(&api, &terms, &mut candidate, began).await {
                Ok(Bid::Won(held)) => {
                    let (epoch, source) = Epoch::new(held.epoch());
                    tracing::info!(lease = terms.name, identity, epoch = epoch.now(), "this operator leads");
                    return Some((Self { terms, api, held: *held, renewed: asked, epoch: source }, epoch));
                }
                Ok(Bid::Waiting { holder }) => {
                    format!("{holder} leads; waiting for the Lease {}", terms.name)
                }
                Err(error) => {
                    format!("the Lease {} could not be read or taken; trying again: {error}", terms.name)
                }
            };
            if state != reported {
                tracing::info!("{state}");
                reported = state;
            }
            tokio::select! {
                () = sleep(terms.retry) => {}
                () = stop.cancelled() => return None,
            }
        }
    }

    /// Keeps the Lease, and raises its transitions when asked to. Ends only when the leadership is lost.
    pub async fn keep(&mut self) -> LeadershipLost {
        let mut error = "no answer".to_owned();
        loop {
            let deadline = self.renewed + self.terms.renew_deadline;
            tokio::select! {
                () = tokio::time::sleep_until(deadline) => {
                    let (name, deadline) = (self.terms.name.clone(), self.terms.renew_deadline);
                    return LeadershipLost::NotRenewed { name, deadline, error };
                }
                result = self.renew_after_a_pause() => match result {
                    Ok(()) => {}
                    Err(LeaseError::Taken { holder }) => {
                        return LeadershipLost::Taken { name: self.terms.name.clone(), holder };
                    }
                    Err(other) => {
                        error = other.to_string();
                        tracing::warn!(error, "the lease could not be renewed; trying again");
                    }
                },
            }
        }
    }

    async fn renew_after_a_pause(&mut self) -> Result<(), LeaseError> {
        let above = tokio::select! {
            () = sleep(self.terms.retry) => None,
            Some(known) = self.epoch.raises.recv() => Some(known),
        };
        let asked = Instant::now();
        let transitions = match above {
            Some(known) if known >= self.held.epoch() => {
                let raised = election::transitions_above(known).ok_or(LeaseError::EpochTooHigh { known })?;
                tracing::warn!(
                    known,
                    epoch = u64::try_from(raised).unwrap_or_default() + 1,
                    "an agent has seen a higher epoch; the lease's transitions are raised above it"
                );
                Some(raised)
            }
            Some(_) => return Ok(()),
            None => None,
        };
        self.held = lease::renew(&self.api, &self.held, transitions).await?;
        self.renewed = asked;
        self.epoch.now.send_replace(self.held.epoch());
        Ok(())
    }

    /// Gives the Lease back, so that no other operator has to wait for it. Only when all that acted by it has
    /// ended.
    pub async fn release(self) {
        match lease::release(&self.api, &self.held).await {
            Ok(()) => tracing::info!(lease = self.terms.name, "the lease has been given back"),
            Err(error) => {
                tracing::warn!(lease = self.terms.name, %error, "the lease could not be given back")
            }
        }
    }
}

/// What came of one look at the Lease.
enum Bid {
    /// This operator has it.
    Won(Box<HeldLease>),
    /// Another operator has it.
    Waiting {
        /// Which one.
        holder: String,
    },
}

/// Takes the Lease if it may be taken; otherwise says who has it.
async fn try_to_lead(
    api: &Api<lease::Lease>,
    terms: &Terms,
    candidate: &mut Candidate,
    began: Instant,
) -> Result<Bid, LeaseError> {
    let found = lease::read(api, &terms.name).await?;
    let seen = found.as_ref().map(lease::state_of);
    match candidate.consider(seen, began.elapsed()) {
        Move::Take { transitions } => lease::take(api, &terms.name, found, candidate, transitions)
            .await
            .map(|held| Bid::Won(Box::new(held))),
        Move::Wait { holder } => Ok(Bid::Waiting { holder }),
    }
}
