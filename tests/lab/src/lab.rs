//! The lab as a whole.

use std::path::{Path, PathBuf};

use futures::future::try_join_all;
use tokio::{task::AbortHandle, try_join};

use crate::config::LabConfig;
use crate::control_plane::ControlPlane;
use crate::error::LabError;
use crate::host::folder::LabFolder;
use crate::host::installed;
use crate::host::shared_disk::SharedDisk;
use crate::host::switch::Switch;
use crate::image;
use crate::node::{Boot, Node};

/// A running lab.
#[derive(Debug)]
pub struct Lab {
    // In the order in which they are dropped with the lab: the folder last.
    nodes: Vec<Node>,
    control_plane: Option<ControlPlane>,
    shared_disk: Option<SharedDisk>,
    switch: AbortHandle,
    folder: LabFolder,
}

impl Lab {
    /// Starts everything in the configuration, and waits until all of it is up.
    ///
    /// # Errors
    /// When the configuration is invalid, something is not installed or built, or a component does not come
    /// up.
    pub async fn start(config: LabConfig) -> Result<Self, LabError> {
        config.check()?;
        let folder = LabFolder::make()?;
        let links: Vec<_> =
            config.nodes.iter().map(|node| folder.path().join(format!("{}.link", node.name))).collect();
        let switch = Switch::bind(&links).map_err(LabError::io("binding the switch's ports"))?;
        let switch = tokio::spawn(switch.run()).abort_handle();
        let shared_disk = match config.shared_disk_mib {
            Some(mib) => Some(SharedDisk::start(folder.path(), mib).await?),
            None => None,
        };
        let mut lab = Self { nodes: Vec::new(), control_plane: None, shared_disk, switch, folder };
        let control_plane = async {
            match config.control_plane {
                true => ControlPlane::start(lab.folder().join("control-plane")).await.map(Some),
                false => Ok(None),
            }
        };
        (lab.nodes, lab.control_plane) = try_join!(start_nodes(&config, &lab, &links), control_plane)?;
        Ok(lab)
    }

    /// The node of this name.
    ///
    /// # Errors
    /// When there is none.
    pub fn node(&self, name: &str) -> Result<&Node, LabError> {
        let found = self.nodes.iter().find(|node| node.name() == name);
        found.ok_or_else(|| LabError::Configuration(format!("there is no node {name}")))
    }

    /// The control plane.
    ///
    /// # Errors
    /// When the configuration asked for none.
    pub fn control_plane(&self) -> Result<&ControlPlane, LabError> {
        let none = || LabError::Configuration("there is no control plane".into());
        self.control_plane.as_ref().ok_or_else(none)
    }

    /// The file behind the shared disk.
    ///
    /// # Errors
    /// When the configuration asked for none.
    pub fn shared_disk(&self) -> Result<&Path, LabError> {
        let none = || LabError::Configuration("there is no shared disk".into());
        self.shared_disk.as_ref().map(SharedDisk::path).ok_or_else(none)
    }

    /// All nodes, in the configuration's order.
    #[must_use]
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// Unplugs a node's cable on the link between the nodes: nothing that it sends arrives, and nothing
    /// reaches it. The lab itself still does.
    ///
    /// # Errors
    /// When there is no such node, or its QEMU refuses.
    pub async fn cut_link(&self, node: &str) -> Result<(), LabError> {
        self.node(node)?.set_link(false).await
    }

    /// Plugs the node's cable in again.
    ///
    /// # Errors
    /// When there is no such node, or its QEMU refuses.
    pub async fn restore_link(&self, node: &str) -> Result<(), LabError> {
        self.node(node)?.set_link(true).await
    }

    /// Where the lab keeps its sockets, logs and data.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.switch.abort();
    }
}

async fn start_nodes(config: &LabConfig, lab: &Lab, links: &[PathBuf]) -> Result<Vec<Node>, LabError> {
    if config.nodes.is_empty() {
        return Ok(Vec::new());
    }
    let kernel = installed::installed("node-kernel")?;
    let folder = lab.folder();
    let path = folder.join("image.cpio");
    let mut image = config.image.clone();
    image.programs.extend(installed::node_programs()?);
    image::write(&image, &kernel, &path)?;
    let shared_disk = lab.shared_disk.as_ref().map(SharedDisk::forward).unwrap_or_default();
    let boot = Boot { kernel: &kernel, image: &path, folder, shared_disk };
    let starting = (1..).zip(&config.nodes).zip(links).map(|((number, node), link)| {
        let boot = &boot;
        async move {
            let node = Node::start(boot, node, number, link).await?;
            node.ready().await?;
            Ok(node)
        }
    });
    try_join_all(starting).await
}
