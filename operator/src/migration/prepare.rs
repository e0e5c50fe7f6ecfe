//! Planning an attempt and reserving at the target: all that happens before the source is asked for anything.

use std::sync::Arc;

use jiff::Timestamp;
use tokio::time::Instant;

use super::attempt::Attempt;
use super::request::{Accepted, read_spec};
use super::run::Run;
use super::step::Wish;
use crate::inventory::{Link, Vm, VmState};
use crate::plan::plan;

impl Run {
    /// Plans the next attempt when it is time; returns earlier if something about the object has changed.
    pub(super) async fn retry(&mut self) {
        let draft = self.tracked.draft();
        let time = draft.status.next_attempt_time.clone();
        // The clock may be set while it waits.
        let (_, begins) = match self.attempt.next.take().filter(|(of, _)| *of == time) {
            Some(next) => next,
            None => (time.clone(), Instant::now() + draft.wait_for_next_attempt(Timestamp::now())),
        };
        if begins <= Instant::now() {
            return self.plan().await;
        }
        self.attempt.next = Some((time, begins));
        tokio::select! {
            () = tokio::time::sleep_until(begins) => {}
            () = self.tracked.changed() => {}
        }
    }

    /// Plans the migration, or refuses it.
    pub(super) async fn plan(&mut self) {
        if !self.agents_have_been_asked().await {
            return;
        }
        // What was accepted once counts for every attempt.
        let again = self.tracked.draft().status.attempt.is_some();
        let accepted = self.tracked.draft().status.observed_spec.clone().filter(|_| again);
        let spec = accepted.unwrap_or_else(|| self.tracked.spec().clone());
        let checks = self.context.checks;
        let planned = read_spec(&self.tracked.namespace(), &spec).and_then(|request| {
            let name = self.tracked.object_name();
            let inventory = self.context.inventory(&request.vm);
            self.context.claims.plan(&self.tracked.uid, &name, &request.vm, |others| {
                plan(&request, &inventory, others, checks)
            })
        });
        match planned {
            Err(refusal) => {
                tracing::info!(
                    migration = self.tracked.name(),
                    reason = refusal.reason(),
                    %refusal,
                    "refused"
                );
                let draft = self.tracked.draft_now();
                match again {
                    true => draft.next_plan_failed(&spec, &refusal),
                    false => draft.refuse(&spec, &refusal),
                }
            }
            Ok(plan) => {
                let (source, target) = (&plan.source, &plan.target);
                tracing::info!(migration = self.tracked.name(), source, target, "accepted");
                // First, so that the object cannot vanish while agents hold something for it.
                if !self.tracked.write_finalizer(true).await {
                    return;
                }
                self.tracked.draft_now().begin_attempt(&spec, &plan);
                self.attempt = Attempt::default();
            }
        }
        self.tracked.write().await;
    }

    /// Waits until every agent has answered or failed once. `false`: the migration was deleted or cancelled
    /// meanwhile.
    async fn agents_have_been_asked(&mut self) -> bool {
        let mut changes = self.context.fleet.changes();
        self.context.homes.restored().await;
        loop {
            let message = match self.context.fleet.undecided() {
                Some(nodes) if nodes.is_empty() => return true,
                Some(nodes) => format!("Waiting for the first answer of {}.", nodes.join(", ")),
                None => "The MigrationNodes are not known yet.".to_owned(),
            };
            // Between two attempts the status has more to say.
            if self.tracked.draft().status.attempt.is_none() {
                self.tracked.draft_now().wait_for_agents(&message);
            }
            self.tracked.write_progress().await;
            tokio::select! {
                () = changes.next() => {}
                () = self.tracked.changed() => self.tracked.look(),
            }
            if self.tracked.draft().wish != Wish::Migrate {
                return false;
            }
        }
    }

    /// Asks the target to reserve.
    pub(super) async fn reserve(&mut self) {
        let Some(accepted) = self.tracked.accepted() else { return self.tracked.give_up_unreadable().await };
        let Some(vm) = self.vm_at_source(&accepted).await else { return };
        let fleet = Arc::clone(&self.context.fleet);
        let reserved = tokio::select! {
            reserved = fleet.reserve(&accepted.target, accepted.reserve(&vm)) => reserved,
            // It may take as long as the twin's start. The target is asked to give back what it has then.
            () = self.until_unwanted() => return,
        };
        match reserved {
            Ok(journal) => {
                self.attempt.source_never_asked = true;
                self.tracked.draft_now().target_reserved(&journal);
            }
            Err(error) => {
                let target = &accepted.target;
                tracing::warn!(migration = self.tracked.name(), target, %error, "reserving failed");
                self.tracked.draft_now().reserve_failed(error.target_reason(), &error.to_string());
            }
        }
        self.tracked.write().await;
    }

    /// Returns when the migration was cancelled or deleted.
    async fn until_unwanted(&mut self) {
        while self.tracked.draft().wish == Wish::Migrate {
            self.tracked.changed().await;
            self.tracked.look();
        }
    }

    /// The VM as the source reports it, when both agents have been asked. `None`: something else has to be
    /// done first.
    async fn vm_at_source(&mut self, accepted: &Accepted) -> Option<Vm> {
        let mut changes = self.context.fleet.changes();
        loop {
            // Not kept while it waits: as long as somebody has it, each change of it is made to a copy.
            let inventory = self.context.fleet.inventory();
            let connecting = [&accepted.source, &accepted.target]
                .into_iter()
                .any(|node| inventory.get(node).is_some_and(|node| node.link == Link::Connecting));
            let source = inventory.get(&accepted.source);
            let vm = source.and_then(|node| node.report.as_ref()?.vms.get(&accepted.vm)).cloned();
            let error = source.and_then(|node| node.not_ready_reason());
            drop(inventory);
            match (error, vm) {
                _ if connecting => {}
                (None, Some(vm)) if vm.state != VmState::Unreachable => return Some(vm),
                (error, _) => {
                    let error = error.unwrap_or_else(|| "it is not there any more".to_owned());
                    self.tracked.draft_now().source_not_ready(&error);
                    self.tracked.write().await;
                    return None;
                }
            }
            tokio::select! {
                () = changes.next() => {}
                () = self.tracked.changed() => self.tracked.look(),
            }
            if self.tracked.draft().wish != Wish::Migrate {
                return None;
            }
        }
    }
}
