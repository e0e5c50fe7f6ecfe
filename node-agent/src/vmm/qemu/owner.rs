//! Who has stopped the VM while QEMU copies it, pure: QEMU for the rest of its migration, or the guest or
//! another client. At pre-switchover QEMU says `finish-migrate` in either case, so the events before it decide.
//!
//! ```text
//! QEMU itself      STOP ─▶ MIGRATION pre-switchover
//! another client   STOP ─▶ MIGRATION_PASS (QEMU goes on copying) ─▶ MIGRATION pre-switchover
//! the guest        SHUTDOWN, SUSPEND, GUEST_PANICKED, BLOCK_IO_ERROR, WATCHDOG ─▶ STOP ─▶ ...
//! ```
//!
//! Once QEMU has stopped the VM itself, it does not look at RAM again before `migrate-continue`.

use serde_json::Value;

use super::qmp::{EventKind, Notice, RunState as QemuState};
use crate::vmm::RunState;
use crate::vmm::stopped::Stopped;

/// What QEMU's events say about the VM since its migration began.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Stops {
    stopped: bool,
    by_others: Option<RunState>,
}

impl Stops {
    /// Takes a notice into account.
    pub(super) fn hear(&mut self, notice: &Notice) {
        let Notice::Event(event) = notice else { return };
        match &event.kind {
            EventKind::Stop => self.stopped = true,
            EventKind::Resume => *self = Self::default(),
            EventKind::MigrationPass { .. } if self.stopped => {
                self.by_others = self.by_others.or(Some(RunState::Paused));
            }
            EventKind::Shutdown { .. } => self.others(Stopped::ShutDown),
            EventKind::Other { name, data } => match (name.as_str(), action(data)) {
                ("SUSPEND", _) => self.others(Stopped::Suspended),
                ("GUEST_PANICKED", "pause") => self.others(Stopped::Panicked),
                ("BLOCK_IO_ERROR", "stop") => self.others(Stopped::IoError),
                ("WATCHDOG", "pause") => self.others(Stopped::Watchdog),
                ("WAKEUP", _) => {
                    self.by_others =
                        self.by_others.filter(|why| *why != RunState::Stopped(Stopped::Suspended));
                }
                _ => {}
            },
            _ => {}
        }
    }

    /// QEMU was asked what the VM does. What it says once it has stopped the VM itself decides nothing, and an
    /// event may have come since.
    pub(super) fn seen(&mut self, state: &QemuState) {
        match run_state(state) {
            RunState::Running | RunState::Stopped(Stopped::InUse | Stopped::MigratedAway) => {}
            state => self.by_others = Some(state),
        }
    }

    /// What the VM does, if somebody else has stopped it.
    pub(super) fn by_others(&self) -> Option<RunState> {
        self.by_others
    }

    fn others(&mut self, why: Stopped) {
        self.by_others = Some(RunState::Stopped(why));
    }
}

fn action(data: &Value) -> &str {
    data.get("action").and_then(Value::as_str).unwrap_or_default()
}

/// What the VM does, by QEMU's word.
pub(super) fn run_state(state: &QemuState) -> RunState {
    let stopped = match state {
        QemuState::Running => return RunState::Running,
        QemuState::InMigrate => return RunState::Incoming,
        QemuState::Paused => return RunState::Paused,
        QemuState::Prelaunch => Stopped::NotStarted,
        QemuState::Shutdown => Stopped::ShutDown,
        QemuState::Suspended => Stopped::Suspended,
        QemuState::GuestPanicked => Stopped::Panicked,
        QemuState::IoError => Stopped::IoError,
        QemuState::Watchdog => Stopped::Watchdog,
        QemuState::InternalError => Stopped::InternalError,
        QemuState::PostMigrate => Stopped::MigratedAway,
        QemuState::FinishMigrate
        | QemuState::Debug
        | QemuState::RestoreVm
        | QemuState::SaveVm
        | QemuState::Colo
        | QemuState::Other(_) => Stopped::InUse,
    };
    RunState::Stopped(stopped)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::qmp::Event;
    use super::*;

    fn other(name: &str, data: Value) -> EventKind {
        EventKind::Other { name: name.to_owned(), data }
    }

    fn pass() -> EventKind {
        EventKind::MigrationPass { pass: 3 }
    }

    fn after(events: &[EventKind]) -> Option<RunState> {
        let mut stops = Stops::default();
        for kind in events {
            stops.hear(&Notice::Event(Event { timestamp: None, kind: kind.clone() }));
        }
        stops.by_others()
    }

    #[test]
    fn a_vm_that_qemu_has_stopped_for_its_migration_was_stopped_by_nobody_else() {
        assert_eq!(after(&[pass(), pass(), EventKind::Stop]), None);
        let mut stops = Stops::default();
        stops.hear(&Notice::Event(Event { timestamp: None, kind: EventKind::Stop }));
        stops.seen(&QemuState::FinishMigrate);
        assert_eq!(stops.by_others(), None);
    }

    #[test]
    fn a_vm_of_which_qemu_still_copies_ram_after_it_stopped_was_stopped_by_another_client() {
        assert_eq!(after(&[pass(), EventKind::Stop, pass()]), Some(RunState::Paused));
        assert_eq!(after(&[EventKind::Stop, pass(), EventKind::Resume, pass()]), None);
    }

    #[test]
    fn what_the_guest_does_is_known_by_its_event() {
        let shutdown = EventKind::Shutdown { guest: true, reason: "guest-shutdown".to_owned() };
        for (event, why) in [
            (shutdown, Stopped::ShutDown),
            (other("SUSPEND", Value::Null), Stopped::Suspended),
            (other("GUEST_PANICKED", json!({"action": "pause"})), Stopped::Panicked),
            (other("BLOCK_IO_ERROR", json!({"action": "stop", "device": "d"})), Stopped::IoError),
            (other("WATCHDOG", json!({"action": "pause"})), Stopped::Watchdog),
        ] {
            assert_eq!(after(&[event.clone(), EventKind::Stop]), Some(RunState::Stopped(why)), "{event:?}");
            assert_eq!(after(&[event.clone(), EventKind::Stop, pass()]), Some(RunState::Stopped(why)));
        }
        for event in [
            other("GUEST_PANICKED", json!({"action": "run"})),
            other("BLOCK_IO_ERROR", json!({"action": "report"})),
            other("WATCHDOG", json!({"action": "reset"})),
            other("RTC_CHANGE", json!({"offset": 1})),
        ] {
            assert_eq!(after(&[event]), None);
        }
        assert_eq!(after(&[other("SUSPEND", Value::Null), other("WAKEUP", Value::Null)]), None);
    }

    #[test]
    fn what_qemu_says_of_a_vm_that_it_has_not_stopped_itself_counts() {
        for (state, found) in [
            (QemuState::Paused, Some(RunState::Paused)),
            (QemuState::Shutdown, Some(RunState::Stopped(Stopped::ShutDown))),
            (QemuState::GuestPanicked, Some(RunState::Stopped(Stopped::Panicked))),
            (QemuState::Running, None),
            (QemuState::FinishMigrate, None),
            (QemuState::PostMigrate, None),
        ] {
            let mut stops = Stops::default();
            stops.seen(&state);
            assert_eq!(stops.by_others(), found, "{state}");
        }
    }
}
