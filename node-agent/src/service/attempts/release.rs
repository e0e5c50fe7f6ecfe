//! What is left over of a VM here, once it runs elsewhere.

use std::path::PathBuf;
use std::sync::Arc;

use futures::FutureExt;
use futures::future::BoxFuture;
use tracing::{error, warn};

use super::resources::NodeResources;
use crate::host::identity::IdentityOf;
use crate::process::cgroup::Cgroup;
use crate::vmm::{LocalVmm, twin};

/// Gives back what is left over, once.
pub(super) type Release = Box<dyn FnOnce() -> BoxFuture<'static, ()> + Send>;

/// What there is of a VM here besides its process.
pub(super) struct VmRemains {
    /// The cgroup of its VMM, if that was started as a twin.
    pub(super) cgroup: Option<Cgroup>,
    /// The directory of its `vm.json`.
    pub(super) directory: PathBuf,
    /// Where its VMM listens.
    pub(super) socket: PathBuf,
}

impl VmRemains {
    /// Ends the VMM and clears away what is left over.
    pub(super) fn release(
        self,
        leaving: Arc<dyn LocalVmm>,
        node: &NodeResources,
        migration_id: &str,
    ) -> Release {
        let (limit, vf_identity) = (node.config.deadlines.quit, Arc::clone(&node.vf_identity));
        let of = IdentityOf { migration_id: migration_id.to_owned(), devices: Vec::new(), claim: Vec::new() };
        Box::new(move || {
            async move {
                if let Err(error) = vf_identity.withdraw(&of).await {
                    warn!(migration = of.migration_id, %error, "an identity could not be withdrawn");
                }
                let Self { cgroup, directory, socket } = self;
                let ended = twin::end(leaving.as_ref(), cgroup.as_ref(), &directory, &socket, limit).await;
                if let Err(error) = ended {
                    let migration = of.migration_id;
                    error!(migration, %error, "the VM runs elsewhere, but something of it is left here");
                }
            }
            .boxed()
        })
    }

    /// Clears away what is left over of a VM whose process is gone.
    pub(super) fn clear_away(self, node: &NodeResources) -> Release {
        let limit = node.config.deadlines.quit;
        Box::new(move || {
            async move {
                let Self { cgroup, directory, socket } = self;
                if let Err(error) = twin::forget(cgroup.as_ref(), &directory, &socket, limit).await {
                    warn!(%error, "the VM runs elsewhere, but something of it is left here");
                }
            }
            .boxed()
        })
    }
}
