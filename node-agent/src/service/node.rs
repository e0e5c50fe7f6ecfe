//! `slackwater.node.v1`, served to the operator.

use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;

use futures::future::BoxFuture;
use futures::{FutureExt, Stream, StreamExt};
use slackwater_handover::policy::Driver;
use slackwater_handover::policy::stop_plan;
use slackwater_handover::state::MigrationState;
use slackwater_handover::{Failure, Reason};
use slackwater_proto::identity;
use slackwater_proto::node::node_agent_server::NodeAgent;
use slackwater_proto::node::{
    AbortRequest, AbortResponse, DescribeRequest, DescribeResponse, DevicePair, JournalState, MigrateRequest,
    MigrateResponse, MigrationRef, ReleaseReason, ReleaseRequest, ReleaseResponse, ReserveRequest,
    ReserveResponse, ResolveRequest, ResolveResponse, WatchRequest, WatchResponse,
};
use slackwater_proto::tls::Credentials;
use slackwater_proto::tonic::{Request, Response, Status, async_trait};
use slackwater_proto::transfer::Attempt;
use tokio::sync::Mutex;
use tracing::{error, info, warn};

use super::inventory::Inventory;
use super::preflight::Preflight;
use super::recovery;
use super::registry::{Part, Registry, Stale};
use super::{NodeConfig, borrowing, journalling, request, reservation};
use crate::attempt::destination::{DestinationParts, DestinationRun, Site};
use crate::attempt::events::EventLog;
use crate::attempt::ledger::Ledger;
use crate::attempt::link::Peer;
use crate::attempt::source::{SourceParts, SourceRun};
use crate::host::identity::{IdentityOf, VfIdentity};
use crate::journal::{Journal, JournalError, Role};
use crate::process::cgroup::Cgroup;
use crate::vfio::worker::DeviceHandle;
use crate::vmm::budget::Budget;
use crate::vmm::{Description, LocalVmm, RunState, Vmm, twin};

/// The service.
pub struct NodeService {
    config: NodeConfig,
    credentials: Arc<Credentials>,
    inventory: Arc<Inventory>,
    registry: Arc<Registry>,
    journal: Arc<Journal>,
    vf_identity: Arc<dyn VfIdentity>,
    preflight: Preflight,
    /// Reservations and migrations begin one after the other: what one has checked, the next cannot change before it is taken.
    beginning: Mutex<()>,
}

impl NodeService {
    /// Serves this node.
    pub fn new(
        config: NodeConfig,
        credentials: Arc<Credentials>,
        inventory: Arc<Inventory>,
        registry: Arc<Registry>,
        journal: Arc<Journal>,
        vf_identity: Arc<dyn VfIdentity>,
    ) -> Self {
        let preflight = Preflight::new(&config);
        let beginning = Mutex::new(());
        Self { config, credentials, inventory, registry, journal, vf_identity, preflight, beginning }
    }

    /// Takes up what an earlier agent has left in the journal. To be called before anybody is served.
    ///
    /// # Errors
    /// If the journal's directory cannot be read. A single file that cannot be read is told, and held.
    pub async fn recover(&self) -> Result<(), JournalError> {
        self.preflight.clear().await;
        let around = recovery::Around {
            config: self.config.clone(),
            credentials: Arc::clone(&self.credentials),
            inventory: Arc::clone(&self.inventory),
            registry: Arc::clone(&self.registry),
            journal: Arc::clone(&self.journal),
            vf_identity: Arc::clone(&self.vf_identity),
        };
        recovery::recover(around).await
    }

    /// Refuses who is not up to date. A newer operator's epoch is durable before anything is done for it.
    async fn fence(&self, reference: &MigrationRef) -> Result<(), Status> {
        let epoch = reference.operator_epoch;
        if epoch > self.registry.highest_epoch() {
            let journal = Arc::clone(&self.journal);
            let written = tokio::task::spawn_blocking(move || journal.set_epoch(epoch)).await;
            let written = written.map_err(|error| Status::internal(error.to_string()))?;
            written.map_err(|error| {
                Status::unavailable(format!("the operator's epoch {epoch} could not be recorded: {error}"))
            })?;
        }
        self.registry.fence(reference).map_err(|stale| {
            let mut status = Status::failed_precondition(stale.to_string());
            if let Stale::Epoch { known, .. } = stale
                && let Ok(known) = known.to_string().parse()
            {
                status.metadata_mut().insert("slackwater-known-epoch", known);
            }
            status
        })
    }

    /// This node's part in an attempt, if it is one that can be asked.
    fn part(&self, reference: &MigrationRef) -> Result<Option<Part>, Status> {
        match self.registry.part(&reference.id, reference.attempt) {
            Some(Part::Recovering) => Err(Status::unavailable(
                "the agent was started again, and is still finding the VM and its devices; try again",
            )),
            Some(Part::Unreadable(why)) => Err(Status::failed_precondition(why)),
            part => Ok(part),
        }
    }

    /// Begins a migration away from here, or joins it if it has begun.
    async fn source(&self, given: MigrateRequest) -> Result<SourceRun, Status> {
        let request::Migration { reference, vm, policy, pre_commit_timeout, downtime, on_exceeded } =
            request::migrate(&given).map_err(invalid)?;
        let _one_at_a_time = self.beginning.lock().await;
        self.fence(&reference).await?;
        match self.part(&reference)? {
            Some(Part::Source(run)) => return Ok(run),
            Some(Part::Destination(..)) => {
                return Err(Status::failed_precondition(
                    "this node is the destination of this migration, and cannot be its source, too",
                ));
            }
            Some(Part::Recovering | Part::Unreadable(_)) | None => {}
        }
        if given.target_node == self.config.node {
            return Err(Status::invalid_argument(format!(
                "target_node is {:?}: this is the source itself; another node would be right",
                given.target_node
            )));
        }
        let named = format!("VM {}/{}", vm.namespace, vm.name);
        let entry =
            self.inventory.vm(&vm).ok_or_else(|| Status::not_found(format!("there is no {named} here")))?;
        let known = entry.vm.map_err(|why| Status::failed_precondition(format!("{named}: {why}")))?;
        let (vmm, description) = self
            .inventory
            .vmm(&known)
            .await
            .map_err(|error| Status::failed_precondition(format!("{named}: {error}")))?;
        same_devices(&description, &given.devices)?;
        if description.run_state != RunState::Running {
            let message = format!("{named} does not run: somebody has paused it");
            return Err(Status::failed_precondition(message));
        }
        let names = given.devices.iter().map(|pair| pair.source.as_str());
        self.registry.take(&reference.id, &vm, names).map_err(precondition)?;
        let prepared = async {
            let devices = borrowing::devices(vmm.as_ref(), &description)
                .map_err(|failure| Status::failed_precondition(failure.message))?;
            all_running(&devices).await?;
            let features: Vec<_> = devices.iter().map(DeviceHandle::features).collect();
            let plan = stop_plan(&features, policy).map_err(precondition)?;
            Ok::<_, Status>((devices, features, plan))
        };
        let (devices, features, plan) = match prepared.await {
            Ok(prepared) => prepared,
            Err(status) => {
                self.registry.give_back(&reference.id);
                return Err(status);
            }
        };
        let key = journalling::key(&reference.id, Role::Source)?;
        let cgroup = Cgroup::of_process(&self.config.cgroup_root, vmm.pid()).ok().flatten();
        let (process, told) = (vmm.process().identity(), cgroup.as_ref());
        let written = journalling::source(&reference, &vm, &given, policy, process, told);
        let ledger = Ledger::new(Arc::clone(&self.journal), key, written);
        let left = Left { cgroup, directory: entry.directory.clone(), socket: known.socket.clone() };
        let release =
            release(Arc::clone(&vmm), left, &self.config, Arc::clone(&self.vf_identity), &reference.id);
        let vmm: Arc<dyn Vmm> = vmm;
        // Only QEMU gives its state in more than one stream.
        let channels = if vmm.driver() == Driver::Vmm { self.config.migration_channels } else { 0 };
        let run = SourceRun::start(SourceParts {
            peer: Peer {
                credentials: Arc::clone(&self.credentials),
                node: given.target_node,
                address: given.target_address,
                attempt: Attempt { migration_id: reference.id.clone(), attempt: reference.attempt },
            },
            vmm,
            devices,
            features,
            plan,
            ledger,
            recovered: None,
            pre_commit_timeout,
            budget: Budget {
                downtime,
                on_exceeded,
                bandwidth_bytes_per_second: self.config.migration_bandwidth_bytes_per_second,
                channels,
            },
            release,
            log: EventLog::new(&self.config.node),
        });
        info!(migration = reference.id, attempt = reference.attempt, vm = named, "source: begun");
        self.registry.join(&reference, Part::Source(run.clone()));
        give_back_source(&self.registry, &run, reference.id);
        Ok(run)
    }

    /// Begins a reservation, or joins it if it has begun.
    async fn destination(&self, given: ReserveRequest) -> Result<DestinationRun, Status> {
        let (reference, vm, policy, silence_timeout) = request::reserve(&given).map_err(invalid)?;
        // Before, so that nobody who wants to begin something waits for it.
        self.preflight.get_ready(&given).await;
        let _one_at_a_time = self.beginning.lock().await;
        self.fence(&reference).await?;
        match self.part(&reference)? {
            Some(Part::Destination(run, earlier)) if same_reservation(&earlier, &given) => return Ok(run),
            Some(Part::Destination(..)) => {
                return Err(Status::failed_precondition(
                    "this attempt has reserved something else before; another reservation needs another attempt",
                ));
            }
            Some(Part::Source(_)) => {
                return Err(Status::failed_precondition(
                    "this node is the source of this migration, and cannot be its destination, too",
                ));
            }
            Some(Part::Recovering | Part::Unreadable(_)) | None => {}
        }
        if given.source_node == self.config.node {
            return Err(Status::invalid_argument(format!(
                "source_node is {:?}: this is the destination itself; another node would be right",
                given.source_node
            )));
        }
        if self.inventory.vm(&vm).is_some() {
            return Err(Status::failed_precondition(format!(
                "a VM {}/{} is on this node already",
                vm.namespace, vm.name
            )));
        }
        let names = given.devices.iter().map(|pair| pair.target.as_str());
        for name in names.clone() {
            if let Some(holder) = self.registry.holder_of_device(name) {
                return Err(Status::failed_precondition(format!(
                    "device {name} is held by migration {holder}"
                )));
            }
        }
        let targets = reservation::targets(&self.inventory, &given.devices).await?;
        stop_plan(&targets.features, policy).map_err(precondition)?;
        let site = reservation::site(
            &self.config,
            Arc::clone(&self.vf_identity),
            &reference,
            &vm,
            &given,
            &targets.devices,
        )?;
        let driver = site.driver();
        self.preflight.check(&given, &site.plan).await?;
        self.registry.take(&reference.id, &vm, names).map_err(precondition)?;
        let site: Arc<dyn Site> = Arc::new(site);
        let key = journalling::key(&reference.id, Role::Destination)?;
        let ledger = Ledger::new(
            Arc::clone(&self.journal),
            key,
            journalling::destination(&reference, &vm, &given, policy),
        );
        let run = DestinationRun::start(DestinationParts {
            migration_id: reference.id.clone(),
            features: targets.features,
            driver,
            site,
            silence_timeout,
            ledger,
            recovered: None,
        });
        info!(migration = reference.id, attempt = reference.attempt, "destination: reserving");
        self.registry.join(&reference, Part::Destination(run.clone(), Box::new(given)));
        give_back_destination(&self.registry, &run, reference.id);
        Ok(run)
    }
}

/// What there is of a VM here besides its process.
pub(super) struct Left {
    pub(super) cgroup: Option<Cgroup>,
    pub(super) directory: PathBuf,
    pub(super) socket: PathBuf,
}

/// Gives back what is left of a VM here, once it runs elsewhere.
pub(super) fn release(
    leaving: Arc<dyn LocalVmm>,
    left: Left,
    config: &NodeConfig,
    vf_identity: Arc<dyn VfIdentity>,
    migration_id: &str,
) -> Box<dyn FnOnce() -> BoxFuture<'static, ()> + Send> {
    let limit = config.deadlines.quit;
    let of = IdentityOf { migration_id: migration_id.to_owned(), devices: Vec::new(), claim: Vec::new() };
    Box::new(move || {
        async move {
            if let Err(error) = vf_identity.withdraw(&of).await {
                warn!(migration = of.migration_id, %error, "an identity could not be withdrawn");
            }
            let ended = twin::end(leaving.as_ref(), left.cgroup.as_ref(), &left.directory, &left.socket, limit).await;
            if let Err(error) = ended {
                error!(migration = of.migration_id, %error, "the VM runs elsewhere, but something of it is left here");
            }
        }
        .boxed()
    })
}

/// What a migration has taken at its source is given back when it has ended there.
pub(super) fn give_back_source(registry: &Arc<Registry>, run: &SourceRun, id: String) {
    let (registry, run) = (Arc::clone(registry), run.clone());
    tokio::spawn(async move {
        run.ended().await;
        registry.give_back(&id);
    });
}

/// What a migration has taken at its destination is given back when it has ended there.
pub(super) fn give_back_destination(registry: &Arc<Registry>, run: &DestinationRun, id: String) {
    let (registry, run) = (Arc::clone(registry), run.clone());
    tokio::spawn(async move {
        run.free().await;
        registry.give_back(&id);
    });
}

fn invalid(error: request::InvalidField) -> Status {
    Status::invalid_argument(error.to_string())
}

fn precondition(error: impl std::error::Error) -> Status {
    Status::failed_precondition(error.to_string())
}

/// The same but for who asks, and what that one knows of the source's QEMU: a new operator may join what an older one has begun.
fn same_reservation(earlier: &ReserveRequest, given: &ReserveRequest) -> bool {
    let matters =
        |request: &ReserveRequest| ReserveRequest { migration: None, qemu: None, ..request.clone() };
    matters(earlier) == matters(given)
}

/// The VM must have the devices that the migration was planned for.
fn same_devices(description: &Description, pairs: &[DevicePair]) -> Result<(), Status> {
    let has: Vec<&str> = description.devices.iter().map(|device| device.name.as_str()).collect();
    let planned: Vec<&str> = pairs.iter().map(|pair| pair.source.as_str()).collect();
    if has == planned {
        return Ok(());
    }
    Err(Status::failed_precondition(format!(
        "devices: the VM has [{}], but the migration was planned for [{}]",
        has.join(", "),
        planned.join(", ")
    )))
}

/// A device that does not run has been left behind by somebody else.
async fn all_running(devices: &[DeviceHandle]) -> Result<(), Status> {
    for device in devices {
        let state = device.state().await.map_err(precondition)?;
        if state != MigrationState::Running {
            return Err(Status::failed_precondition(format!(
                "device {} stands in {state}; a VM is migrated only from RUNNING",
                device.name()
            )));
        }
    }
    Ok(())
}

#[async_trait]
impl NodeAgent for NodeService {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<WatchResponse, Status>> + Send>>;
    type MigrateStream = Pin<Box<dyn Stream<Item = Result<MigrateResponse, Status>> + Send>>;

    async fn describe(&self, call: Request<DescribeRequest>) -> Result<Response<DescribeResponse>, Status> {
        identity::require_operator(&call)?;
        let node = self.inventory.describe().await.map_err(|error| Status::internal(error.to_string()))?;
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
            let response = described
                .map(|node| WatchResponse { node: Some(node) })
                .map_err(|error| Status::internal(error.to_string()));
            Some((response, (inventory, changes)))
        });
        Ok(Response::new(Box::pin(stream)))
    }

    async fn reserve(&self, call: Request<ReserveRequest>) -> Result<Response<ReserveResponse>, Status> {
        identity::require_operator(&call)?;
        let run = self.destination(call.into_inner()).await?;
        run.reserved().await.map_err(|failure| {
            Status::failed_precondition(format!("{}: {}", failure.reason.as_str(), failure.message))
        })?;
        Ok(Response::new(ReserveResponse {}))
    }

    async fn migrate(&self, call: Request<MigrateRequest>) -> Result<Response<Self::MigrateStream>, Status> {
        identity::require_operator(&call)?;
        let run = self.source(call.into_inner()).await?;
        let stream = run.log().follow().map(|event| Ok(MigrateResponse { event: Some(event) }));
        Ok(Response::new(Box::pin(stream)))
    }

    async fn abort(&self, call: Request<AbortRequest>) -> Result<Response<AbortResponse>, Status> {
        identity::require_operator(&call)?;
        let given = call.into_inner();
        let reference = request::migration(given.migration.as_ref()).map_err(invalid)?;
        self.fence(&reference).await?;
        if let Some(Part::Source(run)) = self.part(&reference)? {
            run.abort(given.why).await.map_err(precondition)?;
        }
        Ok(Response::new(AbortResponse {}))
    }

    async fn release(&self, call: Request<ReleaseRequest>) -> Result<Response<ReleaseResponse>, Status> {
        identity::require_operator(&call)?;
        let given = call.into_inner();
        let reference = request::migration(given.migration.as_ref()).map_err(invalid)?;
        let message = match given.reason() {
            ReleaseReason::AbortedAtSource => "the source has reported that it keeps the VM",
            ReleaseReason::NeverStarted => "the source was never asked to give the VM",
            ReleaseReason::Unspecified => {
                return Err(Status::invalid_argument(format!(
                    "reason is {}: RELEASE_REASON_ABORTED_AT_SOURCE or RELEASE_REASON_NEVER_STARTED would be right",
                    given.reason
                )));
            }
        };
        self.fence(&reference).await?;
        if let Some(Part::Destination(run, _)) = self.part(&reference)? {
            run.release(Failure::new(Reason::Released, message)).await.map_err(precondition)?;
        }
        Ok(Response::new(ReleaseResponse {}))
    }

    async fn resolve(&self, call: Request<ResolveRequest>) -> Result<Response<ResolveResponse>, Status> {
        identity::require_operator(&call)?;
        let given = call.into_inner();
        let reference = request::migration(given.migration.as_ref()).map_err(invalid)?;
        self.fence(&reference).await?;
        let peer = given.peer.map(|peer| request::word("peer", &peer)).transpose().map_err(invalid)?;
        let own = match self.part(&reference)? {
            Some(Part::Source(run)) => {
                if let Some(peer) = peer {
                    run.peer_says(peer);
                }
                run.journalled()
            }
            Some(Part::Destination(run, _)) => {
                if let Some(peer) = peer {
                    run.peer_says(peer);
                }
                run.journalled()
            }
            _ => JournalState::default(),
        };
        Ok(Response::new(ResolveResponse { own: Some(own) }))
    }
}
