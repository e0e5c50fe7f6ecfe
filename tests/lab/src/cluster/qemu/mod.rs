//! QEMU VMs with the nodes' devices, started in a node and announced to the agent.
//!
//! The argument vector is built in one place, with a placeholder for each device and one for the socket. It
//! serves the VM at the source (`start`), the `twin` of `vm.json`, which the agent fills in at the
//! destination, and a destination by hand (`await_migration`).

mod guest_output;
mod running;

use anyhow::Context;
use serde_json::{Value, json};

use super::NAMESPACE;
use crate::config::LabConfig;
use crate::guests::{counter, linux};
use crate::host::SHARED_DISK_ADDRESS;
use crate::image::Image;
use crate::node::Node;

/// QEMU, in a node.
pub const QEMU_PROGRAM: &str = "/bin/qemu-system-x86_64";

/// The folder in a node for what VMs write besides their state: every twin, each with a user of its own, may
/// write there.
pub(super) const GUEST_OUTPUT: &str = "/run/slackwater-lab";

/// Makes the folder in a node: a command for its shell.
pub(super) fn make_output_folder() -> String {
    format!("mkdir -p {GUEST_OUTPUT} && chmod 777 {GUEST_OUTPUT}")
}

/// How the guest's code is executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accelerator {
    /// The node's KVM, itself emulated.
    Kvm,
    /// QEMU's own emulation.
    Tcg,
}

/// How QEMU opens its devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceAccess {
    /// Each by its character device, all bound to one `/dev/iommu`.
    Iommufd,
    /// The same, but the agent opens them and passes them to the twin. A VM that is started in a node opens
    /// them itself.
    Descriptor,
    /// Each by its VFIO group and the container of them all.
    Group,
}

/// What runs in a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guest {
    /// A boot sector that counts: [`counter`].
    Counter,
    /// A Linux that talks through its serial ports: [`linux`].
    Linux,
}

/// A VM to start.
#[derive(Clone, Debug)]
pub struct QemuVm {
    /// Its name, in the namespace [`NAMESPACE`].
    pub name: String,
    /// How many of the node's devices it gets: the first ones. QEMU calls them `v0`, `v1` and so on.
    pub devices: usize,
    /// What runs in it.
    pub guest: Guest,
    /// How its code is executed.
    pub accelerator: Accelerator,
    /// How it opens its devices.
    pub access: DeviceAccess,
    /// Whether QEMU reports each device's state changes on QMP (`VFIO_MIGRATION`).
    pub migration_events: bool,
    /// Whether it has the lab's shared disk.
    pub shared_disk: bool,
    /// Whether the lab has a monitor of its own: the agent holds the first.
    pub second_monitor: bool,
    /// Further arguments, without braces.
    pub more: Vec<String>,
}

/// What differs between the QEMU processes of one VM.
struct Place {
    /// The property that selects each device: `sysfsdev=`, or `fd=`.
    devices: Vec<String>,
    /// Further properties of iommufd.
    iommufd: &'static str,
    /// The path of its QMP socket.
    socket: String,
}

impl Guest {
    fn arguments(self) -> Vec<String> {
        match self {
            Self::Counter => {
                let drive = format!("if=none,id=boot,format=raw,readonly=on,file={}", counter::DISK);
                split_words(&format!("-m 32 -drive {drive} -device virtio-blk-pci,drive=boot"))
            }
            Self::Linux => {
                let mut list = split_words(&format!(
                    "-m 128 -no-reboot -kernel {} -initrd {}",
                    linux::KERNEL,
                    linux::INITRD
                ));
                list.extend(["-append".to_owned(), linux::COMMAND_LINE.to_owned()]);
                list
            }
        }
    }
}

impl QemuVm {
    /// The VM `counter`, with KVM, by iommufd, without migration events.
    #[must_use]
    pub fn counter(devices: usize) -> Self {
        Self {
            name: "counter".to_owned(),
            devices,
            guest: Guest::Counter,
            accelerator: Accelerator::Kvm,
            access: DeviceAccess::Iommufd,
            migration_events: false,
            shared_disk: false,
            second_monitor: false,
            more: Vec::new(),
        }
    }

    /// The VM `linux`, likewise.
    #[must_use]
    pub fn linux(devices: usize) -> Self {
        Self { name: "linux".to_owned(), guest: Guest::Linux, ..Self::counter(devices) }
    }

    /// The same, emulated by QEMU itself. In an emulated node a Linux would not come up within [`TIMEOUT`].
    #[must_use]
    pub fn emulated(mut self) -> Self {
        self.accelerator = Accelerator::Tcg;
        self
    }

    /// The same, with a twin that gets its devices as open descriptors.
    #[must_use]
    pub fn by_descriptor(mut self) -> Self {
        self.access = DeviceAccess::Descriptor;
        self
    }

    /// The same, with its devices opened by their groups.
    #[must_use]
    pub fn by_group(mut self) -> Self {
        self.access = DeviceAccess::Group;
        self
    }

    /// The same, with migration events.
    #[must_use]
    pub fn with_migration_events(mut self) -> Self {
        self.migration_events = true;
        self
    }

    /// The same, with the lab's shared disk. Only a Linux writes to it.
    #[must_use]
    pub fn with_shared_disk(mut self) -> Self {
        self.shared_disk = true;
        self
    }

    /// The same, with a second monitor for the lab, since the agent holds the first.
    #[must_use]
    pub fn with_second_monitor(mut self) -> Self {
        self.second_monitor = true;
        self
    }

    /// Adds to the nodes' image what the VM needs. The nodes need more memory for it:
    /// [`QemuVm::node_memory_mib`].
    ///
    /// # Errors
    /// When something is not installed, or not built.
    pub fn in_image(&self, image: Image) -> anyhow::Result<Image> {
        let image = image.with_qemu()?;
        Ok(match self.guest {
            Guest::Counter => image.with_generated(counter::DISK, counter::disk()?),
            Guest::Linux => image.with_linux_guest()?,
        })
    }

    /// The memory of a node with room for the VM, and for its twin.
    #[must_use]
    pub fn node_memory_mib(&self) -> u32 {
        match self.guest {
            Guest::Counter => 768,
            Guest::Linux => 1024,
        }
    }

    /// Gives the nodes of a lab what the VM needs: memory, and files in their image.
    ///
    /// # Errors
    /// As [`QemuVm::in_image`].
    pub fn in_nodes(&self, mut config: LabConfig) -> anyhow::Result<LabConfig> {
        for node in &mut config.nodes {
            node.memory_mib = self.node_memory_mib();
        }
        config.image = self.in_image(config.image)?;
        Ok(config)
    }

    /// The folder in which the agent finds the VM.
    #[must_use]
    pub fn directory(&self) -> String {
        format!("/run/slackwater/vms/{NAMESPACE}.{}", self.name)
    }

    /// The QMP socket of the VM that [`QemuVm::start`] started.
    #[must_use]
    pub fn socket(&self) -> String {
        format!("{}/qmp.sock", self.directory())
    }

    /// The QMP socket that the lab uses.
    #[must_use]
    pub fn monitor(&self) -> String {
        if self.second_monitor { format!("{GUEST_OUTPUT}/{}.qmp", self.name) } else { self.socket() }
    }

    /// The file in a node to which its QEMU appends the guest's output.
    #[must_use]
    pub fn debug_file(&self) -> String {
        format!("{GUEST_OUTPUT}/{}.debug", self.name)
    }

    fn device_names(&self) -> Vec<String> {
        (0..self.devices).map(|device| format!("v{device}")).collect()
    }

    /// QEMU's arguments at a place. Everything that a guest can see is the same at all places: otherwise QEMU
    /// refuses to migrate.
    fn arguments(&self, place: &Place) -> Vec<String> {
        let (machine, cpu) = match self.accelerator {
            Accelerator::Kvm => ("pc,accel=kvm", "host"),
            Accelerator::Tcg => ("pc,accel=tcg", "max"),
        };
        let mut list = split_words("-nodefaults -no-user-config -display none");
        list.extend(split_words(&format!("-machine {machine} -cpu {cpu}")));
        // A guest that was stopped must not get all missed ticks at once.
        list.extend(split_words("-global kvm-pit.lost_tick_policy=discard"));
        list.extend(self.guest.arguments());
        list.extend(split_words(&format!("-chardev file,id=dbg,path={},append=on", self.debug_file())));
        list.extend(split_words("-device isa-debugcon,iobase=0xe9,chardev=dbg"));
        if self.shared_disk {
            let (host, port) = SHARED_DISK_ADDRESS;
            let file = format!("file.driver=nbd,file.host={host},file.port={port}");
            list.extend(split_words(&format!("-drive if=none,id=shared,driver=raw,{file},cache.direct=on")));
            list.extend(split_words("-device virtio-blk-pci,drive=shared"));
        }
        list.extend(self.more.iter().cloned());
        if self.access != DeviceAccess::Group {
            list.extend(split_words(&format!("-object iommufd,id=iommufd0{}", place.iommufd)));
        }
        for (name, which) in self.device_names().iter().zip(&place.devices) {
            list.extend(["-device".to_owned(), self.device(name, which)]);
        }
        if self.second_monitor {
            list.extend(split_words(&format!("-qmp unix:{},server=on,wait=off", self.monitor())));
        }
        list.extend(["-qmp".to_owned(), format!("unix:{},server=on,wait=off", place.socket)]);
        list
    }

    fn device(&self, name: &str, which: &str) -> String {
        let events = if self.migration_events { ",migration-events=on" } else { "" };
        let iommufd = match self.access {
            DeviceAccess::Iommufd | DeviceAccess::Descriptor => ",iommufd=iommufd0",
            DeviceAccess::Group => "",
        };
        format!("vfio-pci,id={name},{which}{events}{iommufd}")
    }

    fn place_in(&self, node: &Node) -> anyhow::Result<Place> {
        let devices = node.devices().get(..self.devices);
        let devices = devices.with_context(|| format!("{} has too few devices", node.name()))?;
        let sysfs = |device: &String| format!("sysfsdev=/sys/bus/mdev/devices/{device}");
        Ok(Place { devices: devices.iter().map(sysfs).collect(), iommufd: "", socket: self.socket() })
    }

    /// The same with the agent's placeholders. Nothing else has a brace, which would have to be doubled.
    fn place_of_the_twin(&self) -> Place {
        let open = self.access == DeviceAccess::Descriptor;
        let devices = (0..self.devices).map(|device| {
            let sysfs = format!("sysfsdev={{device.{device}.sysfs}}");
            // A mediated device (a VF is none) needs both properties: otherwise QEMU takes it for a PCI
            // device of the host.
            if open { format!("fd={{device.{device}.fd}},{sysfs}") } else { sysfs }
        });
        let iommufd = if open { ",fd={iommu.fd}" } else { "" };
        Place { devices: devices.collect(), iommufd, socket: "{socket}".to_owned() }
    }

    fn json(&self) -> Value {
        let mut args = self.arguments(&self.place_of_the_twin());
        args.extend(split_words("-S -incoming defer"));
        json!({
            "name": self.name,
            "namespace": NAMESPACE,
            "vmm": {"kind": "qemu", "socket": "qmp.sock", "devices": self.device_names()},
            "twin": {"program": QEMU_PROGRAM, "args": args},
        })
    }

    /// The name of the VM's cgroup and log in the lab's control service.
    fn group(&self) -> String {
        format!("vm-{}", self.name)
    }
}

fn split_words(text: &str) -> Vec<String> {
    text.split(' ').map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device_arguments(vm: &QemuVm) -> Vec<String> {
        let args = vm.arguments(&vm.place_of_the_twin());
        args.into_iter().filter(|arg| arg.starts_with("vfio-pci") || arg.starts_with("iommufd")).collect()
    }

    #[test]
    fn the_twin_has_the_agents_placeholders_for_its_devices_and_its_socket() {
        let json = QemuVm::counter(2).json();
        assert_eq!(json["vmm"], json!({"kind": "qemu", "socket": "qmp.sock", "devices": ["v0", "v1"]}));
        let args: Vec<&str> =
            json["twin"]["args"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
        assert!(args.contains(&"vfio-pci,id=v1,sysfsdev={device.1.sysfs},iommufd=iommufd0"), "{args:?}");
        assert!(
            args.ends_with(&["-qmp", "unix:{socket},server=on,wait=off", "-S", "-incoming", "defer"]),
            "{args:?}"
        );
        let braces = args.iter().map(|arg| arg.matches('{').count()).sum::<usize>();
        assert_eq!(braces, 3, "only the agent's placeholders have braces");
    }

    #[test]
    fn each_variant_differs_in_its_own_arguments_only() {
        let vm = QemuVm::counter(1);
        assert_eq!(
            device_arguments(&vm),
            ["iommufd,id=iommufd0", "vfio-pci,id=v0,sysfsdev={device.0.sysfs},iommufd=iommufd0"]
        );
        let group = vm.clone().by_group().with_migration_events();
        assert_eq!(
            device_arguments(&group),
            ["vfio-pci,id=v0,sysfsdev={device.0.sysfs},migration-events=on"]
        );
        let open = vm.clone().by_descriptor();
        assert_eq!(
            device_arguments(&open),
            [
                "iommufd,id=iommufd0,fd={iommu.fd}",
                "vfio-pci,id=v0,fd={device.0.fd},sysfsdev={device.0.sysfs},iommufd=iommufd0"
            ]
        );
        let (kvm, tcg) = (vm.arguments(&vm.place_of_the_twin()), vm.clone().emulated());
        let differing: Vec<_> =
            tcg.arguments(&tcg.place_of_the_twin()).into_iter().filter(|arg| !kvm.contains(arg)).collect();
        assert_eq!(differing, ["pc,accel=tcg", "max"]);
    }
}
