//! Beginning a reservation: taking a VM in.

use std::sync::Arc;

use slackwater_handover::policy::stop_plan;
use slackwater_proto::node::ReserveRequest;
use slackwater_proto::refusal::Refusal;
use tracing::info;

use super::{Attempts, entries, no_stop_plan, precondition, reservation};
use crate::attempt::destination::{DestinationParts, DestinationRun, Site};
use crate::attempt::ledger::Ledger;
use crate::journal::Role;
use crate::service::reason::ServiceReason;
use crate::service::registry::LocalEnd;
use crate::service::request;

impl Attempts {
    /// Begins a reservation, or joins it if it has begun.
    pub(in crate::service) async fn begin_destination(
        &self,
        given: ReserveRequest,
    ) -> Result<DestinationRun, Refusal> {
        let request::Reservation { reference, vm, policy, silence_timeout } = request::reserve(&given)?;
        // Before the lock, so that no other beginning waits for QEMU, or for a device.
        self.preflight.get_ready(&given).await;
        let targets = reservation::targets(&self.node.inventory, &given.devices).await;
        let _one_at_a_time = self.beginning.lock().await;
        match self.find(&reference).await? {
            Some(LocalEnd::Destination(run, earlier)) if same_reservation(&earlier, &given) => {
                return Ok(run);
            }
            Some(LocalEnd::Destination(..)) => {
                let message = "this attempt has reserved something else before; another reservation needs \
                               another attempt";
                return Err(precondition(ServiceReason::MigrationInProgress, message));
            }
            Some(LocalEnd::Source(_)) => {
                let message = "this node is the source of this migration, and cannot be its destination, too";
                return Err(precondition(ServiceReason::MigrationInProgress, message));
            }
            Some(LocalEnd::Recovering | LocalEnd::Unreadable(_) | LocalEnd::Conflicting(_)) | None => {}
        }
        let node = &self.node;
        node.check_memory()?;
        if given.source_node == node.config.node {
            let message = format!(
                "source_node is {:?}: this is the destination itself; another node would be right",
                given.source_node
            );
            return Err(Refusal::invalid_argument(ServiceReason::TargetIsSource, message));
        }
        if node.inventory.vm(&vm).is_some() {
            let message = format!("a VM {}/{} is on this node already", vm.namespace, vm.name);
            return Err(precondition(ServiceReason::VmAlreadyThere, message));
        }
        let names = given.devices.iter().map(|pair| pair.target.as_str());
        for name in names.clone() {
            if let Some(held) = node.registry.held_device(name) {
                return Err(held.into());
            }
        }
        let targets = targets?;
        stop_plan(&targets.features, policy).map_err(no_stop_plan)?;
        let user = reservation::twin_user(node, &vm)?;
        let number = user.number();
        let site = reservation::site_to_start(node, &reference, &vm, &given, &targets.devices, user)?;
        let driver = site.driver();
        self.preflight.check(&given, &site.plan).await?;
        let key = entries::key(&reference.id, Role::Destination)?;
        let written = entries::destination(&reference, &vm, &given, policy, number);
        entries::check_room(&written)?;
        node.registry.take(&reference.id, &vm, names)?;
        let site: Arc<dyn Site> = Arc::new(site);
        let run = DestinationRun::start(DestinationParts {
            migration_id: reference.id.clone(),
            features: targets.features,
            driver,
            site,
            silence_timeout,
            ledger: Ledger::new(Arc::clone(&node.journal), key, written),
            recovered: None,
        });
        info!(migration = reference.id, attempt = reference.attempt, "destination: reserving");
        node.join_destination(&reference, &run, given);
        Ok(run)
    }
}

/// The same but for the operator that asks and what it knows of the source's QEMU: a new operator may join
/// what an older one has begun.
fn same_reservation(earlier: &ReserveRequest, given: &ReserveRequest) -> bool {
    let what_matters =
        |request: &ReserveRequest| ReserveRequest { migration: None, qemu: None, ..request.clone() };
    what_matters(earlier) == what_matters(given)
}
