//! What a request must look like before anything is done for it. Pure. Every error names the field, its value
//! and what would be right.

use std::time::Duration;

use slackwater_handover::Word;
use slackwater_handover::failure::cut;
use slackwater_handover::policy::PeerToPeer;
use slackwater_proto::node::{
    DevicePair, JournalState, MigrateRequest, MigrationRef, OnBudgetExceeded, PeerToPeer as WirePeerToPeer,
    ReserveRequest, VmRef,
};
use slackwater_proto::refusal::Refusal;

use super::reason::ServiceReason;
use crate::vmm::budget::{DEFAULT_BUDGET, MAX_BUDGET, OnExceeded};

/// More devices than any VM has: a limit for the work that a request can cause.
const DEVICES_MAX: usize = 256;
/// More CPU features than QEMU knows, and longer names.
const CPU_FEATURES_MAX: usize = 4096;
const CPU_FEATURE_MAX: usize = 64;
/// Bytes of a name of a device, its driver or its model: longer than any in sysfs.
const NAME_MAX: usize = 128;
/// Bytes of a host:port.
const ADDRESS_MAX: usize = 512;
/// Bytes of a reservation's claim.
const CLAIM_MAX: usize = 4096;
/// Characters of a migration's id.
const ID_MAX: usize = 64;

/// A field that cannot be accepted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field} is {value}: {expected}")]
pub(super) struct InvalidField {
    /// Its path in the message.
    pub field: String,
    /// What was given.
    pub value: String,
    /// What would be right.
    pub expected: &'static str,
}

impl From<InvalidField> for Refusal {
    fn from(error: InvalidField) -> Self {
        Self::invalid_argument(ServiceReason::InvalidRequest, error.to_string())
    }
}

fn invalid(field: impl Into<String>, value: impl std::fmt::Debug, expected: &'static str) -> InvalidField {
    InvalidField { field: field.into(), value: format!("{value:?}"), expected }
}

/// Which attempt of which migration, and which operator asks.
pub(super) fn migration(given: Option<&MigrationRef>) -> Result<MigrationRef, InvalidField> {
    let given = given.ok_or_else(|| invalid("migration", "absent", "every call names its migration"))?;
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    if given.id.is_empty() || given.id.len() > ID_MAX || !given.id.chars().all(allowed) {
        return Err(invalid("migration.id", &given.id, "1 to 64 characters of a-z, 0-9 and -"));
    }
    if given.attempt == 0 {
        return Err(invalid("migration.attempt", given.attempt, "attempts count from 1"));
    }
    Ok(given.clone())
}

/// Which VM.
pub(super) fn vm(given: Option<&VmRef>) -> Result<VmRef, InvalidField> {
    let given = given.ok_or_else(|| invalid("vm", "absent", "a VM's namespace and name"))?;
    for (field, value) in [("vm.namespace", &given.namespace), ("vm.name", &given.name)] {
        if !crate::host::vm::is_dns_label(value) {
            return Err(invalid(
                field,
                value,
                "a DNS label: 1 to 63 characters of a-z, 0-9 and -, not at an end",
            ));
        }
    }
    Ok(given.clone())
}

/// The multi-device policy.
pub(super) fn peer_to_peer(given: i32) -> Result<PeerToPeer, InvalidField> {
    let policy = WirePeerToPeer::try_from(given).ok().and_then(Option::<PeerToPeer>::from);
    policy.ok_or_else(|| {
        invalid("peer_to_peer", given, "PEER_TO_PEER_REQUIRED or PEER_TO_PEER_ASSUME_ISOLATED")
    })
}

/// What the other end has journalled.
pub(super) fn word(field: &str, given: &JournalState) -> Result<Word, InvalidField> {
    Word::try_from(given).map_err(|unknown| {
        invalid(format!("{field}.record"), unknown.0, "a record that this version of the agent knows")
    })
}

/// A time that must be given.
pub(super) fn milliseconds(field: &str, given: u64) -> Result<Duration, InvalidField> {
    if given == 0 {
        return Err(invalid(field, given, "a time in milliseconds, at least 1"));
    }
    Ok(Duration::from_millis(given))
}

/// For how long the guest may be stopped.
fn downtime_budget(given: u64) -> Result<Duration, InvalidField> {
    match Duration::from_millis(given) {
        Duration::ZERO => Ok(DEFAULT_BUDGET),
        budget if budget <= MAX_BUDGET => Ok(budget),
        _ => Err(invalid("downtime_budget_ms", given, "1 to 60000 milliseconds, or 0 for 300")),
    }
}

/// What to do when that does not suffice.
fn on_exceeded(given: i32) -> Result<OnExceeded, InvalidField> {
    match OnBudgetExceeded::try_from(given) {
        Ok(OnBudgetExceeded::Unspecified | OnBudgetExceeded::Abort) => Ok(OnExceeded::Abort),
        Ok(OnBudgetExceeded::Proceed) => Ok(OnExceeded::Proceed),
        Err(_) => Err(invalid(
            "on_budget_exceeded",
            given,
            "ON_BUDGET_EXCEEDED_ABORT or ON_BUDGET_EXCEEDED_PROCEED",
        )),
    }
}

/// Device pairs: each side named, and named once.
pub(super) fn devices(given: &[DevicePair]) -> Result<&[DevicePair], InvalidField> {
    if given.len() > DEVICES_MAX {
        return Err(invalid("devices", given.len(), "at most 256 devices"));
    }
    for (index, pair) in given.iter().enumerate() {
        if pair.source.is_empty() || pair.target.is_empty() {
            let value = format!("{} -> {}", pair.source, pair.target);
            return Err(invalid(
                format!("devices[{index}]"),
                value,
                "the name of a device at the source and of one at the target",
            ));
        }
        for (field, name) in [
            ("source", &pair.source),
            ("target", &pair.target),
            ("driver", &pair.driver),
            ("model", &pair.model),
        ] {
            if !is_plain(name, NAME_MAX) {
                let shown = cut(name, NAME_MAX);
                let expected = "at most 128 printable ASCII characters without quotes and backslashes";
                return Err(invalid(format!("devices[{index}].{field}"), shown, expected));
            }
        }
        if pair.features.is_none() {
            return Err(invalid(
                format!("devices[{index}].features"),
                "absent",
                "the features of the source device",
            ));
        }
        let earlier = given.get(..index).unwrap_or_default();
        if earlier.iter().any(|other| other.source == pair.source || other.target == pair.target) {
            let value = format!("{} -> {}", pair.source, pair.target);
            return Err(invalid(format!("devices[{index}]"), value, "no device may be named twice"));
        }
    }
    Ok(given)
}

/// What a journal holds as it is, and a person may read: nothing that would have to be escaped.
fn is_plain(text: &str, max_bytes: usize) -> bool {
    text.len() <= max_bytes
        && text.bytes().all(|byte| byte.is_ascii_graphic() && !matches!(byte, b'"' | b'\\'))
}

/// A reservation, as it was asked for.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Reservation {
    pub(super) reference: MigrationRef,
    pub(super) vm: VmRef,
    pub(super) policy: PeerToPeer,
    /// How long the source's Hello is waited for.
    pub(super) silence_timeout: Duration,
}

/// Checks a reservation, as far as the message alone allows that.
pub(super) fn reserve(request: &ReserveRequest) -> Result<Reservation, InvalidField> {
    let reference = migration(request.migration.as_ref())?;
    let vm = vm(request.vm.as_ref())?;
    if !slackwater_proto::identity::is_node_name(&request.source_node) {
        return Err(invalid("source_node", &request.source_node, "the name of the source's node"));
    }
    devices(&request.devices)?;
    let policy = peer_to_peer(request.peer_to_peer)?;
    let silence_timeout = milliseconds("silence_timeout_ms", request.silence_timeout_ms)?;
    if request.claim.len() > CLAIM_MAX {
        return Err(invalid("claim", format_args!("{} bytes", request.claim.len()), "at most 4096 bytes"));
    }
    if let Some(qemu) = &request.qemu {
        cpu_features(&qemu.cpu_features)?;
    }
    Ok(Reservation { reference, vm, policy, silence_timeout })
}

/// Names that could be CPU features. They come from another node, and are shown to people.
fn cpu_features(given: &[String]) -> Result<(), InvalidField> {
    if given.len() > CPU_FEATURES_MAX {
        return Err(invalid("qemu.cpu_features", given.len(), "at most 4096 names"));
    }
    let plain = |name: &String| {
        (1..=CPU_FEATURE_MAX).contains(&name.len())
            && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    };
    match given.iter().position(|name| !plain(name)) {
        Some(index) => Err(invalid(
            format!("qemu.cpu_features[{index}]"),
            given.get(index).map_or("", String::as_str),
            "1 to 64 letters, digits and -, as in avx512f",
        )),
        None => Ok(()),
    }
}

/// A migration, as it was asked for.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Migration {
    pub(super) reference: MigrationRef,
    pub(super) vm: VmRef,
    pub(super) policy: PeerToPeer,
    pub(super) pre_commit_timeout: Duration,
    /// For how long the guest may be stopped, and what to do when that does not suffice.
    pub(super) downtime: Duration,
    pub(super) on_exceeded: OnExceeded,
}

/// Checks a migration, as far as the message alone allows that.
pub(super) fn migrate(request: &MigrateRequest) -> Result<Migration, InvalidField> {
    let reference = migration(request.migration.as_ref())?;
    let vm = vm(request.vm.as_ref())?;
    if !slackwater_proto::identity::is_node_name(&request.target_node) {
        return Err(invalid("target_node", &request.target_node, "the name of the destination's node"));
    }
    if request.target_address.is_empty() {
        return Err(invalid(
            "target_address",
            &request.target_address,
            "host:port of the destination's agent",
        ));
    }
    if !is_plain(&request.target_address, ADDRESS_MAX) {
        let shown = cut(&request.target_address, NAME_MAX);
        return Err(invalid("target_address", shown, "host:port in at most 512 printable ASCII characters"));
    }
    devices(&request.devices)?;
    let policy = peer_to_peer(request.peer_to_peer)?;
    let pre_commit_timeout = milliseconds("pre_commit_timeout_ms", request.pre_commit_timeout_ms)?;
    let downtime = downtime_budget(request.downtime_budget_ms)?;
    let on_exceeded = on_exceeded(request.on_budget_exceeded)?;
    Ok(Migration { reference, vm, policy, pre_commit_timeout, downtime, on_exceeded })
}

#[cfg(test)]
mod tests {
    use slackwater_proto::node::MigrationFeatures;

    use super::*;

    fn reference() -> MigrationRef {
        MigrationRef { id: "3f1c".to_owned(), attempt: 1, operator_epoch: 0 }
    }

    fn pair(source: &str, target: &str) -> DevicePair {
        DevicePair {
            source: source.to_owned(),
            target: target.to_owned(),
            features: Some(MigrationFeatures::default()),
            ..DevicePair::default()
        }
    }

    fn request() -> MigrateRequest {
        MigrateRequest {
            migration: Some(reference()),
            vm: Some(VmRef { namespace: "demo".to_owned(), name: "counter".to_owned() }),
            target_node: "node-b".to_owned(),
            target_address: "10.77.0.2:7443".to_owned(),
            devices: vec![pair("a", "b")],
            peer_to_peer: WirePeerToPeer::Required.into(),
            pre_commit_timeout_ms: 1000,
            downtime_budget_ms: 0,
            on_budget_exceeded: OnBudgetExceeded::Unspecified.into(),
        }
    }

    #[test]
    fn a_complete_request_is_accepted() {
        assert!(migrate(&request()).is_ok());
    }

    #[test]
    fn a_name_that_cannot_be_a_cpu_feature_is_refused() {
        let said = |names: &[&str]| {
            let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
            cpu_features(&names).map_err(|error| error.to_string())
        };
        assert_eq!(said(&["sse4-1", "3dnow"]), Ok(()));
        let right = "1 to 64 letters, digits and -, as in avx512f";
        assert_eq!(said(&["avx", "a b"]), Err(format!("qemu.cpu_features[1] is \"a b\": {right}")));
        assert!(said(&[""]).is_err() && said(&["x".repeat(65).as_str()]).is_err());
        assert!(said(&["x"; 4097]).is_err());
    }

    #[test]
    fn a_request_without_a_budget_has_300_ms_and_is_given_up_beyond() {
        let read = |downtime_budget_ms, on: OnBudgetExceeded| {
            let request = MigrateRequest { downtime_budget_ms, on_budget_exceeded: on.into(), ..request() };
            migrate(&request).map(|read| (read.downtime.as_millis(), read.on_exceeded)).unwrap()
        };
        assert_eq!(read(0, OnBudgetExceeded::Unspecified), (300, OnExceeded::Abort));
        assert_eq!(read(1, OnBudgetExceeded::Abort), (1, OnExceeded::Abort));
        assert_eq!(read(60_000, OnBudgetExceeded::Proceed), (60_000, OnExceeded::Proceed));
    }

    #[test]
    fn every_broken_field_is_named_with_its_value_and_what_would_be_right() {
        type Break = fn(&mut MigrateRequest);
        let cases: [(Break, &str); 15] = [
            (|r| r.migration = None, r#"migration is "absent": every call names its migration"#),
            (
                |r| r.migration.as_mut().unwrap().id = "A/B".to_owned(),
                r#"migration.id is "A/B": 1 to 64 characters"#,
            ),
            (|r| r.migration.as_mut().unwrap().attempt = 0, "migration.attempt is 0: attempts count from 1"),
            (|r| r.vm = None, r#"vm is "absent": a VM's namespace and name"#),
            (|r| r.vm.as_mut().unwrap().name = "../etc".to_owned(), r#"vm.name is "../etc": a DNS label"#),
            (|r| r.target_node.clear(), r#"target_node is "": the name of"#),
            (|r| r.target_address.clear(), r#"target_address is "": host:port"#),
            (|r| r.peer_to_peer = 9, "peer_to_peer is 9: PEER_TO_PEER_REQUIRED or"),
            (|r| r.pre_commit_timeout_ms = 0, "pre_commit_timeout_ms is 0: a time in milliseconds"),
            (|r| r.downtime_budget_ms = 60_001, "downtime_budget_ms is 60001: 1 to 60000 milliseconds, or 0"),
            (|r| r.on_budget_exceeded = 7, "on_budget_exceeded is 7: ON_BUDGET_EXCEEDED_ABORT or"),
            (|r| r.devices.push(pair("c", "b")), r#"devices[1] is "c -> b": no device may be named twice"#),
            (|r| r.devices[0].model = "a\u{1b}".to_owned(), "devices[0].model is \"a\u{fffd}\": at most 128"),
            (|r| r.devices[0].target = "x".repeat(129), r#"devices[0].target is "xxx"#),
            (|r| r.target_address = "h".repeat(513), r#"target_address is "hhh"#),
        ];
        for (break_it, expected) in cases {
            let mut broken = request();
            break_it(&mut broken);
            let error = migrate(&broken).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{error}");
        }
    }
}
