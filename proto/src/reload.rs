//! Credentials that follow their files: a renewed certificate, key or CA takes effect without a restart.
//!
//! What is connected keeps the certificate that it was made with; new connections use the new one. Files that
//! cannot be used are refused whole, with the reason, and what was read before stays in force.
//!
//! The folders are watched, not the files: a new file is moved over the old one, and Kubernetes mounts a
//! Secret as a folder of links through `..data`, which it swaps. A slow look finds what a watch misses.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use notify::{Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::{Notify, watch};
use tokio::time::sleep;
use tracing::{error, info, warn};

use crate::channel::chain;
use crate::tls::{Credentials, Material};
use crate::validity::{self, Validity};

/// The slow look.
const LOOK_EVERY: Duration = Duration::from_secs(30);

/// Certificate and key are two files: after the first change the others get this long to follow.
const SETTLE: Duration = Duration::from_millis(200);

/// What a person should know of a certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertificateStatus {
    /// The time in which the chain that is shown now is valid.
    pub validity: Validity,
    /// It should have been renewed by now ([`Validity::ends_soon`]).
    pub ends_soon: bool,
    /// Why the files, as they are now, are not in force; for a person.
    pub refused: Option<String>,
}

impl CertificateStatus {
    pub(crate) fn of(material: &Material) -> Self {
        let validity = material.validity;
        Self { validity, ends_soon: validity.ends_soon(validity::now()), refused: None }
    }
}

impl Credentials {
    /// What is known of the own certificate, and each change of that.
    pub fn status(&self) -> watch::Receiver<CertificateStatus> {
        self.shared.status.subscribe()
    }

    /// Reads the files again whenever they change. Never returns.
    pub async fn follow_files(&self) {
        let changed = Arc::new(Notify::new());
        let _watcher = self.watch_folders(&changed);
        let CertificateStatus { validity, ends_soon, .. } = self.shared.status.borrow().clone();
        info!(role = %self.shared.role, not_after = validity.not_after, ends_soon, "the certificate is in force");
        loop {
            self.read_again();
            tokio::select! {
                () = changed.notified() => sleep(SETTLE).await,
                () = sleep(LOOK_EVERY) => {}
            }
        }
    }

    fn watch_folders(&self, changed: &Arc<Notify>) -> Option<RecommendedWatcher> {
        let notify = Arc::clone(changed);
        let watcher = notify::recommended_watcher(move |event: notify::Result<Event>| {
            if !matches!(event, Ok(Event { kind: EventKind::Access(_), .. })) {
                notify.notify_one();
            }
        });
        let mut watcher = watcher.inspect_err(|error| warn!(%error, "cannot watch certificates")).ok()?;
        let files = &self.shared.files;
        let folders: BTreeSet<&Path> = [&files.certificate, &files.key, &files.ca]
            .into_iter()
            .map(|file| file.parent().filter(|folder| *folder != Path::new("")).unwrap_or(Path::new(".")))
            .collect();
        for folder in folders {
            if let Err(error) = watcher.watch(folder, RecursiveMode::NonRecursive) {
                warn!(folder = %folder.display(), %error, "cannot watch certificates");
            }
        }
        Some(watcher)
    }

    /// Takes in the files as they are now, if they have changed and can be used.
    pub fn read_again(&self) {
        let shared = &self.shared;
        let current = Arc::clone(&shared.current.borrow());
        let read = shared.files.read().and_then(|raw| match raw.fingerprint() == current.fingerprint {
            true => Ok(None),
            false => Material::load(&shared.files, &raw, Some(&shared.role)).map(Some),
        });
        let status = match read {
            Ok(None) => CertificateStatus::of(&current),
            Ok(Some(new)) => {
                let status = CertificateStatus::of(&new);
                info!(role = %shared.role, not_after = status.validity.not_after, "the certificates were renewed");
                shared.current.send_replace(Arc::new(new));
                status
            }
            Err(error) => {
                CertificateStatus { refused: Some(chain(&error)), ..CertificateStatus::of(&current) }
            }
        };
        shared.status.send_if_modified(|last| {
            let (refused, soon) = (status.refused != last.refused, status.ends_soon && !last.ends_soon);
            if let Some(reason) = status.refused.as_ref().filter(|_| refused) {
                error!(reason, "the certificate files are not usable; the ones read before stay in force");
            }
            if soon {
                let not_after = status.validity.not_after;
                warn!(not_after, "the certificate ends soon and has not been renewed");
            }
            let modified = *last != status;
            *last = status;
            modified
        });
    }

    /// Returns when a connection that was made with `made_with`, and ends with a certificate of the other end
    /// that is valid until `their_not_after`, must end: a certificate has run out, or the CAs that are
    /// trusted are not a superset of those that were.
    pub(crate) async fn outlived(&self, made_with: &Material, their_not_after: i64) {
        let mut current = self.shared.current.subscribe();
        tokio::select! {
            () = validity::passed(their_not_after.min(made_with.validity.not_after)) => {}
            Ok(_) = current.wait_for(|now| !now.roots.is_superset(&made_with.roots)) => {}
        }
    }
}
