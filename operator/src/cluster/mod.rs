//! Everything that uses the Kubernetes API: watching, writing, and events.

mod apply;
mod events;
mod observe;

pub use apply::{Cluster, WriteError};
pub use observe::{Observed, observe};
