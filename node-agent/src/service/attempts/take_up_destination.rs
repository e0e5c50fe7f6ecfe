//! Taking up the destination's end of an attempt.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use slackwater_handover::Record;

use super::journalled_vmm::{self, Connection, FoundVmm, Route};
use super::reopen::{TakeUpError, reopen, restarted};
use super::resources::NodeResources;
use super::{entries, reservation};
use crate::attempt::destination::{DestinationParts, DestinationRun, Recovered, Site, Twin};
use crate::attempt::entry::{Entry, Pair};
use crate::host::devices::vfio_devices;
use crate::host::{vm, vms};
use crate::journal::Key;
use crate::vmm::Vmm;

/// Finds the twin, and goes on. Does nothing for the journal of a source.
pub(super) async fn take_up(node: &NodeResources, key: Key, entry: Entry) -> Result<(), TakeUpError> {
    let Some(request) = entries::reservation_of(&entry) else { return Ok(()) };
    let ledger = reopen(node, &key, &entry).await?;
    let all = tokio::task::spawn_blocking(|| vfio_devices(Path::new("/sys"))).await?;
    let all = all.map_err(|error| TakeUpError::ListDevices(error.into()))?.devices;
    let target = |pair: &Pair| all.iter().find(|device| device.name == pair.target).cloned();
    let devices: Vec<_> = entry.devices.iter().filter_map(target).collect();
    let json =
        vm::parse(&request.vm_json).map_err(|source| TakeUpError::VmJson { key: key.to_string(), source })?;
    let directory = vms::directory(&node.config.run_dir, &json);
    let socket = json.twin_socket_in(&directory).map_err(TakeUpError::Socket)?;
    let reference = entries::reference_of(&entry);
    let user = entries::twin_user_of(&entry).map(|number| node.twin_users.take_again(number));
    let site = reservation::site(node, &reference, &entries::vm_of(&entry), &request, &devices, user)?;
    let driver = site.driver();
    let route = || {
        Ok(Route {
            vmm: json.vmm.clone(),
            socket: socket.clone(),
            folder: directory.clone(),
            connection: Connection::Own,
        })
    };
    let found = match &entry.vmm {
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
