//! Asking an agent to do something.

use std::time::Duration;

use futures::{Stream, StreamExt};
use slackwater_handover::Reason;
use slackwater_proto::limits::node_client;
use slackwater_proto::node::{
    AbortRequest, AcknowledgeEndRequest, MigrateRequest, MigrationEvent, MigrationRef, ReleaseRequest,
    ReserveRequest, ResolveRequest, ResolveResponse,
};
use slackwater_proto::refusal::{Detail, Refusal};
use slackwater_proto::tonic::{Code, Status};

use super::Fleet;
use crate::epoch::{EpochClaim, Raised};
use crate::reason::{EPOCH_TOO_HIGH, RESERVE_REFUSED, SOURCE_REFUSED, TARGET_UNREACHABLE};

/// How often a call is repeated with a higher epoch. Each time another operator has raised it meanwhile.
const RAISES: u32 = 3;

/// A call that failed.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// There is no MigrationNode of that name (any more).
    #[error("there is no MigrationNode {node:?} any more")]
    NoSuchNode {
        /// The name.
        node: String,
    },
    /// The agent does not answer. It was not asked.
    #[error("{error}")]
    NotReady {
        /// The node.
        node: String,
        /// Why not, for a person.
        error: String,
    },
    /// The agent has seen an operator epoch that is not believed. It has changed nothing.
    #[error("{claim}")]
    EpochTooHigh {
        /// The node.
        node: String,
        /// The epoch.
        claim: EpochClaim,
    },
    /// This operator does not lead any more, as far as it knows. The agent was not asked.
    #[error("this operator could not renew its Lease in time, and asks nothing of agents any more")]
    NotLeading,
    /// The agent refuses. It has changed nothing.
    #[error(transparent)]
    Refused(Refusal),
    /// The answer did not arrive. It may have done what it was asked.
    #[error("{message}")]
    Broken {
        /// The reason, if the agent has named one.
        reason: Option<Reason>,
        /// What happened to the call.
        message: String,
    },
}

impl CallError {
    fn from_status(status: &Status) -> Self {
        let mut refusal = Refusal::from_status(status);
        refusal.message.truncate(refusal.message.trim_end_matches('.').len());
        match refusal.is_decided() {
            true => Self::Refused(refusal),
            false => Self::Broken { reason: refusal.reason, message: refusal.message },
        }
    }

    /// The agent has answered, and changed nothing.
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Refused(_))
    }

    /// The agent has answered that a state of the migration forbids it. An operator that is told that its
    /// epoch is over has learned nothing about the migration.
    pub fn is_precondition(&self) -> bool {
        matches!(
            self,
            Self::Refused(Refusal { code: Code::FailedPrecondition, detail, .. })
                if !matches!(detail, Some(Detail::KnownEpoch(_)))
        )
    }

    /// There is no agent to ask.
    pub fn is_no_such_node(&self) -> bool {
        matches!(self, Self::NoSuchNode { .. })
    }

    /// The agent was not even asked, or did not listen.
    pub fn was_not_asked(&self) -> bool {
        match self {
            Self::NoSuchNode { .. }
            | Self::NotReady { .. }
            | Self::EpochTooHigh { .. }
            | Self::NotLeading => true,
            Self::Refused(_) | Self::Broken { .. } => false,
        }
    }

    /// CamelCase, for a condition: why the target could not be made ready.
    pub fn target_reason(&self) -> &str {
        match self {
            Self::NoSuchNode { .. } => "TargetNotFound",
            Self::NotReady { .. } | Self::NotLeading => TARGET_UNREACHABLE,
            Self::EpochTooHigh { .. } => EPOCH_TOO_HIGH,
            Self::Broken { reason, .. } => name_of(reason.as_ref(), TARGET_UNREACHABLE),
            Self::Refused(refusal) => name_of(refusal.reason.as_ref(), RESERVE_REFUSED),
        }
    }

    /// CamelCase, for a condition: why the source, which has answered, has not begun.
    pub fn source_reason(&self) -> &str {
        match self {
            Self::Refused(refusal) => name_of(refusal.reason.as_ref(), SOURCE_REFUSED),
            Self::EpochTooHigh { .. } => EPOCH_TOO_HIGH,
            Self::NoSuchNode { .. } | Self::NotReady { .. } | Self::NotLeading | Self::Broken { .. } => {
                SOURCE_REFUSED
            }
        }
    }
}

fn name_of<'a>(reason: Option<&'a Reason>, fallback: &'a str) -> &'a str {
    reason.map_or(fallback, Reason::as_str)
}

/// The events of an attempt, as they arrive.
pub type Events = std::pin::Pin<Box<dyn Stream<Item = Result<MigrationEvent, CallError>> + Send>>;

/// A request that names its migration.
pub(super) trait Fenced: Clone {
    /// Where it is named.
    fn migration(&mut self) -> &mut Option<MigrationRef>;
}

macro_rules! fenced {
    ($($request:ty),+) => {$(
        impl Fenced for $request {
            fn migration(&mut self) -> &mut Option<MigrationRef> {
                &mut self.migration
            }
        }
    )+};
}
fenced!(ReserveRequest, MigrateRequest, AbortRequest, ReleaseRequest, ResolveRequest, AcknowledgeEndRequest);

impl Fleet {
    /// Asks the target to reserve. Returns the identity of the journal in which it has recorded that, or nothing
    /// that is one.
    ///
    /// # Errors
    /// [`CallError`]
    pub async fn reserve(&self, node: &str, request: ReserveRequest) -> Result<String, CallError> {
        let client = node_client(self.index.channel(node)?);
        let report = self.index.known(node)?.report;
        let limit = self.limits.reserve(report.and_then(|report| report.twin_start_limit));
        let call = |request| {
            let mut client = client.clone();
            async move { within("Reserve", limit, client.reserve(request)).await }
        };
        Ok(self.fenced(node, request, call).await?.into_inner().journal_id)
    }

    /// Asks the source to migrate, or joins the migration that it is busy with.
    ///
    /// # Errors
    /// [`CallError`]
    pub async fn migrate(&self, node: &str, request: MigrateRequest) -> Result<Events, CallError> {
        let client = node_client(self.index.connected(node)?);
        let limit = self.limits.migrate;
        let call = |request| {
            let mut client = client.clone();
            async move { within("Migrate", limit, client.migrate(request)).await }
        };
        let stream = self.fenced(node, request, call).await?.into_inner();
        let messages = first_within(self.limits.first_event, stream);
        Ok(Box::pin(messages.filter_map(async |message| match message {
            Ok(message) => message.event.map(Ok),
            Err(error) => Some(Err(error)),
        })))
    }

    /// Asks the source to give a migration up. Returns when it has ended there; how, its journal says.
    ///
    /// # Errors
    /// [`CallError`]; a precondition can mean that the point of no return has passed.
    pub async fn abort(&self, node: &str, request: AbortRequest) -> Result<(), CallError> {
        let client = node_client(self.index.connected(node)?);
        let limit = self.limits.abort;
        let call = |request| {
            let mut client = client.clone();
            async move { within("Abort", limit, client.abort(request)).await.map(drop) }
        };
        self.fenced(node, request, call).await
    }

    /// Asks the target to give back what it reserved.
    ///
    /// # Errors
    /// [`CallError`]; a precondition means that the VM may have run there.
    pub async fn release(&self, node: &str, request: ReleaseRequest) -> Result<(), CallError> {
        let client = node_client(self.index.connected(node)?);
        let limit = self.limits.release;
        let call = |request| {
            let mut client = client.clone();
            async move { within("Release", limit, client.release(request)).await.map(drop) }
        };
        self.fenced(node, request, call).await
    }

    /// Asks either end what it has journalled, and relays the other end's record if the request has one.
    ///
    /// # Errors
    /// [`CallError`]
    pub async fn resolve(&self, node: &str, request: ResolveRequest) -> Result<ResolveResponse, CallError> {
        let client = node_client(self.index.connected(node)?);
        let limit = self.limits.resolve;
        let call = |request| {
            let mut client = client.clone();
            async move { within("Resolve", limit, client.resolve(request)).await }
        };
        Ok(self.fenced(node, request, call).await?.into_inner())
    }

    /// Tells either end that it is known how the migration ended. An older agent has no such call, and forgets
    /// by itself.
    ///
    /// # Errors
    /// [`CallError`]
    pub async fn acknowledge_end(&self, node: &str, request: AcknowledgeEndRequest) -> Result<(), CallError> {
        let client = node_client(self.index.connected(node)?);
        let limit = self.limits.resolve;
        let call = |request| {
            let mut client = client.clone();
            let acknowledged = async move {
                match client.acknowledge_end(request).await {
                    Err(status) if status.code() == Code::Unimplemented => Ok(()),
                    answer => answer.map(drop),
                }
            };
            within("AcknowledgeEnd", limit, acknowledged)
        };
        self.fenced(node, request, call).await
    }

    /// Makes a call with this leadership's epoch. If the agent has seen a higher one that is believed, raises
    /// the epoch above it and calls again.
    async fn fenced<R: Fenced, T, C: Future<Output = Result<T, CallError>>>(
        &self,
        node: &str,
        mut request: R,
        call: impl Fn(R) -> C,
    ) -> Result<T, CallError> {
        let mut tries = 0;
        loop {
            if !self.epoch.is_in_force() {
                return Err(CallError::NotLeading);
            }
            let epoch = self.epoch.now();
            if let Some(migration) = request.migration() {
                migration.operator_epoch = epoch;
            }
            tries += 1;
            let answer = call(request.clone()).await;
            let Err(CallError::Refused(Refusal { detail: Some(Detail::KnownEpoch(known)), .. })) = &answer
            else {
                return answer;
            };
            if *known < epoch || tries > RAISES {
                return answer;
            }
            match self.epoch.above(*known, self.index.known(node)?.accepted_epoch).await {
                Raised::Yes => self.index.epoch_rose(self.epoch.now()),
                Raised::No => return answer,
                Raised::TooHigh(claim) => {
                    tracing::warn!(node, %claim, "an agent is set aside");
                    self.index.set_aside(node, claim.clone());
                    return Err(CallError::EpochTooHigh { node: node.to_owned(), claim });
                }
            }
        }
    }
}

async fn within<T>(
    name: &str,
    limit: Duration,
    call: impl Future<Output = Result<T, Status>>,
) -> Result<T, CallError> {
    match tokio::time::timeout(limit, call).await {
        Ok(answer) => answer.map_err(|status| CallError::from_status(&status)),
        Err(_) => Err(late(&format!("answer to {name}"), limit)),
    }
}

/// The messages of a stream whose first one may take so long, and each other one any time.
fn first_within<T>(
    limit: Duration,
    stream: impl Stream<Item = Result<T, Status>> + Unpin,
) -> impl Stream<Item = Result<T, CallError>> {
    futures::stream::unfold((stream, Some(limit)), |(mut stream, limit)| async move {
        let next = match limit {
            None => stream.next().await?,
            Some(limit) => match tokio::time::timeout(limit, stream.next()).await {
                Ok(next) => next?,
                Err(_) => return Some((Err(late("event of the migration", limit)), (stream, None))),
            },
        };
        Some((next.map_err(|status| CallError::from_status(&status)), (stream, None)))
    })
}

fn late(what: &str, limit: Duration) -> CallError {
    let message = format!("no {what} within {} s", limit.as_secs_f64());
    CallError::Broken { reason: None, message }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_answer_that_must_come_from_the_agent_itself_is_a_refusal() {
        for code in
            [Code::Unavailable, Code::Unknown, Code::Internal, Code::Cancelled, Code::DeadlineExceeded]
        {
            assert!(!CallError::from_status(&Status::new(code, "x")).is_refusal(), "{code:?}");
        }
        let refusal = CallError::from_status(&Status::failed_precondition("the VM is paused."));
        assert!(refusal.is_refusal() && refusal.is_precondition());
        assert_eq!(refusal.to_string(), "the VM is paused");
        assert!(!CallError::from_status(&Status::not_found("no such VM")).is_precondition());
    }

    #[test]
    fn a_refused_call_has_the_reason_that_the_agent_names_if_it_names_one() {
        let read = |refusal: Refusal| CallError::from_status(&refusal.into());
        let full = read(Refusal::precondition(Reason::JournalFailed, "no space."));
        assert_eq!((full.target_reason(), full.source_reason()), ("JournalFailed", "JournalFailed"));
        assert_eq!(full.to_string(), "no space");
        let older = read(Refusal::precondition(Reason::Other("QEMUOlder".into()), "it has 9.2"));
        assert_eq!(older.target_reason(), "QEMUOlder");
        let unnamed = Status::failed_precondition("x");
        let mut hostile = unnamed.clone();
        hostile.metadata_mut().insert("slackwater-reason", "no reason".parse().unwrap());
        for status in [unnamed, hostile] {
            let error = CallError::from_status(&status);
            assert_eq!((error.target_reason(), error.source_reason()), ("ReserveRefused", "SourceRefused"));
        }
    }

    #[test]
    fn a_target_that_cannot_go_on_now_has_its_reason_and_one_that_is_lost_is_unreachable() {
        let full = Refusal::unavailable(Reason::JournalFailed, "the epoch could not be recorded");
        let full = CallError::from_status(&full.into());
        assert_eq!((full.is_refusal(), full.target_reason()), (false, "JournalFailed"));
        let lost = CallError::from_status(&Status::unavailable("connection refused"));
        assert_eq!(lost.target_reason(), "TargetUnreachable");
    }
}
