//! The lab: nodes (QEMU machines with Debian's kernel and VFIO devices that migrate), the link between them,
//! and a Kubernetes control plane, all on this machine, on its loopback interface and on Unix sockets only.
//!
//! ```no_run
//! # async fn example() -> Result<(), slackwater_lab::LabError> {
//! use slackwater_lab::{Lab, LabConfig, NodeConfig};
//!
//! let config = LabConfig::nodes([
//!     NodeConfig::new("node-a", ["mtty-1", "mtty-1"]),
//!     NodeConfig::new("node-b", ["mtty-1", "mtty-1"]),
//! ]);
//! let lab = Lab::start(config).await?;
//! let node = lab.node("node-a")?;
//! println!("{}", node.shell("ls /sys/bus/mdev/devices").await?);
//! lab.cut_link("node-b").await?;
//! # Ok(())
//! # }
//! ```
//!
//! Everything that a lab starts ends with it: when it is dropped, and when its process ends for any reason.
//! Its folder is removed, too, unless [`host::KEEP_VARIABLE`] is set.
//!
//! | room | what it has |
//! |---|---|
//! | [`host`] | this machine: the lab's folder, the programs that it starts, the switch and the shared disk |
//! | [`guests`] | what runs in QEMU VMs inside the nodes |
//! | [`image`] | the file system that a node boots into |
//! | [`node`] | a node: its machine, its clock, and the requests that it takes |
//! | [`in_node`] | the other side of these requests: the service that runs inside a node |
//! | [`control_plane`] | etcd and kube-apiserver |
//! | [`Lab`] | all of these, started from a [`LabConfig`] |
//! | [`witness`] | what the nodes' kernels saw, and the invariants that this must keep |
//! | [`cluster`] | Slackwater installed on a lab, and a VM to migrate |
//! | [`faults`] | the matrix of faults, and the random walk |
//!
//! Each uses only those above it.

pub mod cluster;
mod config;
pub mod control_plane;
mod error;
pub mod faults;
pub mod guests;
pub mod host;
pub mod image;
pub mod in_node;
mod lab;
pub mod node;
mod pki;
pub mod witness;

pub use config::LabConfig;
pub use control_plane::ControlPlane;
pub use error::LabError;
pub use image::Image;
pub use lab::Lab;
pub use node::{Node, NodeConfig};
pub use pki::{Issued, Pki, Subject};
