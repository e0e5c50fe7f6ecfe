//! `vm.json`: how a VM makes itself known to the agent, and how its twin is started. Pure.
//!
//! ```json
//! {
//!   "name": "counter", "namespace": "demo",
//!   "vmm": {"kind": "contract", "socket": "vmm.sock"},
//!   "twin": {"program": "/usr/bin/vmm",
//!            "args": ["--incoming", "--socket", "{socket}", "--device", "{device.0.cdev}"]}
//! }
//! ```
//!
//! ```json
//! {
//!   "name": "web", "namespace": "demo",
//!   "vmm": {"kind": "qemu", "socket": "qmp.sock", "devices": ["vf0"]},
//!   "twin": {"program": "/usr/bin/qemu-system-x86_64",
//!            "args": ["-machine", "q35,accel=kvm", "-object", "iommufd,id=iommufd0",
//!            "-device", "vfio-pci,id=vf0,sysfsdev={device.0.sysfs},iommufd=iommufd0",
//!            "-qmp", "unix:{socket},server=on,wait=off", "-S", "-incoming", "defer"]}
//! }
//! ```
//!
//! `vmm.kind` is `contract` (`slackwater.vmm.v1`) or `qemu` (QMP, a monitor for the agent alone).
//! `vmm.devices`, of a QEMU VM, are the ids of its VFIO devices, in the order in which placeholders count
//! them.
//!
//! `vmm.socket` is relative to the directory of `vm.json`. It may also be absolute, and lie elsewhere, in a
//! directory that belongs to the agent's user; a twin's socket always lies in its directory. Placeholders in
//! `twin.args`:
//!
//! | placeholder | value at the destination |
//! |---|---|
//! | `{socket}` | absolute path of the socket on which the twin must serve |
//! | `{device.N.cdev}` | `/dev/vfio/devices/vfioM` of the VM's device N, from 0 |
//! | `{device.N.sysfs}` | its folder in sysfs, `/sys/bus/pci/devices/...` or `/sys/bus/mdev/devices/...` |
//! | `{device.N.name}` | its PCI address or UUID |
//! | `{device.N.fd}` | number of a descriptor of its `cdev`, which the twin gets open |
//! | `{iommu.fd}` | number of a descriptor of `/dev/iommu`, likewise |
//! | `{{` and `}}` | `{` and `}` |
//!
//! A source hands its `vm.json` to a destination, so the file is input from another machine: it is limited in
//! size, unknown fields are refused, and only programs that the destination's administrator has allowed are
//! started, without a shell.

use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};
use slackwater_handover::policy::Driver;
use strum::IntoStaticStr;

use super::placeholders::pieces;
use crate::process::folder::relative;

/// The largest `vm.json`, in bytes.
pub const VM_JSON_LIMIT_BYTES: usize = 64 << 10;

/// The longest path of a Unix socket, in bytes: `sun_path` less its NUL (unix(7)).
const SOCKET_PATH_LIMIT_BYTES: usize = 107;

/// What the socket of a QEMU VM's stream has after the name of its monitor.
pub(crate) const STREAM_SUFFIX: &str = ".migrate";

/// The content of a `vm.json`, checked.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmJson {
    /// DNS label.
    pub name: String,
    /// DNS label.
    pub namespace: String,
    /// The VMM that runs the VM.
    pub vmm: VmmEntry,
    /// The VMM that takes it over on another node.
    pub twin: TwinEntry,
}

/// The VMM that runs the VM.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmmEntry {
    /// Its protocol.
    pub kind: VmmKind,
    /// Its socket: see [`VmJson::socket_in`].
    pub socket: PathBuf,
    /// QEMU's names (`id=`) of the VM's VFIO devices, in the VM's order; none for another VMM, which names
    /// them itself.
    #[serde(default)]
    pub devices: Vec<String>,
}

/// The protocol of a VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, IntoStaticStr)]
#[serde(rename_all = "lowercase")]
#[strum(serialize_all = "lowercase")]
pub enum VmmKind {
    /// `slackwater.vmm.v1`.
    Contract,
    /// QEMU's machine protocol.
    Qemu,
}

impl VmmKind {
    /// The driver of its VMs' devices.
    pub fn driver(self) -> Driver {
        match self {
            Self::Contract => Driver::Agent,
            Self::Qemu => Driver::Vmm,
        }
    }

    /// As in `vm.json`.
    pub fn as_str(self) -> &'static str {
        self.into()
    }
}

/// How a twin is started.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TwinEntry {
    /// Absolute path.
    pub program: PathBuf,
    /// Its arguments, with placeholders: see [`twin_arguments`](super::placeholders::twin_arguments).
    pub args: Vec<String>,
}

/// Why a `vm.json` cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum VmJsonError {
    /// Longer than [`VM_JSON_LIMIT_BYTES`].
    #[error("vm.json has {bytes} bytes or more: at most {VM_JSON_LIMIT_BYTES} are read")]
    TooLarge {
        /// Its length, as far as it was read.
        bytes: usize,
    },
    /// No JSON, or not of this shape.
    #[error("vm.json: {}{reason}", at(field))]
    Shape {
        /// The field, as in `vmm.kind`; empty at the top.
        field: String,
        /// What is wrong and what would be right.
        reason: String,
    },
    /// A field with an invalid value.
    #[error("vm.json: field `{field}`: `{value}` {right}")]
    Value {
        /// The field.
        field: String,
        /// Its value.
        value: String,
        /// What is right.
        right: String,
    },
    /// An unknown placeholder.
    #[error(
        "vm.json: field `{field}`: `{placeholder}` is no placeholder: {{socket}}, {{iommu.fd}}, {{device.N.cdev}}, \
         {{device.N.fd}}, \
             {{device.N.name}} and {{device.N.sysfs}} are, and a brace itself is written twice"
    )]
    Placeholder {
        /// The argument.
        field: String,
        /// The placeholder.
        placeholder: String,
    },
    /// A device that the VM does not have.
    #[error(
        "vm.json: field `{field}`: `{placeholder}` names a device that the VM does not have: it has {devices}, \
         counted from 0"
    )]
    NoSuchDevice {
        /// The argument.
        field: String,
        /// The placeholder.
        placeholder: String,
        /// How many the VM has.
        devices: usize,
    },
    /// The administrator of this node has not allowed it.
    #[error(
        "vm.json: field `twin.program`: {program} may not be started on this node: {}",
        allowed(programs)
    )]
    NotAllowed {
        /// The program.
        program: String,
        /// The programs that may be started.
        programs: Vec<String>,
    },
}

fn at(field: &str) -> String {
    if field.is_empty() { String::new() } else { format!("field `{field}`: ") }
}

fn allowed(programs: &[String]) -> String {
    if programs.is_empty() {
        "the agent was started without --twin-program".to_owned()
    } else {
        format!("--twin-program allows {}", programs.join(", "))
    }
}

/// Whether `text` is a DNS label (RFC 1123): what Kubernetes accepts as the name of a namespace.
pub fn is_dns_label(text: &str) -> bool {
    let alphanumeric = |byte: Option<u8>| byte.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    text.len() <= 63
        && alphanumeric(text.bytes().next())
        && alphanumeric(text.bytes().next_back())
        && text.bytes().all(|b| b == b'-' || alphanumeric(Some(b)))
}

/// Reads and checks a `vm.json`.
///
/// # Errors
/// [`VmJsonError`], which names the field, its value, and what is right.
pub fn parse(text: &str) -> Result<VmJson, VmJsonError> {
    if text.len() > VM_JSON_LIMIT_BYTES {
        return Err(VmJsonError::TooLarge { bytes: text.len() });
    }
    let mut json = serde_json::Deserializer::from_str(text);
    let vm: VmJson = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let path = error.path().to_string();
        let field = if path == "." { String::new() } else { path };
        VmJsonError::Shape { field, reason: error.into_inner().to_string() }
    })?;
    json.end().map_err(|error| VmJsonError::Shape { field: String::new(), reason: error.to_string() })?;
    vm.check()?;
    Ok(vm)
}

impl VmJson {
    fn check(&self) -> Result<(), VmJsonError> {
        for (field, text) in [("name", &self.name), ("namespace", &self.namespace)] {
            if !is_dns_label(text) {
                let right = "must be a DNS label: 1 to 63 characters of a-z, 0-9 and `-`, with a letter or digit \
                    at both ends";
                return Err(value(field, text, right));
            }
        }
        let (socket, program) = (&self.vmm.socket, &self.twin.program);
        if !is_plain(socket) {
            return Err(value("vmm.socket", &socket.display(), "must be a path without `.`, `..` and NUL"));
        }
        if !program.is_absolute() || !is_plain(program) {
            let right = "must be an absolute path without `.`, `..` and NUL";
            return Err(value("twin.program", &program.display(), right));
        }
        for (index, argument) in self.twin.args.iter().enumerate() {
            let field = argument_field(index);
            if argument.contains('\0') {
                return Err(value(&field, &argument.escape_debug(), "must not contain NUL"));
            }
            pieces(&field, argument)?;
        }
        match self.vmm.kind {
            VmmKind::Contract if self.vmm.devices.is_empty() => Ok(()),
            VmmKind::Contract => {
                let right =
                    "belongs to a VMM of kind qemu: one that serves the contract names its devices itself";
                Err(value("vmm.devices", &self.vmm.devices.join(", "), right))
            }
            VmmKind::Qemu => self.check_qemu(),
        }
    }

    /// A QEMU twin must wait for its state, and after that for the hand-over.
    fn check_qemu(&self) -> Result<(), VmJsonError> {
        if self.vmm.devices.is_empty() {
            let right = "must name the ids of the VM's vfio-pci devices (`-device vfio-pci,id=...`)";
            return Err(value("vmm.devices", &"[]", right));
        }
        for (index, id) in self.vmm.devices.iter().enumerate() {
            let field = format!("vmm.devices[{index}]");
            // QEMU accepts as an id: a letter, then letters, digits, `-`, `.` and `_` (id_wellformed() of
            // util/id.c).
            let mut bytes = id.bytes();
            let plain = bytes.next().is_some_and(|byte| byte.is_ascii_alphabetic())
                && bytes.all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte));
            if !plain {
                return Err(value(
                    &field,
                    id,
                    "must be a QEMU id: a letter, then letters, digits, `-`, `.` and `_`",
                ));
            }
            if self.vmm.devices.iter().take(index).any(|other| other == id) {
                return Err(value(&field, id, "is named twice"));
            }
        }
        let args = &self.twin.args;
        let has_pair = |first: &str, second: &str| {
            args.windows(2).any(|pair| matches!(pair, [a, b] if a == first && b == second))
        };
        let needed: [(bool, &str); 3] = [
            (
                args.iter().any(|argument| argument == "-S"),
                "`-S`: the twin must not run before the hand-over lets it",
            ),
            (
                has_pair("-incoming", "defer"),
                "`-incoming` `defer`: the agent says when, and from where, its state comes",
            ),
            (
                args.iter().any(|argument| argument.contains("{socket}")),
                "`-qmp` `unix:{socket},server=on,wait=off`: without a monitor the agent cannot reach the twin",
            ),
        ];
        match needed.iter().find(|(there, _)| !there) {
            Some((_, right)) => Err(value("twin.args", &args.join(" "), format!("must have {right}"))),
            None => Ok(()),
        }
    }

    /// The name of the VM's directory under `vms/`: namespace and name are labels, so the dot is unambiguous.
    pub fn directory_name(&self) -> String {
        format!("{}.{}", self.namespace, self.name)
    }

    /// The socket of the VMM of this VM if its `vm.json` is in `directory`, which is absolute.
    ///
    /// # Errors
    /// [`VmJsonError::Value`] if the path is longer than the kernel accepts.
    pub fn socket_in(&self, directory: &Path) -> Result<PathBuf, VmJsonError> {
        let socket = directory.join(&self.vmm.socket);
        let more = if self.vmm.kind == VmmKind::Qemu { STREAM_SUFFIX.len() } else { 0 };
        let (bytes, most) = (socket.as_os_str().len(), SOCKET_PATH_LIMIT_BYTES - more);
        if bytes > most {
            let why = if more == 0 { "" } else { ", less what the migration's own socket beside it needs" };
            let right = format!(
                "becomes {}, {bytes} bytes: a socket's path has at most {most}{why}",
                socket.display()
            );
            return Err(value("vmm.socket", &self.vmm.socket.display(), right));
        }
        Ok(socket)
    }

    /// The socket of the twin of this VM: as [`VmJson::socket_in`], but only in `directory`. It is made and
    /// unlinked there, so another machine must not name another place.
    ///
    /// # Errors
    /// [`VmJsonError::Value`].
    pub fn twin_socket_in(&self, directory: &Path) -> Result<PathBuf, VmJsonError> {
        let socket = self.socket_in(directory)?;
        match relative(directory, &socket) {
            Some(_) => Ok(socket),
            None => Err(self.socket_elsewhere(directory)),
        }
    }

    /// The socket is outside of the VM's directory, and may not be.
    pub(super) fn socket_elsewhere(&self, directory: &Path) -> VmJsonError {
        let right = format!("must lie in the VM's folder, {}: a name alone is right", directory.display());
        value("vmm.socket", &self.vmm.socket.display(), right)
    }

    /// Checks that the administrator of this node allows the program to be started as a twin.
    ///
    /// # Errors
    /// [`VmJsonError::NotAllowed`].
    pub fn require_allowed(&self, programs: &[PathBuf]) -> Result<(), VmJsonError> {
        if programs.contains(&self.twin.program) {
            return Ok(());
        }
        Err(VmJsonError::NotAllowed {
            program: self.twin.program.display().to_string(),
            programs: programs.iter().map(|program| program.display().to_string()).collect(),
        })
    }
}

pub(super) fn argument_field(index: usize) -> String {
    format!("twin.args[{index}]")
}

pub(super) fn value(field: &str, value: &dyn ToString, right: impl Into<String>) -> VmJsonError {
    VmJsonError::Value { field: field.to_owned(), value: value.to_string(), right: right.into() }
}

/// Whether a path is unambiguous: not empty, and without `.`, `..`, doubled slashes or NUL.
fn is_plain(path: &Path) -> bool {
    let mut plain = PathBuf::new();
    for component in path.components() {
        match component {
            Component::RootDir | Component::Normal(_) => plain.push(component),
            Component::CurDir | Component::ParentDir | Component::Prefix(_) => return false,
        }
    }
    path.file_name().is_some()
        && plain.as_os_str() == path.as_os_str()
        && !path.as_os_str().as_encoded_bytes().contains(&0)
}

#[cfg(test)]
#[path = "vm_tests.rs"]
mod tests;
