//! The output of a VM's guest in a node, and the state of its vCPU when there is none.

use std::time::Duration;

use anyhow::{Context, bail};
use serde_json::json;

use super::QemuVm;
use crate::cluster::TIMEOUT;
use crate::error::LabError;
use crate::guests::Report;
use crate::node::Node;

/// A guest without output for this time does not run.
const SILENCE: Duration = Duration::from_secs(10);

/// How often the state of a silent guest is sampled.
const SAMPLES_OF_A_SILENT_GUEST: usize = 5;

impl QemuVm {
    /// All output of its guest in a node.
    ///
    /// # Errors
    /// When it has not run there.
    pub async fn said(&self, node: &Node) -> Result<String, LabError> {
        node.get_text(&self.debug_file()).await
    }

    /// The last report of its guest in a node.
    ///
    /// # Errors
    /// When there is none.
    pub async fn report(&self, node: &Node) -> anyhow::Result<Report> {
        let said = self.said(node).await?;
        Report::last_of(&said).with_context(|| format!("the guest of {} reports nothing", self.name))
    }

    /// Deletes the output of its guest in a node that it has left, so that it is not taken for current
    /// output.
    ///
    /// # Errors
    /// When the node cannot be reached.
    pub(in crate::cluster) async fn delete_guest_output(&self, node: &Node) -> anyhow::Result<()> {
        node.shell(&format!("rm -f {}", self.debug_file())).await?;
        Ok(())
    }

    /// The next report of its guest in a node.
    ///
    /// # Errors
    /// When no QEMU runs there, or its guest reports nothing for a while.
    pub(in crate::cluster) async fn guest(
        &self,
        node: &Node,
    ) -> anyhow::Result<slackwater_reference_vmm::guest::Report> {
        let running = node.exec(&["pidof", "qemu-system-x86_64"]).await?;
        if running.stdout.is_empty() {
            let said = self.said(node).await.unwrap_or_default();
            let last = said.lines().last().unwrap_or("nothing");
            bail!("no VMM runs on {}; the guest's last line there: {last}", node.name());
        }
        let before = node.get(&self.debug_file()).await.unwrap_or_default().len();
        let deadline = tokio::time::Instant::now() + SILENCE;
        while tokio::time::Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(50)).await;
            let said = node.get(&self.debug_file()).await.unwrap_or_default();
            let new = String::from_utf8_lossy(said.get(before..).unwrap_or_default()).into_owned();
            // The first line may have begun earlier.
            let whole = new.split_once('\n').map_or("", |(_, whole)| whole);
            if let Some(report) = Report::last_of(whole) {
                return Ok(slackwater_reference_vmm::guest::Report {
                    count: report.count,
                    errors: report.errors,
                    ram_errors: 0,
                    devices: Vec::new(),
                });
            }
        }
        let state = if self.second_monitor { self.machine_state(node).await } else { String::new() };
        bail!("the guest of {} on {} reports nothing for {SILENCE:?}{state}", self.name, node.name())
    }

    /// Why a guest may be silent: its vCPU and its interrupt controllers, sampled a few times.
    async fn machine_state(&self, node: &Node) -> String {
        let mut text = String::new();
        for what in ["status", "registers", "lapic", "pic"] {
            text.push_str(&format!("\n--- info {what}\n{}", self.info(node, what).await));
        }
        text.push_str("\n--- and then");
        for _ in 0..SAMPLES_OF_A_SILENT_GUEST {
            tokio::time::sleep(Duration::from_secs(1)).await;
            for what in ["registers", "lapic", "pic"] {
                let answer = self.info(node, what).await;
                let relevant = |line: &&str| ["RIP", "IRR", "ISR"].iter().any(|word| line.contains(word));
                for line in answer.lines().filter(relevant) {
                    text.push_str(&format!("\n{}", line.trim()));
                }
            }
        }
        text
    }

    /// The answer of the human monitor.
    async fn info(&self, node: &Node, what: &str) -> String {
        let arguments = json!({ "command-line": format!("info {what}") });
        match self.execute(node, "human-monitor-command", arguments).await {
            Ok(answer) => answer.as_str().unwrap_or_default().replace('\r', ""),
            Err(error) => format!("{error:#}"),
        }
    }

    /// Waits until its guest has counted to `count` in a node.
    ///
    /// # Errors
    /// When it does not.
    pub async fn until_counted(&self, node: &Node, count: u64) -> anyhow::Result<Report> {
        self.until(node, &format!("count to {count}"), || async {
            self.report(node).await.ok().filter(|report| report.count >= count)
        })
        .await
    }

    pub(super) async fn until<T>(
        &self,
        node: &Node,
        what: &str,
        look: impl AsyncFn() -> Option<T>,
    ) -> anyhow::Result<T> {
        let deadline = tokio::time::Instant::now() + TIMEOUT;
        let mut polls = tokio::time::interval(Duration::from_millis(100));
        loop {
            polls.tick().await;
            if let Some(found) = look().await {
                return Ok(found);
            }
            if tokio::time::Instant::now() >= deadline {
                let log = node.get_text(&format!("/var/log/{}.log", self.group())).await.unwrap_or_default();
                let said = self.said(node).await.unwrap_or_default();
                let (begin, last) = (said.lines().take(10).collect::<Vec<_>>(), said.lines().last());
                bail!(
                    "{} does not {what}; its guest said at first {begin:#?} and last {last:?}, QEMU said\n{log}",
                    self.name
                );
            }
        }
    }
}
