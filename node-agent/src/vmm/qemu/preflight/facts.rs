//! The facts about the QEMU of a running VM.
//!
//! All of it is answered by QEMU's main loop without disturbing a vCPU. Features are asked one by one,
//! because the commands that list all at once do not list what this guest sees: `query-cpu-model-expansion`
//! is about models, and `feature-words` leaves out MSRs.

use std::collections::BTreeSet;

use futures::{StreamExt, TryStreamExt, stream};
use serde_json::Value;
use tracing::debug;

use super::{Accelerator, Facts, features};
use crate::vmm::qemu::qmp::commands::{QomGet, QomListProperties, QueryCpusFast, QueryKvm};
use crate::vmm::qemu::qmp::{QmpClient, QmpError};

/// Concurrent queries: few, so that other callers of QEMU do not wait for them.
const CONCURRENT_QUERIES: usize = 8;

/// Queries QEMU.
///
/// # Errors
/// Any [`QmpError`].
pub async fn collect(qmp: &QmpClient) -> Result<Facts, QmpError> {
    let version = qmp.version();
    let machine = get(qmp, "/machine", "type").await?;
    let machine = machine.as_str().unwrap_or_default();
    let kvm = qmp.execute(QueryKvm).await?.enabled;
    Ok(Facts {
        version: version.qemu.to_string(),
        package: version.package,
        machine_type: machine.strip_suffix("-machine").unwrap_or(machine).to_owned(),
        accelerator: Some(if kvm { Accelerator::Kvm } else { Accelerator::Tcg }),
        cpu_features: cpu_features(qmp).await?,
    })
}

/// The features of the first vCPU: all vCPUs have the same.
async fn cpu_features(qmp: &QmpClient) -> Result<BTreeSet<String>, QmpError> {
    let cpus = qmp.execute(QueryCpusFast).await?;
    let Some(cpu) = cpus.first().map(|cpu| cpu.qom_path.clone()) else { return Ok(BTreeSet::new()) };
    let typename = get(qmp, &cpu, "type").await?.as_str().unwrap_or_default().to_owned();
    let properties = qmp.execute(QomListProperties { typename }).await?;
    let (nested, others): (Vec<String>, Vec<String>) =
        features::names(&properties).into_iter().partition(|name| features::is_nested(name));
    let mut set = which_are_set(qmp, &cpu, others).await?;
    if set.contains("vmx") {
        set.extend(which_are_set(qmp, &cpu, nested).await?);
    }
    Ok(set)
}

async fn which_are_set(qmp: &QmpClient, cpu: &str, names: Vec<String>) -> Result<BTreeSet<String>, QmpError> {
    let ask = |name: String| async move {
        match get(qmp, cpu, &name).await {
            Ok(value) => Ok((value == Value::Bool(true)).then(|| features::plain(&name))),
            // A feature that cannot be read cannot be compared.
            Err(error @ QmpError::Refused { .. }) => {
                debug!(name, %error, "QEMU does not report a CPU feature");
                Ok(None)
            }
            Err(error) => Err(error),
        }
    };
    stream::iter(names)
        .map(ask)
        .buffered(CONCURRENT_QUERIES)
        .try_filter_map(|found| async { Ok(found) })
        .try_collect()
        .await
}

async fn get(qmp: &QmpClient, path: &str, property: &str) -> Result<Value, QmpError> {
    qmp.execute(QomGet { path: path.to_owned(), property: property.to_owned() }).await
}
