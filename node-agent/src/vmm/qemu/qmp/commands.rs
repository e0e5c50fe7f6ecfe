//! The commands that the agent sends, as in QEMU 10.0's QAPI, and their answers (`answers.rs`).

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use super::answers::*;
use super::states::MigrationStatus;

/// A command. It serializes to its arguments.
pub trait Command: Serialize {
    /// QEMU's name for it.
    const NAME: &'static str;
    /// What QEMU returns.
    type Answer: DeserializeOwned;
}

/// Commands without arguments.
macro_rules! plain {
    ($($(#[$doc:meta])* $command:ident = $name:literal -> $answer:ty;)*) => {
        $(
            $(#[$doc])*
            #[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
            pub struct $command;

            impl Command for $command {
                const NAME: &'static str = $name;
                type Answer = $answer;
            }
        )*
    };
}

plain! {
    /// `query-status`: what the machine does.
    QueryStatus = "query-status" -> StatusInfo;
    /// `query-version`.
    QueryVersion = "query-version" -> Version;
    /// `query-name`: what `-name` says.
    QueryName = "query-name" -> NameInfo;
    /// `query-kvm`.
    QueryKvm = "query-kvm" -> KvmInfo;
    /// `query-machines`: the machine types that this QEMU has.
    QueryMachines = "query-machines" -> Vec<MachineInfo>;
    /// `query-cpus-fast`: the vCPUs. No vCPU is disturbed by it.
    QueryCpusFast = "query-cpus-fast" -> Vec<CpuInfo>;
    /// `query-pci`: buses and devices, as QEMU writes them.
    QueryPci = "query-pci" -> Value;
    /// `query-block`: disks, as QEMU writes them.
    QueryBlock = "query-block" -> Value;
    /// `query-migrate`.
    QueryMigrate = "query-migrate" -> MigrationInfo;
    /// `query-migrate-capabilities`.
    QueryMigrateCapabilities = "query-migrate-capabilities" -> Vec<MigrationCapability>;
    /// `query-migrate-parameters`.
    QueryMigrateParameters = "query-migrate-parameters" -> MigrationParameters;
    /// `migrate_cancel`: answered at once, and with success even if there is no migration. Wait for the
    /// status `cancelled`.
    MigrateCancel = "migrate_cancel" -> Done;
    /// `stop`: the vCPUs are stopped when it has been answered.
    Stop = "stop" -> Done;
    /// `cont`: the vCPUs run, or after an incoming migration, if there is one.
    Cont = "cont" -> Done;
    /// `quit`: answered, and then QEMU ends. The answer may be lost with it.
    Quit = "quit" -> Done;
}

/// Commands with arguments.
macro_rules! with_arguments {
    ($($command:ty = $name:literal -> $answer:ty;)*) => {
        $(
            impl Command for $command {
                const NAME: &'static str = $name;
                type Answer = $answer;
            }
        )*
    };
}

with_arguments! {
    MigrateSetCapabilities = "migrate-set-capabilities" -> Done;
    MigrateSetParameters = "migrate-set-parameters" -> Done;
    Migrate = "migrate" -> Done;
    MigrateIncoming = "migrate-incoming" -> Done;
    MigrateContinue = "migrate-continue" -> Done;
    QomGet = "qom-get" -> Value;
    QomList = "qom-list" -> Vec<ObjectProperty>;
    QomListProperties = "qom-list-properties" -> Vec<TypeProperty>;
    QueryCpuModelExpansion = "query-cpu-model-expansion" -> CpuModelExpansion;
}

/// A capability of migration, and whether it is on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigrationCapability {
    /// Its name, such as `pause-before-switchover`.
    pub capability: String,
    /// Whether it is on.
    pub state: bool,
}

impl MigrationCapability {
    /// This capability, on.
    pub fn on(capability: &str) -> Self {
        Self { capability: capability.to_owned(), state: true }
    }

    /// This capability, off.
    pub fn off(capability: &str) -> Self {
        Self { capability: capability.to_owned(), state: false }
    }
}

/// `migrate-set-capabilities`: others stay as they are. Refused while a migration runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MigrateSetCapabilities {
    /// What to switch.
    pub capabilities: Vec<MigrationCapability>,
}

/// `migrate-set-parameters`: those that are `None` stay as they are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct MigrateSetParameters {
    /// How long the machine may be stopped, in milliseconds; at most 2,000,000.
    #[serde(rename = "downtime-limit", skip_serializing_if = "Option::is_none")]
    pub downtime_limit_ms: Option<u64>,
    /// The most that is sent, in bytes per second; 0 for no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_bandwidth: Option<u64>,
    /// What QEMU may assume for the switch-over, in bytes per second; 0 to let it use what it measures. Since
    /// QEMU 8.2.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub avail_switchover_bandwidth: Option<u64>,
    /// Connections of `multifd`, at least 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub multifd_channels: Option<u8>,
}

/// `migrate`: answered when the migration has begun, and with success even if the destination cannot be
/// reached: the status says so.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Migrate {
    /// Where to, such as `unix:PATH` or `tcp:HOST:PORT`.
    pub uri: String,
}

/// `migrate-incoming`, at a QEMU with `-incoming defer`: answered when it listens. If the migration fails,
/// the QEMU ends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MigrateIncoming {
    /// Where to listen, such as `unix:PATH` or `tcp:HOST:PORT`.
    pub uri: String,
}

/// `migrate-continue`: leaves a status that waits for it. Refused if the migration's status is another one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MigrateContinue {
    /// The status to leave.
    pub state: MigrationStatus,
}

impl MigrateContinue {
    /// Leaves `pre-switchover`.
    pub fn switch_over() -> Self {
        Self { state: MigrationStatus::PreSwitchover }
    }
}

/// `qom-get`: a property of an object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct QomGet {
    /// The object, such as `/machine/peripheral/v0`.
    pub path: String,
    /// The property.
    pub property: String,
}

/// `qom-list`: the properties and children of an object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct QomList {
    /// The object.
    pub path: String,
}

/// `qom-list-properties`: the properties that objects of a type have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct QomListProperties {
    /// The type, such as `max-x86_64-cpu`.
    pub typename: String,
}

/// How far [`QueryCpuModelExpansion`] goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum CpuModelExpansionType {
    /// To a model that never changes, and all properties that differ from it.
    Static,
    /// To all properties.
    Full,
}

/// The CPU model to expand.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CpuModel {
    /// Such as `host`, `max` or `qemu64`.
    pub name: String,
    /// Properties that differ from the model's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub props: Option<Value>,
}

/// `query-cpu-model-expansion`: what a CPU model consists of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct QueryCpuModelExpansion {
    /// How far.
    #[serde(rename = "type")]
    pub expansion: CpuModelExpansionType,
    /// Of what.
    pub model: CpuModel,
}
