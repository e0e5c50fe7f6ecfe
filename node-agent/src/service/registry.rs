//! What is under way on this node, and who may have a say in it.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use slackwater_proto::node::{MigrationRef, ReserveRequest, VmRef};
use tokio::sync::watch;

use crate::attempt::destination::DestinationRun;
use crate::attempt::source::SourceRun;

/// Migrations that have ended and are still remembered, so that a late question gets its answer.
pub(super) const REMEMBERED: usize = 1000;

/// Why a call is refused before anything is done for it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Stale {
    /// A newer attempt has been seen.
    #[error("migration {id}: attempt {given} is over, attempt {known} has been seen")]
    Attempt {
        /// The migration.
        id: String,
        /// As the caller says.
        given: u32,
        /// The newest seen.
        known: u32,
    },
    /// Another operator has taken over.
    #[error("operator epoch {given} is over, epoch {known} has been seen: another operator leads now")]
    Epoch {
        /// As the caller says.
        given: u64,
        /// The newest seen.
        known: u64,
    },
}

/// Something that a migration needs is held by another.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what} is held by migration {holder}")]
pub struct Held {
    /// A device or a VM, for a person.
    pub what: String,
    /// The id of the migration that has it.
    pub holder: String,
}

/// This node's part in an attempt.
#[derive(Clone, Debug)]
pub enum Part {
    /// The VM leaves from here.
    Source(SourceRun),
    /// The VM lands here.
    Destination(DestinationRun, Box<ReserveRequest>),
    /// An agent that has begun again is still finding the VM and its devices.
    Recovering,
    /// What was journalled cannot be read, or not be acted by: nothing is guessed. In words, with the file.
    Unreadable(String),
}

#[derive(Debug)]
struct Known {
    attempt: u32,
    part: Option<Part>,
    order: u64,
}

#[derive(Debug, Default)]
struct Inner {
    migrations: HashMap<String, Known>,
    highest_epoch: u64,
    counted: u64,
    vms: HashMap<(String, String), String>,
    devices: HashMap<String, String>,
}

/// All migrations that this node takes part in.
#[derive(Debug)]
pub struct Registry {
    inner: Mutex<Inner>,
    changed: watch::Sender<u64>,
}

impl Default for Registry {
    fn default() -> Self {
        Self { inner: Mutex::default(), changed: watch::Sender::new(0) }
    }
}

impl Registry {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn touch(&self) {
        self.changed.send_modify(|count| *count += 1);
    }

    /// Changes whenever a VM or a device is taken or given back.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// The highest operator epoch that an earlier agent has seen.
    pub fn restore_epoch(&self, epoch: u64) {
        let mut inner = self.lock();
        inner.highest_epoch = inner.highest_epoch.max(epoch);
    }

    /// The highest operator epoch that has been seen.
    pub fn highest_epoch(&self) -> u64 {
        self.lock().highest_epoch
    }

    /// Refuses who is not up to date, and remembers the newest, which the caller has made durable.
    ///
    /// # Errors
    /// [`Stale`].
    pub fn fence(&self, reference: &MigrationRef) -> Result<(), Stale> {
        let mut inner = self.lock();
        let (given, known) = (reference.operator_epoch, inner.highest_epoch);
        if given < known {
            return Err(Stale::Epoch { given, known });
        }
        if let Some(entry) = inner.migrations.get(&reference.id)
            && reference.attempt < entry.attempt
        {
            let (id, given, known) = (reference.id.clone(), reference.attempt, entry.attempt);
            return Err(Stale::Attempt { id, given, known });
        }
        inner.highest_epoch = given;
        Ok(())
    }

    /// This node's part in an attempt, if it has one.
    pub fn part(&self, id: &str, attempt: u32) -> Option<Part> {
        let inner = self.lock();
        let known = inner.migrations.get(id)?;
        match &known.part {
            // Which attempt it is about cannot be known.
            Some(part @ Part::Unreadable(_)) => Some(part.clone()),
            part if known.attempt == attempt => part.clone(),
            _ => None,
        }
    }

    /// This node takes part.
    pub fn join(&self, reference: &MigrationRef, part: Part) {
        let mut inner = self.lock();
        inner.counted += 1;
        let order = inner.counted;
        let known = Known { attempt: reference.attempt, part: Some(part), order };
        inner.migrations.insert(reference.id.clone(), known);
        while inner.migrations.len() > REMEMBERED {
            let busy: Vec<String> = inner.vms.values().chain(inner.devices.values()).cloned().collect();
            let oldest = inner
                .migrations
                .iter()
                .filter(|(id, _)| !busy.contains(id))
                .min_by_key(|(_, known)| known.order)
                .map(|(id, _)| id.clone());
            match oldest {
                Some(id) => inner.migrations.remove(&id),
                None => break,
            };
        }
    }

    /// What is known of a migration cannot be used: whoever asks for any attempt of it hears why.
    pub fn hold_unreadable(&self, id: &str, why: String) {
        let mut inner = self.lock();
        inner.counted += 1;
        let order = inner.counted;
        let attempt = inner.migrations.get(id).map_or(0, |known| known.attempt);
        inner.migrations.insert(id.to_owned(), Known { attempt, part: Some(Part::Unreadable(why)), order });
    }

    /// Takes a VM and devices for a migration: all of them or none.
    ///
    /// # Errors
    /// Names the first that somebody else holds.
    pub fn take<'a>(
        &self,
        id: &str,
        vm: &VmRef,
        devices: impl IntoIterator<Item = &'a str> + Clone,
    ) -> Result<(), Held> {
        let mut inner = self.lock();
        let key = (vm.namespace.clone(), vm.name.clone());
        if let Some(holder) = inner.vms.get(&key) {
            let what = format!("VM {}/{}", vm.namespace, vm.name);
            return Err(Held { what, holder: holder.clone() });
        }
        for device in devices.clone() {
            if let Some(holder) = inner.devices.get(device) {
                return Err(Held { what: format!("device {device}"), holder: holder.clone() });
            }
        }
        inner.vms.insert(key, id.to_owned());
        inner.devices.extend(devices.into_iter().map(|device| (device.to_owned(), id.to_owned())));
        drop(inner);
        self.touch();
        Ok(())
    }

    /// Gives back all that a migration has taken.
    pub fn give_back(&self, id: &str) {
        let mut inner = self.lock();
        inner.vms.retain(|_, holder| holder != id);
        inner.devices.retain(|_, holder| holder != id);
        drop(inner);
        self.touch();
    }

    /// The migration that holds a VM.
    pub fn holder_of_vm(&self, namespace: &str, name: &str) -> Option<String> {
        self.lock().vms.get(&(namespace.to_owned(), name.to_owned())).cloned()
    }

    /// The migration that holds a device.
    pub fn holder_of_device(&self, device: &str) -> Option<String> {
        self.lock().devices.get(device).cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reference(attempt: u32, operator_epoch: u64) -> MigrationRef {
        MigrationRef { id: "m".to_owned(), attempt, operator_epoch }
    }

    fn vm(name: &str) -> VmRef {
        VmRef { namespace: "demo".to_owned(), name: name.to_owned() }
    }

    #[test]
    fn an_older_operator_is_refused_once_a_newer_has_been_heard() {
        let registry = Registry::default();
        assert_eq!(registry.fence(&reference(1, 4)), Ok(()));
        assert_eq!(registry.fence(&reference(1, 5)), Ok(()));
        assert_eq!(registry.fence(&reference(1, 4)), Err(Stale::Epoch { given: 4, known: 5 }));
    }

    #[test]
    fn a_vm_and_devices_are_taken_all_or_none_and_given_back_together() {
        let registry = Registry::default();
        assert_eq!(registry.take("m1", &vm("one"), ["a", "b"]), Ok(()));
        let held = registry.take("m2", &vm("two"), ["c", "b"]).unwrap_err();
        assert_eq!(held.to_string(), "device b is held by migration m1");
        assert_eq!(registry.holder_of_device("c"), None);
        assert_eq!(registry.holder_of_vm("demo", "two"), None);
        let held = registry.take("m2", &vm("one"), []).unwrap_err();
        assert_eq!(held.to_string(), "VM demo/one is held by migration m1");
        registry.give_back("m1");
        assert_eq!(registry.take("m2", &vm("one"), ["a", "b"]), Ok(()));
    }
}
