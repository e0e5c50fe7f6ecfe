//! One VMMigration, brought as far as it goes: asks the agents, in the order that [`step`](super::step) draws, and writes
//! what becomes known.
//!
//! What must survive a crash is written before it is acted upon, and that write is repeated until it is taken. Progress is
//! written when it can be.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use kube::ResourceExt;
use slackwater_api::{MIGRATION_FINALIZER, Reservation, VMMigration, VMMigrationSpec, VMMigrationStatus};
use slackwater_handover::{Record, Word};
use slackwater_proto::node::ReleaseReason;

use super::controller::Surroundings;
use super::fact::{self, Draft};
use super::inquiry::Inquiry;
use super::request::{Accepted, read_spec};
use super::resolver::Decision;
use super::step::{Step, Wish, holds_claim, next};
use super::trace::Trace;
use crate::cluster::WriteError;
use crate::conditions::Stamp;
use crate::inventory::{Link, Vm, VmState};
use crate::plan::plan;

/// The first and the longest pause between two tries of the same thing.
const PAUSES: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(10));

/// A VMMigration and all that is needed to bring it on.
pub(super) struct Run {
    pub(super) around: Surroundings,
    pub(super) uid: String,
    /// As it was seen last.
    object: Arc<VMMigration>,
    /// The object is not there any more, finalizer or not.
    gone: bool,
    pub(super) draft: Draft,
    /// The object has, or may have, our finalizer.
    finalizer: bool,
    /// What stands in the API server, as far as this task has written it.
    written: VMMigrationStatus,
    /// This task has reserved, so it knows that the source was never asked.
    pub(super) source_never_asked: bool,
    /// The source has said that it cannot be given up any more.
    pub(super) abort_too_late: bool,
    /// The source has given the migration up, and only has to tell how it ended.
    pub(super) given_up: bool,
    pub(super) inquiry: Inquiry,
    /// What an administrator has decided. It is acted upon when it stands in the status.
    pub(super) decided: Option<Decision>,
    pub(super) trace: Trace,
}

/// A pause that grows.
pub(super) struct Pause(Duration);

impl Pause {
    pub(super) fn new() -> Self {
        Self(PAUSES.0)
    }
}

impl Run {
    pub(super) fn new(around: Surroundings, object: Arc<VMMigration>) -> Self {
        let draft = Draft::new(&object);
        Self {
            around,
            uid: object.uid().unwrap_or_default(),
            written: draft.status.clone(),
            draft,
            finalizer: has_finalizer(&object),
            object,
            gone: false,
            source_never_asked: false,
            abort_too_late: false,
            given_up: false,
            inquiry: Inquiry::new(),
            decided: None,
            trace: Trace::default(),
        }
    }

    /// Goes on until nothing is left to do, or the object is gone.
    pub(super) async fn bring_to_its_end(mut self) {
        if !self.read_again().await {
            self.around.claims.release(&self.uid);
            return;
        }
        loop {
            self.look();
            if self.is_forgotten() {
                tracing::warn!(
                    migration = self.name(),
                    "it was in doubt, and its finalizer was removed: it is forgotten"
                );
                return self.around.claims.release(&self.uid);
            }
            self.note_spec_change().await;
            match next(&self.draft.status, self.draft.wish) {
                Step::Plan => self.plan().await,
                Step::Reserve => self.reserve().await,
                Step::GiveUp => {
                    self.learn(fact::gave_up_before_asking);
                    self.write().await;
                }
                Step::Migrate => self.migrate().await,
                Step::Release(reason) => self.release(reason).await,
                Step::Retry => self.retry().await,
                Step::Done => break,
            }
        }
        let kept = self.draft.status.reservation == Some(Reservation::Kept);
        if !holds_claim(&self.draft.status) || self.is_deleting() {
            self.around.claims.release(&self.uid);
        }
        // Without anything left at the agents the object may go, whether or not an operator is there to see it.
        if !kept || self.is_deleting() {
            self.write_finalizer(false).await;
        }
    }

    /// The watch can be behind what an earlier task, or an earlier operator, has written: begin with what stands there now.
    /// `false`: the object is gone.
    async fn read_again(&mut self) -> bool {
        let mut pause = Pause::new();
        loop {
            match self.around.cluster.migration(&self.object).await {
                Ok(object) => {
                    self.draft = Draft::new(&object);
                    self.written = self.draft.status.clone();
                    self.finalizer = has_finalizer(&object);
                    self.object = Arc::new(object);
                    return true;
                }
                Err(WriteError::Gone) => return false,
                Err(error) => {
                    tracing::warn!(migration = self.name(), %error, "a VMMigration could not be read; trying again");
                    self.rest(&mut pause).await;
                }
            }
        }
    }

    /// Takes over what the watch says of the object.
    pub(super) fn look(&mut self) {
        let namespace = self.object.namespace();
        let seen = self.around.migrations.get(namespace.as_deref(), &self.object.name_any());
        match seen.filter(|seen| seen.uid().as_deref() == Some(&self.uid)) {
            Some(seen) => self.object = seen,
            None => self.gone = true,
        }
        let wish = if self.gone { Wish::Delete } else { fact::wish_of(&self.object) };
        // A cancel cannot be taken back.
        if !(self.draft.wish == Wish::Cancel && wish == Wish::Migrate) {
            self.draft.wish = wish;
        }
    }

    pub(super) fn spec(&self) -> VMMigrationSpec {
        self.object.spec.clone()
    }

    /// Somebody has removed the finalizer of a migration that is in doubt, and takes it from here.
    pub(super) fn is_forgotten(&self) -> bool {
        self.gone && self.draft.is_in_doubt()
    }

    pub(super) fn is_deleting(&self) -> bool {
        self.gone || self.object.metadata.deletion_timestamp.is_some()
    }

    pub(super) fn name(&self) -> String {
        format!("{}/{}", self.object.namespace().unwrap_or_default(), self.object.name_any())
    }

    /// Takes in a fact, as of now.
    pub(super) fn learn<T>(&mut self, fact: impl FnOnce(&mut Draft, Stamp) -> T) -> T {
        let stamp = Stamp { generation: self.object.metadata.generation, now: Timestamp::now() };
        fact(&mut self.draft, stamp)
    }

    pub(super) fn accepted(&self) -> Option<Accepted> {
        Accepted::read(&self.object.namespace().unwrap_or_default(), &self.uid, &self.draft.status)
    }

    pub(super) async fn note_spec_change(&mut self) {
        let spec = self.object.spec.clone();
        let changed = self.learn(|draft, stamp| fact::spec_changed(draft, &spec, stamp));
        if self.judge_resolve() || changed {
            self.write_progress().await;
        }
        // Before an agent is told of a decision, it stands where the next operator finds it.
        if self.draft.status == self.written
            && let Some(decision) = self.decided.take()
        {
            self.inquiry.decide(decision);
        }
    }

    pub(super) async fn plan(&mut self) {
        if !self.agents_have_been_asked().await {
            return;
        }
        // What was accepted once counts for every attempt.
        let again = self.draft.status.attempt.is_some();
        let accepted = self.draft.status.observed_spec.clone().filter(|_| again);
        let spec = accepted.unwrap_or_else(|| self.object.spec.clone());
        let namespace = self.object.namespace().unwrap_or_default();
        let inventory = self.around.fleet.inventory();
        let checks = self.around.checks;
        let planned = read_spec(&namespace, &spec).and_then(|request| {
            let name = self.object.name_any();
            let vm = request.vm.clone();
            self.around
                .claims
                .plan(&self.uid, &name, &vm, |others| plan(&request, &inventory, others, checks))
        });
        match planned {
            Err(refusal) => {
                tracing::info!(migration = self.name(), reason = refusal.reason(), %refusal, "refused");
                self.learn(|draft, stamp| match again {
                    true => fact::no_plan_this_time(draft, &spec, &refusal, stamp),
                    false => fact::refused(draft, &spec, &refusal, stamp),
                });
            }
            Ok(plan) => {
                tracing::info!(
                    migration = self.name(),
                    source = plan.source,
                    target = plan.target,
                    "accepted"
                );
                // First, so that the object cannot vanish while agents hold something for it.
                if !self.write_finalizer(true).await {
                    return;
                }
                self.learn(|draft, stamp| fact::planned(draft, &spec, &plan, stamp));
                // All that was known is of the attempt before.
                (self.inquiry, self.trace) = (Inquiry::new(), Trace::default());
                (self.abort_too_late, self.given_up) = (false, false);
            }
        }
        self.write().await;
    }

    /// `false`: it has been deleted or cancelled meanwhile.
    async fn agents_have_been_asked(&mut self) -> bool {
        let mut changes = self.around.fleet.changes();
        loop {
            let message = match self.around.fleet.undecided() {
                Some(nodes) if nodes.is_empty() => return true,
                Some(nodes) => format!("Waiting for the first answer of {}.", nodes.join(", ")),
                None => "The MigrationNodes are not known yet.".to_owned(),
            };
            // Between two attempts the status has more to say.
            if self.draft.status.attempt.is_none() {
                self.learn(|draft, stamp| fact::waiting(draft, &message, stamp));
            }
            self.write_progress().await;
            tokio::select! {
                () = changes.next() => {}
                _ = self.around.migrations.changed() => self.look(),
            }
            if self.draft.wish != Wish::Migrate {
                return false;
            }
        }
    }

    async fn reserve(&mut self) {
        let Some(accepted) = self.accepted() else { return self.unreadable().await };
        let Some(vm) = self.vm_at_source(&accepted).await else { return };
        match self.around.fleet.reserve(&accepted.target, accepted.reserve(&vm)).await {
            Ok(()) => {
                self.source_never_asked = true;
                self.learn(fact::reserved);
            }
            Err(error) => {
                tracing::warn!(migration = self.name(), target = accepted.target, %error, "reserving failed");
                self.learn(|draft, stamp| {
                    fact::reserve_failed(draft, error.target_reason(), &error.to_string(), stamp)
                });
            }
        }
        self.write().await;
    }

    /// The VM as the source reports it, when both agents have been asked. `None`: something else has to be done first.
    async fn vm_at_source(&mut self, accepted: &Accepted) -> Option<Vm> {
        let mut changes = self.around.fleet.changes();
        loop {
            let inventory = self.around.fleet.inventory();
            let connecting = [&accepted.source, &accepted.target]
                .into_iter()
                .find(|node| inventory.get(*node).is_some_and(|node| node.link == Link::Connecting));
            let source = inventory.get(&accepted.source);
            let vm = source.and_then(|node| node.report.as_ref()?.vms.get(&accepted.vm));
            match (connecting, source.and_then(crate::inventory::Node::not_ready_reason), vm) {
                (None, None, Some(vm)) if vm.state != VmState::Unreachable => {
                    return Some(vm.clone());
                }
                (Some(_), _, _) => {}
                (None, error, _) => {
                    let error = error.unwrap_or_else(|| "it is not there any more".to_owned());
                    self.learn(|draft, stamp| fact::source_not_ready(draft, &error, stamp));
                    self.write().await;
                    return None;
                }
            }
            tokio::select! {
                () = changes.next() => {}
                _ = self.around.migrations.changed() => self.look(),
            }
            if self.draft.wish != Wish::Migrate {
                return None;
            }
        }
    }

    async fn release(&mut self, reason: ReleaseReason) {
        let Some(accepted) = self.accepted() else { return self.unreadable().await };
        let mut pause = Pause::new();
        loop {
            match self.around.fleet.release(&accepted.target, accepted.release(reason)).await {
                Ok(()) => {
                    let message = format!("{} has given back what it reserved.", accepted.target);
                    self.learn(|draft, stamp| fact::released(draft, &message, stamp));
                    break;
                }
                Err(error) if error.is_precondition() && self.has_started_there(&accepted).await => {
                    tracing::error!(migration = self.name(), target = accepted.target, %error, "the target keeps its reservation");
                    self.learn(|draft, stamp| fact::release_refused(draft, &error.to_string(), stamp));
                    break;
                }
                Err(error) if error.is_no_such_node() => {
                    let message = format!("{error}; its agent gives the devices back by itself.");
                    self.learn(|draft, stamp| fact::released(draft, &message, stamp));
                    break;
                }
                Err(error) => {
                    tracing::warn!(migration = self.name(), target = accepted.target, %error, "releasing failed; trying again");
                    self.learn(|draft, stamp| fact::release_failed(draft, &error.to_string(), stamp));
                    self.write_progress().await;
                    self.rest(&mut pause).await;
                }
            }
        }
        self.write().await;
    }

    /// The target says that it has started the VM: no other reason not to give back is for good.
    async fn has_started_there(&self, accepted: &Accepted) -> bool {
        let word = self.around.fleet.resolve(&accepted.target, accepted.resolve(None)).await;
        let word = word.ok().and_then(|state| Word::try_from(&state).ok());
        word.is_some_and(|word| matches!(word.record, Some(Record::Starting | Record::Running)))
    }

    /// A status that says "accepted" and not what: somebody has written to it.
    pub(super) async fn unreadable(&mut self) {
        self.learn(fact::unreadable);
        self.write().await;
    }

    /// Waits for a while that grows with every call, or until the agents have something new to say.
    pub(super) async fn rest(&self, pause: &mut Pause) {
        let mut changes = self.around.fleet.changes();
        tokio::select! {
            () = tokio::time::sleep(pause.0) => {}
            // Not at once: an agent that comes and goes must not be asked in a tight loop.
            () = async { tokio::join!(changes.next(), tokio::time::sleep(PAUSES.0)); } => {}
        }
        pause.0 = (pause.0 * 2).min(PAUSES.1);
    }

    /// Writes what has become known, again and again until it is taken.
    pub(super) async fn write(&mut self) {
        let mut pause = Pause::new();
        while !self.try_write().await {
            self.rest(&mut pause).await;
        }
    }

    /// Writes what has become known, if that works now; otherwise a later write takes it along.
    pub(super) async fn write_progress(&mut self) {
        self.try_write().await;
    }

    async fn try_write(&mut self) -> bool {
        if !self.gone && self.draft.status != self.written {
            match self.around.cluster.write_migration_status(&self.object, &self.draft.status).await {
                Ok(()) => self.written = self.draft.status.clone(),
                Err(WriteError::Gone) => self.gone = true,
                Err(error) => {
                    tracing::warn!(migration = self.name(), %error, "the status of a VMMigration could not be written");
                    return false;
                }
            }
        }
        for notice in std::mem::take(&mut self.draft.notices) {
            tracing::info!(migration = self.name(), reason = notice.reason, "{}", notice.note);
            if !self.gone {
                self.around.cluster.tell(self.object.as_ref(), "Migrate", &notice).await;
            }
        }
        true
    }

    /// `false`: the object is gone.
    async fn write_finalizer(&mut self, present: bool) -> bool {
        let mut pause = Pause::new();
        while !self.gone {
            if present == self.finalizer {
                return true;
            }
            match self.around.cluster.write_finalizer(&self.object, present).await {
                Ok(()) => self.finalizer = present,
                Err(WriteError::Gone) => self.gone = true,
                Err(error) => {
                    tracing::warn!(migration = self.name(), %error, "the finalizer could not be written; trying again");
                    self.rest(&mut pause).await;
                }
            }
        }
        false
    }
}

/// The object has our finalizer.
pub(super) fn has_finalizer(migration: &VMMigration) -> bool {
    migration.finalizers().iter().any(|finalizer| finalizer == MIGRATION_FINALIZER)
}
