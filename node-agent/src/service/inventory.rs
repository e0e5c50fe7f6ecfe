//! What there is on the node: VMs, devices, who holds them, and what stands in a migration's way.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures::future::join_all;
use slackwater_handover::policy::Driver;
use slackwater_handover::state::Features;
use slackwater_proto::node::{DeviceDescription, NodeDescription, VmDescription, VmRef, VmState};
use tokio::sync::{Mutex, watch};
use tracing::warn;

use super::connections::Connections;
use super::registry::Registry;
use super::{NodeConfig, blockers, borrowing, preflight, watching};
use crate::host::devices::{Device, vfio_devices};
use crate::host::holders::Holders;
use crate::host::node::kernel;
use crate::host::vms::{KnownVm, VmEntry, VmWatch};
use crate::vfio::device::Device as _;
use crate::vfio::probe;
use crate::vmm::{self, Description, LocalVmm, RunState, VmmDevice, VmmError};

/// A device's features as its driver told them once; another driver is another device.
type FeatureKey = (String, String);

/// The node, looked at on demand.
pub struct Inventory {
    config: NodeConfig,
    registry: Arc<Registry>,
    vms: VmWatch,
    vmms: Connections<Answering>,
    /// Held while a free device is probed: a reservation waits for it, and the twin then finds the device closed.
    features: Mutex<HashMap<FeatureKey, Features>>,
    ended: watch::Sender<u64>,
    /// A VMM did not answer, and will be asked again soon.
    asking_again: AtomicBool,
}

/// A VMM that has answered.
struct Answering {
    vmm: Arc<dyn LocalVmm>,
    /// What it said last against a migration, whoever asked.
    blocked: Vec<String>,
}

/// Between two looks at a VMM that does not answer: it may be starting, or its monitor be held by somebody else for a moment.
const ASK_AGAIN: Duration = Duration::from_secs(2);
/// How long it may take to notice that a process has ended.
const ENDING: Duration = Duration::from_millis(50);

/// Why the node cannot be described.
#[derive(Debug, thiserror::Error)]
#[error("cannot look at the node: {0}")]
pub struct LookError(String);

impl Inventory {
    /// A node whose VMs are watched.
    pub fn new(config: NodeConfig, registry: Arc<Registry>, vms: VmWatch) -> Self {
        let (vmms, features, ended) = (Connections::default(), Mutex::default(), watch::Sender::new(0));
        Self { config, registry, vms, vmms, features, ended, asking_again: AtomicBool::new(false) }
    }

    /// Returns when something may have changed since the last look; the first time at once.
    pub fn changes(&self) -> Changes {
        let mut vms = self.vms.list();
        vms.mark_changed();
        Changes { vms, registry: self.registry.changes(), ended: self.ended.subscribe() }
    }

    /// The node as of now.
    ///
    /// # Errors
    /// If sysfs or procfs cannot be read.
    pub async fn describe(self: &Arc<Self>) -> Result<NodeDescription, LookError> {
        let (devices, holders, kernel) = self.look().await?;
        let entries = self.vms.list().borrow().clone();
        let mut vms = Vec::with_capacity(entries.len());
        let mut used = HashMap::new();
        // Beside each other: one that does not answer takes as long as it may.
        for vm in join_all(entries.iter().map(|entry| self.describe_vm(entry, &devices))).await {
            if let Some(name) = &vm.vm {
                let holder = format!("VM {}/{}", name.namespace, name.name);
                used.extend(vm.devices.iter().map(|device| (device.clone(), holder.clone())));
            }
            vms.push(vm);
        }
        let mut described = Vec::with_capacity(devices.len());
        for device in &devices {
            let reserved = self.registry.holder_of_device(&device.name);
            let holder = match (reserved, used.get(&device.name), holders.of(device).first()) {
                (Some(migration), None, _) => format!("reserved by migration {migration}"),
                (_, Some(vm), _) => vm.clone(),
                (None, None, Some(process)) => process.to_string(),
                (None, None, None) => String::new(),
            };
            described.push(self.describe_device(device, holder).await);
        }
        Ok(NodeDescription {
            node: self.config.node.clone(),
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            kernel_release: kernel.release,
            boot_id: kernel.boot_id,
            vms,
            devices: described,
        })
    }

    async fn look(&self) -> Result<(Vec<Device>, Holders, crate::host::node::Kernel), LookError> {
        let looked = tokio::task::spawn_blocking(|| {
            let inventory = vfio_devices(Path::new("/sys")).map_err(|error| LookError(error.to_string()))?;
            for unusable in &inventory.unusable {
                warn!(unusable, "a VFIO device cannot be used");
            }
            let proc = Path::new("/proc");
            let kernel = kernel(proc).map_err(|error| LookError(error.to_string()))?;
            Ok((inventory.devices, Holders::look(proc), kernel))
        });
        looked.await.map_err(|error| LookError(error.to_string()))?
    }

    /// The device of this name, if it is there and nobody has it.
    ///
    /// # Errors
    /// In words: there is no such device, or who has it.
    pub async fn free_device(&self, name: &str) -> Result<Device, String> {
        let (devices, holders, _) = self.look().await.map_err(|error| error.to_string())?;
        let Some(device) = devices.iter().find(|device| device.name == name) else {
            let names: Vec<&str> = devices.iter().map(|device| device.name.as_str()).collect();
            return Err(format!("there is no device {name} on this node; there are {}", names.join(", ")));
        };
        match holders.of(device).first() {
            Some(holder) => Err(format!("device {name} is in use by {holder}")),
            None => Ok(device.clone()),
        }
    }

    async fn describe_device(&self, device: &Device, holder: String) -> DeviceDescription {
        let free = holder.is_empty();
        let (features, features_unknown_reason) = match self.features(device, free).await {
            Ok(features) => (Some(features.into()), String::new()),
            Err(why) => (None, why),
        };
        DeviceDescription {
            name: device.name.clone(),
            cdev: device.cdev.display().to_string(),
            driver: device.driver.clone(),
            model: device.model.clone(),
            features,
            features_unknown_reason,
            free,
            holder,
        }
    }

    /// What the device's driver advertises. A device that is in use is not touched: what is not known of it stays unknown.
    ///
    /// # Errors
    /// In words.
    pub async fn features(&self, device: &Device, free: bool) -> Result<Features, String> {
        let mut known = self.features.lock().await;
        let key = (device.name.clone(), device.driver.clone());
        if let Some(features) = known.get(&key) {
            return Ok(*features);
        }
        if !free || self.registry.holder_of_device(&device.name).is_some() {
            return Err("the device is in use, and was not free before".to_owned());
        }
        let cdev = device.cdev.clone();
        let probed = tokio::task::spawn_blocking(move || probe::features(&cdev)).await;
        let features = probed.map_err(|error| error.to_string())?.map_err(|error| error.to_string())?;
        known.insert(key, features);
        Ok(features)
    }

    /// Features of a VM's device, by way of its VMM.
    async fn features_in_use(
        &self,
        vmm: &dyn LocalVmm,
        used: &VmmDevice,
        devices: &[Device],
    ) -> Result<Features, String> {
        let driver = devices.iter().find(|device| device.name == used.name).map(|device| &device.driver);
        let key = (used.name.clone(), driver.cloned().unwrap_or_default());
        let mut known = self.features.lock().await;
        if let Some(features) = known.get(&key) {
            return Ok(*features);
        }
        let features = borrowing::device(vmm, used)?.features();
        known.insert(key, features);
        Ok(features)
    }

    async fn describe_vm(self: &Arc<Self>, entry: &VmEntry, devices: &[Device]) -> VmDescription {
        let known = match &entry.vm {
            Ok(known) => known,
            Err(why) => return unreachable(vm_of_directory(&entry.directory), why.to_string()),
        };
        let (namespace, name) = (&known.json.namespace, &known.json.name);
        let mut described = match self.vmm(known).await {
            Ok((vmm, description)) => {
                let mut features = Vec::with_capacity(description.devices.len());
                for device in &description.devices {
                    let known = self.features_in_use(vmm.as_ref(), device, devices).await;
                    features.push((device.name.clone(), known));
                }
                VmDescription {
                    state: match description.run_state {
                        RunState::Running => VmState::Running,
                        RunState::Paused | RunState::Incoming => VmState::Paused,
                    }
                    .into(),
                    blockers: blockers::of_vm(
                        description.run_state,
                        &features,
                        vmm.driver(),
                        &description.blocked,
                    ),
                    qemu: vmm.facts().map(|facts| preflight::to_wire(&facts)),
                    devices: description.devices.into_iter().map(|device| device.name).collect(),
                    ram_bytes: description.ram_bytes,
                    ..VmDescription::default()
                }
            }
            Err(error) => {
                self.ask_again_soon();
                unreachable(None, error.to_string())
            }
        };
        described.vm = Some(VmRef { namespace: namespace.clone(), name: name.clone() });
        described.vmm_kind = known.json.vmm.kind.as_str().to_owned();
        described.vm_json = known.text.clone();
        if let Some(migration) = self.registry.holder_of_vm(namespace, name) {
            // A VM that is paused because it is being migrated has nothing in its way but that migration.
            described.blockers.retain(|blocker| blocker.reason != "VMPaused");
            described.migration_id = migration;
        }
        described
    }

    fn ask_again_soon(self: &Arc<Self>) {
        if self.asking_again.swap(true, Ordering::Relaxed) {
            return;
        }
        let inventory = Arc::downgrade(self);
        tokio::spawn(async move {
            tokio::time::sleep(ASK_AGAIN).await;
            if let Some(inventory) = inventory.upgrade() {
                inventory.asking_again.store(false, Ordering::Relaxed);
                inventory.look_again();
            }
        });
    }

    /// The VM of this name.
    pub fn vm(&self, vm: &VmRef) -> Option<VmEntry> {
        let name = format!("{}.{}", vm.namespace, vm.name);
        let list = self.vms.list();
        let list = list.borrow();
        list.iter().find(|entry| entry.directory.file_name().is_some_and(|n| n == name.as_str())).cloned()
    }

    /// The VM's VMM, and what it says of itself now.
    ///
    /// # Errors
    /// If it does not answer.
    pub async fn vmm(self: &Arc<Self>, vm: &KnownVm) -> Result<(Arc<dyn LocalVmm>, Description), VmmError> {
        let slot = self.vmms.slot(&vm.socket);
        let mut known = slot.lock().await;
        if let Some(Answering { vmm, blocked }) = known.as_mut() {
            match vmm.describe().await {
                Ok(description) => {
                    blocked.clone_from(&description.blocked);
                    return Ok((Arc::clone(vmm), description));
                }
                // A monitor serves one client at a time, so as long as its QEMU lives, this one is it; it connects again by itself.
                Err(error) if vmm.driver() == Driver::Vmm && lives(vmm.as_ref()).await => return Err(error),
                // Another VMM may serve the socket by now.
                Err(_) => *known = None,
            }
        }
        let vmm = vmm::connect(&vm.json.vmm, &vm.socket, self.config.deadlines).await?;
        let description = vmm.describe().await?;
        *known = Some(Answering { vmm: Arc::clone(&vmm), blocked: description.blocked.clone() });
        let (inventory, watched) = (Arc::downgrade(self), Arc::clone(&vmm));
        drop(known);
        watching::start(inventory, vm.socket.clone(), watched);
        Ok((vmm, description))
    }

    /// What the VMM said last against a migration, as everybody was told; None if another one is asked when this socket's VM is looked at.
    pub(super) async fn last_blocked(&self, socket: &Path, vmm: &Arc<dyn LocalVmm>) -> Option<Vec<String>> {
        let slot = self.vmms.slot(socket);
        let known = slot.lock().await;
        let known = known.as_ref().filter(|known| Arc::ptr_eq(&known.vmm, vmm))?;
        Some(known.blocked.clone())
    }

    /// Its process has ended.
    pub(super) async fn forget(&self, socket: &Path, vmm: &Arc<dyn LocalVmm>) {
        let slot = self.vmms.slot(socket);
        let mut known = slot.lock().await;
        if known.as_ref().is_some_and(|known| Arc::ptr_eq(&known.vmm, vmm)) {
            *known = None;
        }
    }

    /// Something is otherwise than at the last look.
    pub(super) fn look_again(&self) {
        self.ended.send_modify(|count| *count += 1);
    }
}

/// Whether its process has not ended.
async fn lives(vmm: &dyn LocalVmm) -> bool {
    tokio::time::timeout(ENDING, vmm.exited()).await.is_err()
}

fn unreachable(vm: Option<VmRef>, why: String) -> VmDescription {
    VmDescription {
        vm,
        state: VmState::Unreachable.into(),
        blockers: blockers::unreachable(&why),
        unreachable_reason: why,
        ..VmDescription::default()
    }
}

/// `<namespace>.<name>`; neither part has a dot.
fn vm_of_directory(directory: &Path) -> Option<VmRef> {
    let (namespace, name) = directory.file_name()?.to_str()?.split_once('.')?;
    Some(VmRef { namespace: namespace.to_owned(), name: name.to_owned() })
}

/// What may have changed.
#[derive(Debug)]
pub struct Changes {
    vms: watch::Receiver<Vec<VmEntry>>,
    registry: watch::Receiver<u64>,
    ended: watch::Receiver<u64>,
}

impl Changes {
    /// Waits for the next change. False when there will be none any more.
    pub async fn next(&mut self) -> bool {
        tokio::select! {
            changed = self.vms.changed() => changed.is_ok(),
            changed = self.registry.changed() => changed.is_ok(),
            changed = self.ended.changed() => changed.is_ok(),
        }
    }
}
