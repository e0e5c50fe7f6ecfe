//! The kernel's numbers (include/uapi/linux/vfio.h) in the core's types.

use slackwater_handover::state::Features;
use vfio_bindings::bindings::vfio;

/// What a driver advertises by the flags of `struct vfio_device_feature_migration`. Bits that are not known
/// here belong to states that are never asked for: they are ignored.
#[must_use]
pub(super) const fn features(flags: u64) -> Features {
    Features {
        stop_copy: flags & vfio::VFIO_MIGRATION_STOP_COPY as u64 != 0,
        p2p: flags & vfio::VFIO_MIGRATION_P2P as u64 != 0,
        pre_copy: flags & vfio::VFIO_MIGRATION_PRE_COPY as u64 != 0,
    }
}

#[cfg(test)]
mod tests {
    use slackwater_handover::state::{MigrationState, UnknownState};

    use super::*;

    #[test]
    fn numbers_names_and_groups_are_the_kernels() {
        for (number, name) in [
            (vfio::vfio_device_mig_state_VFIO_DEVICE_STATE_ERROR, "ERROR"),
            (vfio::vfio_device_mig_state_VFIO_DEVICE_STATE_STOP, "STOP"),
            (vfio::vfio_device_mig_state_VFIO_DEVICE_STATE_RUNNING, "RUNNING"),
            (vfio::vfio_device_mig_state_VFIO_DEVICE_STATE_STOP_COPY, "STOP_COPY"),
            (vfio::vfio_device_mig_state_VFIO_DEVICE_STATE_RESUMING, "RESUMING"),
            (vfio::vfio_device_mig_state_VFIO_DEVICE_STATE_RUNNING_P2P, "RUNNING_P2P"),
            (vfio::vfio_device_mig_state_VFIO_DEVICE_STATE_PRE_COPY, "PRE_COPY"),
            (vfio::vfio_device_mig_state_VFIO_DEVICE_STATE_PRE_COPY_P2P, "PRE_COPY_P2P"),
        ] {
            let state = MigrationState::try_from(number).unwrap();
            assert_eq!((state.number(), state.to_string().as_str()), (number, name));
            assert_eq!(state.is_p2p(), name.ends_with("P2P"));
            assert_eq!(state.is_pre_copy(), name.starts_with("PRE_COPY"));
            assert_eq!(state.is_stopped(), name.starts_with("STOP"));
            assert_eq!(state.is_saving(), name.contains("COPY"));
            assert_eq!(state.has_data(), name.contains("COPY") || name == "RESUMING");
        }
        assert_eq!(
            MigrationState::try_from(vfio::vfio_device_mig_state_VFIO_DEVICE_STATE_NR),
            Err(UnknownState(8))
        );
        assert_eq!(format!("{:>8}|{:<8}|", MigrationState::Stop, MigrationState::Stop), "    STOP|STOP    |");
    }

    #[test]
    fn features_are_read_from_the_kernels_flags_and_said_in_its_words() {
        assert_eq!(features(7), Features::ALL);
        assert_eq!(features(0xff00 | 1), Features::STOP_COPY);
        assert_eq!(features(1 | 4).to_string(), "STOP_COPY | PRE_COPY");
        assert_eq!(features(0).to_string(), "none");
    }
}
