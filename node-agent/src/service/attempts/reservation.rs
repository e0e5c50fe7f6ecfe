//! What a reservation needs of this node, checked before anything is touched.

use std::error::Error;
use std::path::PathBuf;
use std::sync::Arc;

use slackwater_handover::Reason;
use slackwater_handover::state::Features;
use slackwater_proto::node::{DevicePair, MigrationRef, ReserveRequest, VmRef};
use slackwater_proto::refusal::Refusal;
use tokio::sync::Mutex;

use super::resources::NodeResources;
use super::site::NodeSite;
use crate::faults;
use crate::host::devices::Device;
use crate::host::identity::IdentityOf;
use crate::host::placeholders::twin_arguments;
use crate::host::twin_users::TwinUser;
use crate::host::vm::{VmJson, VmmEntry, VmmKind};
use crate::host::{vm, vms};
use crate::service::inventory::{FeaturesError, Inventory, NotFreeError};
use crate::service::reason::ServiceReason;
use crate::vmm::confinement::Confined;
use crate::vmm::qemu::preflight::confined::QEMU_SANDBOX;
use crate::vmm::twin::{TwinPlan, launcher};

/// The target devices of a reservation, in the VM's order.
pub(super) struct Targets {
    pub(super) devices: Vec<Device>,
    pub(super) features: Vec<Features>,
}

/// Why a device cannot take over from another.
#[derive(Debug, thiserror::Error)]
enum Misfit<'a> {
    /// Another driver or model.
    #[error(
        "device {} is a {} under {}, and cannot take over from {}, which is a {} under {}",
        device.name, device.model, device.driver, pair.source, pair.model, pair.driver
    )]
    Model { device: &'a Device, pair: &'a DevicePair },
    /// A feature is missing.
    #[error(
        "device {} has the features {features:?}, and cannot take over from {}, which has {required:?}",
        device.name, pair.source
    )]
    Features { device: &'a Device, features: Features, pair: &'a DevicePair, required: Features },
}

/// Finds the target devices, which must be free and able to take over from their sources.
pub(super) async fn targets(inventory: &Inventory, pairs: &[DevicePair]) -> Result<Targets, Refusal> {
    let mut targets =
        Targets { devices: Vec::with_capacity(pairs.len()), features: Vec::with_capacity(pairs.len()) };
    for (index, pair) in pairs.iter().enumerate() {
        let refused = |error: &dyn Error| {
            let message = format!("devices[{index}].target: {error}");
            Refusal::precondition(ServiceReason::NoMatchingDevices, message)
        };
        let device = inventory.free_device(&pair.target).await.map_err(|error| match error {
            NotFreeError::Hangs(why) => {
                Refusal::precondition(Reason::DeviceHangs, format!("devices[{index}].target: {why}"))
            }
            error => refused(&error),
        })?;
        let features = inventory.features(&device, true).await.map_err(|error| {
            let message = format!("devices[{index}].target: device {}: {error}", device.name);
            match *error {
                FeaturesError::NoAnswer(_) => Refusal::precondition(Reason::DeviceHangs, message),
                _ => Refusal::precondition(ServiceReason::NoMatchingDevices, message),
            }
        })?;
        fits(&device, features, pair).map_err(|misfit| refused(&misfit))?;
        targets.devices.push(device);
        targets.features.push(features);
    }
    Ok(targets)
}

/// Whether a device can take over the state of its source.
fn fits<'a>(device: &'a Device, features: Features, pair: &'a DevicePair) -> Result<(), Misfit<'a>> {
    let same_model =
        faults::ignores_device_model() || (device.driver == pair.driver && device.model == pair.model);
    if !same_model {
        return Err(Misfit::Model { device, pair });
    }
    let required = pair.features.map(Features::from).unwrap_or_default();
    if !features.stop_copy || (required.p2p && !features.p2p) {
        return Err(Misfit::Features { device, features, pair, required });
    }
    Ok(())
}

/// The user that the twin of a VM gets.
pub(super) fn twin_user(node: &NodeResources, vm: &VmRef) -> Result<TwinUser, Refusal> {
    let name = format!("{}/{}", vm.namespace, vm.name);
    let folder = vms::directory_of(&node.config.run_dir, &vm.namespace, &vm.name);
    let taken = node.twin_users.take(&name, &folder);
    taken.map_err(|error| Refusal::precondition(ServiceReason::TwinNotConfined, error.to_string()))
}

/// As [`site`], for a twin that is to be started: it is confined.
pub(super) fn site_to_start(
    node: &NodeResources,
    reference: &MigrationRef,
    named: &VmRef,
    request: &ReserveRequest,
    devices: &[Device],
    user: TwinUser,
) -> Result<NodeSite, Refusal> {
    let number = user.number();
    let mut site = site(node, reference, named, request, devices, user)?;
    let plan = &mut site.plan;
    if plan.vmm.kind == VmmKind::Qemu {
        plan.arguments.extend(QEMU_SANDBOX.map(str::to_owned));
    }
    let sandbox = node.config.confinement.sandbox(Confined {
        user: number,
        directory: &plan.directory,
        program: &plan.program,
        kind: plan.vmm.kind,
        arguments: &plan.arguments,
        descriptors: &plan.descriptors,
        devices,
    });
    let failed = |error| {
        Refusal::precondition(ServiceReason::TwinNotConfined, format!("the twin cannot be confined: {error}"))
    };
    plan.sandbox = Some(sandbox.map_err(failed)?);
    Ok(site)
}

/// The place for a VM: its twin's command, directory, cgroup and user.
fn site(
    node: &NodeResources,
    reference: &MigrationRef,
    named: &VmRef,
    request: &ReserveRequest,
    devices: &[Device],
    user: TwinUser,
) -> Result<NodeSite, Refusal> {
    let config = &node.config;
    let invalid = |error: vm::VmJsonError| {
        Refusal::invalid_argument(ServiceReason::InvalidRequest, format!("vm_json: {error}"))
    };
    let json = vm::parse(&request.vm_json).map_err(invalid)?;
    if (&json.namespace, &json.name) != (&named.namespace, &named.name) {
        let message = format!(
            "vm_json describes {}/{}, but vm is {}/{}",
            json.namespace, json.name, named.namespace, named.name
        );
        return Err(Refusal::invalid_argument(ServiceReason::InvalidRequest, message));
    }
    json.require_allowed(&config.twin_programs)
        .map_err(|error| Refusal::precondition(ServiceReason::TwinNotAllowed, format!("vm_json: {error}")))?;
    let directory = vms::directory(&config.run_dir, &json);
    let socket = json.twin_socket_in(&directory).map_err(invalid)?;
    let command = twin_arguments(&json, &socket, devices).map_err(invalid)?;
    let plan = TwinPlan {
        arguments: command.arguments,
        descriptors: command.descriptors,
        device_names: devices.iter().map(|device| device.name.clone()).collect(),
        ..plan_without_command(node, reference, named, &json.vmm, json.twin.program.clone(), socket)
    };
    Ok(site_of(node, reference, request, devices, plan, Some(user)))
}

/// The place of a reservation that an earlier agent has made. The twin has been started, or never will be:
/// only its directory and its cgroup are needed, and they follow from the journal. So neither the devices nor
/// the program have to be there, or allowed, any more. Without `json`, the twin cannot be asked anything.
pub(super) fn site_of_journal(
    node: &NodeResources,
    reference: &MigrationRef,
    named: &VmRef,
    request: &ReserveRequest,
    devices: &[Device],
    json: Option<&VmJson>,
    user: Option<TwinUser>,
) -> Result<NodeSite, vm::VmJsonError> {
    let directory = vms::directory_of(&node.config.run_dir, &named.namespace, &named.name);
    let unknown = VmmEntry { kind: VmmKind::Contract, socket: "vmm.sock".into(), devices: Vec::new() };
    let (vmm, program, socket) = match json {
        Some(json) => (&json.vmm, json.twin.program.clone(), json.twin_socket_in(&directory)?),
        None => (&unknown, PathBuf::new(), directory.join(&unknown.socket)),
    };
    let plan = plan_without_command(node, reference, named, vmm, program, socket);
    Ok(site_of(node, reference, request, devices, plan, user))
}

fn plan_without_command(
    node: &NodeResources,
    reference: &MigrationRef,
    named: &VmRef,
    vmm: &VmmEntry,
    program: PathBuf,
    socket: PathBuf,
) -> TwinPlan {
    let config = &node.config;
    TwinPlan {
        launcher: launcher(),
        cgroup_root: config.cgroup_root.clone(),
        cgroup_name: format!("{}.{}-{}", named.namespace, named.name, reference.id),
        directory: vms::directory_of(&config.run_dir, &named.namespace, &named.name),
        vmm: vmm.clone(),
        program,
        arguments: Vec::new(),
        descriptors: Vec::new(),
        device_names: Vec::new(),
        sandbox: None,
        socket,
        start_limit: config.twin_start_limit,
        deadlines: config.deadlines,
    }
}

fn site_of(
    node: &NodeResources,
    reference: &MigrationRef,
    request: &ReserveRequest,
    devices: &[Device],
    plan: TwinPlan,
    user: Option<TwinUser>,
) -> NodeSite {
    let of = IdentityOf {
        migration_id: reference.id.clone(),
        devices: devices.to_vec(),
        claim: request.claim.to_vec(),
    };
    let identity = Arc::clone(&node.vf_identity);
    NodeSite {
        plan,
        vm_json: request.vm_json.clone(),
        identity,
        of,
        twin: Mutex::new(None),
        _user: user,
        borrowed: Arc::clone(node.inventory.borrowed()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(driver: &str, model: &str) -> Device {
        Device {
            name: "b0".to_owned(),
            sysfs: PathBuf::from("/sys/bus/mdev/devices/b0"),
            cdev: PathBuf::from("/dev/vfio/devices/vfio0"),
            group: None,
            driver: driver.to_owned(),
            model: model.to_owned(),
        }
    }

    fn pair() -> DevicePair {
        DevicePair {
            source: "a0".to_owned(),
            target: "b0".to_owned(),
            driver: "mtty".to_owned(),
            model: "mtty-1".to_owned(),
            features: Some(Features::ALL.into()),
        }
    }

    #[test]
    fn a_target_must_have_the_sources_driver_model_and_p2p() {
        let fits = |driver, model, features| {
            fits(&device(driver, model), features, &pair()).map_err(|misfit| misfit.to_string())
        };
        assert_eq!(fits("mtty", "mtty-1", Features::ALL), Ok(()));
        let other_model = fits("mtty", "mtty-2", Features::ALL).unwrap_err();
        assert_eq!(
            other_model,
            "device b0 is a mtty-2 under mtty, and cannot take over from a0, which is a mtty-1 under mtty"
        );
        assert!(fits("vfio-pci", "mtty-1", Features::ALL).is_err());
        let no_p2p = Features { p2p: false, ..Features::ALL };
        assert!(fits("mtty", "mtty-1", no_p2p).unwrap_err().contains("cannot take over from a0, which has"));
        let no_pre_copy = Features { pre_copy: false, ..Features::ALL };
        assert_eq!(fits("mtty", "mtty-1", no_pre_copy), Ok(()));
    }
}
