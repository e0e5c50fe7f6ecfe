//! What a lab is made of.

use crate::error::LabError;
use crate::image::Image;
use crate::node::NodeConfig;

/// A lab to start.
#[derive(Clone, Debug, Default)]
pub struct LabConfig {
    /// The nodes, in order: the first has number 1.
    pub nodes: Vec<NodeConfig>,
    /// Whether there is a Kubernetes control plane.
    pub control_plane: bool,
    /// What is in the nodes' image besides the workspace's programs.
    pub image: Image,
    /// The size in MiB of the disk that VMs in all nodes can reach. `None`: there is no such disk.
    pub shared_disk_mib: Option<u32>,
}

impl LabConfig {
    /// A lab of these nodes, without a control plane.
    pub fn nodes(nodes: impl IntoIterator<Item = NodeConfig>) -> Self {
        Self { nodes: nodes.into_iter().collect(), ..Self::default() }
    }

    /// The same with a control plane.
    #[must_use]
    pub fn with_control_plane(mut self) -> Self {
        self.control_plane = true;
        self
    }

    /// The same with a shared disk of this size in MiB.
    #[must_use]
    pub fn with_shared_disk(mut self, mib: u32) -> Self {
        self.shared_disk_mib = Some(mib);
        self
    }

    /// Rejects a configuration that cannot be started. Names go into paths, host names and QEMU's arguments.
    pub(crate) fn check(&self) -> Result<(), LabError> {
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        let refuse = |text: String| Err(LabError::Configuration(text));
        if self.nodes.len() > 200 {
            return refuse(format!("{} nodes are too many", self.nodes.len()));
        }
        for (index, node) in self.nodes.iter().enumerate() {
            if node.name.is_empty() || node.name.len() > 32 || !node.name.chars().all(plain) {
                return refuse(format!("{:?} cannot name a node", node.name));
            }
            if self.nodes.iter().take(index).any(|other| other.name == node.name) {
                return refuse(format!("two nodes are named {}", node.name));
            }
            if let Some(feature) =
                node.without_cpu_features.iter().find(|feature| !feature.chars().all(plain))
            {
                return refuse(format!("{feature:?} is no CPU feature"));
            }
            if let Some(device) = node.devices.iter().find(|device| !device.chars().all(plain)) {
                return refuse(format!("{device:?} is no device type"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_would_end_up_in_arguments_are_refused() {
        let lab =
            |names: &[&str]| LabConfig::nodes(names.iter().map(|name| NodeConfig::new(*name, ["mtty-1"])));
        assert!(lab(&["node-a", "node-b"]).check().is_ok());
        assert!(lab(&["node-a", "node-a"]).check().is_err());
        assert!(lab(&["node a"]).check().is_err());
        assert!(lab(&[""]).check().is_err());
        assert!(LabConfig::nodes([NodeConfig::new("a", ["mtty-1,x"])]).check().is_err());
    }
}
