//! The migration capabilities that both ends need, and those that must be off.

use slackwater_proto::tonic::Code;

use super::super::VmmError;
use super::qmp::commands::{
    MigrateSetCapabilities, MigrateSetParameters, MigrationCapability, QueryMigrateCapabilities,
};
use super::{QemuVmm, from_qmp};

/// Switched on where QEMU knows them: its events, the stop before the final state that the gate needs, the
/// twin's report that it has loaded its devices, and, at the twin, no lock on a disk before it runs.
const ON: [&str; 5] =
    ["events", "pause-before-switchover", "return-path", "switchover-ack", "late-block-activate"];
/// Without these there is no gate, and no safe hand-over.
const NEEDED: [&str; 2] = ["pause-before-switchover", "return-path"];
/// Several streams instead of one; switched on if there are to be several, and off if not.
const MULTIFD: &str = "multifd";
/// Switched off where QEMU knows them: the source could not take the VM back, or the state would not come at
/// all.
const OFF: [&str; 4] = ["postcopy-ram", "release-ram", "x-colo", "background-snapshot"];

impl QemuVmm {
    /// Switches the capabilities that both ends need, for this many channels besides the main one.
    pub(super) async fn prepare(&self, call: &'static str, channels: u8) -> Result<(), VmmError> {
        let known =
            self.qmp.execute(QueryMigrateCapabilities).await.map_err(|error| from_qmp(call, error))?;
        let knows = |name: &&str| known.iter().any(|capability| capability.capability == *name);
        let needed = NEEDED.iter().copied().chain((channels > 0).then_some(MULTIFD));
        if let Some(missing) = needed.into_iter().find(|name| !knows(name)) {
            let message = format!("QEMU {} has no migration capability {missing}", self.qmp.version());
            return Err(VmmError::Refused { call, code: Code::FailedPrecondition, message });
        }
        let multifd = [MULTIFD];
        let (more_on, more_off): (&[&str], &[&str]) =
            if channels > 0 { (&multifd, &[]) } else { (&[], &multifd) };
        let on =
            ON.iter().chain(more_on).filter(|name| knows(name)).map(|name| MigrationCapability::on(name));
        let off =
            OFF.iter().chain(more_off).filter(|name| knows(name)).map(|name| MigrationCapability::off(name));
        let capabilities = on.chain(off).collect();
        let set = self.qmp.execute(MigrateSetCapabilities { capabilities }).await;
        set.map_err(|error| from_qmp(call, error))?;
        if channels == 0 {
            return Ok(());
        }
        let parameters =
            MigrateSetParameters { multifd_channels: Some(channels), ..MigrateSetParameters::default() };
        self.qmp.execute(parameters).await.map(drop).map_err(|error| from_qmp(call, error))
    }
}
