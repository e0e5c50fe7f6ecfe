//! Whether the QEMU of a destination could take over a QEMU VM. It is checked before the twin is started.
//!
//! ```text
//! source                                   destination
//! the VM's QEMU ──facts──▶ (operator) ──▶  the twin's program, run once without a machine ──probe──▶ offer
//!                                          compare(facts, offer), files(twin's arguments) ──▶ findings
//!                                          with findings, Reserve is refused
//! ```
//!
//! The rules are QEMU's: docs/devel/migration/compatibility.rst for versions and machine types,
//! docs/system/i386/cpu-models-x86.rst for CPUs. The decision is pure; `facts.rs` and `probe.rs` query.

mod compare;
pub mod confined;
pub mod facts;
mod features;
pub mod files;
mod machine;
pub mod probe;
mod version;

use std::collections::BTreeSet;

use strum::{Display, EnumString, IntoStaticStr};

pub use self::compare::compare;

/// The properties of a VM's QEMU that another QEMU needs to take over its state.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// As in `10.0.2`.
    pub version: String,
    /// The distribution's version; may be empty.
    pub package: String,
    /// With its version, as in `pc-q35-10.0`.
    pub machine_type: String,
    /// What runs the guest's code; None if this agent does not know the source's accelerator.
    pub accelerator: Option<Accelerator>,
    /// The features that the guest sees: [`features`].
    pub cpu_features: BTreeSet<String>,
}

/// What runs a guest's code. Named as in QEMU's `-accel`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EnumString, IntoStaticStr)]
#[strum(serialize_all = "lowercase")]
pub enum Accelerator {
    /// The kernel's KVM.
    Kvm,
    /// QEMU's own emulation.
    Tcg,
}

impl Accelerator {
    /// As in `-accel`.
    pub fn as_str(self) -> &'static str {
        self.into()
    }
}

/// What a QEMU at the destination offers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Offer {
    /// As in `10.0.2`.
    pub version: String,
    /// The machine types that it knows.
    pub machines: Vec<MachineType>,
    /// The features that it can give a guest; None if it was not queried: the accelerator is missing.
    pub cpu_features: Option<BTreeSet<String>>,
}

/// A machine type.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MachineType {
    /// With its version, if it has one.
    pub name: String,
    /// Another name, such as `q35`.
    pub alias: Option<String>,
    /// Whether QEMU uses it without `-machine`.
    pub is_default: bool,
}

/// The kind of a finding: the condition's reason. In CamelCase, as Kubernetes writes reasons.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Display, IntoStaticStr)]
pub enum Kind {
    /// The destination's QEMU is older.
    #[strum(serialize = "QEMUOlder")]
    QemuOlder,
    /// It does not know the machine type.
    MachineTypeUnknown,
    /// The twin would have another machine type.
    MachineTypeDiffers,
    /// No KVM.
    AcceleratorMissing,
    /// The guest has seen CPU features that it would not have there.
    #[strum(serialize = "CPUFeaturesMissing")]
    CpuFeaturesMissing,
    /// An argument of the twin that cannot work in its sandbox.
    ArgumentRefused,
    /// A file that the twin's arguments name.
    FileMissing,
}

impl Kind {
    /// As a condition has it.
    pub fn as_str(self) -> &'static str {
        self.into()
    }
}

/// Something that would make the migration fail.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Its kind.
    pub kind: Kind,
    /// For users, without a full stop: what is wrong, and what would be right.
    pub message: String,
}

impl Finding {
    fn new(kind: Kind, message: String) -> Self {
        Self { kind, message }
    }
}

/// The result of a comparison.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// All obstacles, the gravest first.
    pub findings: Vec<Finding>,
    /// What could not be compared, and why. It does not prevent a migration.
    pub not_compared: Vec<String>,
}

impl Verdict {
    /// The reason and the message of a refusal; None if there is no obstacle.
    pub fn refusal(&self) -> Option<(Kind, String)> {
        let first = self.findings.first()?;
        let all = match self.findings.as_slice() {
            [only] => format!("{}: {}", only.kind, only.message),
            several => {
                let numbered = several.iter().zip(1..);
                let numbered = numbered.map(|(f, n)| format!("({n}) {}: {}", f.kind, f.message));
                format!(
                    "{} things are in the way: {}",
                    several.len(),
                    numbered.collect::<Vec<_>>().join("; ")
                )
            }
        };
        let not_compared: String =
            self.not_compared.iter().map(|what| format!("; not compared: {what}")).collect();
        Some((first.kind, format!("{all}{not_compared}")))
    }
}

#[cfg(test)]
#[path = "real_tests.rs"]
mod real;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_has_all_findings_and_the_reason_of_the_first() {
        assert_eq!(Verdict::default().refusal(), None);
        let older = Finding::new(Kind::QemuOlder, "it is older".to_owned());
        let file = Finding::new(Kind::FileMissing, "a file is not there".to_owned());
        let one = Verdict { findings: vec![file.clone()], not_compared: vec!["the CPU".to_owned()] };
        let expected = "FileMissing: a file is not there; not compared: the CPU".to_owned();
        assert_eq!(one.refusal(), Some((Kind::FileMissing, expected)));
        let two = Verdict { findings: vec![older, file], not_compared: Vec::new() };
        let expected =
            "2 things are in the way: (1) QEMUOlder: it is older; (2) FileMissing: a file is not there";
        assert_eq!(two.refusal(), Some((Kind::QemuOlder, expected.to_owned())));
    }
}
