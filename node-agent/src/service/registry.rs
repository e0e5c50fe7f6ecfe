//! The migrations that this node takes part in, and which calls are out of date.

use std::collections::{HashMap, HashSet};

use parking_lot::Mutex;
use slackwater_proto::node::{MigrationRef, ReserveRequest, VmRef};
use slackwater_proto::refusal::{Detail, Refusal};
use tokio::sync::watch;

use super::reason::ServiceReason;

use crate::attempt::destination::DestinationRun;
use crate::attempt::source::SourceRun;
use crate::journal::{Key, Role};

/// At most this many migrations whose end has been acknowledged are remembered, here and in the journal: only
/// a very late question is about them.
pub(super) const MAX_REMEMBERED_MIGRATIONS: usize = 1000;

/// At most this many others: their ends may still be asked for. Beyond that, no migration begins.
pub(super) const MAX_UNACKNOWLEDGED: usize = 4096;

/// A call that is out of date: it is refused before anything is done for it.
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

impl From<Stale> for Refusal {
    fn from(stale: Stale) -> Self {
        let message = stale.to_string();
        match stale {
            Stale::Attempt { .. } => Self::precondition(ServiceReason::AttemptOver, message),
            Stale::Epoch { known, .. } => Self::precondition(ServiceReason::OperatorReplaced, message)
                .with_detail(Detail::KnownEpoch(known)),
        }
    }
}

/// Something that a migration needs is held by another.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what} is held by migration {holder}{}", why.as_ref().map(|why| format!(": {why}")).unwrap_or_default())]
pub struct Held {
    /// A device or a VM, for a person.
    pub what: String,
    /// The id of the migration that has it.
    pub holder: String,
    /// Why that holds it for longer than it takes.
    pub why: Option<String>,
}

/// Why a migration that does not go on holds its VM and devices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hold {
    /// For a condition.
    pub(super) reason: ServiceReason,
    /// For a person.
    pub(super) why: String,
}

impl From<Held> for Refusal {
    fn from(held: Held) -> Self {
        Self::precondition(ServiceReason::MigrationInProgress, held.to_string())
    }
}

/// The end of an attempt on this node.
#[derive(Clone, Debug)]
pub enum LocalEnd {
    /// The VM leaves from here.
    Source(SourceRun),
    /// The VM lands here.
    Destination(DestinationRun, Box<ReserveRequest>),
    /// The agent was restarted, and is still finding the VM and its devices.
    Recovering,
    /// What was journalled cannot be read or used: nothing is guessed. The message names the file.
    Unreadable(String),
    /// Another open journal is about the same VM or device. The message names the files.
    Conflicting(String),
}

impl LocalEnd {
    /// The name of its journal, if it has one that can be used.
    fn key(&self, id: &str) -> Option<Key> {
        let role = match self {
            Self::Source(_) => Role::Source,
            Self::Destination(..) => Role::Destination,
            Self::Recovering | Self::Unreadable(_) | Self::Conflicting(_) => return None,
        };
        Key::new(id, role).ok()
    }
}

#[derive(Debug)]
struct Migration {
    attempt: u32,
    part: LocalEnd,
    order: u64,
    /// The operator knows how it ended.
    acknowledged: bool,
}

#[derive(Debug, Default)]
struct State {
    migrations: HashMap<String, Migration>,
    highest_epoch: u64,
    counted: u64,
    /// What a migration that is being taken up again waits for.
    waits: HashMap<String, String>,
    /// Migrations that are being taken up again, and whose VM leaves from here.
    sources: HashSet<String>,
    vms: HashMap<(String, String), String>,
    devices: HashMap<String, String>,
    /// By migration.
    holds: HashMap<String, Hold>,
}

impl State {
    fn held(&self, what: String, holder: &str) -> Held {
        let why = self.holds.get(holder).map(|hold| hold.why.clone());
        Held { what, holder: holder.to_owned(), why }
    }
}

/// All migrations that this node takes part in.
#[derive(Debug)]
pub struct Registry {
    state: Mutex<State>,
    changed: watch::Sender<u64>,
}

impl Default for Registry {
    fn default() -> Self {
        Self { state: Mutex::default(), changed: watch::Sender::new(0) }
    }
}

impl Registry {
    fn touch(&self) {
        self.changed.send_modify(|count| *count += 1);
    }

    /// Changes whenever a VM or a device is taken or given back.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// The highest operator epoch that an earlier agent has seen.
    pub fn restore_epoch(&self, epoch: u64) {
        let mut state = self.state.lock();
        state.highest_epoch = state.highest_epoch.max(epoch);
    }

    /// The highest operator epoch that has been seen.
    pub fn highest_epoch(&self) -> u64 {
        self.state.lock().highest_epoch
    }

    /// Refuses a call that is out of date, and remembers the newest epoch, which the caller has made durable.
    ///
    /// # Errors
    /// [`Stale`].
    pub fn fence(&self, reference: &MigrationRef) -> Result<(), Stale> {
        let mut state = self.state.lock();
        let (given, known) = (reference.operator_epoch, state.highest_epoch);
        if given < known {
            return Err(Stale::Epoch { given, known });
        }
        if let Some(entry) = state.migrations.get(&reference.id)
            && reference.attempt < entry.attempt
        {
            let (id, given, known) = (reference.id.clone(), reference.attempt, entry.attempt);
            return Err(Stale::Attempt { id, given, known });
        }
        state.highest_epoch = given;
        Ok(())
    }

    /// The end of an attempt on this node, if it has one.
    pub fn part(&self, id: &str, attempt: u32) -> Option<LocalEnd> {
        let state = self.state.lock();
        let migration = state.migrations.get(id)?;
        // Which attempt an unreadable journal is about cannot be known.
        let held = matches!(migration.part, LocalEnd::Unreadable(_) | LocalEnd::Conflicting(_));
        let is_about_it = migration.attempt == attempt || held;
        is_about_it.then(|| migration.part.clone())
    }

    /// As [`Registry::part`], but only one that can be asked.
    ///
    /// # Errors
    /// UNAVAILABLE while it is being taken up again; FAILED_PRECONDITION if its journal cannot be used.
    pub(super) fn usable_part(&self, id: &str, attempt: u32) -> Result<Option<LocalEnd>, Refusal> {
        match self.part(id, attempt) {
            Some(LocalEnd::Recovering) => {
                let why = self.waits_for(id).map(|why| format!(" ({why})")).unwrap_or_default();
                let message = format!(
                    "the agent was restarted, and is still finding the VM and its devices{why}; try again"
                );
                Err(Refusal::unavailable(ServiceReason::Recovering, message))
            }
            Some(LocalEnd::Unreadable(why)) => {
                Err(Refusal::precondition(ServiceReason::JournalUnreadable, why))
            }
            Some(LocalEnd::Conflicting(why)) => {
                Err(Refusal::precondition(ServiceReason::JournalsConflict, why))
            }
            part => Ok(part),
        }
    }

    /// This node takes part.
    pub fn join(&self, reference: &MigrationRef, part: LocalEnd) {
        self.put(&reference.id, reference.attempt, part);
    }

    fn put(&self, id: &str, attempt: u32, part: LocalEnd) {
        let mut state = self.state.lock();
        state.counted += 1;
        state.waits.remove(id);
        let migration = Migration { attempt, part, order: state.counted, acknowledged: false };
        state.migrations.insert(id.to_owned(), migration);
    }

    /// The operator knows how an attempt ended. Returns the oldest of such migrations, which are not remembered
    /// any more.
    pub(super) fn acknowledge(&self, id: &str, attempt: u32) -> Vec<Key> {
        let mut state = self.state.lock();
        if let Some(migration) = state.migrations.get_mut(id).filter(|known| known.attempt == attempt) {
            migration.acknowledged = true;
        }
        let busy: HashSet<&String> = state.vms.values().chain(state.devices.values()).collect();
        let over = state.migrations.iter().filter(|(id, known)| known.acknowledged && !busy.contains(id));
        let mut over: Vec<(u64, String)> = over.map(|(id, known)| (known.order, id.clone())).collect();
        over.sort_unstable();
        over.truncate(over.len().saturating_sub(MAX_REMEMBERED_MIGRATIONS));
        over.into_iter().filter_map(|(_, id)| state.migrations.remove(&id)?.part.key(&id)).collect()
    }

    /// The migrations that are under way here, or whose end nobody has acknowledged.
    pub(super) fn unacknowledged(&self) -> usize {
        self.state.lock().migrations.values().filter(|migration| !migration.acknowledged).count()
    }

    /// The journal of a migration cannot be used: a call about any attempt of it is refused with `why`.
    pub fn hold_unreadable(&self, id: &str, why: String) {
        self.explain(id, Hold { reason: ServiceReason::JournalUnreadable, why: why.clone() });
        self.put_aside(id, LocalEnd::Unreadable(why));
    }

    /// Another open journal is about the same VM or device: nothing is done for either.
    pub(super) fn hold_conflicting(&self, id: &str, why: String) {
        self.explain(id, Hold { reason: ServiceReason::JournalsConflict, why: why.clone() });
        self.put_aside(id, LocalEnd::Conflicting(why));
    }

    fn put_aside(&self, id: &str, part: LocalEnd) {
        let attempt = self.state.lock().migrations.get(id).map_or(0, |migration| migration.attempt);
        self.put(id, attempt, part);
    }

    /// Why a migration that does not go on holds what it does.
    pub(super) fn explain(&self, id: &str, hold: Hold) {
        self.state.lock().holds.insert(id.to_owned(), hold);
        self.touch();
    }

    /// It goes on.
    pub(super) fn explained(&self, id: &str) {
        if self.state.lock().holds.remove(id).is_some() {
            self.touch();
        }
    }

    /// The explanation, if there is one.
    pub(super) fn explanation(&self, id: &str) -> Option<Hold> {
        self.state.lock().holds.get(id).cloned()
    }

    /// A migration that is being taken up again waits for something: the answers about it say for what.
    pub(super) fn waits(&self, id: &str, why: String) {
        self.state.lock().waits.insert(id.to_owned(), why);
        self.touch();
    }

    /// What a migration that is being taken up again waits for, if it does.
    pub(super) fn waits_for(&self, id: &str) -> Option<String> {
        self.state.lock().waits.get(id).cloned()
    }

    /// The VM of a migration that is being taken up again leaves from here.
    pub(super) fn has_its_vm_here(&self, id: &str) {
        self.state.lock().sources.insert(id.to_owned());
    }

    /// The VMs that leave from here, each with its migration: they are here, whatever else shows them.
    pub(super) fn leaving(&self) -> Vec<(VmRef, String)> {
        let state = self.state.lock();
        let is_source = |id: &String| {
            let part = state.migrations.get(id).map(|migration| &migration.part);
            state.sources.contains(id) || matches!(part, Some(LocalEnd::Source(_)))
        };
        let here = state.vms.iter().filter(|(_, id)| is_source(id));
        here.map(|((namespace, name), id)| {
            (VmRef { namespace: namespace.clone(), name: name.clone() }, id.clone())
        })
        .collect()
    }

    /// Takes a VM and devices for a migration: all of them or none.
    ///
    /// # Errors
    /// Names the first that another migration holds.
    pub fn take<'a>(
        &self,
        id: &str,
        vm: &VmRef,
        devices: impl IntoIterator<Item = &'a str> + Clone,
    ) -> Result<(), Held> {
        let mut state = self.state.lock();
        let key = (vm.namespace.clone(), vm.name.clone());
        if let Some(holder) = state.vms.get(&key) {
            return Err(state.held(format!("VM {}/{}", vm.namespace, vm.name), holder));
        }
        for device in devices.clone() {
            if let Some(holder) = state.devices.get(device) {
                return Err(state.held(format!("device {device}"), holder));
            }
        }
        state.vms.insert(key, id.to_owned());
        state.devices.extend(devices.into_iter().map(|device| (device.to_owned(), id.to_owned())));
        drop(state);
        self.touch();
        Ok(())
    }

    /// Takes what an open journal names, as far as another journal has not: all that is in doubt stays held.
    pub(super) fn hold_what_is_free<'a>(
        &self,
        id: &str,
        vm: &VmRef,
        devices: impl IntoIterator<Item = &'a str>,
    ) {
        let mut state = self.state.lock();
        state.vms.entry((vm.namespace.clone(), vm.name.clone())).or_insert_with(|| id.to_owned());
        for device in devices {
            state.devices.entry(device.to_owned()).or_insert_with(|| id.to_owned());
        }
        drop(state);
        self.touch();
    }

    /// Gives back everything that a migration has taken.
    pub fn give_back(&self, id: &str) {
        let mut state = self.state.lock();
        state.vms.retain(|_, holder| holder != id);
        state.devices.retain(|_, holder| holder != id);
        state.holds.remove(id);
        state.sources.remove(id);
        drop(state);
        self.touch();
    }

    /// The migration that holds a VM.
    pub fn holder_of_vm(&self, namespace: &str, name: &str) -> Option<String> {
        self.state.lock().vms.get(&(namespace.to_owned(), name.to_owned())).cloned()
    }

    /// As a refusal: the first migration that holds the VM or one of the devices, if one does.
    pub(super) fn holder_of_any<'a>(
        &self,
        vm: &VmRef,
        devices: impl IntoIterator<Item = &'a str>,
    ) -> Option<Held> {
        let state = self.state.lock();
        let vm_holder = state.vms.get(&(vm.namespace.clone(), vm.name.clone()));
        vm_holder
            .map(|holder| state.held(format!("VM {}/{}", vm.namespace, vm.name), holder))
            .or_else(|| devices.into_iter().find_map(|device| Self::device_held(&state, device)))
    }

    fn device_held(state: &State, device: &str) -> Option<Held> {
        state.devices.get(device).map(|holder| state.held(format!("device {device}"), holder))
    }

    /// As a refusal: the migration that holds a device, if one does.
    pub(super) fn held_device(&self, device: &str) -> Option<Held> {
        Self::device_held(&self.state.lock(), device)
    }

    /// The migration that holds a device.
    pub fn holder_of_device(&self, device: &str) -> Option<String> {
        self.state.lock().devices.get(device).cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attempt::entry::tests::entry;
    use crate::attempt::events::EventLog;
    use crate::attempt::ledger::Ledger;

    fn reference(attempt: u32, operator_epoch: u64) -> MigrationRef {
        MigrationRef { id: "m".to_owned(), attempt, operator_epoch }
    }

    fn vm(name: &str) -> VmRef {
        VmRef { namespace: "demo".to_owned(), name: name.to_owned() }
    }

    #[test]
    fn an_older_operator_is_refused_with_the_epoch_of_the_newer_one() {
        let registry = Registry::default();
        assert_eq!(registry.fence(&reference(1, 4)), Ok(()));
        assert_eq!(registry.fence(&reference(1, 5)), Ok(()));
        let stale = registry.fence(&reference(1, 4)).unwrap_err();
        assert_eq!(stale, Stale::Epoch { given: 4, known: 5 });
        assert_eq!(Refusal::from(stale).detail, Some(Detail::KnownEpoch(5)));
    }

    fn ended(id: &str) -> (MigrationRef, LocalEnd) {
        let ledger = Ledger::ended(&entry());
        let part = LocalEnd::Source(SourceRun::over(EventLog::new("node-a"), ledger));
        (MigrationRef { id: id.to_owned(), attempt: 1, operator_epoch: 0 }, part)
    }

    #[test]
    fn only_the_oldest_acknowledged_ends_are_forgotten_and_the_others_are_counted() {
        let registry = Registry::default();
        let count = MAX_REMEMBERED_MIGRATIONS + 10;
        for number in 0..count {
            let (reference, part) = ended(&number.to_string());
            registry.join(&reference, part);
        }
        registry.hold_unreadable("damaged", "the file".to_owned());
        assert_eq!(registry.unacknowledged(), count + 1, "nothing is forgotten by itself");
        let forgotten: Vec<String> = (1..count)
            .flat_map(|number| registry.acknowledge(&number.to_string(), 1))
            .map(|key| key.to_string())
            .collect();
        let expected: Vec<String> = (1..10).map(|number| format!("{number}.source")).collect();
        assert_eq!(forgotten, expected);
        assert!(registry.part("1", 1).is_none());
        for kept in ["0", "10", &(count - 1).to_string(), "damaged"] {
            assert!(registry.part(kept, 1).is_some(), "{kept}");
        }
        assert_eq!(registry.unacknowledged(), 2);
        assert_eq!(registry.acknowledge("0", 2), [], "another attempt");
        assert_eq!(registry.unacknowledged(), 2);
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
