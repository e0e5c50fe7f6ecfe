//! Faults that hit the product: links that are cut, disks that are full, journals that are damaged, processes
//! that are killed.

use std::time::Duration;

use anyhow::{Context, ensure};

use super::agents::{STATE_DIR, STATE_DISK};
use super::{Cluster, TIMEOUT};

/// How often to check whether a killed process is gone.
const KILL_POLL: Duration = Duration::from_millis(50);
/// After the header, within the record; later bytes may be unused space.
const DAMAGED_BYTE: usize = 100;

/// A file of a node's journal as it was before it was damaged.
#[derive(Clone, Debug)]
pub struct DamagedFile {
    /// Where it is.
    pub path: String,
    original: Vec<u8>,
}

impl Cluster {
    /// Cuts a node off from the other nodes and from the operator. They get no error.
    ///
    /// # Errors
    /// When there is no such node.
    pub async fn isolate(&self, node: &str) -> anyhow::Result<()> {
        self.relay(node)?.cut();
        Ok(self.lab.cut_link(node).await?)
    }

    /// Ends what [`Cluster::isolate`] began.
    ///
    /// # Errors
    /// When there is no such node.
    pub async fn reconnect(&self, node: &str) -> anyhow::Result<()> {
        self.relay(node)?.restore();
        Ok(self.lab.restore_link(node).await?)
    }

    /// Fills the disk under the journal of a node's agent, to the last byte.
    ///
    /// # Errors
    /// When there is room left afterwards.
    pub async fn fill_state_disk(&self, node: &str) -> anyhow::Result<()> {
        let node = self.lab.node(node)?;
        // It succeeds only if a second file cannot hold a byte.
        node.shell(&format!(
            "cat /dev/zero >{STATE_DISK}/filler 2>/dev/null; \
             if echo x >{STATE_DISK}/more 2>/dev/null; then exit 1; fi; rm -f {STATE_DISK}/more"
        ))
        .await
        .context("the disk of the journal could not be filled")?;
        Ok(())
    }

    /// Makes room on the disk again.
    ///
    /// # Errors
    /// When the node cannot be reached.
    pub async fn empty_state_disk(&self, node: &str) -> anyhow::Result<()> {
        self.lab.node(node)?.shell(&format!("rm -f {STATE_DISK}/filler")).await?;
        Ok(())
    }

    /// Changes a byte in each journal file that a node's agent has for a migration. The agent must not run.
    ///
    /// # Errors
    /// When there is no such file.
    pub async fn damage_journal(&self, node: &str, migration: &str) -> anyhow::Result<Vec<DamagedFile>> {
        let node = self.lab.node(node)?;
        let listed =
            node.shell(&format!("find {STATE_DIR} -type f | grep -F -e {migration} || true")).await?;
        let mut damaged = Vec::new();
        for path in listed.lines().map(str::to_owned) {
            let original = node.get(&path).await?;
            let mut bytes = original.clone();
            *bytes
                .get_mut(DAMAGED_BYTE)
                .with_context(|| format!("{path} has {} bytes", original.len()))? ^= 0x10;
            node.put(&path, 0o600, &bytes).await?;
            damaged.push(DamagedFile { path, original });
        }
        // The journal before its second copy, whose name is longer.
        damaged.sort_by_key(|file: &DamagedFile| file.path.len());
        ensure!(!damaged.is_empty(), "node {} has no journal of {migration}", node.name());
        Ok(damaged)
    }

    /// Restores the damaged files, as from a backup. The agent must not run.
    ///
    /// # Errors
    /// When the node cannot be reached.
    pub async fn restore_journal(&self, node: &str, damaged: &[DamagedFile]) -> anyhow::Result<()> {
        let node = self.lab.node(node)?;
        for file in damaged {
            node.put(&file.path, 0o600, &file.original).await?;
        }
        Ok(())
    }

    /// Removes everything that a node's agent has on its disk. The agent must not run.
    ///
    /// # Errors
    /// When the node cannot be reached.
    pub async fn delete_state(&self, node: &str) -> anyhow::Result<()> {
        self.lab.node(node)?.shell(&format!("rm -rf {STATE_DISK}/filler {STATE_DIR}/*")).await?;
        Ok(())
    }

    /// Kills the VMM in a node (SIGKILL), be it the VM's or a twin.
    ///
    /// # Errors
    /// When there is not exactly one.
    pub async fn kill_vmm(&self, node: &str) -> anyhow::Result<()> {
        match self.vmms(node).await?.as_slice() {
            [pid] => self.kill_and_wait(node, *pid).await,
            several => anyhow::bail!("{} VMMs run on {node}", several.len()),
        }
    }

    /// The same, if a VMM runs there and does not end by itself meanwhile.
    ///
    /// # Errors
    /// When there are several, or it does not die.
    pub async fn kill_vmm_if_any(&self, node: &str) -> anyhow::Result<()> {
        match self.vmms(node).await?.as_slice() {
            [] => Ok(()),
            [pid] => match self.kill_and_wait(node, *pid).await {
                Err(_) if !self.vmms(node).await?.contains(pid) => Ok(()),
                killed => killed,
            },
            several => anyhow::bail!("{} VMMs run on {node}", several.len()),
        }
    }

    async fn kill_and_wait(&self, node: &str, pid: u32) -> anyhow::Result<()> {
        self.lab.node(node)?.kill(pid).await?;
        // A killed process takes a while to be gone, longer in an emulated node.
        let gone = async {
            while self.vmms(node).await?.contains(&pid) {
                tokio::time::sleep(KILL_POLL).await;
            }
            anyhow::Ok(())
        };
        tokio::time::timeout(TIMEOUT, gone).await?
    }

    /// The VMMs in a node, by their process ids.
    ///
    /// # Errors
    /// When the node does not answer.
    pub async fn vmms(&self, node: &str) -> anyhow::Result<Vec<u32>> {
        let pids = self.lab.node(node)?.exec(&["pidof", self.vmm()]).await?;
        let pids = String::from_utf8_lossy(&pids.stdout).into_owned();
        Ok(pids.split_whitespace().map(str::parse).collect::<Result<_, _>>()?)
    }
}
