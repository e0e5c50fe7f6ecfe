//! A node as a machine: its QEMU, its console, its network cards.

use std::{
    fs::File,
    io::{BufRead, BufReader, Write},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{ChildStdout, Command, Stdio},
    thread,
    time::Duration,
};

use rustix::process::Signal;
use serde_json::json;
use tokio::{
    net::UnixListener,
    sync::{Mutex, watch},
    time::timeout,
};

use super::config::NodeConfig;
use super::protocol::{CONTROL_PORT, READY_LINE};
use super::qmp::{Qmp, forwarded_ports};
use crate::error::{LabError, last_lines};
use crate::host::children::{self, RunningChild};
use crate::host::switch::mac_of;

/// Where an agent listens inside its node.
pub const AGENT_PORT: u16 = 7443;

/// How long a node may take to come up. It takes 3 to 5 s on an idle machine, and longer on a busy one.
const BOOT_TIMEOUT: Duration = Duration::from_secs(90);

/// The link's MTU: larger frames cost the emulated CPUs much less per byte.
const LINK_MTU: u32 = 9000;

/// Switches off work at boot that the lab does not need: a third of the time on an emulated CPU.
const QUICKER_BOOT: &str = "mitigations=off tsc=reliable rcupdate.rcu_expedited=1 nokaslr lsm=capability \
    audit=0 nmi_watchdog=0 cryptomgr.notests";

/// What all nodes of a lab share.
pub(crate) struct Boot<'a> {
    pub(crate) kernel: &'a Path,
    pub(crate) image: &'a Path,
    pub(crate) folder: &'a Path,
    /// The option of the user network that leads to the shared disk.
    pub(crate) shared_disk: String,
}

/// A running QEMU.
#[derive(Debug)]
pub(crate) struct Machine {
    name: String,
    child: RunningChild,
    qmp: Mutex<Qmp>,
    console: PathBuf,
    ready: watch::Receiver<bool>,
    ports: Vec<(u16, u16)>,
}

impl Machine {
    /// Starts the machine. `link` is the switch's socket.
    pub(crate) async fn start(
        boot: &Boot<'_>,
        config: &NodeConfig,
        number: u8,
        link: &Path,
    ) -> Result<Self, LabError> {
        let name = config.name.clone();
        let monitor = boot.folder.join(format!("{name}.qmp"));
        let listener =
            UnixListener::bind(&monitor).map_err(LabError::io(format!("binding {}", monitor.display())))?;
        let mut child = children::start("qemu-system-x86_64", |command| {
            arguments(command, boot, config, number, link, &monitor);
        })
        .await?;
        let console = boot.folder.join(format!("{name}.console.log"));
        let (came_up, ready) = watch::channel(false);
        if let Some(output) = child.stdout.take() {
            let file =
                File::create(&console).map_err(LabError::io(format!("creating {}", console.display())))?;
            thread::spawn(move || copy_console(output, file, &came_up));
        }
        let mut qmp = tokio::select! {
            qmp = Qmp::accept(&listener) => qmp?,
            _ = child.ended() => return Err(down(&name, "QEMU ended at once", &console)),
        };
        let usernet = qmp.execute("human-monitor-command", json!({"command-line": "info usernet"})).await?;
        let ports = forwarded_ports(usernet.as_str().unwrap_or_default());
        Ok(Self { name, child, qmp: Mutex::new(qmp), console, ready, ports })
    }

    /// Waits until the control service inside answers.
    pub(crate) async fn ready(&self) -> Result<(), LabError> {
        let mut ready = self.ready.clone();
        let came_up = async {
            tokio::select! {
                // Its console closes a moment before QEMU has ended.
                Ok(_) = ready.wait_for(|up| *up) => None,
                status = self.child.ended() => Some(status),
            }
        };
        match timeout(BOOT_TIMEOUT, came_up).await {
            Ok(None) => Ok(()),
            Ok(Some(status)) => {
                let status = status.map_or_else(|| "unknown".to_owned(), |status| status.to_string());
                Err(self.down(&format!("its QEMU ended while it was coming up ({status})")))
            }
            Err(_) => Err(self.down(&format!("it did not come up in {} s", BOOT_TIMEOUT.as_secs()))),
        }
    }

    /// The address on this machine that leads to a port inside.
    pub(crate) fn forwarded(&self, port: u16) -> Result<SocketAddr, LabError> {
        let found = self.ports.iter().find(|(_, theirs)| *theirs == port);
        let (ours, _) = found.ok_or_else(|| self.down(&format!("port {port} is not forwarded")))?;
        Ok(SocketAddr::from(([127, 0, 0, 1], *ours)))
    }

    /// Plugs the cable of the inter-node link, or unplugs it.
    pub(crate) async fn set_link(&self, up: bool) -> Result<(), LabError> {
        self.qmp.lock().await.execute("set_link", json!({"name": "link0", "up": up})).await.map(drop)
    }

    /// Stops the machine like a power failure.
    pub(crate) async fn power_off(&self) {
        self.child.signal(Signal::KILL);
        self.child.ended().await;
    }

    /// The serial console, as a growing file.
    pub(crate) fn console(&self) -> &Path {
        &self.console
    }

    fn down(&self, reason: &str) -> LabError {
        down(&self.name, reason, &self.console)
    }
}

fn down(node: &str, reason: &str, console: &Path) -> LabError {
    LabError::NodeDown { node: node.to_owned(), reason: reason.to_owned(), console: last_lines(console) }
}

fn arguments(
    command: &mut Command,
    boot: &Boot<'_>,
    config: &NodeConfig,
    number: u8,
    link: &Path,
    monitor: &Path,
) {
    let append = format!(
        "console=ttyS0 panic=-1 quiet {QUICKER_BOOT} slackwater.name={} slackwater.number={number} \
         slackwater.mtu={LINK_MTU} slackwater.devices={}",
        config.name,
        config.devices.join(","),
    );
    let cpu: String = std::iter::once("max".to_owned())
        .chain(config.without_cpu_features.iter().map(|feature| format!(",{feature}=off")))
        .collect();
    let forward = |port: u16| format!(",hostfwd=tcp:127.0.0.1:0-:{port}");
    command
        .args(["-name", &config.name])
        // Not microvm: under load one boot in three hangs there in the calibration of the clock. This
        // machine's KVM is not used, since it often cannot nest; an emulated node has a KVM of its own.
        .args([
            "-machine",
            "q35",
            "-accel",
            "tcg,thread=multi",
            "-cpu",
            &cpu,
            "-smp",
            &config.cpus.to_string(),
        ])
        .args(["-m", &config.memory_mib.to_string()])
        .args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-monitor", "none"])
        .args(["-serial", "stdio"])
        .arg("-chardev")
        .arg(format!("socket,id=qmp,path={}", monitor.display()))
        .args(["-mon", "chardev=qmp,mode=control"])
        .arg("-kernel")
        .arg(boot.kernel.join("vmlinuz"))
        .arg("-initrd")
        .arg(boot.image)
        .args(["-append", &append])
        .args(["-device", "virtio-rng-pci"])
        // restrict: programs inside reach this machine and its network only by the forwarded ports.
        .arg("-netdev")
        .arg(format!(
            "user,id=host0,restrict=on{}{}{}",
            forward(CONTROL_PORT),
            forward(AGENT_PORT),
            boot.shared_disk
        ))
        .arg("-device")
        .arg(format!("virtio-net-pci,netdev=host0,mac=52:54:00:76:00:{number:02x},romfile="))
        .arg("-netdev")
        .arg(format!("stream,id=link0,server=off,addr.type=unix,addr.path={}", link.display()))
        .arg("-device")
        .arg(format!("virtio-net-pci,netdev=link0,mac={},host_mtu={LINK_MTU},romfile=", mac_of(number)))
        .stdout(Stdio::piped());
}

/// Copies the console to a file, and notices when the node is up. Ends with QEMU.
fn copy_console(output: ChildStdout, mut file: File, ready: &watch::Sender<bool>) {
    for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
        // A console that cannot be kept must not stop the node.
        let _ = file.write_all(&line).and_then(|()| file.write_all(b"\n"));
        if line.trim_ascii_end().ends_with(READY_LINE.as_bytes()) {
            ready.send_replace(true);
        }
    }
}
