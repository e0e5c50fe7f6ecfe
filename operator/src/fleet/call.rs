//! Asking an agent to do something.

use std::time::Duration;

use futures::{Stream, StreamExt};
use slackwater_proto::channel::words;
use slackwater_proto::node::node_agent_client::NodeAgentClient;
use slackwater_proto::node::{
    AbortRequest, JournalState, MigrateRequest, MigrationEvent, MigrationRef, ReleaseRequest, ReserveRequest,
    ResolveRequest,
};
use slackwater_proto::tonic::{Code, Status};

use super::Fleet;
use crate::reason::{RESERVE_REFUSED, camel_case_or};

/// Reserving starts a VMM and takes devices through the kernel; an agent that needs longer than this is
/// stuck.
const RESERVE_TIMEOUT: Duration = Duration::from_secs(120);
/// Giving back ends a VMM and resets devices.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(60);
/// An agent answers this from its journal.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(5);
/// The metadata by which an agent that refuses an epoch names the highest that it has seen.
const KNOWN_EPOCH: &str = "slackwater-known-epoch";
/// The metadata by which an agent that refuses a reservation names its reason.
const REASON: &str = "slackwater-reason";
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
    /// The agent refuses. It has changed nothing.
    #[error("{message}")]
    Refused {
        /// The state of something forbids it.
        precondition: bool,
        /// The epoch that it has seen, which is higher than this operator's.
        known_epoch: Option<u64>,
        /// The reason that it names, in CamelCase.
        reason: Option<String>,
        /// Why, in its own words.
        message: String,
    },
    /// The answer did not arrive. It may have done what it was asked.
    #[error("{message}")]
    Broken {
        /// What happened to the call.
        message: String,
    },
}

impl CallError {
    fn from_status(status: &Status) -> Self {
        let message = words(status).trim_end_matches('.').to_owned();
        match status.code() {
            Code::InvalidArgument
            | Code::NotFound
            | Code::AlreadyExists
            | Code::PermissionDenied
            | Code::ResourceExhausted
            | Code::FailedPrecondition
            | Code::OutOfRange
            | Code::Unimplemented
            | Code::Unauthenticated => {
                let known_epoch = status.metadata().get(KNOWN_EPOCH);
                Self::Refused {
                    precondition: status.code() == Code::FailedPrecondition,
                    known_epoch: known_epoch.and_then(|epoch| epoch.to_str().ok()?.parse().ok()),
                    reason: reason_of(status),
                    message,
                }
            }
            Code::Ok
            | Code::Cancelled
            | Code::Unknown
            | Code::DeadlineExceeded
            | Code::Aborted
            | Code::Internal
            | Code::Unavailable
            | Code::DataLoss => Self::Broken { message },
        }
    }

    /// The agent has answered, and changed nothing.
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Refused { .. })
    }

    /// The agent has answered that a state forbids it.
    pub fn is_precondition(&self) -> bool {
        matches!(self, Self::Refused { precondition: true, .. })
    }

    /// There is no agent to ask.
    pub fn is_no_such_node(&self) -> bool {
        matches!(self, Self::NoSuchNode { .. })
    }

    /// The agent was not even asked.
    pub fn was_not_asked(&self) -> bool {
        matches!(self, Self::NoSuchNode { .. } | Self::NotReady { .. })
    }

    /// CamelCase, for a condition's reason about the target.
    pub fn target_reason(&self) -> &str {
        match self {
            Self::NoSuchNode { .. } => "TargetNotFound",
            Self::NotReady { .. } | Self::Broken { .. } => "TargetUnreachable",
            Self::Refused { reason, .. } => reason.as_deref().unwrap_or(RESERVE_REFUSED),
        }
    }
}

/// What an agent sends is input: it goes into a condition only if it can be a reason.
fn reason_of(status: &Status) -> Option<String> {
    let named = status.metadata().get(REASON)?.to_str().ok()?;
    Some(camel_case_or(named, RESERVE_REFUSED))
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
fenced!(ReserveRequest, MigrateRequest, AbortRequest, ReleaseRequest, ResolveRequest);

impl Fleet {
    /// Asks the target to reserve.
    ///
    /// # Errors
    /// [`CallError`]
    pub async fn reserve(&self, node: &str, request: ReserveRequest) -> Result<(), CallError> {
        let client = NodeAgentClient::new(self.index.channel(node)?);
        let call = |request| {
            let mut client = client.clone();
            async move { within(RESERVE_TIMEOUT, client.reserve(request)).await.map(drop) }
        };
        self.fenced(request, call).await
    }

    /// Asks the source to migrate, or joins the migration that it is busy with.
    ///
    /// # Errors
    /// [`CallError`]
    pub async fn migrate(&self, node: &str, request: MigrateRequest) -> Result<Events, CallError> {
        let client = NodeAgentClient::new(self.index.channel(node)?);
        let call = |request| {
            let mut client = client.clone();
            async move { client.migrate(request).await.map_err(|status| CallError::from_status(&status)) }
        };
        let stream = self.fenced(request, call).await?.into_inner();
        let events = stream.filter_map(async |message| match message {
            Ok(message) => message.event.map(Ok),
            Err(status) => Some(Err(CallError::from_status(&status))),
        });
        Ok(Box::pin(events))
    }

    /// Asks the source to give a migration up. Returns when it has ended there; how, its journal says.
    ///
    /// # Errors
    /// [`CallError`]; a precondition can mean that the point of no return has passed.
    pub async fn abort(&self, node: &str, request: AbortRequest) -> Result<(), CallError> {
        let client = NodeAgentClient::new(self.index.channel(node)?);
        let call = |request| {
            let mut client = client.clone();
            async move { client.abort(request).await.map(drop).map_err(|status| CallError::from_status(&status)) }
        };
        self.fenced(request, call).await
    }

    /// Asks the target to give back what it reserved.
    ///
    /// # Errors
    /// [`CallError`]; a precondition means that the VM may have run there.
    pub async fn release(&self, node: &str, request: ReleaseRequest) -> Result<(), CallError> {
        let client = NodeAgentClient::new(self.index.channel(node)?);
        let call = |request| {
            let mut client = client.clone();
            async move { within(RELEASE_TIMEOUT, client.release(request)).await.map(drop) }
        };
        self.fenced(request, call).await
    }

    /// Asks either end what it has journalled, and relays the other end's record if the request has one.
    ///
    /// # Errors
    /// [`CallError`]
    pub async fn resolve(&self, node: &str, request: ResolveRequest) -> Result<JournalState, CallError> {
        let client = NodeAgentClient::new(self.index.channel(node)?);
        let call = |request| {
            let mut client = client.clone();
            async move { within(RESOLVE_TIMEOUT, client.resolve(request)).await }
        };
        let answer = self.fenced(request, call).await?;
        Ok(answer.into_inner().own.unwrap_or_default())
    }

    /// Makes a call with this leadership's epoch. If the agent has seen a higher one, raises the epoch above
    /// it and calls again.
    async fn fenced<R: Fenced, T, C: Future<Output = Result<T, CallError>>>(
        &self,
        mut request: R,
        call: impl Fn(R) -> C,
    ) -> Result<T, CallError> {
        let mut tries = 0;
        loop {
            let epoch = self.epoch.now();
            if let Some(migration) = request.migration() {
                migration.operator_epoch = epoch;
            }
            tries += 1;
            match call(request.clone()).await {
                Err(CallError::Refused { known_epoch: Some(known), .. })
                    if tries <= RAISES && known >= epoch && self.epoch.above(known).await => {}
                answer => return answer,
            }
        }
    }
}

async fn within<T>(limit: Duration, call: impl Future<Output = Result<T, Status>>) -> Result<T, CallError> {
    match tokio::time::timeout(limit, call).await {
        Ok(answer) => answer.map_err(|status| CallError::from_status(&status)),
        Err(_) => Err(CallError::Broken { message: format!("no answer within {} s", limit.as_secs()) }),
    }
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
    fn a_refused_reservation_has_the_agents_reason_if_that_can_be_one() {
        let reason = |named: Option<&'static str>| {
            let mut status = Status::failed_precondition("x");
            if let Some(named) = named {
                status.metadata_mut().insert(REASON, named.parse().unwrap());
            }
            CallError::from_status(&status).target_reason().to_owned()
        };
        assert_eq!(reason(Some("QEMUOlder")), "QEMUOlder");
        assert_eq!(reason(None), "ReserveRefused");
        assert_eq!(reason(Some("no reason")), "ReserveRefused");
    }
}
