//! The answers to the commands. Fields that later versions of QEMU add are ignored.

use std::fmt;

use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};

use super::states::{MigrationStatus, RunState};

/// `{}`: it was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub struct Done {}

/// Of `query-status`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct StatusInfo {
    /// What the machine does.
    pub status: RunState,
    /// Whether its vCPUs run.
    pub running: bool,
}

/// QEMU's version.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Deserialize)]
pub struct Version {
    /// QEMU's own version.
    pub qemu: VersionTriple,
    /// The distribution's version; empty without a package.
    #[serde(default)]
    pub package: String,
}

/// Three numbers that can be compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
pub struct VersionTriple {
    /// The first.
    pub major: u32,
    /// The second.
    pub minor: u32,
    /// The third; 50 and above is a development version.
    pub micro: u32,
}

impl VersionTriple {
    /// Whether it is this release, or a later one.
    pub fn at_least(&self, major: u32, minor: u32) -> bool {
        (self.major, self.minor) >= (major, minor)
    }
}

impl fmt::Display for VersionTriple {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.qemu)?;
        match self.package.as_str() {
            "" => Ok(()),
            package => write!(f, " ({package})"),
        }
    }
}

/// Of `query-name`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct NameInfo {
    /// The VM's name, if it was given one.
    pub name: Option<String>,
}

/// Of `query-kvm`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub struct KvmInfo {
    /// Whether this machine uses it.
    pub enabled: bool,
    /// Whether this QEMU was built with it.
    pub present: bool,
}

/// A machine type, of `query-machines`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MachineInfo {
    /// Its name, such as `pc-q35-10.0`.
    pub name: String,
    /// Another name, such as `q35`: its machine type changes with QEMU's version.
    pub alias: Option<String>,
    /// Whether QEMU uses it without `-machine`.
    #[serde(default)]
    pub is_default: bool,
    /// The most vCPUs that it can have.
    pub cpu_max: u64,
    /// Whether it will be removed from QEMU.
    #[serde(default)]
    pub deprecated: bool,
    /// Its CPU without `-cpu`.
    pub default_cpu_type: Option<String>,
}

/// A property of an object, of `qom-list`. A child's type is `child<TYPE>`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct ObjectProperty {
    /// Its name.
    pub name: String,
    /// Its type, such as `bool`, `link<memory-backend>` or `child<vfio-pci>`.
    #[serde(rename = "type")]
    pub kind: String,
}

impl ObjectProperty {
    /// The type of the object that it is, if it is a child.
    pub fn child_type(&self) -> Option<&str> {
        self.kind.strip_prefix("child<")?.strip_suffix('>')
    }
}

/// A property of a type, of `qom-list-properties`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct TypeProperty {
    /// Its name.
    pub name: String,
    /// Its type, such as `bool`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Its default. Only settings of QEMU itself (qdev properties) have one.
    pub default_value: Option<Value>,
}

/// A vCPU, of `query-cpus-fast`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct CpuInfo {
    /// Its object.
    pub qom_path: String,
}

/// Of `query-cpu-model-expansion`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct CpuModelExpansion {
    /// The model, `name` and `props`, as QEMU writes it.
    pub model: Value,
}

/// Of `query-migrate`. With no migration so far everything is `None`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MigrationInfo {
    /// Its status.
    pub status: Option<MigrationStatus>,
    /// Why it failed.
    pub error_desc: Option<String>,
    /// What has been copied of RAM. At the source only.
    pub ram: Option<RamInfo>,
    /// What has been copied of VFIO devices, if there are any.
    pub vfio: Option<VfioInfo>,
    /// How long the machine was stopped, in milliseconds. When it has completed.
    #[serde(rename = "downtime", default, deserialize_with = "optional_count")]
    pub downtime_ms: Option<u64>,
    /// How long QEMU expects the machine to be stopped, in milliseconds. While it is active.
    #[serde(rename = "expected-downtime", default, deserialize_with = "optional_count")]
    pub expected_downtime_ms: Option<u64>,
    /// How long it has taken, in milliseconds.
    #[serde(rename = "total-time", default, deserialize_with = "optional_count")]
    pub total_time_ms: Option<u64>,
    /// How long the connecting and the devices' set-up took, in milliseconds.
    #[serde(rename = "setup-time", default, deserialize_with = "optional_count")]
    pub setup_time_ms: Option<u64>,
    /// Why this machine cannot be migrated now. Since QEMU 6.0; `None` if it can.
    pub blocked_reasons: Option<Vec<String>>,
}

/// The progress of RAM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct RamInfo {
    /// Bytes sent, of RAM and of all else.
    #[serde(rename = "transferred", deserialize_with = "count")]
    pub transferred_bytes: u64,
    /// Bytes of RAM that are still to be sent.
    #[serde(rename = "remaining", deserialize_with = "count")]
    pub remaining_bytes: u64,
    /// Bytes of RAM that the guest has.
    #[serde(rename = "total", deserialize_with = "count")]
    pub total_bytes: u64,
    /// Pages per second that the guest and its devices write.
    #[serde(deserialize_with = "count")]
    pub dirty_pages_rate: u64,
    /// How often the dirty log was read.
    #[serde(deserialize_with = "count")]
    pub dirty_sync_count: u64,
    /// Bytes per page.
    #[serde(rename = "page-size", deserialize_with = "count")]
    pub page_size_bytes: u64,
    /// Bytes sent while the guest ran.
    #[serde(deserialize_with = "count")]
    pub precopy_bytes: u64,
    /// Bytes sent while the guest was stopped.
    #[serde(deserialize_with = "count")]
    pub downtime_bytes: u64,
}

/// The progress of the VFIO devices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct VfioInfo {
    /// Bytes of device state sent, of all devices.
    #[serde(rename = "transferred", deserialize_with = "count")]
    pub transferred_bytes: u64,
}

/// Of `query-migrate-parameters`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MigrationParameters {
    /// How long the machine may be stopped, in milliseconds.
    #[serde(rename = "downtime-limit")]
    pub downtime_limit_ms: Option<u64>,
    /// The most that is sent, in bytes per second; 0 for no limit.
    pub max_bandwidth: Option<u64>,
    /// What QEMU may assume for the switch-over, in bytes per second; 0 if it uses what it measures.
    pub avail_switchover_bandwidth: Option<u64>,
    /// Connections of `multifd`.
    pub multifd_channels: Option<u8>,
    /// All others, as QEMU writes them.
    #[serde(flatten)]
    pub rest: Map<String, Value>,
}

/// QAPI's `int` is signed; a negative count is one that QEMU could not determine.
fn count<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Int {
        Count(u64),
        Below(i64),
    }
    Ok(match Int::deserialize(deserializer)? {
        Int::Count(count) => count,
        Int::Below(below) => u64::try_from(below).unwrap_or(0),
    })
}

fn optional_count<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    count(deserializer).map(Some)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::vmm::qemu::qmp::message::parse;

    #[test]
    fn without_a_migration_every_field_is_empty() {
        assert_eq!(parse::<MigrationInfo>(&json!({})), Ok(MigrationInfo::default()));
    }

    #[test]
    fn a_migration_is_parsed_with_the_fields_that_it_has() {
        let answer = json!({
            "status": "active", "total-time": 812, "setup-time": 3, "expected-downtime": -1,
            "ram": {"transferred": 67_108_924, "remaining": 4096, "total": 34_078_720, "mbps": 268.4,
                    "dirty-pages-rate": 7},
            "vfio": {"transferred": 65_536}, "blocked-reasons": ["no P2P"], "daydreams": [1, 2],
        });
        let info: MigrationInfo = parse(&answer).unwrap();
        assert_eq!(info.status, Some(MigrationStatus::Active));
        assert_eq!((info.total_time_ms, info.setup_time_ms, info.downtime_ms), (Some(812), Some(3), None));
        assert_eq!(info.expected_downtime_ms, Some(0));
        let ram = info.ram.unwrap();
        assert_eq!((ram.transferred_bytes, ram.remaining_bytes, ram.dirty_pages_rate), (67_108_924, 4096, 7));
        assert_eq!(info.vfio, Some(VfioInfo { transferred_bytes: 65_536 }));
        assert_eq!(info.blocked_reasons, Some(vec!["no P2P".to_owned()]));
    }

    #[test]
    fn the_type_of_a_child_is_taken_from_its_property() {
        let property = |kind: &str| ObjectProperty { name: "v0".to_owned(), kind: kind.to_owned() };
        assert_eq!(property("child<vfio-pci>").child_type(), Some("vfio-pci"));
        assert_eq!(property("string").child_type(), None);
    }
}
