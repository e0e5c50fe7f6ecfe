//! What may befall the product: links that are cut, disks that are full, journals that are damaged, processes that are killed.

use std::time::Duration;

use anyhow::{Context, ensure};

use super::agents::{STATE_DIR, STATE_DISK};
use super::{Cluster, SOON};

/// Between two looks whether a killed process is gone.
const DYING: Duration = Duration::from_millis(50);
/// Behind the header and in what is said; further behind there may be nothing but space for later.
const DAMAGED_BYTE: usize = 100;

/// A file of a node's journal as it was before it was damaged.
#[derive(Clone, Debug)]
pub struct Damaged {
    /// Where it is.
    pub path: String,
    original: Vec<u8>,
}

impl Cluster {
    /// Cuts a node off from the other nodes and from the operator. Neither is told.
    ///
    /// # Errors
    /// When there is no such node.
    pub async fn cut_off(&self, node: &str) -> anyhow::Result<()> {
        self.relay(node)?.cut();
        Ok(self.lab.cut_link(node).await?)
    }

    /// Ends that.
    ///
    /// # Errors
    /// When there is no such node.
    pub async fn join_again(&self, node: &str) -> anyhow::Result<()> {
        self.relay(node)?.restore();
        Ok(self.lab.restore_link(node).await?)
    }

    /// Fills the disk that the agent of a node has its journal on, to the last byte.
    ///
    /// # Errors
    /// When there is room left afterwards.
    pub async fn fill_state_disk(&self, node: &str) -> anyhow::Result<()> {
        let node = self.lab.node(node)?;
        // The shell's last word is that of the test: a second file cannot hold a byte.
        node.shell(&format!(
            "cat /dev/zero >{STATE_DISK}/filler 2>/dev/null; if echo x >{STATE_DISK}/more 2>/dev/null; then exit 1; fi; \
             rm -f {STATE_DISK}/more"
        ))
        .await
        .context("the disk of the journal could not be filled")?;
        Ok(())
    }

    /// Makes room again.
    ///
    /// # Errors
    /// When the node cannot be reached.
    pub async fn empty_state_disk(&self, node: &str) -> anyhow::Result<()> {
        self.lab.node(node)?.shell(&format!("rm -f {STATE_DISK}/filler")).await?;
        Ok(())
    }

    /// Changes a byte of each file that the agent of a node has in its journal of a migration. It must not run.
    ///
    /// # Errors
    /// When there is no such file.
    pub async fn damage_journal(&self, node: &str, migration: &str) -> anyhow::Result<Vec<Damaged>> {
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
            damaged.push(Damaged { path, original });
        }
        // The journal itself before its spare copy, whose name is longer.
        damaged.sort_by_key(|file: &Damaged| file.path.len());
        ensure!(!damaged.is_empty(), "node {} has nothing journalled of {migration}", node.name());
        Ok(damaged)
    }

    /// Puts back what was damaged, as from a backup. The agent must not run.
    ///
    /// # Errors
    /// When the node cannot be reached.
    pub async fn mend_journal(&self, node: &str, damaged: &[Damaged]) -> anyhow::Result<()> {
        let node = self.lab.node(node)?;
        for file in damaged {
            node.put(&file.path, 0o600, &file.original).await?;
        }
        Ok(())
    }

    /// Removes all that the agent of a node has on its disk. It must not run.
    ///
    /// # Errors
    /// When the node cannot be reached.
    pub async fn forget_state(&self, node: &str) -> anyhow::Result<()> {
        self.lab.node(node)?.shell(&format!("rm -rf {STATE_DISK}/filler {STATE_DIR}/*")).await?;
        Ok(())
    }

    /// Kills the VMM in a node (SIGKILL): a VM's, or a twin.
    ///
    /// # Errors
    /// When there is not exactly one.
    pub async fn kill_vmm(&self, node: &str) -> anyhow::Result<()> {
        match self.vmms(node).await?.as_slice() {
            [pid] => self.kill_and_wait(node, *pid).await,
            several => anyhow::bail!("{} VMMs run on {node}", several.len()),
        }
    }

    /// The same, if there is one and it does not end by itself meanwhile.
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
        // A process that has been killed takes a while to be gone, an emulated one longer.
        let gone = async {
            while self.vmms(node).await?.contains(&pid) {
                tokio::time::sleep(DYING).await;
            }
            anyhow::Ok(())
        };
        tokio::time::timeout(SOON, gone).await?
    }

    /// The VMMs in a node, by their process ids.
    ///
    /// # Errors
    /// When the node cannot be asked.
    pub async fn vmms(&self, node: &str) -> anyhow::Result<Vec<u32>> {
        let pids = self.lab.node(node)?.exec(&["pidof", self.vmm()]).await?;
        let pids = String::from_utf8_lossy(&pids.stdout).into_owned();
        Ok(pids.split_whitespace().map(str::parse).collect::<Result<_, _>>()?)
    }
}
