//! Taking up the destination's end of an attempt.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use slackwater_handover::Record;
use tokio::time::timeout;
use tracing::warn;

use super::journalled_vmm::{self, Connection, FoundVmm, Route};
use super::reopen::{TakeUpError, reopen, restarted};
use super::resources::NodeResources;
use super::{entries, reservation};
use crate::attempt::destination::{DestinationParts, DestinationRun, Recovered, Site, Twin};
use crate::attempt::entry::{Entry, Pair};
use crate::host::devices::{Device, vfio_devices};
use crate::host::vm;
use crate::journal::Key;
use crate::vmm::Vmm;

/// For so long the twin of a reservation that is given back is looked for: its devices are reset then.
const LOOK_LIMIT: Duration = Duration::from_secs(10);

/// Finds the twin, and goes on. Does nothing for the journal of a source.
pub(super) async fn take_up(node: &NodeResources, key: Key, entry: Entry) -> Result<(), TakeUpError> {
    let Some(request) = entries::reservation_of(&entry) else { return Ok(()) };
    let given_back = matches!(entry.record, Record::Reserved | Record::Discarded);
    let json = match vm::parse(&request.vm_json) {
        Ok(json) => Some(json),
        Err(error) if given_back => {
            warn!(migration = entry.migration_id, %error, "its twin cannot be asked anything; it is ended");
            None
        }
        Err(source) => return Err(TakeUpError::VmJson { key: key.to_string(), source }),
    };
    let devices = devices_still_here(&entry).await?;
    let reference = entries::reference_of(&entry);
    let vm = entries::vm_of(&entry);
    let user = entries::twin_user_of(&entry).map(|number| node.twin_users.take_again(number));
    let site = reservation::site_of_journal(node, &reference, &vm, &request, &devices, json.as_ref(), user);
    let site = site.map_err(TakeUpError::Socket)?;
    let ledger = reopen(node, &key, &entry).await?;
    let driver = site.driver();
    let route = || {
        Ok(Route {
            vmm: site.plan.vmm.clone(),
            socket: site.plan.socket.clone(),
            folder: site.plan.directory.clone(),
            connection: Connection::Own,
        })
    };
    let found = match &entry.vmm {
        _ if json.is_none() => None,
        // It only has to be made known, whatever it does now.
        _ if entry.record == Record::Running => None,
        // Whatever its twin says: its process ends with its cgroup.
        Some(process) if given_back => {
            let found = journalled_vmm::find(route, node, &entry.migration_id, process);
            timeout(LOOK_LIMIT, found).await.unwrap_or_else(|_| {
                warn!(migration = reference.id, "the twin of a reservation does not answer; it is ended");
                None
            })
        }
        Some(process) => journalled_vmm::find(route, node, &entry.migration_id, process).await,
        // A twin that loads, or may have run, was journalled before.
        None if matches!(entry.record, Record::Loaded | Record::Starting) => {
            return Err(TakeUpError::NoProcess);
        }
        None => None,
    };
    let (twin, found) = match found {
        Some(FoundVmm { vmm, devices, states }) => {
            (Some(Twin { vmm: vmm as Arc<dyn Vmm>, devices, process: entry.vmm.clone() }), states)
        }
        None => (None, Vec::new()),
    };
    let site: Arc<dyn Site> = Arc::new(site);
    let run = DestinationRun::start(DestinationParts {
        migration_id: entry.migration_id.clone(),
        features: Vec::new(),
        driver,
        site,
        silence_timeout: Duration::from_millis(request.silence_timeout_ms),
        ledger,
        recovered: Some(Recovered {
            record: entry.record,
            twin,
            found,
            failure: entry.failure().unwrap_or_else(restarted),
        }),
    });
    node.join_destination(&reference, &run, request);
    Ok(())
}

/// The reserved devices that are there. The network identities alone need them: one that is missing, or not
/// there yet, keeps nothing else from going on.
async fn devices_still_here(entry: &Entry) -> Result<Vec<Device>, TakeUpError> {
    let all = match tokio::task::spawn_blocking(|| vfio_devices(Path::new("/sys"))).await? {
        Ok(all) => all.devices,
        Err(error) => {
            warn!(migration = entry.migration_id, %error, "the devices cannot be listed; it goes on without");
            Vec::new()
        }
    };
    let target = |pair: &Pair| {
        let found = all.iter().find(|device| device.name == pair.target).cloned();
        if found.is_none() {
            warn!(migration = entry.migration_id, device = pair.target, "a reserved device is not there");
        }
        found
    };
    Ok(entry.devices.iter().filter_map(target).collect())
}

#[cfg(test)]
#[path = "take_up_destination_tests.rs"]
mod tests;
