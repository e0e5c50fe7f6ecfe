//! Reading and writing the Lease.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::LeaseSpec;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use kube::Api;
use kube::api::PostParams;
use tokio::time::timeout;

use super::election::{Candidate, LeaseState};

pub(super) use k8s_openapi::api::coordination::v1::Lease;

/// How long the API server may take for one answer: less than any renew deadline that makes sense.
const LEASE_REQUEST_TIMEOUT: Duration = Duration::from_secs(4);

/// Why a Lease could not be read or written.
#[derive(Debug, thiserror::Error)]
pub(super) enum LeaseError {
    /// Another operator has it.
    #[error("{holder} holds it")]
    Taken { holder: String },
    /// The API server does not answer.
    #[error("the API server has not answered within {} s", LEASE_REQUEST_TIMEOUT.as_secs())]
    TooLate,
    /// Anything else.
    #[error("the API server says: {0}")]
    Ask(#[source] Box<kube::Error>),
}

/// The Lease as this operator has written it last.
pub(super) struct HeldLease {
    lease: Lease,
}

impl HeldLease {
    /// Transitions plus 1: 0 would be "no operator is involved".
    pub(super) fn epoch(&self) -> u64 {
        u64::try_from(transitions_of(&self.lease)).unwrap_or_default() + 1
    }

    fn holder(&self) -> &str {
        holder(&self.lease)
    }
}

/// A name for this process that no other process ever has.
pub(super) fn identity() -> String {
    let read = |path| std::fs::read_to_string(path).map(|text| text.trim().to_owned()).unwrap_or_default();
    let host = std::env::var("HOSTNAME").unwrap_or_else(|_| read("/proc/sys/kernel/hostname"));
    let unique = read("/proc/sys/kernel/random/uuid");
    format!("{host}_{}_{unique}", std::process::id())
}

/// What a Lease says.
pub(super) fn state_of(lease: &Lease) -> LeaseState {
    let spec = lease.spec.clone().unwrap_or_default();
    let seconds = spec.lease_duration_seconds.and_then(|seconds| u64::try_from(seconds).ok());
    LeaseState {
        holder: holder(lease).to_owned(),
        renewed: spec.renew_time.map(|time| time.0.to_string()).unwrap_or_default(),
        duration: seconds.map(Duration::from_secs),
        transitions: transitions_of(lease),
    }
}

fn holder(lease: &Lease) -> &str {
    lease.spec.as_ref().and_then(|spec| spec.holder_identity.as_deref()).unwrap_or_default()
}

fn transitions_of(lease: &Lease) -> i32 {
    lease.spec.as_ref().and_then(|spec| spec.lease_transitions).unwrap_or_default().max(0)
}

pub(super) async fn read(api: &Api<Lease>, name: &str) -> Result<Option<Lease>, LeaseError> {
    request(api.get_opt(name)).await
}

/// Makes this operator the holder. If another one was faster, the API server refuses by the resource version.
pub(super) async fn take(
    api: &Api<Lease>,
    name: &str,
    found: Option<Lease>,
    candidate: &Candidate,
    transitions: i32,
) -> Result<HeldLease, LeaseError> {
    let now = MicroTime(Timestamp::now());
    let spec = LeaseSpec {
        holder_identity: Some(candidate.identity.clone()),
        lease_duration_seconds: i32::try_from(candidate.duration.as_secs()).ok(),
        lease_transitions: Some(transitions),
        acquire_time: Some(now.clone()),
        renew_time: Some(now),
        ..LeaseSpec::default()
    };
    let metadata = ObjectMeta { name: Some(name.to_owned()), ..ObjectMeta::default() };
    let lease = match found {
        None => request(api.create(&PostParams::default(), &Lease { metadata, spec: Some(spec) })).await?,
        Some(found) => {
            let taken = Lease { spec: Some(spec), ..found };
            request(api.replace(name, &PostParams::default(), &taken)).await?
        }
    };
    Ok(HeldLease { lease })
}

/// Renews it, and sets its transitions where that is wanted.
pub(super) async fn renew(
    api: &Api<Lease>,
    held: &HeldLease,
    transitions: Option<i32>,
) -> Result<HeldLease, LeaseError> {
    let mut lease = held.lease.clone();
    if let Some(spec) = &mut lease.spec {
        spec.renew_time = Some(MicroTime(Timestamp::now()));
        spec.lease_transitions = transitions.or(spec.lease_transitions);
    }
    let name = lease.metadata.name.clone().unwrap_or_default();
    match request(api.replace(&name, &PostParams::default(), &lease)).await {
        Ok(lease) => return Ok(HeldLease { lease }),
        Err(LeaseError::Ask(error)) if is(&error, 409) || is(&error, 404) => {}
        Err(error) => return Err(error),
    }
    // It was written to or deleted meanwhile.
    let lease = match read(api, &name).await? {
        Some(now) if holder(&now) == held.holder() => {
            // This operator still holds it: it is overwritten, and its count never goes back.
            if let Some(spec) = &mut lease.spec {
                spec.lease_transitions = spec.lease_transitions.max(Some(transitions_of(&now)));
            }
            lease.metadata.resource_version = now.metadata.resource_version;
            request(api.replace(&name, &PostParams::default(), &lease)).await?
        }
        Some(now) => {
            let holder = holder(&now);
            let holder = if holder.is_empty() { "no operator" } else { holder };
            return Err(LeaseError::Taken { holder: holder.to_owned() });
        }
        None => {
            // Written again, since its count would start over otherwise.
            lease.metadata = ObjectMeta { name: Some(name), ..ObjectMeta::default() };
            request(api.create(&PostParams::default(), &lease)).await?
        }
    };
    Ok(HeldLease { lease })
}

/// Leaves it without a holder.
pub(super) async fn release(api: &Api<Lease>, held: &HeldLease) -> Result<(), LeaseError> {
    let mut lease = held.lease.clone();
    if let Some(spec) = &mut lease.spec {
        spec.holder_identity = None;
        spec.renew_time = Some(MicroTime(Timestamp::now()));
    }
    let name = lease.metadata.name.clone().unwrap_or_default();
    request(api.replace(&name, &PostParams::default(), &lease)).await.map(drop)
}

fn is(error: &kube::Error, code: u16) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == code)
}

async fn request<T>(call: impl Future<Output = kube::Result<T>>) -> Result<T, LeaseError> {
    match timeout(LEASE_REQUEST_TIMEOUT, call).await {
        Ok(answer) => answer.map_err(|error| LeaseError::Ask(Box::new(error))),
        Err(_) => Err(LeaseError::TooLate),
    }
}
