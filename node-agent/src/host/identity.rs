//! The network identity of a VM's devices (MAC, VLAN, trust, rates): the three moments at which it moves with
//! the VM.
//!
//! | hook | where | when |
//! |---|---|---|
//! | [`VfIdentity::prepare`] | destination | before any device enters RESUMING |
//! | [`VfIdentity::activate`] | destination | after the commit, before any device runs |
//! | [`VfIdentity::withdraw`] | source | once the VM runs elsewhere |
//! | [`VfIdentity::withdraw`] | destination | when a reservation is given back |
//!
//! Activating before the commit would take the traffic away from the VM. The hooks are called, and do nothing
//! yet: [`NoIdentity`] is the only implementation.

use slackwater_proto::tonic::async_trait;

use super::devices::Device;

/// The devices whose identity moves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdentityOf {
    /// The migration.
    pub migration_id: String,
    /// The VM's devices on this node, in the VM's order.
    pub devices: Vec<Device>,
    /// `ReserveRequest.claim`: for another allocator of devices. Empty at the source.
    pub claim: Vec<u8>,
}

/// A device's identity could not be moved.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the network identity of {device}: {reason}")]
pub struct IdentityError {
    /// The device's name.
    pub device: String,
    /// What is wrong.
    pub reason: String,
}

/// Moves the devices' network identity. Every hook may be called twice with the same content, and then does
/// nothing more.
#[async_trait]
pub trait VfIdentity: Send + Sync {
    /// At the destination, before any device enters RESUMING. It must have no effect outside the node.
    ///
    /// # Errors
    /// [`IdentityError`]; the migration is then refused.
    async fn prepare(&self, of: &IdentityOf) -> Result<(), IdentityError>;

    /// At the destination, after the commit and before any device runs.
    ///
    /// # Errors
    /// [`IdentityError`]; the VM cannot go back any more.
    async fn activate(&self, of: &IdentityOf) -> Result<(), IdentityError>;

    /// At the source once the VM runs elsewhere, and at the destination when a reservation is given back.
    ///
    /// # Errors
    /// [`IdentityError`]; it is reported, and nothing else changes.
    async fn withdraw(&self, of: &IdentityOf) -> Result<(), IdentityError>;
}

/// Leaves every identity as it is: for devices whose identity is part of their state, or that have none.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoIdentity;

#[async_trait]
impl VfIdentity for NoIdentity {
    async fn prepare(&self, _: &IdentityOf) -> Result<(), IdentityError> {
        Ok(())
    }

    async fn activate(&self, _: &IdentityOf) -> Result<(), IdentityError> {
        Ok(())
    }

    async fn withdraw(&self, _: &IdentityOf) -> Result<(), IdentityError> {
        Ok(())
    }
}
