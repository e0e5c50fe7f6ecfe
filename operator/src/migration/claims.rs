//! Which VMs and devices belong to accepted migrations: what keeps a VM from being migrated twice at once.
//!
//! In the operator's memory, and rebuilt from the statuses when it starts. It is ahead of everything else: of
//! the API server's watch, which reports late what was just written, and of the agents, which report late
//! what was just reserved.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;
use slackwater_api::{VMMigration, VMMigrationStatus};

use super::step::holds_claim;
use crate::changes::{Publisher, Subscription};
use crate::inventory::VmKey;
use crate::plan::{OtherMigration, Plan, Refusal};

/// All claims, by the UID of the migration.
#[derive(Default)]
pub struct Claims {
    claims: Mutex<BTreeMap<String, Arc<OtherMigration>>>,
    /// The VMs whose claims have changed.
    changed: Publisher<VmKey>,
}

impl Claims {
    /// All claims.
    pub fn all(&self) -> Vec<Arc<OtherMigration>> {
        self.claims.lock().values().cloned().collect()
    }

    /// Takes the claims of migrations that an earlier operator has accepted.
    pub fn restore<'a>(&self, migrations: impl Iterator<Item = &'a VMMigration>) {
        let restored: Vec<_> = migrations.filter_map(claim_of).collect();
        let vms: Vec<VmKey> = restored.iter().map(|(_, claim)| claim.vm.clone()).collect();
        self.claims.lock().extend(restored);
        self.changed.publish(vms);
    }

    /// Plans against all other claims and, if there is a plan, claims its VM and devices, with nothing in
    /// between.
    ///
    /// # Errors
    /// The planner's refusal.
    pub fn plan(
        &self,
        uid: &str,
        name: &str,
        vm: &VmKey,
        plan: impl FnOnce(&[Arc<OtherMigration>]) -> Result<Plan, Refusal>,
    ) -> Result<Plan, Refusal> {
        let mut claims = self.claims.lock();
        let others: Vec<Arc<OtherMigration>> =
            claims.iter().filter(|(id, _)| *id != uid).map(|(_, claim)| Arc::clone(claim)).collect();
        let plan = plan(&others)?;
        let devices = plan.devices.iter().map(|pair| pair.target.clone()).collect();
        claims.insert(uid.to_owned(), claim(uid, name, vm.clone(), plan.target.clone(), devices));
        drop(claims);
        self.changed.publish([vm.clone()]);
        Ok(plan)
    }

    /// Gives up the claim of a migration, if it has one.
    pub fn release(&self, uid: &str) {
        let released = self.claims.lock().remove(uid);
        self.changed.publish(released.map(|claim| claim.vm.clone()));
    }

    /// The VMs whose claims have changed.
    pub fn changes(&self) -> Subscription<VmKey> {
        self.changed.subscribe([])
    }
}

fn claim(
    uid: &str,
    name: &str,
    vm: VmKey,
    target: String,
    target_devices: Vec<String>,
) -> Arc<OtherMigration> {
    Arc::new(OtherMigration {
        name: format!("VMMigration {}/{name}", vm.namespace),
        id: uid.to_owned(),
        vm,
        target,
        target_devices,
    })
}

fn claim_of(migration: &VMMigration) -> Option<(String, Arc<OtherMigration>)> {
    let status: &VMMigrationStatus = migration.status.as_ref().filter(|status| holds_claim(status))?;
    let uid = migration.metadata.uid.clone()?;
    let vm = VmKey {
        namespace: migration.metadata.namespace.clone()?,
        name: status.observed_spec.as_ref()?.vm_ref.name.clone(),
    };
    let devices = status.devices.iter().map(|device| device.target.clone()).collect();
    let name = migration.metadata.name.clone()?;
    let claim = claim(&uid, &name, vm, status.target_node.clone()?, devices);
    Some((uid, claim))
}

#[cfg(test)]
mod tests {
    use super::*;
    use slackwater_api::{Reservation, VMMigrationSpec};

    fn vm() -> VmKey {
        VmKey { namespace: "demo".into(), name: "counter".into() }
    }

    fn planned() -> Plan {
        Plan { source: "a".into(), target: "b".into(), target_address: String::new(), devices: vec![] }
    }

    #[test]
    fn the_second_migration_of_a_vm_sees_the_first_and_not_itself() {
        let claims = Claims::default();
        claims.plan("u-1", "first", &vm(), |others| Ok((planned(), assert!(others.is_empty())).0)).unwrap();
        claims.plan("u-1", "first", &vm(), |others| Ok((planned(), assert!(others.is_empty())).0)).unwrap();
        let seen = claims.plan("u-2", "second", &vm(), |others| {
            let by = others[0].name.clone();
            Err(Refusal::MigrationInProgress { vm: vm(), by })
        });
        assert!(seen.unwrap_err().to_string().contains("VMMigration demo/first"));
        assert_eq!(claims.all().len(), 1);
        claims.release("u-1");
        assert!(claims.all().is_empty());
    }

    #[test]
    fn only_accepted_migrations_that_have_not_ended_are_restored() {
        let spec = VMMigrationSpec::new("counter");
        let object = |uid: &str, reservation| {
            let mut object = VMMigration::new(uid, spec.clone());
            object.metadata.uid = Some(uid.into());
            object.metadata.namespace = Some("demo".into());
            object.status = Some(VMMigrationStatus {
                reservation,
                observed_spec: Some(spec.clone()),
                target_node: Some("node-b".into()),
                ..Default::default()
            });
            object
        };
        let objects = [
            object("new", None),
            object("held", Some(Reservation::Held)),
            object("kept", Some(Reservation::Kept)),
            object("used", Some(Reservation::Used)),
            object("between two attempts", Some(Reservation::Released)),
        ];
        let claims = Claims::default();
        claims.restore(objects.iter());
        assert_eq!(
            claims.all().iter().map(|claim| claim.id.as_str()).collect::<Vec<_>>(),
            ["between two attempts", "held", "kept"]
        );
    }
}
