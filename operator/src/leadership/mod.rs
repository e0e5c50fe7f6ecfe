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
//! begin. Renewals have a thread of their own ([`Keeper`]), and every call that an agent acts upon is refused
//! here once the last renewal has run out ([`Epoch::is_in_force`]). An operator that loses the Lease ends; it
//! does not try again in the same process, where something of the old leadership might live on.

pub mod election;
mod lease;
#[cfg(test)]
mod tests;

use std::time::Duration;

use kube::{Api, Client};
use tokio::runtime::Builder;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, sleep_until};
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
    /// The thread that renews it has failed.
    #[error("the thread that renews the Lease has failed: {error}")]
    KeeperFailed {
        /// How.
        error: String,
    },
}

/// This operator leads.
struct Leadership {
    terms: Terms,
    api: Api<lease::Lease>,
    held: HeldLease,
    /// When the last renewal that was taken had been sent.
    renewed: Instant,
    epoch: EpochSource,
}

impl Leadership {
    /// Waits until this operator leads. `None`: `stop` came first.
    async fn acquire(client: &Client, terms: Terms, stop: &CancellationToken) -> Option<(Self, Epoch)> {
        let api = Api::namespaced(client.clone(), &terms.namespace);
        let identity = lease::identity();
        let mut candidate = Candidate::new(identity.clone(), terms.duration);
        let began = Instant::now();
        let mut reported = String::new();
        loop {
            let asked = Instant::now();
            let state = match try_to_lead(&api, &terms, &mut candidate, began).await {
                Ok(Bid::Won(held)) => {
                    let (epoch, source) = Epoch::new(held.epoch(), asked + terms.duration);
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
    ///
    /// A renewal comes when it is time, whatever else is asked for meanwhile.
    async fn keep(&mut self) -> LeadershipLost {
        let mut error = "no answer".to_owned();
        let mut next_renewal = Instant::now() + self.terms.retry;
        loop {
            let deadline = self.renewed + self.terms.renew_deadline;
            let transitions = tokio::select! {
                biased;
                () = sleep_until(deadline) => return self.not_renewed(error),
                () = sleep_until(next_renewal) => None,
                Some(known) = self.epoch.raises.recv() => match self.raise(known) {
                    Some(raised) => Some(raised),
                    None => continue,
                },
            };
            let asked = Instant::now();
            next_renewal = asked + self.terms.retry;
            let renewed = tokio::select! {
                biased;
                () = sleep_until(deadline) => return self.not_renewed(error),
                renewed = lease::renew(&self.api, &self.held, transitions) => renewed,
            };
            match renewed {
                Ok(held) => {
                    self.held = held;
                    self.renewed = asked;
                    self.epoch.valid_until.send_replace(asked + self.terms.duration);
                    self.epoch.now.send_replace(self.held.epoch());
                }
                Err(LeaseError::Taken { holder }) => {
                    return LeadershipLost::Taken { name: self.terms.name.clone(), holder };
                }
                Err(other) => {
                    error = other.to_string();
                    tracing::warn!(error, "the lease could not be renewed; trying again");
                }
            }
        }
    }

    fn not_renewed(&self, error: String) -> LeadershipLost {
        let (name, deadline) = (self.terms.name.clone(), self.terms.renew_deadline);
        LeadershipLost::NotRenewed { name, deadline, error }
    }

    /// The transitions that are above an epoch that an agent has seen; `None` if they are already, or cannot
    /// be.
    fn raise(&self, known: u64) -> Option<i32> {
        let raised = Some(known).filter(|known| *known >= self.held.epoch())?;
        let raised = election::transitions_above(raised)?;
        let epoch = u64::try_from(raised).unwrap_or_default() + 1;
        tracing::warn!(
            known,
            epoch,
            "an agent has seen a higher epoch; the lease's transitions are raised above it"
        );
        Some(raised)
    }

    async fn release(self) {
        match lease::release(&self.api, &self.held).await {
            Ok(()) => tracing::info!(lease = self.terms.name, "the lease has been given back"),
            Err(error) => {
                tracing::warn!(lease = self.terms.name, %error, "the lease could not be given back")
            }
        }
    }
}

/// The thread that keeps the Lease. It has a runtime and a client of its own: nothing that this operator does
/// delays a renewal.
pub struct Keeper {
    lost: oneshot::Receiver<LeadershipLost>,
    stop: CancellationToken,
}

impl Keeper {
    /// Waits until this operator leads, and keeps the Lease from then on. `None`: `stop` came first.
    ///
    /// # Errors
    /// [`LeadershipLost::KeeperFailed`]: there can be no such thread.
    pub async fn start(
        client: impl FnOnce() -> kube::Result<Client> + Send + 'static,
        terms: Terms,
        stop: &CancellationToken,
    ) -> Result<Option<(Self, Epoch)>, LeadershipLost> {
        let failed = |error: String| LeadershipLost::KeeperFailed { error };
        let runtime = Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|error| failed(error.to_string()))?;
        let ((lost_sender, lost), (leads, led)) = (oneshot::channel(), oneshot::channel());
        let (never, stop_keeping) = (stop.clone(), CancellationToken::new());
        let stopped = stop_keeping.clone();
        let work = move || {
            let keeping = async move {
                let client = match client() {
                    Ok(client) => client,
                    Err(error) => return drop(leads.send(Err(failed(error.to_string())))),
                };
                let Some((mut leadership, epoch)) = Leadership::acquire(&client, terms, &never).await else {
                    return drop(leads.send(Ok(None)));
                };
                leads.send(Ok(Some(epoch))).ok();
                match stopped.run_until_cancelled(leadership.keep()).await {
                    Some(lost) => drop(lost_sender.send(lost)),
                    None => leadership.release().await,
                }
            };
            runtime.block_on(keeping);
        };
        std::thread::Builder::new()
            .name("lease".to_owned())
            .spawn(work)
            .map_err(|error| failed(error.to_string()))?;
        let leads = led.await.unwrap_or_else(|_| Err(failed("it has ended".to_owned())))?;
        Ok(leads.map(|epoch| (Self { lost, stop: stop_keeping }, epoch)))
    }

    /// Returns when the leadership is lost.
    pub async fn lost(&mut self) -> LeadershipLost {
        let ended = || LeadershipLost::KeeperFailed { error: "it has ended".to_owned() };
        (&mut self.lost).await.unwrap_or_else(|_| ended())
    }

    /// Gives the Lease back, so that no other operator has to wait for it. Only when all that acted by it has
    /// ended.
    pub async fn release(self) {
        self.stop.cancel();
        // The thread drops its end when it has done that.
        self.lost.await.ok();
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
