//! Everything that uses the Kubernetes API: watching, writing, and events.

mod apply;
mod events;
mod guard;
mod mark;
mod observe;

pub use apply::{Cluster, WriteError};
pub use observe::{Follower, Keep, ObjectKey, Observed, Seen, observe};
