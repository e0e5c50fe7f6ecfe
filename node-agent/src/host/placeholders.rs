//! The placeholders in the arguments of a twin, and their values at the destination: [`vm`](super::vm) lists
//! them. Pure.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::devices::Device;
use super::vm::{VmJson, VmJsonError, argument_field, value};
use crate::process::exec::Descriptor;

/// The first descriptor that a twin gets: that of [`IOMMU`]; those of the devices follow, in the VM's order.
const FIRST_DESCRIPTOR: i32 = 64;
/// The device of iommufd.
const IOMMU: &str = "/dev/iommu";

/// The arguments and descriptors of a twin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TwinCommand {
    /// With all placeholders filled in.
    pub arguments: Vec<String>,
    /// The files that it gets open: in the order of the numbers, each once.
    pub descriptors: Vec<Descriptor>,
}

/// The twin's arguments, with the placeholders filled in: `devices` are the destination's, in the VM's order.
///
/// # Errors
/// [`VmJsonError::NoSuchDevice`] for a device that is not among them; [`VmJsonError::Value`] for a socket's
/// path that is not UTF-8.
pub fn twin_arguments(vm: &VmJson, socket: &Path, devices: &[Device]) -> Result<TwinCommand, VmJsonError> {
    let text = |path: &Path| path.to_str().map(str::to_owned);
    let mut arguments = Vec::with_capacity(vm.twin.args.len());
    let mut open = BTreeMap::new();
    for (index, argument) in vm.twin.args.iter().enumerate() {
        let field = argument_field(index);
        let mut filled = String::with_capacity(argument.len());
        for piece in pieces(&field, argument)? {
            let (number, placeholder) = match piece {
                Piece::Text(text) => {
                    filled.push_str(text);
                    continue;
                }
                Piece::Socket => {
                    let socket = text(socket);
                    filled.push_str(&socket.ok_or_else(|| value(&field, &"{socket}", "must be UTF-8"))?);
                    continue;
                }
                Piece::IommuFd => {
                    open.insert(FIRST_DESCRIPTOR, PathBuf::from(IOMMU));
                    filled.push_str(&FIRST_DESCRIPTOR.to_string());
                    continue;
                }
                Piece::Cdev(number, placeholder)
                | Piece::Fd(number, placeholder)
                | Piece::Sysfs(number, placeholder)
                | Piece::Name(number, placeholder) => (number, placeholder),
            };
            let device = devices.get(number).ok_or_else(|| VmJsonError::NoSuchDevice {
                field: field.clone(),
                placeholder: placeholder.to_owned(),
                devices: devices.len(),
            })?;
            match piece {
                Piece::Cdev(..) => filled.push_str(&device.cdev.display().to_string()),
                Piece::Sysfs(..) => filled.push_str(&device.sysfs.display().to_string()),
                Piece::Fd(..) => {
                    let descriptor = descriptor_of(number);
                    open.insert(descriptor, device.cdev.clone());
                    filled.push_str(&descriptor.to_string());
                }
                _ => filled.push_str(&device.name),
            }
        }
        arguments.push(filled);
    }
    let descriptors = open.into_iter().map(|(number, path)| Descriptor { number, path }).collect();
    Ok(TwinCommand { arguments, descriptors })
}

/// The descriptor of the VM's device N.
fn descriptor_of(device: usize) -> i32 {
    i32::try_from(device).map_or(i32::MAX, |device| FIRST_DESCRIPTOR.saturating_add(1).saturating_add(device))
}

/// A piece of an argument. The placeholders of devices keep their text for errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Piece<'a> {
    Text(&'a str),
    Socket,
    IommuFd,
    Cdev(usize, &'a str),
    Fd(usize, &'a str),
    Sysfs(usize, &'a str),
    Name(usize, &'a str),
}

/// Cuts an argument into text and placeholders.
pub(super) fn pieces<'a>(field: &str, argument: &'a str) -> Result<Vec<Piece<'a>>, VmJsonError> {
    let unknown =
        |text: &str| VmJsonError::Placeholder { field: field.to_owned(), placeholder: text.to_owned() };
    let mut pieces = Vec::new();
    let mut rest = argument;
    while let Some(brace) = rest.find(['{', '}']) {
        let (before, from) = rest.split_at(brace);
        pieces.push(Piece::Text(before));
        if let Some(after) = from.strip_prefix("{{") {
            pieces.push(Piece::Text("{"));
            rest = after;
        } else if let Some(after) = from.strip_prefix("}}") {
            pieces.push(Piece::Text("}"));
            rest = after;
        } else {
            let Some((placeholder, after)) = from.find('}').map(|end| from.split_at(end + 1)) else {
                return Err(unknown(from));
            };
            pieces.push(Piece::parse(placeholder).ok_or_else(|| unknown(placeholder))?);
            rest = after;
        }
    }
    pieces.push(Piece::Text(rest));
    Ok(pieces)
}

impl<'a> Piece<'a> {
    fn parse(placeholder: &'a str) -> Option<Self> {
        let inner = placeholder.strip_prefix('{')?.strip_suffix('}')?;
        match inner {
            "socket" => return Some(Self::Socket),
            "iommu.fd" => return Some(Self::IommuFd),
            _ => {}
        }
        let (number, what) = inner.strip_prefix("device.")?.split_once('.')?;
        // usize's parser alone would also accept `+1`, and `01` for `1`.
        let canonical = |n: &usize| n.to_string() == number;
        let number = number.parse().ok().filter(canonical)?;
        match what {
            "cdev" => Some(Self::Cdev(number, placeholder)),
            "fd" => Some(Self::Fd(number, placeholder)),
            "sysfs" => Some(Self::Sysfs(number, placeholder)),
            "name" => Some(Self::Name(number, placeholder)),
            _ => None,
        }
    }
}
