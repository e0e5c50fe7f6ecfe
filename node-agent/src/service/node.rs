//! `slackwater.node.v1`, served to the operator.

use std::pin::Pin;
use std::sync::Arc;

use futures::{Stream, StreamExt};
use slackwater_handover::{Failure, Reason};
use slackwater_proto::identity;
use slackwater_proto::node::node_agent_server::NodeAgent;
use slackwater_proto::node::{
    AbortRequest, AbortResponse, AcknowledgeEndRequest, AcknowledgeEndResponse, DescribeRequest,
    DescribeResponse, JournalState, MigrateRequest, MigrateResponse, MigrationRef, ReleaseReason,
    ReleaseRequest, ReleaseResponse, ReserveRequest, ReserveResponse, ResolveRequest, ResolveResponse,
    WatchRequest, WatchResponse,
};
use slackwater_proto::refusal::Refusal;
use slackwater_proto::tonic::{Code, Request, Response, Status, async_trait};

use super::attempts::Attempts;
use super::inventory::{Inventory, LookError};
use super::reason::ServiceReason;
use super::registry::LocalEnd;
use super::request;
use super::whole::to_its_end;

/// The service.
pub struct NodeService {
    inventory: Arc<Inventory>,
    attempts: Arc<Attempts>,
}

impl NodeService {
    /// Serves this node.
    pub fn new(inventory: Arc<Inventory>, attempts: Attempts) -> Self {
        Self { inventory, attempts: Arc::new(attempts) }
    }

    /// This node's part in the attempt that a call is about: see [`Attempts::find`].
    async fn find(&self, reference: MigrationRef) -> Result<Option<LocalEnd>, Refusal> {
        let attempts = Arc::clone(&self.attempts);
        to_its_end(async move { attempts.find(&reference).await }).await
    }
}

/// The node cannot be described.
fn cannot_look(error: &LookError) -> Status {
    Refusal::new(Code::Internal, ServiceReason::Internal, error.to_string()).into()
}

/// The VM runs, or may have run, at the destination.
fn committed(error: impl std::error::Error) -> Refusal {
    Refusal::precondition(ServiceReason::AlreadyCommitted, error.to_string())
}

#[async_trait]
impl NodeAgent for NodeService {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<WatchResponse, Status>> + Send>>;
    type MigrateStream = Pin<Box<dyn Stream<Item = Result<MigrateResponse, Status>> + Send>>;

    async fn describe(&self, call: Request<DescribeRequest>) -> Result<Response<DescribeResponse>, Status> {
        identity::require_operator(&call)?;
        let node = self.inventory.describe().await.map_err(|error| cannot_look(&error))?;
        Ok(Response::new(DescribeResponse { node: Some(node) }))
    }

    async fn watch(&self, call: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        identity::require_operator(&call)?;
        let inventory = Arc::clone(&self.inventory);
        let changes = inventory.changes();
        let stream = futures::stream::unfold((inventory, changes), |(inventory, mut changes)| async move {
            if !changes.next().await {
                return None;
            }
            let described = inventory.describe().await;
            let response =
                described.map(|node| WatchResponse { node: Some(node) }).map_err(|error| cannot_look(&error));
            Some((response, (inventory, changes)))
        });
        Ok(Response::new(Box::pin(stream)))
    }

    async fn reserve(&self, call: Request<ReserveRequest>) -> Result<Response<ReserveResponse>, Status> {
        identity::require_operator(&call)?;
        let (attempts, given) = (Arc::clone(&self.attempts), call.into_inner());
        let run = to_its_end(async move { attempts.begin_destination(given).await }).await?;
        run.reserved().await.map_err(Refusal::from)?;
        let journal_id = self.attempts.journal_identity().await;
        Ok(Response::new(ReserveResponse { journal_id }))
    }

    async fn migrate(&self, call: Request<MigrateRequest>) -> Result<Response<Self::MigrateStream>, Status> {
        identity::require_operator(&call)?;
        let (attempts, given) = (Arc::clone(&self.attempts), call.into_inner());
        let run = to_its_end(async move { attempts.begin_source(given).await }).await?;
        let stream = run.log().follow().map(|event| Ok(MigrateResponse { event: Some(event) }));
        Ok(Response::new(Box::pin(stream)))
    }

    async fn abort(&self, call: Request<AbortRequest>) -> Result<Response<AbortResponse>, Status> {
        identity::require_operator(&call)?;
        let given = call.into_inner();
        let reference = request::migration(given.migration.as_ref()).map_err(Refusal::from)?;
        if let Some(LocalEnd::Source(run)) = self.find(reference).await? {
            run.abort(given.why).await.map_err(committed)?;
        }
        Ok(Response::new(AbortResponse {}))
    }

    async fn release(&self, call: Request<ReleaseRequest>) -> Result<Response<ReleaseResponse>, Status> {
        identity::require_operator(&call)?;
        let given = call.into_inner();
        let reference = request::migration(given.migration.as_ref()).map_err(Refusal::from)?;
        let message = match given.reason() {
            ReleaseReason::AbortedAtSource => "the source has reported that it keeps the VM",
            ReleaseReason::NeverStarted => "the source was never asked to give the VM",
            ReleaseReason::Unspecified => {
                let message = format!(
                    "reason is {}: RELEASE_REASON_ABORTED_AT_SOURCE or RELEASE_REASON_NEVER_STARTED would be right",
                    given.reason
                );
                return Err(Refusal::invalid_argument(ServiceReason::InvalidRequest, message).into());
            }
        };
        if let Some(LocalEnd::Destination(run, _)) = self.find(reference).await? {
            run.release(Failure::new(Reason::Released, message)).await.map_err(committed)?;
        }
        Ok(Response::new(ReleaseResponse {}))
    }

    async fn acknowledge_end(
        &self,
        call: Request<AcknowledgeEndRequest>,
    ) -> Result<Response<AcknowledgeEndResponse>, Status> {
        identity::require_operator(&call)?;
        let reference = request::migration(call.into_inner().migration.as_ref()).map_err(Refusal::from)?;
        self.attempts.acknowledge(&reference).await?;
        Ok(Response::new(AcknowledgeEndResponse {}))
    }

    async fn resolve(&self, call: Request<ResolveRequest>) -> Result<Response<ResolveResponse>, Status> {
        identity::require_operator(&call)?;
        let given = call.into_inner();
        let reference = request::migration(given.migration.as_ref()).map_err(Refusal::from)?;
        let peer = given.peer.map(|peer| request::word("peer", &peer)).transpose().map_err(Refusal::from)?;
        let own = match self.find(reference).await? {
            Some(LocalEnd::Source(run)) => {
                if let Some(peer) = peer {
                    run.peer_says(peer);
                }
                run.journalled()
            }
            Some(LocalEnd::Destination(run, _)) => {
                if let Some(peer) = peer {
                    run.peer_says(peer);
                }
                run.journalled()
            }
            _ => JournalState::default(),
        };
        let journal_id = self.attempts.journal_identity().await;
        Ok(Response::new(ResolveResponse { own: Some(own), journal_id }))
    }
}
