//! What a twin's arguments ask for that it cannot have in its sandbox, said before it is started. Pure.
//!
//! This is for the person who wrote the arguments. It is not what confines the twin: the sandbox is, whatever
//! gets past this.

use std::path::{Component, Path, PathBuf};

use super::{Finding, Kind};
use crate::process::sandbox::Sandbox;

/// The agent's own arguments to every QEMU: its own filter, besides the sandbox's.
pub const QEMU_SANDBOX: [&str; 2] =
    ["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"];

/// Options that a twin may not have, and why.
const REFUSED_OPTIONS: [(&str, &str); 8] = [
    ("sandbox", "the agent adds it itself"),
    ("daemonize", "the agent follows the process that it has started"),
    ("runas", "the twin has a user of its own already"),
    ("chroot", "the twin has a root directory of its own already"),
    ("add-fd", "the twin has no other descriptors than {device.N.fd} and {iommu.fd}"),
    ("plugin", "it loads code into QEMU"),
    ("s", "it listens on TCP for a debugger: a guest's state is not for others"),
    ("tpmdev", "the twin has no TPM of this node and can start no emulator"),
];
/// Options whose value is a character device by its old name, or by `chardev:`.
const CHARACTER_OPTIONS: [&str; 8] =
    ["serial", "parallel", "monitor", "qmp", "qmp-pretty", "gdb", "debugcon", "virtioconsole"];
/// Drivers of block devices that need a network.
const NETWORK_DRIVERS: [&str; 11] =
    ["nbd", "http", "https", "ftp", "ftps", "ssh", "iscsi", "rbd", "nfs", "gluster", "sheepdog"];
/// Devices of QEMU that need a device of the node which a twin does not have.
const NODES_DEVICES: [&str; 9] = [
    "usb-host",
    "scsi-block",
    "scsi-generic",
    "vhost-vsock-pci",
    "vhost-vsock-device",
    "vhost-scsi-pci",
    "vhost-scsi",
    "virtio-input-host-pci",
    "vfio-ccw",
];

/// The options of QEMU, by their names without dashes, with the numbers of their values.
fn options(arguments: &[String]) -> impl Iterator<Item = (usize, &str, &str)> {
    arguments.iter().enumerate().filter_map(move |(index, argument)| {
        let name = argument.strip_prefix("--").or_else(|| argument.strip_prefix('-'))?;
        let value = arguments.get(index + 1).map(String::as_str).unwrap_or_default();
        Some((index, name, value))
    })
}

/// What of these arguments, before [`QEMU_SANDBOX`], cannot work in this sandbox. `devices` are the names of
/// the VM's VFIO devices here.
pub fn findings(arguments: &[String], sandbox: &Sandbox, devices: &[String]) -> Vec<Finding> {
    let look = Look { sandbox, devices };
    let mut found = Vec::new();
    for (index, name, value) in options(arguments) {
        let (at, why) = match REFUSED_OPTIONS.iter().find(|(refused, _)| *refused == name) {
            Some((_, why)) => (index, Some((*why).to_owned())),
            None => (index + 1, look.at(name, value)),
        };
        let Some(why) = why else { continue };
        let given = if at == index { format!("-{name}") } else { format!("-{name} {value}") };
        let message = format!("twin.args[{at}]: `{given}` cannot work in the twin's sandbox: {why}");
        found.push(Finding::new(Kind::ArgumentRefused, message));
    }
    found
}

struct Look<'a> {
    sandbox: &'a Sandbox,
    devices: &'a [String],
}

/// The values of `key` in `key=value,...`.
fn values<'a>(text: &'a str, key: &'a str) -> impl Iterator<Item = &'a str> {
    text.split(',')
        .filter_map(move |part| part.split_once('=').filter(|(found, _)| *found == key))
        .map(|pair| pair.1)
}

fn has_value(text: &str, key: &str) -> bool {
    values(text, key).next().is_some()
}

/// What comes before the first comma: a kind, perhaps as `key=kind`.
fn kind_of<'a>(text: &'a str, key: &str) -> &'a str {
    let first = text.split(',').next().unwrap_or_default();
    first.strip_prefix(key).and_then(|rest| rest.strip_prefix('=')).unwrap_or(first)
}

impl Look<'_> {
    /// Why the option cannot work, if so.
    fn at(&self, name: &str, value: &str) -> Option<String> {
        match name {
            "incoming" if value != "defer" => {
                Some("only `defer` is right: the agent says where its state comes from".to_owned())
            }
            "netdev" | "nic" | "net" => self.network(value),
            "chardev" => self.character(kind_of(value, "backend"), value),
            name if CHARACTER_OPTIONS.contains(&name) => self.old_character(value),
            "vnc" | "spice" if !value.starts_with("unix:") && value != "none" => self.needs_network(),
            "pidfile" | "D" => self.written(value),
            "drive" | "blockdev" => self.block(value),
            "device" => self.device(value),
            "object" if kind_of(value, "qom-type") == "input-linux" => Some(not_a_device("/dev/input")),
            "run-with" if has_value(value, "chroot") || has_value(value, "user") => {
                Some("the twin has a root directory and a user of its own already".to_owned())
            }
            _ => None,
        }
    }

    fn needs_network(&self) -> Option<String> {
        let why = "the twin has no network: --twin-network host would give twins of this node its own";
        (!self.sandbox.host_network).then(|| why.to_owned())
    }

    fn network(&self, value: &str) -> Option<String> {
        if values(value, "vhost").any(|vhost| vhost == "on") {
            return Some(not_a_device("/dev/vhost-net"));
        }
        match kind_of(value, "type") {
            "user" if value.contains("-cmd:") || has_value(value, "smb") => {
                Some("the twin starts no other program".to_owned())
            }
            "passt" => Some("the twin starts no other program".to_owned()),
            "tap" | "bridge" => Some(not_a_device("/dev/net/tun")),
            "vhost-vdpa" => Some(not_a_device("/dev/vhost-vdpa-*")),
            "af-xdp" | "netmap" | "l2tpv3" => Some("it needs rights over the node's network".to_owned()),
            "stream" | "dgram" if value.contains("addr.type=unix") || value.contains("local.type=unix") => {
                None
            }
            "user" | "socket" | "stream" | "dgram" => self.needs_network(),
            _ => None,
        }
    }

    fn character(&self, kind: &str, value: &str) -> Option<String> {
        match kind {
            "socket" if has_value(value, "path") => values(value, "path").find_map(|path| self.written(path)),
            "socket" | "udp" => self.needs_network(),
            "file" => values(value, "path").find_map(|path| self.written(path)),
            "pty" => Some(not_a_device("/dev/ptmx")),
            "pipe" => values(value, "path").find_map(|path| self.written(path)),
            "serial" | "tty" | "parallel" | "parport" => Some(not_a_device("a serial or parallel port")),
            _ => None,
        }
    }

    /// `tcp:host:port` and so on, or the name of a character device.
    fn old_character(&self, value: &str) -> Option<String> {
        let (kind, rest) = value.split_once(':').unwrap_or((value, ""));
        let path = rest.split(',').next().unwrap_or_default();
        match kind {
            "tcp" | "udp" | "telnet" | "tn3270" | "websocket" => self.needs_network(),
            "unix" | "file" | "pipe" => self.written(path),
            "pty" => Some(not_a_device("/dev/ptmx")),
            _ if value.starts_with("/dev/") => Some(not_a_device(value)),
            _ => None,
        }
    }

    fn block(&self, value: &str) -> Option<String> {
        if value.contains("io_uring") {
            return Some("io_uring is not for twins: `aio=threads` or `aio=native` is right".to_owned());
        }
        let compact: String = value.chars().filter(|c| !c.is_whitespace() && *c != '"').collect();
        let by_network = NETWORK_DRIVERS.iter().any(|driver| {
            ["driver=", "driver:", "file=", "filename=", "filename:"].iter().any(|key| {
                let after = compact.split(key).skip(1);
                let ends = |rest: &str| rest.is_empty() || rest.starts_with([',', '}', ':', '+']);
                after.filter_map(|rest| rest.strip_prefix(driver)).any(ends)
            })
        });
        let local = compact.contains("+unix") || compact.contains(".path=") || compact.contains("type:unix");
        if by_network && !local { self.needs_network() } else { None }
    }

    fn device(&self, value: &str) -> Option<String> {
        let kind = kind_of(value, "driver");
        if NODES_DEVICES.contains(&kind) {
            return Some(not_a_device("what it takes"));
        }
        if !kind.starts_with("vfio-") {
            return None;
        }
        let of_path = |path: &str| path.rsplit('/').next().unwrap_or_default().to_owned();
        let named = values(value, "host").map(str::to_owned).chain(values(value, "sysfsdev").map(of_path));
        // A PCI address may be written without its domain.
        let reserved = |name: &String| {
            self.devices.iter().any(|device| device == name || device.strip_prefix("0000:") == Some(name))
        };
        let other = named.into_iter().find(|name| !reserved(name))?;
        Some(format!("device {other} is not reserved for it, and is not there: {{device.N.sysfs}} is right"))
    }

    /// A file or a socket that QEMU makes.
    fn written(&self, path: &str) -> Option<String> {
        let path = self.sandbox.directory.join(path);
        let plain = !path.components().any(|part| matches!(part, Component::ParentDir));
        let folders = self.sandbox.shown.iter().filter(|shown| shown.writable).map(|shown| &shown.path);
        let within = |folder: &PathBuf| path.starts_with(folder);
        if plain && folders.chain([&self.sandbox.directory]).any(within) {
            return None;
        }
        Some(format!(
            "{} is in no folder that it may write to: --twin-path would show one, and {} is its own",
            path.display(),
            self.sandbox.directory.display()
        ))
    }
}

fn not_a_device(what: &str) -> String {
    format!("the twin has its own VFIO devices and /dev/kvm, and not {what}")
}

/// A file that the twin's user does not reach in its sandbox.
pub fn unreachable(index: usize, path: &Path, sandbox: &Sandbox, is_shown: bool) -> Finding {
    let why = if path.starts_with("/dev") && !is_shown {
        not_a_device("this")
    } else if is_shown {
        format!("user {} may not read it: it is for the administrator to say who may", sandbox.user)
    } else {
        "it is not shown to twins: --twin-path DIR, or --twin-path DIR:ro, does that".to_owned()
    };
    let message = format!("twin.args[{index}] names {}, which the twin cannot use: {why}", path.display());
    Finding::new(Kind::FileMissing, message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::sandbox::Shown;

    fn sandbox(host_network: bool) -> Sandbox {
        Sandbox {
            user: 7,
            directory: "/run/slackwater/vms/demo.web".into(),
            shown: vec![Shown { path: "/srv/disks".into(), writable: true }, Shown::read_only("/usr")],
            links: Vec::new(),
            devices: Vec::new(),
            host_network,
            locked_memory_bytes: 0,
        }
    }

    fn told(arguments: &[&str], host_network: bool) -> Vec<String> {
        let arguments: Vec<String> = arguments.iter().map(|argument| (*argument).to_owned()).collect();
        let devices = ["0000:3b:00.2".to_owned(), "5a1ac0de-1".to_owned()];
        findings(&arguments, &sandbox(host_network), &devices)
            .into_iter()
            .map(|found| found.message)
            .collect()
    }

    #[test]
    fn what_cannot_work_in_the_sandbox_is_refused_by_name() {
        for (arguments, with_network, why) in [
            (
                &["-netdev", "user,id=n,guestfwd=tcp:10.0.2.100:1-cmd:/bin/sh"][..],
                true,
                "starts no other program",
            ),
            (&["-netdev", "user,id=n,smb=/etc"], true, "starts no other program"),
            (&["-netdev", "user,id=n"], false, "has no network"),
            (&["-nic", "user"], false, "has no network"),
            (&["-netdev", "type=user,id=n"], false, "has no network"),
            (&["-netdev", "tap,id=n"], true, "not /dev/net/tun"),
            (&["-netdev", "tap,id=n,vhost=on"], true, "not /dev/vhost-net"),
            (&["-netdev", "bridge,id=n"], true, "not /dev/net/tun"),
            (&["-netdev", "socket,id=n,connect=10.0.0.1:1"], false, "has no network"),
            (&["-netdev", "passt,id=n"], true, "starts no other program"),
            (&["-chardev", "socket,id=c,host=0.0.0.0,port=4444,server=on"], false, "has no network"),
            (&["-chardev", "udp,id=c,port=1"], false, "has no network"),
            (&["-chardev", "socket,id=c,path=/run/slackwater/vms/demo.other/qmp.sock"], true, "in no folder"),
            (&["-chardev", "file,id=c,path=/etc/cron.d/x"], true, "in no folder"),
            (&["-chardev", "file,id=c,path=../demo.other/vm.json"], true, "in no folder"),
            (&["-chardev", "pty,id=c"], true, "not /dev/ptmx"),
            (&["-monitor", "tcp:0.0.0.0:4444,server=on"], false, "has no network"),
            (&["-qmp", "tcp::4444,server=on,wait=off"], false, "has no network"),
            (&["-qmp", "unix:/run/x.sock,server=on"], true, "in no folder"),
            (&["-serial", "telnet::1,server"], false, "has no network"),
            (&["-serial", "/dev/ttyS0"], true, "not /dev/ttyS0"),
            (&["-gdb", "tcp::1234"], false, "has no network"),
            (&["-s"], true, "listens on TCP"),
            (&["-vnc", ":1"], false, "has no network"),
            (&["-incoming", "exec:sh"], true, "only `defer` is right"),
            (&["--daemonize"], true, "follows the process"),
            (&["-runas", "root"], true, "user of its own"),
            (&["-run-with", "user=root"], true, "user of its own"),
            (&["-chroot", "/"], true, "root directory of its own"),
            (&["-sandbox", "off"], true, "adds it itself"),
            (&["-pidfile", "/run/x.pid"], true, "in no folder"),
            (&["-D", "/var/log/x"], true, "in no folder"),
            (&["-add-fd", "fd=3,set=1"], true, "no other descriptors"),
            (&["-plugin", "/tmp/x.so"], true, "loads code"),
            (&["-device", "vfio-pci,host=0000:3b:00.3"], true, "device 0000:3b:00.3 is not reserved"),
            (&["-device", "vfio-pci,sysfsdev=/sys/bus/mdev/devices/5a1ac0de-2"], true, "is not reserved"),
            (&["-device", "usb-host,hostbus=1"], true, "has its own VFIO devices"),
            (&["-drive", "file=nbd://10.0.0.1/x"], false, "has no network"),
            (&["-drive", "if=none,driver=raw,file.driver=nbd,file.host=10.0.0.1"], false, "has no network"),
            (&["-blockdev", r#"{"driver": "https", "url": "https://x"}"#], false, "has no network"),
            (&["-drive", "file=/srv/disks/a,aio=io_uring"], true, "io_uring is not for twins"),
        ] {
            let found = told(arguments, with_network);
            assert_eq!(found.len(), 1, "{arguments:?}: {found:?}");
            assert!(found[0].starts_with("twin.args["), "{found:?}");
            assert!(found[0].contains(why), "{arguments:?}: {found:?}");
            assert_eq!(told(&[&["-S"], arguments].concat(), with_network).len(), 1);
        }
    }

    #[test]
    fn what_works_there_is_not_refused() {
        let socket = "unix:/run/slackwater/vms/demo.web/qmp.sock,server=on,wait=off";
        for arguments in [
            &["-machine", "q35,accel=kvm", "-S", "-incoming", "defer", "-qmp", socket][..],
            &["-device", "vfio-pci,id=v,host=3b:00.2", "-device", "vfio-pci,host=0000:3b:00.2"],
            &["-device", "vfio-pci,id=v,sysfsdev=/sys/bus/mdev/devices/5a1ac0de-1,iommufd=i"],
            &["-device", "vfio-pci,fd=65,sysfsdev=/sys/bus/mdev/devices/5a1ac0de-1"],
            &[
                "-chardev",
                "file,id=c,path=/srv/disks/log,append=on",
                "-chardev",
                "socket,id=m,path=mon.sock,server=on",
            ],
            &[
                "-serial",
                "none",
                "-monitor",
                "none",
                "-serial",
                "null",
                "-serial",
                "chardev:c",
                "-vnc",
                "none",
            ],
            &[
                "-drive",
                "file=/srv/disks/nbd.raw,format=raw",
                "-drive",
                "file=nbd+unix:///x?socket=/srv/disks/s",
            ],
            &["-netdev", "stream,id=n,addr.type=unix,addr.path=/srv/disks/s", "-pidfile", "qemu.pid"],
            &["-blockdev", r#"{"driver":"qcow2","file":{"driver":"file","filename":"/srv/disks/https"}}"#],
        ] {
            assert_eq!(told(arguments, false), Vec::<String>::new());
        }
        assert_eq!(
            told(&["-netdev", "user,id=n", "-monitor", "tcp::1,server=on"], true),
            Vec::<String>::new()
        );
    }
}
