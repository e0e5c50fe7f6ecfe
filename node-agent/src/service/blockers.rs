//! Why a VM cannot be migrated as it stands, before anybody tries. Pure.

use slackwater_proto::node::Blocker;

use crate::handover::policy::{NoStopPlan, PeerToPeer, stop_plan};
use crate::vfio::state::Features;
use crate::vmm::RunState;

/// What is known of one device of a VM: its name, and its features or why they are not known.
pub(super) type DeviceFeatures = (String, Result<Features, String>);

/// Everything that stands in the way.
pub(super) fn of_vm(run_state: RunState, devices: &[DeviceFeatures]) -> Vec<Blocker> {
    let mut found = Vec::new();
    if run_state != RunState::Running {
        let message = "the VM does not run: somebody has paused it, and a migration would resume it";
        found.push(blocker("VMPaused", message.to_owned(), false));
    }
    let mut features = Vec::new();
    for (name, known) in devices {
        match known {
            Ok(known) => features.push(*known),
            Err(why) => found.push(blocker(
                "DeviceNotMigratable",
                format!("{name}: its driver does not tell what it can migrate: {why}"),
                false,
            )),
        }
    }
    if features.len() < devices.len() {
        return found;
    }
    let named = |indices: &[usize]| -> String {
        let names: Vec<&str> =
            indices.iter().filter_map(|index| devices.get(*index)).map(|(name, _)| name.as_str()).collect();
        names.join(", ")
    };
    match stop_plan(&features, PeerToPeer::Required) {
        Ok(_) => {}
        Err(NoStopPlan::NotMigratable(indices)) => found.push(blocker(
            "DeviceNotMigratable",
            format!("{}: the driver does not advertise STOP_COPY, so the state cannot be read", named(&indices)),
            false,
        )),
        Err(NoStopPlan::PeerToPeerUnsupported(indices)) => found.push(blocker(
            "PeerToPeerUnsupported",
            format!(
                "{}: the driver does not support P2P, which a VM with several devices needs to stop them safely; \
                 peerToPeer: AssumeIsolated lifts this if these devices never talk to each other",
                named(&indices)
            ),
            true,
        )),
    }
    found
}

/// The VMM does not answer, or its vm.json is broken.
pub(super) fn unreachable(why: &str) -> Vec<Blocker> {
    vec![blocker("VMMUnreachable", why.to_owned(), false)]
}

fn blocker(reason: &str, message: String, lifted_by_assume_isolated: bool) -> Blocker {
    Blocker { reason: reason.to_owned(), message, lifted_by_assume_isolated }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NO_P2P: Features = Features { p2p: false, ..Features::ALL };

    fn device(name: &str, features: Result<Features, &str>) -> DeviceFeatures {
        (name.to_owned(), features.map_err(str::to_owned))
    }

    fn reasons(run_state: RunState, devices: &[DeviceFeatures]) -> Vec<(String, bool)> {
        of_vm(run_state, devices).into_iter().map(|b| (b.reason, b.lifted_by_assume_isolated)).collect()
    }

    #[test]
    fn a_running_vm_whose_devices_support_p2p_has_nothing_in_its_way() {
        let devices = [device("a", Ok(Features::ALL)), device("b", Ok(Features::ALL))];
        assert_eq!(reasons(RunState::Running, &devices), []);
    }

    #[test]
    fn each_obstacle_is_named_and_only_missing_p2p_can_be_lifted() {
        let p2p = [device("a", Ok(Features::ALL)), device("b", Ok(NO_P2P))];
        assert_eq!(reasons(RunState::Running, &p2p), [("PeerToPeerUnsupported".to_owned(), true)]);
        assert!(of_vm(RunState::Running, &p2p)[0].message.starts_with("b: "));
        assert_eq!(reasons(RunState::Running, &p2p[1..]), []);
        let silent = [device("a", Err("ENOTTY")), device("b", Ok(NO_P2P))];
        assert_eq!(reasons(RunState::Running, &silent), [("DeviceNotMigratable".to_owned(), false)]);
        let without = [device("a", Ok(Features::default()))];
        assert_eq!(
            reasons(RunState::Paused, &without),
            [("VMPaused".to_owned(), false), ("DeviceNotMigratable".to_owned(), false)]
        );
    }
}
