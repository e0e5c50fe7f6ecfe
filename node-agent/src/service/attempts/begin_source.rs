//! Beginning a migration away from here.

use std::sync::Arc;

use slackwater_handover::Failure;
use slackwater_handover::policy::{Driver, NoStopPlan, StopPlan, stop_plan};
use slackwater_handover::state::{Features, MigrationState};
use slackwater_proto::node::{DevicePair, MigrateRequest};
use slackwater_proto::refusal::Refusal;
use slackwater_proto::transfer::Attempt;
use tracing::info;

use super::release::VmRemains;
use super::taken::Taken;
use super::{Attempts, entries, no_stop_plan, precondition};
use crate::attempt::entry::Monitor;
use crate::attempt::events::EventLog;
use crate::attempt::ledger::Ledger;
use crate::attempt::link::Peer;
use crate::attempt::source::{SourceParts, SourceRun};
use crate::journal::Role;
use crate::process::cgroup::{Cgroup, error_chain};
use crate::service::blockers;
use crate::service::borrowing::{self, BorrowDeviceError};
use crate::service::reason::ServiceReason;
use crate::service::registry::LocalEnd;
use crate::service::request;
use crate::vfio::worker::DeviceHandle;
use crate::vmm::budget::Budget;
use crate::vmm::{Description, Vmm};

/// The devices of a VM that can be migrated.
struct SourceDevices {
    handles: Vec<DeviceHandle>,
    features: Vec<Features>,
    plan: StopPlan,
}

impl Attempts {
    /// Begins a migration away from here, or joins it if it has begun.
    pub(in crate::service) async fn begin_source(&self, given: MigrateRequest) -> Result<SourceRun, Refusal> {
        let request::Migration { reference, vm, policy, pre_commit_timeout, downtime, on_exceeded } =
            request::migrate(&given)?;
        let _of_this_migration = self.turns.of(&reference.id).lock_owned().await;
        let one_at_a_time = self.beginning.lock().await;
        match self.find(&reference).await? {
            Some(LocalEnd::Source(run)) => return Ok(run),
            Some(LocalEnd::Destination(..)) => {
                let message = "this node is the destination of this migration, and cannot be its source, too";
                return Err(precondition(ServiceReason::MigrationInProgress, message));
            }
            Some(LocalEnd::Recovering | LocalEnd::Unreadable(_) | LocalEnd::Conflicting(_)) | None => {}
        }
        let node = &self.node;
        node.check_memory()?;
        if given.target_node == node.config.node {
            let message = format!(
                "target_node is {:?}: this is the source itself; another node would be right",
                given.target_node
            );
            return Err(Refusal::invalid_argument(ServiceReason::TargetIsSource, message));
        }
        let named = format!("VM {}/{}", vm.namespace, vm.name);
        let entry = node.inventory.vm(&vm).ok_or_else(|| {
            Refusal::not_found(ServiceReason::VmNotFound, format!("there is no {named} here"))
        })?;
        let unreachable = |error: &dyn std::error::Error| {
            precondition(ServiceReason::VmmUnreachable, format_args!("{named}: {error}"))
        };
        let known = entry.vm.map_err(|error| unreachable(&error))?;
        let (vmm, description) = node.inventory.vmm(&known).await.map_err(|error| unreachable(&error))?;
        same_devices(&description, &given.devices)?;
        if let Some((reason, message)) = blockers::not_running(description.run_state) {
            return Err(precondition(reason, format!("{named}: {message}")));
        }
        // A cgroup that cannot be read is not "none": it would be left over.
        let cgroup = Cgroup::of_process(&node.config.cgroup_root, vmm.pid()).map_err(|error| {
            precondition(ServiceReason::VmmUnreachable, format_args!("{named}: {}", error_chain(&error)))
        })?;
        let key = entries::key(&reference.id, Role::Source)?;
        let process = vmm.process().identity();
        let monitor = Monitor {
            kind: known.json.vmm.kind,
            socket: known.socket.clone(),
            devices: known.json.vmm.devices.clone(),
        };
        let written = entries::source(&reference, &vm, &given, policy, process, cgroup.as_ref(), monitor);
        entries::check_room(&written)?;
        let names = given.devices.iter().map(|pair| pair.source.as_str());
        node.registry.take(&reference.id, &vm, names)?;
        // No other beginning waits for these devices.
        drop(one_at_a_time);
        let taken = Taken::new(Arc::clone(&node.registry), &reference.id);
        let handles = borrowing::devices(&vmm, &description, node.inventory.borrowed());
        let SourceDevices { handles, features, plan } =
            prepare(handles, |features| stop_plan(features, policy)).await?;
        taken.keep();
        let remains = VmRemains { cgroup, directory: entry.directory.clone(), socket: known.socket.clone() };
        let release = remains.release(Arc::clone(&vmm), node, &reference.id);
        let vmm: Arc<dyn Vmm> = vmm;
        // Only QEMU gives its state in more than one stream.
        let channels = if vmm.driver() == Driver::Vmm { node.config.migration_channels } else { 0 };
        let run = SourceRun::start(SourceParts {
            peer: Peer {
                credentials: Arc::clone(&node.credentials),
                node: given.target_node,
                address: given.target_address,
                attempt: Attempt { migration_id: reference.id.clone(), attempt: reference.attempt },
            },
            vmm,
            devices: handles,
            features,
            plan,
            ledger: Ledger::new(Arc::clone(&node.journal), key, written),
            recovered: None,
            pre_commit_timeout,
            budget: Budget {
                downtime,
                on_exceeded,
                bandwidth_bytes_per_second: node.config.migration_bandwidth_bytes_per_second,
                channels,
            },
            release,
            log: EventLog::new(&node.config.node),
        });
        info!(migration = reference.id, attempt = reference.attempt, vm = named, "source: begun");
        node.join_source(&reference, &run);
        Ok(run)
    }
}

/// Borrows the VM's devices, which must all be in RUNNING, and plans how to stop them.
async fn prepare(
    devices: impl Future<Output = Result<Vec<DeviceHandle>, BorrowDeviceError>>,
    plan: impl FnOnce(&[Features]) -> Result<StopPlan, NoStopPlan>,
) -> Result<SourceDevices, Refusal> {
    let handles = devices.await.map_err(Failure::from)?;
    all_running(&handles).await?;
    let features: Vec<_> = handles.iter().map(DeviceHandle::features).collect();
    let plan = plan(&features).map_err(no_stop_plan)?;
    Ok(SourceDevices { handles, features, plan })
}

/// The VM must have the devices that the migration was planned for.
fn same_devices(description: &Description, pairs: &[DevicePair]) -> Result<(), Refusal> {
    let has: Vec<&str> = description.devices.iter().map(|device| device.name.as_str()).collect();
    let planned: Vec<&str> = pairs.iter().map(|pair| pair.source.as_str()).collect();
    if has == planned {
        return Ok(());
    }
    let message = format!(
        "devices: the VM has [{}], but the migration was planned for [{}]",
        has.join(", "),
        planned.join(", ")
    );
    Err(precondition(ServiceReason::DevicesDiffer, message))
}

/// A device that is not in RUNNING has been left there by another program.
async fn all_running(devices: &[DeviceHandle]) -> Result<(), Refusal> {
    let states = borrowing::states(devices)
        .await
        .map_err(|Failure { reason, message }| precondition(reason, message))?;
    for (device, state) in devices.iter().zip(states) {
        if state != MigrationState::Running {
            let message =
                format!("device {} is in {state}; a VM is migrated only from RUNNING", device.name());
            return Err(precondition(ServiceReason::DeviceNotRunning, message));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use slackwater_handover::policy::PeerToPeer;
    use slackwater_proto::node::VmRef;

    use super::*;
    use crate::service::registry::Registry;
    use crate::vfio::fake::{FakeDevice, Gate};

    fn vm() -> VmRef {
        VmRef { namespace: "demo".to_owned(), name: "one".to_owned() }
    }

    fn plan(features: &[Features]) -> Result<StopPlan, NoStopPlan> {
        stop_plan(features, PeerToPeer::Required)
    }

    #[tokio::test]
    async fn a_caller_that_goes_away_while_the_devices_are_looked_at_leaves_nothing_held() {
        let (registry, gate) = (Arc::new(Registry::default()), Gate::new());
        registry.take("m", &vm(), ["a"]).unwrap();
        let device = FakeDevice::new("a").hang_in_state(1, &gate);
        let watch = device.watch();
        let handles = vec![DeviceHandle::serve(Box::new(device)).unwrap()];
        let taken = Taken::new(Arc::clone(&registry), "m");
        let beginning = tokio::spawn(async move {
            let prepared = prepare(async { Ok(handles) }, plan).await.map(drop);
            taken.keep();
            prepared
        });
        gate.reached().await;
        beginning.abort();
        assert!(beginning.await.unwrap_err().is_cancelled());
        assert_eq!(registry.holder_of_vm("demo", "one"), None);
        assert_eq!(registry.holder_of_device("a"), None);
        gate.open();
        watch.dropped().await;
    }

    #[tokio::test]
    async fn a_migration_whose_device_hangs_is_refused_by_name_in_time() {
        let gate = Gate::new();
        let device = FakeDevice::new("a").hang_in_state(1, &gate);
        let handles = vec![DeviceHandle::serve(Box::new(device)).unwrap()];
        let refused = prepare(async { Ok(handles) }, plan).await.map(drop).unwrap_err();
        assert!(refused.message.contains("device a hangs"), "{refused:?}");
        gate.open();
    }
}
