//! Planning and reserving: all that happens before the source is asked for anything.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use slackwater_api::condition::{ACCEPTED, COMMITTED, IN_DOUBT, PREPARED, STOPPED, SUCCEEDED};
use slackwater_api::{
    ACCEPTED_AS_ANNOTATION, DeviceMigration, MigrationPhase, PeerToPeer, Reservation, VMMigrationSpec,
    VMMigrationStatus,
};

use super::{Draft, spec};
use crate::conditions::Status;
use crate::plan::{Pair, Plan, Refusal};
use crate::reason;

/// The longest identity of a journal.
const JOURNAL_ID_CHARACTERS: usize = 64;

impl Draft {
    /// The operator does not know the nodes well enough yet to plan.
    pub fn wait_for_agents(&mut self, message: &str) {
        self.status.phase = Some(MigrationPhase::Pending);
        self.set(ACCEPTED, Status::Unknown, reason::WAITING_FOR_AGENTS, message);
        self.set(SUCCEEDED, Status::Unknown, reason::WAITING_FOR_AGENTS, message);
    }

    /// The migration cannot work. Nothing was touched.
    pub fn refuse(&mut self, spec: &VMMigrationSpec, refusal: &Refusal) {
        let message = refusal.to_string();
        self.status.observed_spec = Some(spec::as_accepted(spec));
        self.status.phase = Some(MigrationPhase::Refused);
        self.status.completion_time = Some(Time(self.stamp.now));
        self.set(SUCCEEDED, Status::False, refusal.reason(), &message);
        if self.set(ACCEPTED, Status::False, refusal.reason(), &message) {
            self.warn("Refused", format!("{}: {message}", refusal.reason()));
        }
    }

    /// The object is a copy of another one, by whose UID a migration was accepted: from a backup, or a manifest
    /// that was read back. Nothing that its status may say is about it.
    pub fn refuse_copy(&mut self, original: &str) {
        let message = format!(
            "metadata.annotations[{ACCEPTED_AS_ANNOTATION}] is {original:?}, and not this object's UID: it is a \
             copy of a VMMigration that was accepted before, such as from a backup, and does not run again. To \
             migrate VM {}, create a VMMigration without that annotation.",
            self.vm
        );
        let spec = self.spec.clone();
        self.status = VMMigrationStatus {
            observed_spec: Some(spec::as_accepted(&spec)),
            phase: Some(MigrationPhase::Refused),
            completion_time: Some(Time(self.stamp.now)),
            ..VMMigrationStatus::default()
        };
        self.set(SUCCEEDED, Status::False, reason::RESTORED_COPY, &message);
        self.set(ACCEPTED, Status::False, reason::RESTORED_COPY, &message);
        self.warn("Refused", format!("{}: {message}", reason::RESTORED_COPY));
    }

    /// There is a plan, for the first attempt or for another one. No agent has been asked for anything yet.
    pub fn begin_attempt(&mut self, spec: &VMMigrationSpec, plan: &Plan) {
        let attempt = self.status.attempt.unwrap_or_default() + 1;
        let status = &mut self.status;
        status.observed_spec.get_or_insert_with(|| spec::as_accepted(spec));
        status.source_node = Some(plan.source.clone());
        status.target_node = Some(plan.target.clone());
        status.target_address = Some(plan.target_address.clone());
        status.attempt = Some(attempt);
        status.reservation = Some(Reservation::Requested);
        status.target_journal = None;
        status.start_time.get_or_insert(Time(self.stamp.now));
        status.phase = Some(MigrationPhase::Preparing);
        status.devices = plan.devices.iter().map(device).collect();
        // All else is about the attempt before.
        status.next_attempt_time = None;
        status.timeline.clear();
        status.estimate = None;
        status.timings = None;
        status.bytes = None;
        status.conditions.retain(|condition| condition.type_ != IN_DOUBT);

        let isolated = spec.peer_to_peer == PeerToPeer::AssumeIsolated && plan.devices.len() > 1;
        let message = self.plan_message(plan, isolated);
        let accepted = self.set(ACCEPTED, Status::True, "Planned", &message);
        if attempt > 1 {
            self.report("NextAttempt", format!("Attempt {attempt} of {}: {message}", spec.attempts));
        } else if accepted {
            self.report("Accepted", message);
            if isolated {
                let note = "spec.peerToPeer is AssumeIsolated: the devices of the VM need not be quiesced \
                            together. If they do talk to each other, their state can be torn.";
                self.warn("AssumeIsolated", note.to_owned());
            }
        }
        let reserving = format!("{} is asked to reserve the devices.", plan.target);
        self.set(PREPARED, Status::Unknown, "Reserving", &reserving);
        self.set(STOPPED, Status::False, reason::GUEST_RUNS, &format!("The guest runs on {}.", plan.source));
        self.set(COMMITTED, Status::False, "NotYet", "The migration can still be given up.");
        self.set(SUCCEEDED, Status::Unknown, reason::IN_PROGRESS, "The target is being made ready.");
    }

    fn plan_message(&self, plan: &Plan, isolated: bool) -> String {
        let pair = |pair: &Pair| format!("{} -> {} ({})", pair.source, pair.target, pair.model);
        let pairs: Vec<String> = plan.devices.iter().map(pair).collect();
        let mut message = format!("VM {} goes from {} to {}", self.vm, plan.source, plan.target);
        if !pairs.is_empty() {
            message.push_str(&format!(", its devices {}", pairs.join(", ")));
        }
        message.push('.');
        if isolated {
            message
                .push_str(" They are taken to be isolated from each other, since spec.peerToPeer says so.");
        }
        message
    }

    /// The target has reserved, and has recorded that in a journal of this identity. To be written before the
    /// source is asked for anything.
    pub fn target_reserved(&mut self, journal: &str) {
        let is_one = (1..=JOURNAL_ID_CHARACTERS).contains(&journal.chars().count());
        self.status.target_journal = is_one.then(|| journal.to_owned());
        let devices: Vec<&str> = self.status.devices.iter().map(|device| device.target.as_str()).collect();
        let devices = if devices.is_empty() { String::new() } else { format!("{} and ", devices.join(", ")) };
        let message = format!("{} holds {devices}a waiting VMM.", self.target());
        self.status.reservation = Some(Reservation::Held);
        self.set(PREPARED, Status::True, "TargetReserved", &message);
        let next = format!("{} is asked to migrate.", self.source());
        self.set(SUCCEEDED, Status::Unknown, reason::IN_PROGRESS, &next);
    }

    /// The target has refused to reserve, or could not be asked. The source was never asked for anything.
    pub fn reserve_failed(&mut self, reason: &str, error: &str) {
        let (source, target) = (self.source(), self.target());
        let failure = format!("{target} could not be made ready: {error}.");
        let message = format!("{failure} VM {} runs on at {source}; nothing was touched there.", self.vm);
        self.status.reservation = Some(Reservation::ReleasingNeverStarted);
        self.set(PREPARED, Status::False, reason, &failure);
        self.end_badly(MigrationPhase::RolledBack, reason, &message);
    }

    /// The VM cannot be taken from its node any more. No agent was asked for anything.
    pub fn source_not_ready(&mut self, error: &str) {
        let source = self.source();
        let message =
            format!("VM {} cannot be taken from {source}: {error}. Nothing was touched there.", self.vm);
        self.status.reservation = Some(Reservation::ReleasingNeverStarted);
        self.set(PREPARED, Status::False, reason::SOURCE_NOT_READY, &message);
        self.end_badly(MigrationPhase::RolledBack, reason::SOURCE_NOT_READY, &message);
    }

    /// The source refuses to begin. It has not changed anything.
    pub fn source_refused(&mut self, reason: &str, error: &str) {
        let source = self.source();
        let message =
            format!("{source} refuses to migrate VM {}: {error}. Nothing was touched there.", self.vm);
        self.end_rolled_back(reason, &message);
    }

    /// The source cannot be asked to begin, and never was.
    pub fn source_unreachable(&mut self, error: &str) {
        let message = format!(
            "{} could not be asked to migrate VM {}: {error}. Nothing was touched there.",
            self.source(),
            self.vm
        );
        self.status.reservation = Some(Reservation::ReleasingNeverStarted);
        self.end_badly(MigrationPhase::RolledBack, reason::SOURCE_NOT_READY, &message);
    }
}

fn device(pair: &Pair) -> DeviceMigration {
    DeviceMigration {
        source: pair.source.clone(),
        target: pair.target.clone(),
        driver: pair.driver.clone(),
        model: pair.model.clone(),
        features: pair.features.clone(),
        bytes: None,
        states: Vec::new(),
        states_left_out: None,
    }
}
