//! What a node is made of.

/// A node to start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeConfig {
    /// Its name, in the lab and in the cluster: lower-case letters, digits and dashes.
    pub name: String,
    /// The type of each of its devices, as the driver calls them: `mtty-1` (one port), `mtty-2` (two).
    pub devices: Vec<String>,
    /// Its memory, in MiB.
    pub memory_mib: u32,
    /// Its CPUs. QEMU emulates several CPUs in as many threads. A CPU may then go on with code that another
    /// one has just replaced, as a kernel does with its own: nodes have died of that while they came up.
    pub cpus: u32,
    /// CPU features that QEMU can emulate and this node lacks, by QEMU's names.
    pub without_cpu_features: Vec<String>,
}

impl NodeConfig {
    /// A node with these devices.
    pub fn new<T: Into<String>>(name: impl Into<String>, devices: impl IntoIterator<Item = T>) -> Self {
        Self {
            name: name.into(),
            devices: devices.into_iter().map(Into::into).collect(),
            memory_mib: 512,
            cpus: 1,
            without_cpu_features: Vec::new(),
        }
    }
}
