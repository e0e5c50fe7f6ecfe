//! Why a VM cannot be migrated as it is, before a user tries. Pure.

use slackwater_handover::policy::{Driver, NoStopPlan, PeerToPeer, stop_plan};
use slackwater_handover::state::Features;
use slackwater_proto::node::Blocker;

use super::reason::ServiceReason;
use super::registry::Hold;
use crate::vmm::RunState;

/// What is known of one device of a VM.
pub(super) struct DeviceFeatures {
    /// Its name.
    pub(super) device: String,
    /// Its features, or why they are not known.
    pub(super) features: Result<Features, String>,
}

/// Everything that blocks a migration.
///
/// `driver` drives the devices; `blocked` is what the VMM itself says against a migration.
pub(super) fn of_vm(
    run_state: RunState,
    devices: &[DeviceFeatures],
    driver: Driver,
    blocked: &[String],
) -> Vec<Blocker> {
    let mut found = Vec::new();
    found.extend(not_running(run_state).map(|(reason, message)| blocker(reason, message, false)));
    found.extend(of_devices(devices, driver));
    // Last: what the agent knows of the devices says more than the VMM does about the same.
    if !blocked.is_empty() {
        let words: Vec<&str> = blocked.iter().map(|words| words.trim_end_matches('.')).collect();
        found.push(blocker(
            ServiceReason::MigrationBlocked,
            format!("QEMU would refuse it: {}", words.join("; ")),
            false,
        ));
    }
    found
}

/// Why a VM in this state is not migrated; None if it runs. A VM stays as its owner, or its guest, has left it.
pub(super) fn not_running(run_state: RunState) -> Option<(ServiceReason, String)> {
    let remedy = run_state.remedy();
    match run_state {
        RunState::Running => None,
        RunState::Paused => Some((
            ServiceReason::VmPaused,
            format!("the VM is paused, and a migration would resume it: {remedy} before"),
        )),
        RunState::Incoming | RunState::Stopped(_) => Some((
            ServiceReason::VmNotRunning,
            format!("the VM {}, and only one that runs is migrated: {remedy}", run_state.words()),
        )),
    }
}

/// The agent was restarted, and has not found the VM again yet.
pub(super) fn recovering(why: &str) -> Blocker {
    let message = format!("the agent was restarted, and is still finding the VM and its devices: {why}");
    blocker(ServiceReason::Recovering, message, false)
}

fn of_devices(devices: &[DeviceFeatures], driver: Driver) -> Vec<Blocker> {
    let mut found = Vec::new();
    let mut features = Vec::new();
    for DeviceFeatures { device, features: known } in devices {
        match known {
            Ok(known) => features.push(*known),
            Err(why) => found.push(blocker(
                ServiceReason::DeviceNotMigratable,
                format!("{device}: its driver does not report what it can migrate: {why}"),
                false,
            )),
        }
    }
    if features.len() < devices.len() {
        return found;
    }
    let named = |indices: &[usize]| -> String {
        let names: Vec<&str> = indices
            .iter()
            .filter_map(|index| devices.get(*index))
            .map(|known| known.device.as_str())
            .collect();
        names.join(", ")
    };
    match stop_plan(&features, PeerToPeer::Required) {
        Ok(_) => {}
        Err(NoStopPlan::NotMigratable(indices)) => found.push(blocker(
            ServiceReason::DeviceNotMigratable,
            format!(
                "{}: the driver does not advertise STOP_COPY, so the state cannot be read",
                named(&indices)
            ),
            false,
        )),
        Err(NoStopPlan::PeerToPeerUnsupported(indices)) => {
            let liftable = driver == Driver::Agent;
            let lift = match liftable {
                true => "peerToPeer: AssumeIsolated lifts this if these devices never talk to each other",
                false => "QEMU refuses such a VM, and peerToPeer: AssumeIsolated does not change that",
            };
            let message = format!(
                "{}: the driver does not support P2P, which a VM with several devices needs to stop them \
                 safely; {lift}",
                named(&indices)
            );
            found.push(blocker(ServiceReason::PeerToPeerUnsupported, message, liftable));
        }
    }
    found
}

/// A migration that does not go on holds the VM.
pub(super) fn held(hold: Hold) -> Blocker {
    blocker(hold.reason, hold.why, false)
}

/// The VMM does not answer, or its vm.json is broken.
pub(super) fn unreachable(why: &str) -> Vec<Blocker> {
    vec![blocker(ServiceReason::VmmUnreachable, why.to_owned(), false)]
}

fn blocker(reason: ServiceReason, message: String, lifted_by_assume_isolated: bool) -> Blocker {
    Blocker { reason: reason.as_str().to_owned(), message, lifted_by_assume_isolated }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::stopped::Stopped;

    const NO_P2P: Features = Features { p2p: false, ..Features::ALL };

    fn device(name: &str, features: Result<Features, &str>) -> DeviceFeatures {
        DeviceFeatures { device: name.to_owned(), features: features.map_err(str::to_owned) }
    }

    fn reasons(run_state: RunState, devices: &[DeviceFeatures]) -> Vec<(String, bool)> {
        let found = of_vm(run_state, devices, Driver::Agent, &[]);
        found.into_iter().map(|b| (b.reason, b.lifted_by_assume_isolated)).collect()
    }

    #[test]
    fn what_qemu_says_by_itself_is_reported_in_its_words() {
        let blocked =
            ["0000:3b:00.2: VFIO migration is not supported in kernel.".to_owned(), "no".to_owned()];
        let found = of_vm(RunState::Running, &[device("a", Ok(Features::ALL))], Driver::Vmm, &blocked);
        assert_eq!(
            found,
            [Blocker {
                reason: "MigrationBlocked".to_owned(),
                message: "QEMU would refuse it: 0000:3b:00.2: VFIO migration is not supported in kernel; no"
                    .to_owned(),
                lifted_by_assume_isolated: false,
            }]
        );
    }

    #[test]
    fn missing_p2p_cannot_be_lifted_where_qemu_drives_the_devices() {
        let devices = [device("a", Ok(Features::ALL)), device("b", Ok(NO_P2P))];
        let found = of_vm(RunState::Running, &devices, Driver::Vmm, &[]);
        assert_eq!((found.len(), found[0].lifted_by_assume_isolated), (1, false));
        // What QEMU says about the same comes after it.
        let reasons = of_vm(RunState::Running, &devices, Driver::Vmm, &["no P2P".to_owned()]);
        let reasons: Vec<&str> = reasons.iter().map(|blocker| blocker.reason.as_str()).collect();
        assert_eq!(reasons, ["PeerToPeerUnsupported", "MigrationBlocked"]);
        assert!(found[0].message.ends_with("AssumeIsolated does not change that"), "{found:?}");
    }

    #[test]
    fn nothing_blocks_a_running_vm_whose_devices_support_p2p() {
        let devices = [device("a", Ok(Features::ALL)), device("b", Ok(Features::ALL))];
        assert_eq!(reasons(RunState::Running, &devices), []);
    }

    #[test]
    fn each_obstacle_is_named_and_only_missing_p2p_can_be_lifted() {
        let p2p = [device("a", Ok(Features::ALL)), device("b", Ok(NO_P2P))];
        assert_eq!(reasons(RunState::Running, &p2p), [("PeerToPeerUnsupported".to_owned(), true)]);
        assert!(of_vm(RunState::Running, &p2p, Driver::Agent, &[])[0].message.starts_with("b: "));
        assert_eq!(reasons(RunState::Running, &p2p[1..]), []);
        let silent = [device("a", Err("ENOTTY")), device("b", Ok(NO_P2P))];
        assert_eq!(reasons(RunState::Running, &silent), [("DeviceNotMigratable".to_owned(), false)]);
        let without = [device("a", Ok(Features::default()))];
        assert_eq!(
            reasons(RunState::Paused, &without),
            [("VMPaused".to_owned(), false), ("DeviceNotMigratable".to_owned(), false)]
        );
    }

    #[test]
    fn a_vm_that_does_not_run_is_refused_by_what_it_does_and_with_what_to_do() {
        for (state, reason, says) in [
            (RunState::Paused, "VMPaused", ["paused", "resume it"]),
            (RunState::Stopped(Stopped::ShutDown), "VMNotRunning", ["shut down", "`system_reset`"]),
            (RunState::Stopped(Stopped::Suspended), "VMNotRunning", ["suspended", "`system_wakeup`"]),
            (RunState::Stopped(Stopped::Panicked), "VMNotRunning", ["panicked", "look why"]),
            (RunState::Stopped(Stopped::IoError), "VMNotRunning", ["I/O error", "mend the disk"]),
        ] {
            let found = of_vm(state, &[], Driver::Vmm, &[]);
            assert_eq!(found.len(), 1, "{found:?}");
            assert_eq!(found[0].reason, reason);
            assert!(says.iter().all(|says| found[0].message.contains(says)), "{found:?}");
        }
    }
}
