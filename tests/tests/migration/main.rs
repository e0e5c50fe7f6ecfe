//! Migrations from `kubectl apply` to the end, with real components: kernel VFIO, KVM, etcd, kube-apiserver,
//! helm, kubectl. The kernels' traces show what happened.

#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used, reason = "a test fails by panicking")]

mod attacks;
mod callers;
mod damaged;
mod interrupted;
mod moved;
mod not_known;
mod qemu;
mod qemu_faults;
mod qemu_preflight;
mod refused;

use slackwater_api::VMMigration;
use slackwater_lab::cluster::has_condition;

/// A condition's status, reason and message.
fn condition(migration: &VMMigration, type_: &str) -> (String, String, String) {
    let status = migration.status.as_ref().expect("a status");
    let found = status.conditions.iter().find(|condition| condition.type_ == type_);
    let found = found.unwrap_or_else(|| panic!("no condition {type_}: {:#?}", status.conditions));
    (found.status.clone(), found.reason.clone(), found.message.clone())
}

/// Asserts that it failed before the commit, with this reason and these words in its message.
fn assert_failed(migration: &VMMigration, reason: &str, words: &[&str]) {
    let (status, actual, message) = condition(migration, "Succeeded");
    assert_eq!((status.as_str(), actual.as_str()), ("False", reason), "{message}");
    for word in words {
        assert!(message.contains(word), "{message:?} does not say {word:?}");
    }
    let conditions = &migration.status.as_ref().expect("a status").conditions;
    assert_ne!(has_condition(conditions, "Committed", "True"), Some(true), "{conditions:#?}");
}
