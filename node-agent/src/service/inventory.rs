//! What there is on the node: VMs, devices, who holds them, and what blocks a migration.

use std::collections::HashMap;
use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use futures::future::{OptionFuture, join_all};
use parking_lot::Mutex;
use slackwater_handover::state::Features;
use slackwater_proto::node::{
    CertificateDescription, DeviceDescription, NodeDescription, VmDescription, VmRef, VmState,
};
use slackwater_proto::reload::CertificateStatus;
use tokio::sync::watch;
use tracing::warn;

use super::asking::{ANSWER_LIMIT, Asking, NoAnswer};
use super::blockers::DeviceFeatures;
use super::borrowing::{BorrowDeviceError, Borrowed};
use super::config::NodeConfig;
use super::reason::ServiceReason;
use super::registry::Registry;
use super::vmms::{Answer, Vmms};
use super::{blockers, borrowing, preflight, watching};
use crate::faults;
use crate::host::devices::{Device, vfio_devices};
use crate::host::holders::Holders;
use crate::host::node::{Kernel, kernel};
use crate::host::vm::VmmEntry;
use crate::host::vms::{KnownVm, VmEntry, VmWatch};
use crate::vfio::device::Device as _;
use crate::vfio::probe::{self, ProbeError};
use crate::vmm::{Description, LocalVmm, RunState, VmmDevice, VmmError};

/// A device and its driver: with another driver it is another device.
type FeatureKey = (String, String);

/// Asks the driver of a free device what it advertises. It may never return.
type Probe = dyn Fn(&Device) -> Result<Features, ProbeError> + Send + Sync;

fn probe(device: &Device) -> Result<Features, ProbeError> {
    faults::hang_in_probe(&device.name);
    probe::features(&device.cdev)
}

/// The node, looked at on demand.
pub struct Inventory {
    config: NodeConfig,
    registry: Arc<Registry>,
    vms: VmWatch,
    vmms: Arc<Vmms>,
    certificate: Option<watch::Receiver<CertificateStatus>>,
    features: Arc<Mutex<HashMap<FeatureKey, Features>>>,
    /// What devices advertise. A reservation waits for the answer, so the twin then finds the device closed.
    asking: Asking<Result<Features, Arc<FeaturesError>>>,
    probe: Arc<Probe>,
    looking: Asking<Result<Look, LookError>>,
    looks: AtomicU64,
    borrowed: Arc<Borrowed>,
    /// A VMM did not answer, and will be asked again soon.
    asking_again: AtomicBool,
}

/// Between two looks at a VMM that does not answer: it may be starting, or its monitor may have another
/// client for a moment.
const ASK_AGAIN: Duration = Duration::from_secs(2);

/// Looks at the node that may wait for the kernel at once.
const LOOKS: usize = 8;

/// Why the node cannot be described.
#[derive(Clone, Debug, thiserror::Error)]
#[error("cannot look at the node: {0}")]
pub struct LookError(Arc<dyn Error + Send + Sync>);

/// The node as sysfs and procfs show it.
#[derive(Clone)]
struct Look {
    devices: Vec<Device>,
    holders: Holders,
    kernel: Kernel,
}

/// Why a device is not free.
#[derive(Debug, thiserror::Error)]
pub(super) enum NotFreeError {
    /// The node could not be looked at.
    #[error(transparent)]
    Look(#[from] LookError),
    /// There is no such device.
    #[error("there is no device {device} on this node; there are {}", existing.join(", "))]
    NoSuchDevice {
        /// Its name.
        device: String,
        /// The names of those that there are.
        existing: Vec<String>,
    },
    /// It may have a user.
    #[error("whether device {device} is free is not known: {why}")]
    NotKnown {
        /// Its name.
        device: String,
        /// What could not be read.
        why: String,
    },
    /// It has a user.
    #[error("device {device} is in use by {holder}")]
    InUse {
        /// Its name.
        device: String,
        /// Who uses it, for a person.
        holder: String,
    },
    /// A call to it does not return.
    #[error("{0}")]
    Hangs(String),
}

/// The process that holds a device, or why it is not known whether one does; empty: none does.
fn holder_among(holders: &Holders, device: &Device) -> String {
    match holders.of(device).first() {
        Some(process) => process.to_string(),
        None => holders.not_known().map(|why| format!("not known: {why}")).unwrap_or_default(),
    }
}

/// A device is free only if it is known that no process holds it.
fn require_no_holder(device: &Device, holders: &Holders) -> Result<(), NotFreeError> {
    let name = || device.name.clone();
    match holders.of(device).first() {
        Some(holder) => Err(NotFreeError::InUse { device: name(), holder: holder.to_string() }),
        None => match holders.not_known() {
            Some(why) => Err(NotFreeError::NotKnown { device: name(), why }),
            None => Ok(()),
        },
    }
}

/// Why the features of a device are not known.
#[derive(Debug, thiserror::Error)]
pub(super) enum FeaturesError {
    /// It is not touched while it is in use.
    #[error("the device is in use, and was not free before")]
    InUse,
    /// The kernel does not say.
    #[error(transparent)]
    Probe(#[from] ProbeError),
    /// The kernel does not answer.
    #[error(transparent)]
    NoAnswer(#[from] NoAnswer),
    /// It could not be borrowed from its VMM.
    #[error(transparent)]
    Borrow(#[from] BorrowDeviceError),
}

impl Inventory {
    /// A node whose VMs are watched.
    pub fn new(config: NodeConfig, registry: Arc<Registry>, vms: VmWatch) -> Self {
        let vmms = Arc::new(Vmms::new(config.deadlines));
        Self {
            config,
            registry,
            vms,
            vmms,
            certificate: None,
            features: Arc::default(),
            asking: Asking::new(),
            probe: Arc::new(probe),
            looking: Asking::with(LOOKS, ANSWER_LIMIT),
            looks: AtomicU64::new(0),
            borrowed: Arc::default(),
            asking_again: AtomicBool::new(false),
        }
    }

    /// Describes the agent's certificate, too.
    pub fn showing(self, certificate: watch::Receiver<CertificateStatus>) -> Self {
        Self { certificate: Some(certificate), ..self }
    }

    /// Returns when something may have changed since the last look; the first time at once.
    pub fn changes(&self) -> Changes {
        let mut vms = self.vms.list();
        vms.mark_changed();
        let late = self.asking.late_answers();
        Changes {
            vms,
            registry: self.registry.changes(),
            vmms: self.vmms.changes(),
            late,
            closings: self.borrowed.closings(),
            certificate: self.certificate.clone(),
        }
    }

    /// The devices that are borrowed from VMMs now.
    pub(super) fn borrowed(&self) -> &Arc<Borrowed> {
        &self.borrowed
    }

    /// The node as of now.
    ///
    /// # Errors
    /// If sysfs or procfs cannot be read.
    pub async fn describe(self: &Arc<Self>) -> Result<NodeDescription, LookError> {
        let Look { devices, holders, kernel } = self.look().await?;
        let entries = self.vms.list().borrow().clone();
        let mut vms = Vec::with_capacity(entries.len());
        let mut used = HashMap::new();
        // At the same time: one that does not answer takes as long as it may.
        for vm in join_all(entries.iter().map(|entry| self.describe_vm(entry, &devices))).await {
            if let Some(name) = &vm.vm {
                let holder = format!("VM {}/{}", name.namespace, name.name);
                used.extend(vm.devices.iter().map(|device| (device.clone(), holder.clone())));
            }
            vms.push(vm);
        }
        for (name, migration) in self.registry.leaving() {
            // Its vm.json is not what keeps it here.
            if !vms.iter().any(|vm| vm.vm.as_ref() == Some(&name)) {
                let why = self.registry.waits_for(&migration);
                let why = why.map(|why| format!(": {why}")).unwrap_or_default();
                let why = format!("its vm.json is missing, and migration {migration} holds it{why}");
                vms.push(VmDescription { migration_id: migration, ..unreachable(Some(name), why) });
            }
        }
        // At the same time: one that hangs takes as long as it may.
        let described = join_all(devices.iter().map(|device| {
            let reserved = self.registry.holder_of_device(&device.name);
            let holder = match (reserved, used.get(&device.name)) {
                (Some(migration), None) => format!("reserved by migration {migration}"),
                (_, Some(vm)) => vm.clone(),
                (None, None) => holder_among(&holders, device),
            };
            self.describe_device(device, holder)
        }))
        .await;
        Ok(NodeDescription {
            node: self.config.node.clone(),
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            kernel_release: kernel.release,
            boot_id: kernel.boot_id,
            vms,
            devices: described,
            certificate: self.certificate.as_ref().map(|status| certificate(&status.borrow())),
            known_epoch: self.registry.highest_epoch(),
            twin_start_limit_ms: u64::try_from(self.config.twin_start_limit.as_millis()).unwrap_or(u64::MAX),
        })
    }

    async fn look(&self) -> Result<Look, LookError> {
        // Each look is one of its own: what an older one finds is not the node as of now.
        let about = format!("look {} at the node", self.looks.fetch_add(1, Ordering::Relaxed));
        let looked = self.looking.ask(&about, "reading sysfs and procfs", || {
            let inventory = vfio_devices(Path::new("/sys")).map_err(|error| LookError(Arc::new(error)))?;
            for unusable in &inventory.unusable {
                warn!(unusable, "a VFIO device cannot be used");
            }
            let proc = Path::new("/proc");
            let kernel = kernel(proc).map_err(|error| LookError(Arc::new(error)))?;
            let holders = Holders::look(proc).map_err(|error| LookError(Arc::new(error)))?;
            Ok(Look { devices: inventory.devices, holders, kernel })
        });
        looked.await.map_err(|error| LookError(Arc::new(error)))?
    }

    /// The device of this name, if it is there and free.
    ///
    /// # Errors
    /// [`NotFreeError`]
    pub(super) async fn free_device(&self, name: &str) -> Result<Device, NotFreeError> {
        let Look { devices, holders, .. } = self.look().await?;
        let Some(device) = devices.iter().find(|device| device.name == name) else {
            let existing = devices.into_iter().map(|device| device.name).collect();
            return Err(NotFreeError::NoSuchDevice { device: name.to_owned(), existing });
        };
        if let Some(why) = self.hangs(name) {
            return Err(NotFreeError::Hangs(why));
        }
        require_no_holder(device, &holders)?;
        Ok(device.clone())
    }

    /// The call to a device that does not return, whether the agent has borrowed it or has asked what it
    /// advertises. It is not free before that has ended.
    fn hangs(&self, device: &str) -> Option<String> {
        let asked = || self.asking.hangs(&about(device)).map(|hang| hang.to_string());
        self.borrowed.hangs(device).map(|hang| hang.to_string()).or_else(asked)
    }

    async fn describe_device(&self, device: &Device, holder: String) -> DeviceDescription {
        let (features, features_unknown_reason) = match self.features(device, holder.is_empty()).await {
            Ok(features) => (Some(features.into()), String::new()),
            Err(error) => (None, error.to_string()),
        };
        let holder = match self.hangs(&device.name) {
            Some(why) if holder.is_empty() => format!("a call of the agent: {why}"),
            Some(why) => format!("{holder}; {why}"),
            None => holder,
        };
        let free = holder.is_empty();
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

    /// What the device's driver advertises. A device that is in use is not touched: what is not known of it
    /// stays unknown.
    ///
    /// # Errors
    /// [`FeaturesError`]
    pub(super) async fn features(&self, device: &Device, free: bool) -> Result<Features, Arc<FeaturesError>> {
        let key = (device.name.clone(), device.driver.clone());
        if let Some(features) = self.known_features(&key) {
            return Ok(features);
        }
        if !free || self.registry.holder_of_device(&device.name).is_some() {
            return Err(Arc::new(FeaturesError::InUse));
        }
        let (probe, device, known) = (Arc::clone(&self.probe), device.clone(), Arc::clone(&self.features));
        let about = about(&device.name);
        let answer = self.asking.ask(&about, "opening it", move || {
            let features = probe(&device).map_err(|error| Arc::new(error.into()))?;
            known.lock().insert(key, features);
            Ok(features)
        });
        answer.await.map_err(|error| Arc::new(error.into()))?
    }

    fn known_features(&self, key: &FeatureKey) -> Option<Features> {
        self.features.lock().get(key).copied()
    }

    /// Features of a VM's device, by way of its VMM.
    async fn features_in_use(
        &self,
        vmm: &Arc<dyn LocalVmm>,
        used: &VmmDevice,
        devices: &[Device],
    ) -> Result<Features, Arc<FeaturesError>> {
        let driver = devices.iter().find(|device| device.name == used.name).map(|device| &device.driver);
        let key = (used.name.clone(), driver.cloned().unwrap_or_default());
        if let Some(features) = self.known_features(&key) {
            return Ok(features);
        }
        let (vmm, of_vmm, known) = (Arc::clone(vmm), used.clone(), Arc::clone(&self.features));
        let about = about(&used.name);
        let answer = self.asking.ask(&about, "taking it out of its VMM's process", move || {
            let borrowed =
                borrowing::device(vmm.as_ref(), &of_vmm).map_err(|error| Arc::new(error.into()))?;
            let features = borrowed.features();
            known.lock().insert(key, features);
            Ok(features)
        });
        answer.await.map_err(|error| Arc::new(error.into()))?
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
                    let known = self.features_in_use(&vmm, device, devices).await;
                    features.push(DeviceFeatures {
                        device: device.name.clone(),
                        features: known.map_err(|error| error.to_string()),
                    });
                }
                VmDescription {
                    state: match description.run_state {
                        RunState::Running => VmState::Running,
                        RunState::Paused | RunState::Incoming | RunState::Stopped(_) => VmState::Paused,
                    }
                    .into(),
                    blockers: blockers::of_vm(
                        description.run_state,
                        &features,
                        vmm.driver(),
                        &description.blocked,
                    ),
                    qemu: vmm.facts().map(|facts| preflight::to_proto(&facts)),
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
            // Nothing but that migration blocks a VM that is paused because it is being migrated.
            let stands = [ServiceReason::VmPaused, ServiceReason::VmNotRunning].map(ServiceReason::as_str);
            described.blockers.retain(|blocker| !stands.contains(&blocker.reason.as_str()));
            // What cannot be said about the VM while nothing goes on is said of the migration that holds it.
            let hold = self.registry.explanation(&migration);
            described.blockers.splice(0..0, hold.map(blockers::held));
            if let Some(why) = self.registry.waits_for(&migration) {
                described.blockers.insert(0, blockers::recovering(&why));
            }
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
                inventory.vmms.look_again();
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
    pub async fn vmm(&self, vm: &KnownVm) -> Result<(Arc<dyn LocalVmm>, Description), VmmError> {
        self.vmm_at(&vm.json.vmm, &vm.socket, &vm.directory).await
    }

    /// The same, for a VM whose `vm.json` may not be there: by the absolute path of its socket, and its own
    /// folder.
    ///
    /// # Errors
    /// If it does not answer.
    pub(super) async fn vmm_at(
        &self,
        entry: &VmmEntry,
        socket: &Path,
        folder: &Path,
    ) -> Result<(Arc<dyn LocalVmm>, Description), VmmError> {
        let Answer { vmm, description, is_new } = self.vmms.ask(entry, socket, folder).await?;
        if is_new {
            watching::start(Arc::downgrade(&self.vmms), socket.to_owned(), Arc::clone(&vmm));
        }
        Ok((vmm, description))
    }
}

fn about(device: &str) -> String {
    format!("device {device}")
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

fn certificate(status: &CertificateStatus) -> CertificateDescription {
    CertificateDescription {
        not_before_unix_s: status.validity.not_before,
        not_after_unix_s: status.validity.not_after,
        ends_soon: status.ends_soon,
        refused: status.refused.clone().unwrap_or_default(),
    }
}

/// What may have changed.
#[derive(Debug)]
pub struct Changes {
    vms: watch::Receiver<Vec<VmEntry>>,
    registry: watch::Receiver<u64>,
    vmms: watch::Receiver<u64>,
    certificate: Option<watch::Receiver<CertificateStatus>>,
    late: watch::Receiver<u64>,
    closings: watch::Receiver<u64>,
}

impl Changes {
    /// Waits for the next change. False when there will be no more.
    pub async fn next(&mut self) -> bool {
        tokio::select! {
            changed = self.vms.changed() => changed.is_ok(),
            changed = self.registry.changed() => changed.is_ok(),
            changed = self.vmms.changed() => changed.is_ok(),
            Some(Ok(())) = OptionFuture::from(self.certificate.as_mut().map(watch::Receiver::changed)) => true,
            changed = self.late.changed() => changed.is_ok(),
            changed = self.closings.changed() => changed.is_ok(),
        }
    }
}

#[cfg(test)]
#[path = "inventory_tests.rs"]
mod tests;
