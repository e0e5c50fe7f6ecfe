//! A VM's QEMU in a node: starting it, sending it commands, ending it.

use anyhow::ensure;
use serde_json::{Value, json};

use super::{QEMU_PROGRAM, QemuVm, make_output_folder};
use crate::error::LabError;
use crate::node::Node;

impl QemuVm {
    /// Starts it in a node, and announces it to the agent when it counts.
    ///
    /// # Errors
    /// When it does not come up.
    pub async fn start(&self, node: &Node) -> anyhow::Result<()> {
        self.delete_guest_output(node).await?;
        self.spawn(node, &[]).await?;
        self.until_counted(node, 1).await?;
        self.publish(node).await
    }

    /// Announces the VM that runs in a node: writes its `vm.json`.
    ///
    /// # Errors
    /// When the node cannot be reached.
    pub async fn publish(&self, node: &Node) -> anyhow::Result<()> {
        // Atomically, since the agent watches the directory.
        let directory = self.directory();
        let text = serde_json::to_vec_pretty(&self.json())?;
        node.put(&format!("{directory}/.vm.json.new"), 0o600, &text).await?;
        node.shell(&format!("mv {directory}/.vm.json.new {directory}/vm.json")).await?;
        Ok(())
    }

    /// Starts the twin by hand, as the agent would: stopped, and waiting for `migrate-incoming`. It is not
    /// announced.
    ///
    /// # Errors
    /// When it does not come up.
    pub async fn await_migration(&self, node: &Node) -> anyhow::Result<()> {
        self.spawn(node, &["-S", "-incoming", "defer"]).await?;
        self.until_answers(node).await
    }

    /// The same, but it runs as soon as it is loaded, as a QEMU without Slackwater does.
    ///
    /// # Errors
    /// When it does not come up.
    pub async fn await_migration_and_run(&self, node: &Node) -> anyhow::Result<()> {
        self.spawn(node, &["-incoming", "defer"]).await?;
        self.until_answers(node).await
    }

    async fn until_answers(&self, node: &Node) -> anyhow::Result<()> {
        self.until(node, "answer", || async {
            self.execute(node, "query-status", json!({})).await.ok().map(drop)
        })
        .await
    }

    async fn spawn(&self, node: &Node, more: &[&str]) -> anyhow::Result<()> {
        // A twin that comes back appends to the same file, as another user.
        let (directory, output) = (self.directory(), self.debug_file());
        let make = make_output_folder();
        node.shell(&format!("mkdir -p -m 700 {directory} && {make} && touch {output} && chmod 666 {output}"))
            .await?;
        let arguments = self.arguments(&self.place_in(node)?);
        // Only this user may use the socket.
        let mut list = vec!["sh", "-c", "umask 077; exec \"$0\" \"$@\"", QEMU_PROGRAM];
        list.extend(arguments.iter().map(String::as_str).chain(more.iter().copied()));
        node.spawn(&self.group(), &list, &[]).await?;
        Ok(())
    }

    /// Creates the folder in a node for the guest's output, which QEMU does not create.
    ///
    /// # Errors
    /// When the node cannot be reached.
    pub(in crate::cluster) async fn make_output_folder(&self, node: &Node) -> anyhow::Result<()> {
        node.shell(&make_output_folder()).await?;
        Ok(())
    }

    /// Executes a QMP command in its QEMU in a node, and returns the result.
    ///
    /// # Errors
    /// When no QEMU runs there, or the command fails.
    pub async fn execute(&self, node: &Node, command: &str, arguments: Value) -> anyhow::Result<Value> {
        let arguments = arguments.to_string();
        let list = ["slackwater-lab-node", "qmp", &self.monitor(), command, &arguments];
        Ok(serde_json::from_str(&node.exec(&list).await?.success()?)?)
    }

    /// Moves it by hand, without the product, over the link between the nodes; the destination waits
    /// ([`QemuVm::await_migration`]), and stays stopped.
    ///
    /// # Errors
    /// When QEMU reports a failure.
    pub async fn migrate(&self, from: &Node, to: &Node) -> anyhow::Result<()> {
        let uri = format!("tcp:{}:4444", to.link_address().ip());
        self.execute(to, "migrate-incoming", json!({ "uri": uri })).await?;
        self.execute(from, "migrate", json!({ "uri": uri })).await?;
        for node in [from, to] {
            let status = self
                .until(node, "end its migration", || async {
                    let answer = self.execute(node, "query-migrate", json!({})).await.ok()?;
                    let status = answer.get("status")?.as_str()?.to_owned();
                    matches!(status.as_str(), "completed" | "failed" | "cancelled").then_some(status)
                })
                .await?;
            ensure!(status == "completed", "the migration {status} at {}", node.name());
        }
        Ok(())
    }

    /// Kills its QEMU in a node.
    ///
    /// # Errors
    /// When the lab has not started it there.
    pub async fn kill(&self, node: &Node) -> Result<(), LabError> {
        node.kill_group(&self.group()).await
    }

    /// Removes what a killed QEMU has left in a node.
    ///
    /// # Errors
    /// When the node does not answer.
    pub async fn forget(&self, node: &Node) -> Result<(), LabError> {
        node.shell(&format!("rm -rf {} {}", self.directory(), self.debug_file())).await.map(drop)
    }
}
