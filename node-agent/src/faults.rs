//! Faults on demand, for tests: compiled with the feature `faults` only, and never part of a release.
//!
//! The file that the environment variable `SLACKWATER_FAULTS_FILE` names holds one `name=value` a line. It is read each time that a
//! fault's place is passed, so a test sets and clears faults while the agent runs.
//!
//! | fault | what it does |
//! |---|---|
//! | `halt.source=<phase>`, `halt.destination=<phase>` | the hand-over stands still from that phase on: [`halted`] |
//! | `device.error=<STATE>[@<device>]` | a change to that state (or `read`, `write`, `reset`) fails: [`faulty`](crate::vfio::faulty) |
//! | `device.hang=<STATE>:<seconds>[@<device>]` | a change to that state takes so much longer |
//! | `blob.<index>`, `blob.vmm` | a blob is damaged on the way, or stalls ([`transfer`](crate::transfer)) |
//! | `ignore-device-model=yes` | a device of another model may be reserved |

use std::time::Duration;

use tracing::{info, warn};

/// Between two looks at the file of somebody who waits for a fault to be cleared.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// The value of a fault, if it is set now.
pub fn value(name: &str) -> Option<String> {
    let path = std::env::var_os("SLACKWATER_FAULTS_FILE")?;
    find(&std::fs::read_to_string(path).ok()?, name)
}

/// Whether a fault is set now, to whatever value.
pub fn is_set(name: &str) -> bool {
    value(name).is_some()
}

/// If `halt.<role>=<phase>` is set now, says so in the log and waits until it is not any more. What the value has behind the phase's
/// name is said, too: a test finds its own halt by it (`halt.source=stopping case-17`: "halted at stopping case-17").
pub async fn halted(role: &str, phase: &str) {
    let name = format!("halt.{role}");
    let is_here = || value(&name).filter(|value| value.split_whitespace().next() == Some(phase));
    let Some(here) = is_here() else { return };
    warn!(role, "halted at {here}");
    while is_here().is_some() {
        tokio::time::sleep(LOOK_AGAIN).await;
    }
    info!(role, "goes on from {here}");
}

/// Blocks for so long, or until the fault `name` is not `value` any more.
pub(crate) fn hang(name: &str, expected: &str, limit: Duration) {
    let begin = std::time::Instant::now();
    while begin.elapsed() < limit && value(name).as_deref() == Some(expected) {
        std::thread::sleep(LOOK_AGAIN);
    }
}

fn find(text: &str, name: &str) -> Option<String> {
    text.lines()
        .filter_map(|line| line.split_once('='))
        .find(|(key, _)| key.trim() == name)
        .map(|(_, value)| value.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_is_what_stands_behind_its_name() {
        let text = "blob.0=corrupt\nhalt.source = stopping case-17 \nnonsense\n";
        assert_eq!(find(text, "halt.source").as_deref(), Some("stopping case-17"));
        assert_eq!(find(text, "halt.destination"), None);
        assert_eq!(find(text, "halt"), None);
    }
}
