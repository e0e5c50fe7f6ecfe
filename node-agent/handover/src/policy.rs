//! Which order of stops keeps the devices of a VM from hurting each other, and which VMs have none.

use crate::state::Features;

/// What to do where the devices of a VM may talk to each other (`peerToPeer`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PeerToPeer {
    /// With more than one device, every one must support P2P.
    Required,
    /// The administrator states that these devices never talk to each other.
    AssumeIsolated,
}

/// Who issues the state changes of a VM's devices. Two drivers of one state machine would be in each other's
/// way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Driver {
    /// The agent: the VMM leaves its devices to it.
    Agent,
    /// The VMM, QEMU for one: the agent looks before anything that depends on the devices (the gate), and
    /// leads them only out of RESUMING, which shows whether each driver takes its state (the check). Their
    /// states travel in the VMM's own stream.
    Vmm,
}

impl Driver {
    /// Of a VM with so many devices, how many have a stream of their own.
    pub fn device_blobs(self, devices: usize) -> usize {
        match self {
            Self::Agent => devices,
            Self::Vmm => 0,
        }
    }
}

/// The barrier that the devices of a VM must all have reached before any of them goes further (I2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StopPlan {
    /// All in a P2P state before any is stopped. Every device supports P2P.
    QuiesceFirst,
    /// All in STOP before any enters STOP_COPY. There is no pre-copy: from PRE_COPY the way to STOP leads
    /// through RUNNING.
    StopFirst,
    /// One device without P2P: there is no other to wait for.
    Alone,
}

/// Why no order of stops is safe. Indices count the VM's devices from 0.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoStopPlan {
    /// These devices cannot be migrated at all.
    #[error("the drivers of devices {0:?} do not advertise STOP_COPY, so their state cannot be read")]
    NotMigratable(Vec<usize>),
    /// These devices could be written to by others after they have been stopped.
    #[error("devices {0:?} do not support P2P, which a VM with several devices needs to stop them safely")]
    PeerToPeerUnsupported(Vec<usize>),
}

/// Chooses the order of stops from what the drivers have advertised.
pub fn stop_plan(devices: &[Features], policy: PeerToPeer) -> Result<StopPlan, NoStopPlan> {
    let lacking = |has: fn(&Features) -> bool| -> Vec<usize> {
        devices.iter().enumerate().filter(|(_, f)| !has(f)).map(|(i, _)| i).collect()
    };
    let not_migratable = lacking(|f| f.stop_copy);
    if !not_migratable.is_empty() {
        return Err(NoStopPlan::NotMigratable(not_migratable));
    }
    let without_p2p = lacking(|f| f.p2p);
    match (without_p2p.is_empty(), devices.len(), policy) {
        (true, _, _) => Ok(StopPlan::QuiesceFirst),
        (false, 1, _) => Ok(StopPlan::Alone),
        (false, _, PeerToPeer::AssumeIsolated) => Ok(StopPlan::StopFirst),
        (false, _, PeerToPeer::Required) => Err(NoStopPlan::PeerToPeerUnsupported(without_p2p)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Features = Features { stop_copy: true, p2p: true, pre_copy: true };
    const NO_P2P: Features = Features { stop_copy: true, p2p: false, pre_copy: true };
    const NONE: Features = Features { stop_copy: false, p2p: false, pre_copy: false };

    #[test]
    fn devices_that_all_support_p2p_are_quiesced_first_under_either_policy() {
        for policy in [PeerToPeer::Required, PeerToPeer::AssumeIsolated] {
            assert_eq!(stop_plan(&[ALL, ALL], policy), Ok(StopPlan::QuiesceFirst));
            assert_eq!(stop_plan(&[ALL], policy), Ok(StopPlan::QuiesceFirst));
        }
    }

    #[test]
    fn a_single_device_is_always_allowed() {
        assert_eq!(stop_plan(&[NO_P2P], PeerToPeer::Required), Ok(StopPlan::Alone));
    }

    #[test]
    fn a_second_device_without_p2p_is_refused_by_its_index_unless_isolation_is_assumed() {
        assert_eq!(
            stop_plan(&[ALL, NO_P2P], PeerToPeer::Required),
            Err(NoStopPlan::PeerToPeerUnsupported(vec![1]))
        );
        assert_eq!(stop_plan(&[ALL, NO_P2P], PeerToPeer::AssumeIsolated), Ok(StopPlan::StopFirst));
    }

    #[test]
    fn a_device_that_cannot_be_saved_is_refused_under_either_policy() {
        for policy in [PeerToPeer::Required, PeerToPeer::AssumeIsolated] {
            assert_eq!(stop_plan(&[ALL, NONE], policy), Err(NoStopPlan::NotMigratable(vec![1])));
        }
    }
}
