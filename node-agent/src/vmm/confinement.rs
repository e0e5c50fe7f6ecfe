//! What a twin may reach on this node: what its devices, its program and this node's configuration come to.
//! Its arguments choose nothing, but for the way in which it opens its own devices, and how much memory it
//! may lock.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::host::devices::Device;
use crate::host::vm::VmmKind;
use crate::process::exec::Descriptor;
use crate::process::sandbox::program::shown_for;
use crate::process::sandbox::{Link, Node, Sandbox, Shown};

/// Besides the guest's RAM: what a VMM maps for DMA of its devices' memory and firmware. libvirt uses the
/// same.
const MARGIN_BYTES: u64 = 1 << 30;

/// QEMU's default for `-m`.
const DEFAULT_RAM_BYTES: u64 = 128 << 20;

/// What the administrator lets all twins of this node reach.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Confinement {
    /// Folders and files, without links on their paths.
    pub shown: Vec<Shown>,
    /// Whether they have the node's network.
    pub host_network: bool,
    /// How much a twin may lock whose RAM is not known; None for the node's RAM.
    pub locked_memory_bytes: Option<u64>,
}

/// What is to be confined.
#[derive(Clone, Copy, Debug)]
pub struct Confined<'a> {
    /// The number of its user.
    pub user: u32,
    /// Its folder.
    pub directory: &'a Path,
    /// Absolute.
    pub program: &'a Path,
    /// Its protocol.
    pub kind: VmmKind,
    /// With all placeholders filled in.
    pub arguments: &'a [String],
    /// What it gets open.
    pub descriptors: &'a [Descriptor],
    /// Its VFIO devices.
    pub devices: &'a [Device],
}

/// What could not be looked at.
#[derive(Debug, thiserror::Error)]
#[error("{}: {source}", path.display())]
pub struct ConfineError {
    /// What.
    pub path: PathBuf,
    /// Why.
    source: io::Error,
}

/// Why a folder is not shown to twins.
#[derive(Debug, thiserror::Error)]
#[error("--twin-path {}: {why}", path.display())]
pub struct TwinPathError {
    path: PathBuf,
    why: String,
}

/// A folder or file for [`Confinement::shown`], as it is on the command line: `PATH`, or `PATH:ro`.
///
/// # Errors
/// If it is not absolute or not there, or holds what no twin may see: one of `kept`, above all.
pub fn twin_path(text: &str, kept: &[&Path]) -> Result<Shown, TwinPathError> {
    let (path, writable) = text.strip_suffix(":ro").map_or((text, true), |path| (path, false));
    let failed = |why: String| TwinPathError { path: path.into(), why };
    if !Path::new(path).is_absolute() {
        return Err(failed("it must be an absolute path".to_owned()));
    }
    let real = fs::canonicalize(path).map_err(|error| failed(error.to_string()))?;
    let found = fs::metadata(&real).map_err(|error| failed(error.to_string()))?;
    if !found.is_dir() && !found.is_file() {
        return Err(failed("it must be a folder or a regular file".to_owned()));
    }
    for kept in kept.iter().copied().chain(["/proc", "/sys"].map(Path::new)) {
        if kept.starts_with(&real) || real.starts_with(kept) {
            return Err(failed(format!(
                "twins are not shown {}, or what holds it or lies in it",
                kept.display()
            )));
        }
    }
    Ok(Shown { path: real, writable })
}

impl Confinement {
    /// The sandbox for a twin.
    ///
    /// # Errors
    /// If its program or one of its devices cannot be looked at.
    pub fn sandbox(&self, twin: Confined<'_>) -> Result<Sandbox, ConfineError> {
        let at = |path: &Path| {
            let path = path.to_owned();
            move |source| ConfineError { path, source }
        };
        let (mut shown, mut links) = shown_for(twin.program).map_err(at(twin.program))?;
        shown.extend(self.shown.iter().cloned());
        let mut devices = Vec::new();
        for path in device_paths(&twin) {
            let node = Node::of(&path).map_err(at(&path))?;
            let optional = path == Path::new(KVM);
            match node {
                Some(node) => devices.push(node),
                None if optional => {}
                None => return Err(at(&path)(io::ErrorKind::NotFound.into())),
            }
        }
        for device in twin.devices {
            let real = fs::canonicalize(&device.sysfs).map_err(at(&device.sysfs))?;
            if real != device.sysfs {
                links.push(Link { path: device.sysfs.clone(), target: real.clone() });
            }
            // By its number a VMM that has only opened it finds its name.
            if let Some(Node { major, minor, .. }) = devices.iter().find(|node| node.path == device.cdev)
                && let Some(cdev) = device.cdev.file_name()
            {
                let path = PathBuf::from(format!("/sys/dev/char/{major}:{minor}"));
                links.push(Link { path, target: real.join("vfio-dev").join(cdev) });
            }
            shown.push(Shown::read_only(real));
        }
        shown.sort();
        shown.dedup();
        Ok(Sandbox {
            user: twin.user,
            directory: twin.directory.to_owned(),
            shown,
            links,
            devices,
            host_network: self.host_network,
            locked_memory_bytes: self.locked_memory(twin.kind, twin.arguments),
        })
    }

    fn locked_memory(&self, kind: VmmKind, arguments: &[String]) -> u64 {
        let all = || {
            let info = rustix::system::sysinfo();
            info.totalram.saturating_mul(u64::from(info.mem_unit.max(1)))
        };
        match kind {
            VmmKind::Qemu => ram_bytes(arguments).saturating_add(MARGIN_BYTES),
            VmmKind::Contract => self.locked_memory_bytes.unwrap_or_else(all),
        }
    }
}

const KVM: &str = "/dev/kvm";

/// The device nodes that a twin has: its own devices, by the way that it opens them, and KVM.
fn device_paths(twin: &Confined<'_>) -> Vec<PathBuf> {
    let mut paths = vec![PathBuf::from(KVM)];
    if twin.devices.is_empty() {
        return paths;
    }
    let names = |word: &str| twin.arguments.iter().any(|argument| argument.contains(word));
    let groups: Option<Vec<u32>> = twin.devices.iter().map(|device| device.group).collect();
    let by_cdev = !twin.descriptors.is_empty() || names("iommufd") || names("/dev/vfio/devices/");
    match groups {
        Some(groups) if !by_cdev => {
            paths.push("/dev/vfio/vfio".into());
            paths.extend(groups.iter().map(|group| PathBuf::from(format!("/dev/vfio/{group}"))));
        }
        _ => {
            paths.push("/dev/iommu".into());
            paths.extend(twin.devices.iter().map(|device| device.cdev.clone()));
        }
    }
    let mut seen = BTreeSet::new();
    paths.retain(|path| seen.insert(path.clone()));
    paths
}

/// The RAM that QEMU's arguments give the guest, with what may be plugged in later.
fn ram_bytes(arguments: &[String]) -> u64 {
    let pairs = arguments.windows(2).rev();
    let values = pairs.filter_map(|pair| match pair {
        [option, value] if matches!(option.as_str(), "-m" | "--m") => Some(value),
        _ => None,
    });
    let sizes = values.flat_map(|value| value.split(',')).filter_map(|part| match part.split_once('=') {
        Some(("size" | "maxmem", size)) => size_bytes(size),
        Some(_) => None,
        None => size_bytes(part),
    });
    sizes.max().unwrap_or(DEFAULT_RAM_BYTES)
}

/// A size of `-m`: in MiB if it has no unit (system/vl.c).
fn size_bytes(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let factor: u64 = match text.get(digits.len()..)?.to_ascii_uppercase().as_str() {
        "B" => 1,
        "K" => 1 << 10,
        "" | "M" => 1 << 20,
        "G" => 1 << 30,
        "T" => 1 << 40,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn as_much_memory_is_locked_as_the_guest_has_and_a_margin() {
        let ram = |text: &str| ram_bytes(&words(text));
        assert_eq!(ram("-S"), 128 << 20);
        assert_eq!(ram("-m 32 -S"), 32 << 20);
        assert_eq!(ram("-m 2G"), 2 << 30);
        assert_eq!(ram("-m size=512M,slots=4,maxmem=8g"), 8 << 30);
        assert_eq!(ram("-m many"), 128 << 20);
        let config = Confinement { locked_memory_bytes: Some(7), ..Confinement::default() };
        assert_eq!(config.locked_memory(VmmKind::Qemu, &words("-m 1G")), 2 << 30);
        assert_eq!(config.locked_memory(VmmKind::Contract, &[]), 7);
        assert!(Confinement::default().locked_memory(VmmKind::Contract, &[]) > 64 << 20);
    }

    #[test]
    fn a_twin_has_its_own_device_nodes_by_the_way_that_it_opens_them() {
        let device = |group| Device {
            name: "a".to_owned(),
            sysfs: "/sys/bus/mdev/devices/a".into(),
            cdev: "/dev/vfio/devices/vfio3".into(),
            group,
            driver: "mtty".to_owned(),
            model: "mtty-1".to_owned(),
        };
        let paths = |arguments: &str, group, descriptors: &[Descriptor]| {
            let devices = [device(group)];
            let paths = device_paths(&Confined {
                user: 1,
                directory: Path::new("/d"),
                program: Path::new("/p"),
                kind: VmmKind::Qemu,
                arguments: &words(arguments),
                descriptors,
                devices: &devices,
            });
            paths.into_iter().map(|path| path.display().to_string()).collect::<Vec<_>>()
        };
        let cdev = ["/dev/kvm", "/dev/iommu", "/dev/vfio/devices/vfio3"];
        let group = ["/dev/kvm", "/dev/vfio/vfio", "/dev/vfio/12"];
        assert_eq!(paths("-object iommufd,id=i -device vfio-pci,sysfsdev=/s", Some(12), &[]), cdev);
        assert_eq!(paths("--device /dev/vfio/devices/vfio3", Some(12), &[]), cdev);
        assert_eq!(paths("-device vfio-pci,sysfsdev=/s", Some(12), &[]), group);
        assert_eq!(paths("-device vfio-pci,sysfsdev=/s", None, &[]), cdev);
        let open = [Descriptor { number: 65, path: "/dev/vfio/devices/vfio3".into() }];
        assert_eq!(paths("-device vfio-pci,fd=65", Some(12), &open), cdev);
    }

    #[test]
    fn a_twins_path_is_shown_as_configured_and_never_what_holds_the_agents_own() {
        let dir = tempfile::tempdir().unwrap();
        let (disks, state) = (dir.path().join("disks"), dir.path().join("state"));
        fs::create_dir(&disks).unwrap();
        fs::create_dir_all(state.join("journal")).unwrap();
        let path = |path: &Path, suffix: &str| {
            twin_path(&format!("{}{suffix}", path.display()), &[&state])
                .map_err(|error| error.to_string().replace(&dir.path().display().to_string(), "DIR"))
        };
        assert_eq!(path(&disks, "").unwrap(), Shown { path: disks.clone(), writable: true });
        assert_eq!(path(&disks, ":ro").unwrap(), Shown::read_only(&disks));
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&state, &link).unwrap();
        let refused = |on: &str| {
            format!("--twin-path {on}: twins are not shown DIR/state, or what holds it or lies in it")
        };
        assert_eq!(path(dir.path(), "").unwrap_err(), refused("DIR"));
        assert_eq!(path(&state.join("journal"), ":ro").unwrap_err(), refused("DIR/state/journal"));
        assert_eq!(path(&link, ":ro").unwrap_err(), refused("DIR/link"));
        for bad in ["disks", "/proc/sys", "/sys", "/", "/nowhere", "/dev/null", ""] {
            path(Path::new(bad), "").unwrap_err();
        }
    }
}
