//! What the agents are asked, made from a VMMigration's status alone: a restarted operator asks for the same.

use std::time::Duration;

use slackwater_api::{
    DeviceMigration, MAX_ATTEMPTS, MAX_DOWNTIME_BUDGET, MAX_PRE_COMMIT_TIMEOUT, MIN_DOWNTIME_BUDGET,
    MIN_PRE_COMMIT_TIMEOUT, MigrationFeature, OnBudgetExceeded, PeerToPeer, VMMigrationSpec,
    VMMigrationStatus, format_duration, parse_duration,
};
use slackwater_proto::node as proto;

use crate::inventory::{Vm, VmKey};
use crate::plan::{Refusal, Request};

/// How long the target waits for the silent source before it gives a reservation back by itself.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(120);

/// Reads a spec. The API server checks most of it already; an old one does not check all.
///
/// # Errors
/// [`Refusal::InvalidSpec`]
pub fn read_spec(namespace: &str, spec: &VMMigrationSpec) -> Result<Request, Refusal> {
    let invalid = |message| Refusal::InvalidSpec { message };
    let timeout = parse_duration(&spec.pre_commit_timeout)
        .map_err(|e| invalid(format!("spec.preCommitTimeout: {e}.")))?;
    if !(MIN_PRE_COMMIT_TIMEOUT..=MAX_PRE_COMMIT_TIMEOUT).contains(&timeout) {
        return Err(invalid(format!(
            "spec.preCommitTimeout is {}; it must be from 1s to 24h.",
            spec.pre_commit_timeout
        )));
    }
    let budget =
        parse_duration(&spec.downtime_budget).map_err(|e| invalid(format!("spec.downtimeBudget: {e}.")))?;
    if !(MIN_DOWNTIME_BUDGET..=MAX_DOWNTIME_BUDGET).contains(&budget) {
        return Err(invalid(format!(
            "spec.downtimeBudget is {}; it must be from 1ms to 60s.",
            spec.downtime_budget
        )));
    }
    if !(1..=MAX_ATTEMPTS).contains(&spec.attempts) {
        return Err(invalid(format!(
            "spec.attempts is {}; it must be from 1 to {MAX_ATTEMPTS}.",
            spec.attempts
        )));
    }
    Ok(Request {
        vm: VmKey { namespace: namespace.to_owned(), name: spec.vm_ref.name.clone() },
        target: spec.target.as_ref().map(|target| target.node_name.clone()),
        peer_to_peer: spec.peer_to_peer,
    })
}

/// An accepted migration, with all that the agents have to know about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Accepted {
    /// The VMMigration's UID.
    pub id: String,
    /// The VM.
    pub vm: VmKey,
    /// Its node.
    pub source: String,
    /// The node that it goes to.
    pub target: String,
    /// The journal in which the target has recorded that it reserved, if that is known.
    pub target_journal: Option<String>,
    target_address: String,
    attempt: u32,
    devices: Vec<proto::DevicePair>,
    peer_to_peer: proto::PeerToPeer,
    pre_commit_timeout: Duration,
    downtime_budget: Duration,
    on_budget_exceeded: proto::OnBudgetExceeded,
}

impl Accepted {
    /// Reads an accepted migration from its status. `None`: the status is not that of an accepted migration.
    pub fn read(namespace: &str, uid: &str, status: &VMMigrationStatus) -> Option<Self> {
        let spec = status.observed_spec.as_ref()?;
        let request = read_spec(namespace, spec).ok()?;
        Some(Self {
            id: uid.to_owned(),
            vm: request.vm,
            source: status.source_node.clone()?,
            target: status.target_node.clone()?,
            target_journal: status.target_journal.clone(),
            target_address: status.target_address.clone()?,
            attempt: u32::try_from(status.attempt?).ok()?,
            devices: status.devices.iter().map(device_pair).collect(),
            peer_to_peer: match request.peer_to_peer {
                PeerToPeer::Required => proto::PeerToPeer::Required,
                PeerToPeer::AssumeIsolated => proto::PeerToPeer::AssumeIsolated,
            },
            pre_commit_timeout: parse_duration(&spec.pre_commit_timeout).ok()?,
            downtime_budget: parse_duration(&spec.downtime_budget).ok()?,
            on_budget_exceeded: match spec.on_budget_exceeded {
                OnBudgetExceeded::Abort => proto::OnBudgetExceeded::Abort,
                OnBudgetExceeded::Proceed => proto::OnBudgetExceeded::Proceed,
            },
        })
    }

    /// Without an epoch: [`Fleet`](crate::fleet::Fleet) fills in its own.
    fn migration(&self) -> proto::MigrationRef {
        proto::MigrationRef { id: self.id.clone(), attempt: self.attempt, operator_epoch: 0 }
    }

    fn vm_ref(&self) -> proto::VmRef {
        proto::VmRef { namespace: self.vm.namespace.clone(), name: self.vm.name.clone() }
    }

    /// For the target. `vm`: what the source's agent has reported.
    pub fn reserve(&self, vm: &Vm) -> proto::ReserveRequest {
        proto::ReserveRequest {
            migration: Some(self.migration()),
            vm: Some(self.vm_ref()),
            source_node: self.source.clone(),
            vm_json: vm.vm_json.clone(),
            devices: self.devices.clone(),
            peer_to_peer: self.peer_to_peer.into(),
            silence_timeout_ms: milliseconds(SILENCE_TIMEOUT),
            claim: Default::default(),
            qemu: vm.qemu.as_deref().cloned(),
        }
    }

    /// For the source.
    pub fn migrate(&self) -> proto::MigrateRequest {
        proto::MigrateRequest {
            migration: Some(self.migration()),
            vm: Some(self.vm_ref()),
            target_node: self.target.clone(),
            target_address: self.target_address.clone(),
            devices: self.devices.clone(),
            peer_to_peer: self.peer_to_peer.into(),
            pre_commit_timeout_ms: milliseconds(self.pre_commit_timeout),
            downtime_budget_ms: milliseconds(self.downtime_budget),
            on_budget_exceeded: self.on_budget_exceeded.into(),
        }
    }

    /// For the source.
    pub fn abort(&self, why: &str) -> proto::AbortRequest {
        proto::AbortRequest { migration: Some(self.migration()), why: why.to_owned() }
    }

    /// For either end. `peer`: the other end's record.
    pub fn resolve(&self, peer: Option<proto::JournalState>) -> proto::ResolveRequest {
        proto::ResolveRequest { migration: Some(self.migration()), peer }
    }

    /// For either end.
    pub fn acknowledge_end(&self) -> proto::AcknowledgeEndRequest {
        proto::AcknowledgeEndRequest { migration: Some(self.migration()) }
    }

    /// For the target.
    pub fn release(&self, reason: proto::ReleaseReason) -> proto::ReleaseRequest {
        proto::ReleaseRequest { migration: Some(self.migration()), reason: reason.into() }
    }
}

fn device_pair(device: &DeviceMigration) -> proto::DevicePair {
    let has = |feature: MigrationFeature| device.features.contains(&feature);
    proto::DevicePair {
        source: device.source.clone(),
        target: device.target.clone(),
        driver: device.driver.clone(),
        model: device.model.clone(),
        features: Some(proto::MigrationFeatures {
            stop_copy: has(MigrationFeature::StopCopy),
            p2p: has(MigrationFeature::P2p),
            pre_copy: has(MigrationFeature::PreCopy),
        }),
    }
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// How long the target waits for the silent source, for messages.
pub fn silence_timeout() -> String {
    format_duration(SILENCE_TIMEOUT)
}

#[cfg(test)]
mod tests {
    use super::*;
    use slackwater_api::Target;

    fn spec(timeout: &str) -> VMMigrationSpec {
        VMMigrationSpec {
            target: Some(Target { node_name: "node-b".into() }),
            pre_commit_timeout: timeout.into(),
            ..VMMigrationSpec::new("counter")
        }
    }

    #[test]
    fn a_bad_timeout_is_refused_with_its_value_and_what_would_be_right() {
        let refusal = |timeout: &str| read_spec("demo", &spec(timeout)).unwrap_err().to_string();
        assert_eq!(
            refusal("5 min"),
            "spec.preCommitTimeout: \"5 min\" is not a duration; write hours, minutes, seconds and \
             milliseconds in that order, as in 5m, 1m30s or 500ms."
        );
        assert_eq!(refusal("500ms"), "spec.preCommitTimeout is 500ms; it must be from 1s to 24h.");
        assert_eq!(refusal("24h0m1s"), "spec.preCommitTimeout is 24h0m1s; it must be from 1s to 24h.");
        assert!(read_spec("demo", &spec("24h")).is_ok());
    }

    #[test]
    fn a_bad_budget_is_refused_with_its_value_and_what_would_be_right() {
        let read = |budget: &str| {
            read_spec("demo", &VMMigrationSpec { downtime_budget: budget.into(), ..spec("5m") })
        };
        let refusal = |budget: &str| read(budget).unwrap_err().to_string();
        assert_eq!(
            refusal("300"),
            "spec.downtimeBudget: \"300\" is not a duration; write hours, minutes, seconds and milliseconds \
             in that order, as in 5m, 1m30s or 500ms."
        );
        assert_eq!(refusal("0ms"), "spec.downtimeBudget is 0ms; it must be from 1ms to 60s.");
        assert_eq!(refusal("1m1ms"), "spec.downtimeBudget is 1m1ms; it must be from 1ms to 60s.");
        assert!(read("1ms").is_ok() && read("60s").is_ok());
    }

    #[test]
    fn the_source_gets_the_budget_and_the_default_is_300_ms_and_to_abort() {
        let asked = |spec: VMMigrationSpec| {
            let status = VMMigrationStatus {
                observed_spec: Some(spec),
                source_node: Some("node-a".into()),
                target_node: Some("node-b".into()),
                target_address: Some("10.0.0.2:7443".into()),
                attempt: Some(1),
                ..Default::default()
            };
            let migrate = Accepted::read("demo", "u-1", &status).unwrap().migrate();
            (migrate.downtime_budget_ms, migrate.on_budget_exceeded())
        };
        let least: VMMigrationSpec =
            serde_json::from_value(serde_json::json!({"vmRef": {"name": "counter"}})).unwrap();
        assert_eq!(asked(least), (300, proto::OnBudgetExceeded::Abort));
        let given = VMMigrationSpec {
            downtime_budget: "1s500ms".into(),
            on_budget_exceeded: OnBudgetExceeded::Proceed,
            ..spec("5m")
        };
        assert_eq!(asked(given), (1500, proto::OnBudgetExceeded::Proceed));
    }

    #[test]
    fn the_agents_are_asked_from_the_status_alone_with_its_attempt() {
        let status = VMMigrationStatus {
            observed_spec: Some(spec("1m30s")),
            source_node: Some("node-a".into()),
            target_node: Some("node-b".into()),
            target_address: Some("10.0.0.2:7443".into()),
            attempt: Some(3),
            devices: vec![DeviceMigration {
                source: "a1".into(),
                target: "b1".into(),
                features: vec![MigrationFeature::StopCopy, MigrationFeature::P2p],
                ..Default::default()
            }],
            ..Default::default()
        };
        let accepted = Accepted::read("demo", "u-1", &status).unwrap();
        let migrate = accepted.migrate();
        let qemu = proto::QemuDescription { version: "10.0.2".into(), ..Default::default() };
        let vm = Vm { vm_json: "{}".into(), qemu: Some(Box::new(qemu.clone())), ..Vm::default() };
        let reserve = accepted.reserve(&vm);
        assert_eq!((reserve.vm_json.as_str(), reserve.qemu), ("{}", Some(qemu)));
        assert_eq!(migrate.migration, reserve.migration);
        assert_eq!(migrate.migration.unwrap().attempt, 3);
        assert_eq!(
            (migrate.target_address.as_str(), migrate.pre_commit_timeout_ms),
            ("10.0.0.2:7443", 90_000)
        );
        let features = migrate.devices[0].features.unwrap();
        assert!(features.stop_copy && features.p2p && !features.pre_copy);
        assert_eq!(Accepted::read("demo", "u-1", &VMMigrationStatus::default()), None);
    }
}
