//! Every ordered pair of states.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use slackwater_handover::state::{Features, MigrationState, opens_data, path};
use slackwater_node_agent::vfio::device::Device;
use slackwater_node_agent::vfio::kernel::KernelDevice;
use slackwater_node_agent::vfio::os_error::OsError;

use crate::node;
use crate::trace::StepTrace;

/// What a request for a state leads to, by the table or by the driver.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Outcome {
    /// The states along the way, the last one included; none: refused.
    path: Option<Vec<&'static str>>,
    /// The state of the device afterwards.
    stands_in: &'static str,
    /// Whether a data descriptor was opened.
    opens_data: bool,
}

/// One pair.
#[derive(Debug, Serialize)]
struct Pair {
    from: &'static str,
    to: &'static str,
    /// By the table.
    expected: Option<Outcome>,
    /// By the driver; none: `from` cannot be reached without a fault.
    found: Option<Outcome>,
    /// What the driver said.
    refusal: Option<String>,
    agree: bool,
}

/// The sum.
#[derive(Debug, Default, Serialize)]
struct Sum {
    device: String,
    features: String,
    blob_bytes: usize,
    /// Whether the states along the way were taken from the kernel's trace.
    traced: bool,
    pairs_asked: usize,
    pairs_unreachable: usize,
    mismatches: usize,
}

/// Walks, prints, and says whether the driver agrees with the table everywhere.
pub(crate) fn walk(name: &str, tracefs: Option<&Path>) -> Result<bool> {
    let mut device = node::fresh(name)?;
    let blob = node::save(&mut device)?;
    let trace = tracefs.map(StepTrace::start).transpose()?;
    let features = device.features();
    let mut sum = Sum {
        device: name.to_owned(),
        features: features.to_string(),
        blob_bytes: blob.len(),
        traced: trace.is_some(),
        ..Sum::default()
    };
    for from in MigrationState::ALL {
        for to in MigrationState::ALL {
            let pair = match from {
                // No request leads into ERROR: only a device that fails does.
                MigrationState::Error => Pair::unreachable(to),
                _ => ask(&mut device, &blob, from, to, trace.as_ref())
                    .with_context(|| format!("{from} -> {to}"))?,
            };
            sum.pairs_asked += usize::from(pair.found.is_some());
            sum.pairs_unreachable += usize::from(pair.found.is_none());
            sum.mismatches += usize::from(!pair.agree);
            println!("{}", serde_json::to_string(&pair)?);
        }
    }
    device.reset()?;
    println!("{}", serde_json::to_string(&sum)?);
    Ok(sum.mismatches == 0)
}

/// Takes the device to `from`, requests `to` from the driver itself, ignoring the table, and reads the
/// result.
fn ask(
    device: &mut KernelDevice,
    blob: &[u8],
    from: MigrationState,
    to: MigrationState,
    trace: Option<&StepTrace>,
) -> Result<Pair> {
    device.reset()?;
    device.set_state(from)?;
    if from == MigrationState::Resuming {
        device.write_data(blob)?;
    }
    // A stream that is open now must not be taken for one that the request opens.
    device.close_data();
    let traced = trace.map(|trace| trace.clear().map(|()| trace)).transpose()?;
    let answer = device.request(to);
    let opened = device.has_data_stream();
    let passed = traced.map(StepTrace::passed).transpose()?;
    let stands_in = device.state()?;

    let expected = expected(device.features(), from, to, passed.is_some());
    let found = Outcome {
        path: answer.is_ok().then(|| way(passed.as_deref(), stands_in, from == to)),
        stands_in: stands_in.name(),
        opens_data: opened,
    };
    if let (Some(passed), Err(_)) = (&passed, &answer) {
        ensure!(passed == &[from], "refused after passing {passed:?}");
    }
    let agree = expected == found;
    Ok(Pair {
        from: from.name(),
        to: to.name(),
        expected: Some(expected),
        found: Some(found),
        refusal: answer.err().map(|errno: OsError| errno.to_string()),
        agree,
    })
}

/// By the table. Without a trace only the end of the path can be seen.
fn expected(features: Features, from: MigrationState, to: MigrationState, traced: bool) -> Outcome {
    match path(features, from, to) {
        Ok(states) => {
            let skip = if traced { 0 } else { states.len().saturating_sub(1) };
            Outcome {
                path: Some(states.into_iter().skip(skip).map(MigrationState::name).collect()),
                stands_in: to.name(),
                opens_data: opens_data(from, to),
            }
        }
        Err(_) => Outcome { path: None, stands_in: from.name(), opens_data: false },
    }
}

/// By the driver: each state from which it asked for the next one, without the first, and the final state.
fn way(passed: Option<&[MigrationState]>, stands_in: MigrationState, at_once: bool) -> Vec<&'static str> {
    let between = passed.unwrap_or_default().iter().skip(1).copied();
    let end = (!at_once || passed.is_some_and(|passed| !passed.is_empty())).then_some(stands_in);
    between.chain(end).map(MigrationState::name).collect()
}

impl Pair {
    fn unreachable(to: MigrationState) -> Self {
        let from = MigrationState::Error.name();
        Self { from, to: to.name(), expected: None, found: None, refusal: None, agree: true }
    }
}
