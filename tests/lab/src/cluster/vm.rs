//! The VM that counts in the reference VMM, started in a node and announced to the agent.

use std::time::Duration;

use anyhow::{Context, ensure};

use super::{NAMESPACE, TIMEOUT};
use crate::node::Node;
use slackwater_reference_vmm::guest::Report;

/// The reference VMM's program, in a node.
pub const VMM_PROGRAM: &str = "/bin/slackwater-reference-vmm";

pub(super) const VMM: &str = "slackwater-reference-vmm";
/// How long the VMM idles in each round of its guest: enough rounds to notice a loss, and few enough for the
/// kernel's trace of an emulated machine.
const PACE: Duration = Duration::from_millis(5);

/// A VM to start.
#[derive(Clone, Debug)]
pub struct LabVm {
    /// Its name, in the namespace [`NAMESPACE`].
    pub name: String,
    /// How many of the node's devices it gets: the first ones.
    pub devices: usize,
    /// For how long it idles in each round.
    pub pace: Duration,
}

impl LabVm {
    /// The VM `counter`.
    #[must_use]
    pub fn counter(devices: usize) -> Self {
        Self { name: "counter".to_owned(), devices, pace: PACE }
    }

    /// The same with this pace. A VM that is watched for minutes must leave room in the kernel's trace.
    #[must_use]
    pub fn paced(mut self, pace: Duration) -> Self {
        self.pace = pace;
        self
    }

    fn pace_arguments(&self) -> [String; 2] {
        ["--pace-us".to_owned(), self.pace.as_micros().to_string()]
    }

    fn directory(&self) -> String {
        format!("/run/slackwater/vms/{NAMESPACE}.{}", self.name)
    }

    fn json(&self) -> serde_json::Value {
        let mut args = vec!["run".to_owned(), "--socket".to_owned(), "{socket}".to_owned()];
        for device in 0..self.devices {
            args.extend(["--device".to_owned(), format!("{{device.{device}.cdev}}")]);
        }
        args.extend(self.pace_arguments());
        args.push("--incoming".to_owned());
        serde_json::json!({
            "name": self.name,
            "namespace": NAMESPACE,
            "vmm": {"kind": "contract", "socket": "vmm.sock"},
            "twin": {"program": VMM_PROGRAM, "args": args},
        })
    }

    /// Starts it in a node, and announces it to the agent when it counts.
    ///
    /// # Errors
    /// When it does not come up.
    pub async fn start(&self, node: &Node) -> anyhow::Result<()> {
        let directory = self.directory();
        let cdevs = "for d in \"$@\"; do ls /sys/bus/mdev/devices/$d/vfio-dev; done";
        let mut list = vec!["sh", "-c", cdevs, "sh"];
        list.extend(node.devices().iter().take(self.devices).map(String::as_str));
        let cdevs = node.exec(&list).await?.success()?;
        node.shell(&format!("mkdir -p {directory}")).await?;
        let socket = format!("{directory}/vmm.sock");
        let mut arguments = vec![VMM_PROGRAM.to_owned(), "run".to_owned(), "--socket".to_owned(), socket];
        for cdev in cdevs.split_whitespace() {
            arguments.extend(["--device".to_owned(), format!("/dev/vfio/devices/{cdev}")]);
        }
        arguments.extend(self.pace_arguments());
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        node.spawn(&format!("vm-{}", self.name), &arguments, &[]).await?;
        self.until_counting(node).await?;
        // Atomically, since the agent watches the directory.
        let text = serde_json::to_vec_pretty(&self.json())?;
        node.put(&format!("{directory}/.vm.json.new"), 0o600, &text).await?;
        node.shell(&format!("mv {directory}/.vm.json.new {directory}/vm.json")).await?;
        Ok(())
    }

    async fn until_counting(&self, node: &Node) -> anyhow::Result<()> {
        let deadline = tokio::time::Instant::now() + TIMEOUT;
        let mut polls = tokio::time::interval(Duration::from_millis(100));
        loop {
            polls.tick().await;
            match guest(node).await {
                Ok(report) if report.count > 0 => return Ok(()),
                _ if tokio::time::Instant::now() < deadline => {}
                Ok(report) => anyhow::bail!("the guest does not count: {report:?}"),
                Err(error) => {
                    let log = format!("/var/log/vm-{}.log", self.name);
                    let log = node.get_text(&log).await.unwrap_or_default();
                    return Err(error.context(format!("the VM does not come up; it said\n{log}")));
                }
            }
        }
    }
}

/// The report of the guest of the only VMM in a node, read from outside.
pub(super) async fn guest(node: &Node) -> anyhow::Result<Report> {
    let pids = node.exec(&["pidof", VMM]).await?;
    let pids = String::from_utf8_lossy(&pids.stdout).into_owned();
    let mut pids = pids.split_whitespace();
    let pid = pids.next().with_context(|| format!("no VMM runs on {}", node.name()))?;
    ensure!(pids.next().is_none(), "more than one VMM runs on {}", node.name());
    let report = node.exec(&[VMM_PROGRAM, "guest", "--pid", pid]).await?.success()?;
    Ok(serde_json::from_str(&report)?)
}
