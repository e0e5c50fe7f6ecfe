//! The twin of a reservation, its devices and its network identity.

use std::sync::Arc;

use futures::FutureExt;
use futures::future::BoxFuture;
use slackwater_handover::policy::Driver;
use slackwater_handover::state::MigrationState;
use slackwater_handover::{Failure, Reason};
use tokio::sync::Mutex;
use tracing::{error, warn};

use crate::attempt::destination::{Site, Twin as StartedTwin};
use crate::host::identity::{IdentityOf, VfIdentity};
use crate::host::twin_users::TwinUser;
use crate::host::vms;
use crate::service::borrowing::{self, Borrowed};
use crate::vfio::error::DeviceError;
use crate::vfio::worker::DeviceHandle;
use crate::vmm::Vmm;
use crate::vmm::twin::{self, Twin, TwinPlan};

/// The place of one reservation.
pub(super) struct NodeSite {
    pub(super) plan: TwinPlan,
    pub(super) vm_json: String,
    pub(super) identity: Arc<dyn VfIdentity>,
    pub(super) of: IdentityOf,
    pub(super) twin: Mutex<Option<Twin>>,
    /// The twin's, for as long as nothing of the twin shows that it is taken.
    pub(super) _user: Option<TwinUser>,
    /// The devices that were borrowed from VMMs.
    pub(super) borrowed: Arc<Borrowed>,
}

impl NodeSite {
    /// What drives the devices of the VM that lands here.
    pub(super) fn driver(&self) -> Driver {
        self.plan.vmm.kind.driver()
    }

    async fn prepare_and_start(&self) -> Result<StartedTwin, Failure> {
        let failed = |reason, message: String| Failure::new(reason, format!("at the destination, {message}"));
        self.identity
            .prepare(&self.of)
            .await
            .map_err(|error| failed(Reason::DeviceFailed, error.to_string()))?;
        let twin = twin::start(self.plan.clone())
            .await
            .map_err(|error| failed(Reason::TwinFailed, error.to_string()))?;
        let vmm = Arc::clone(twin.vmm());
        let description = twin.description().clone();
        // From here on `discard` clears the twin away.
        *self.twin.lock().await = Some(twin);
        let has: Vec<&str> = description.devices.iter().map(|device| device.name.as_str()).collect();
        let wanted: Vec<&str> = self.of.devices.iter().map(|device| device.name.as_str()).collect();
        if has != wanted {
            let message = format!(
                "the twin has the devices [{}], but the reservation is for [{}]",
                has.join(", "),
                wanted.join(", ")
            );
            return Err(failed(Reason::TwinFailed, message));
        }
        let devices = borrowing::devices(&vmm, &description, &self.borrowed).await.map_err(|error| {
            let Failure { reason, message } = error.into();
            failed(reason, message)
        })?;
        for device in &devices {
            match device.watch().unless_it_hangs(running(device)).await {
                Ok(result) => result.map_err(|error| failed(Reason::DeviceFailed, error.to_string()))?,
                Err(hang) => return Err(failed(Reason::DeviceHangs, hang.to_string())),
            }
        }
        let process = Some(vmm.process().identity().into());
        let vmm: Arc<dyn Vmm> = vmm;
        Ok(StartedTwin { vmm, devices, process })
    }
}

/// A free device may still be in the state in which its last user left it: a reset takes it to RUNNING.
async fn running(device: &DeviceHandle) -> Result<(), DeviceError> {
    let state = device.state().await?;
    if state != MigrationState::Running {
        warn!(device = device.name(), %state, "a free device was not left in RUNNING, and is reset");
        device.reset().await?;
    }
    Ok(())
}

impl Site for NodeSite {
    fn start_twin(&self) -> BoxFuture<'_, Result<StartedTwin, Failure>> {
        self.prepare_and_start().boxed()
    }

    fn last_words(&self) -> String {
        self.plan.last_words()
    }

    fn activate_identity(&self) -> BoxFuture<'_, Result<(), Failure>> {
        async {
            let activated = self.identity.activate(&self.of).await;
            activated
                .map_err(|error| Failure::new(Reason::DeviceFailed, format!("at the destination, {error}")))
        }
        .boxed()
    }

    fn keep(&self) -> BoxFuture<'_, Result<(), String>> {
        async {
            // From here on the twin does not depend on the agent.
            self.twin.lock().await.take();
            let directory = self.plan.directory.clone();
            let vm_json = self.vm_json.clone();
            let published = tokio::task::spawn_blocking(move || {
                vms::publish(&directory, &vm_json).map_err(|error| {
                    format!("{} cannot be written: {error}", directory.join("vm.json").display())
                })
            });
            published.await.unwrap_or_else(|error| Err(error.to_string()))
        }
        .boxed()
    }

    fn discard(&self) -> BoxFuture<'_, ()> {
        async {
            let limit = self.plan.deadlines.quit;
            let cleared = match self.twin.lock().await.take() {
                Some(twin) => twin.discard(limit).await,
                // It was never started, or by an agent that has ended since.
                None => twin::clear(&self.plan, limit).await,
            };
            if let Err(error) = cleared {
                error!(migration = self.of.migration_id, %error, "a twin could not be cleared away");
            }
            if let Err(error) = self.identity.withdraw(&self.of).await {
                warn!(migration = self.of.migration_id, %error, "an identity could not be withdrawn");
            }
        }
        .boxed()
    }
}
