//! The fault points of a program that tests run: what a test sets, happens.
//!
//! The file that the environment variable `SLACKWATER_FAULTS_FILE` names holds one `name=value` per line.
//! Every fault point reads it again, so a test sets and clears faults while the agent runs.
//!
//! | fault | what it does |
//! |---|---|
//! | `halt.source=<phase>`, `halt.destination=<phase>` | the hand-over halts when it enters that phase |
//! | `device.error=<STATE>[@<device>]` | a change to that state fails: [`device`] |
//! | `device.hang=<STATE>:<seconds>[@<device>]` | a change to that state takes that much longer, or `forever`: [`device`] |
//! | `blob.<index>`, `blob.vmm` | a blob is damaged on the way, or stalls: [`blob`] |
//! | `ignore-device-model=yes` | a device of another model may be reserved |

use std::fmt::Debug;
use std::time::{Duration, Instant};

use tracing::{info, warn};

use super::End;
use crate::vfio::device::Device;

mod blob;
mod device;
mod names;

pub(crate) use self::blob::BlobFaults;
use self::device::FaultyDevice;

/// Pause between two reads of the file while a fault lasts.
const REREAD_AFTER: Duration = Duration::from_millis(20);

/// The value of a fault, if it is set now.
fn value(name: &str) -> Option<String> {
    let path = std::env::var_os(names::FILE)?;
    find(&std::fs::read_to_string(path).ok()?, name)
}

/// If `halt.<end>=<phase>` is set now, logs it and waits until it is cleared. The log repeats whatever
/// follows the phase in the value, so that a test finds its own halt (`halt.source=stopping case-17`: "halted
/// at stopping case-17").
pub(crate) async fn halt(end: End, phase: impl Debug) {
    let (role, name) = match end {
        End::Source => ("source", names::HALT_SOURCE),
        End::Destination => ("destination", names::HALT_DESTINATION),
    };
    let phase = format!("{phase:?}").to_lowercase();
    let is_here = || value(name).filter(|value| value.split_whitespace().next() == Some(phase.as_str()));
    let Some(here) = is_here() else { return };
    warn!(role, "halted at {here}");
    while is_here().is_some() {
        tokio::time::sleep(REREAD_AFTER).await;
    }
    info!(role, "goes on from {here}");
}

/// Blocks while `device.hang=probe:<seconds>[@<device>]` is set for this device.
pub(crate) fn hang_in_probe(device: &str) {
    device::hang_in_probe(device);
}

/// Whether a device of another model may be reserved.
pub(crate) fn ignores_device_model() -> bool {
    value(names::IGNORE_DEVICE_MODEL).is_some()
}

/// The device, with the faults that are set for it.
pub(crate) fn serve_device(device: impl Device + 'static) -> FaultyDevice {
    FaultyDevice::new(device)
}

/// Blocks for `limit`, or until the fault `name` no longer has this value. `None`: until then.
fn hang(name: &str, expected: &str, limit: Option<Duration>) {
    let began = Instant::now();
    while limit.is_none_or(|limit| began.elapsed() < limit) && value(name).as_deref() == Some(expected) {
        std::thread::sleep(REREAD_AFTER);
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
    fn a_fault_has_the_value_after_its_name() {
        let text = "blob.0=corrupt\nhalt.source = stopping case-17 \nnonsense\n";
        assert_eq!(find(text, "halt.source").as_deref(), Some("stopping case-17"));
        assert_eq!(find(text, "halt.destination"), None);
        assert_eq!(find(text, "halt"), None);
    }
}
