//! A local, always current copy of all objects of a kind.

use std::fmt::Debug;
use std::sync::Arc;

use futures::StreamExt;
use kube::runtime::reflector::{self, ObjectRef, Store};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Resource};
use serde::de::DeserializeOwned;
use tokio::sync::watch;
use tokio_util::task::TaskTracker;

/// All objects of a kind, and a signal when one of them changes.
pub struct Observed<K>
where
    K: Resource<DynamicType = ()> + 'static,
{
    store: Store<K>,
    changed: watch::Receiver<()>,
}

impl<K> Clone for Observed<K>
where
    K: Resource<DynamicType = ()> + Clone + 'static,
{
    fn clone(&self) -> Self {
        Self { store: self.store.clone(), changed: self.changed.clone() }
    }
}

/// Watches all objects of a kind until the tracker's tasks are dropped. A broken watch starts again, with
/// back-off.
pub fn observe<K>(api: Api<K>, tasks: &TaskTracker) -> Observed<K>
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + Sync + 'static,
{
    let (store, writer) = reflector::store();
    let (signal, changed) = watch::channel(());
    let kind = K::kind(&()).into_owned();
    let events = reflector::reflector(writer, watcher(api, watcher::Config::default()).default_backoff());
    tasks.spawn(async move {
        let mut events = Box::pin(events);
        while let Some(event) = events.next().await {
            match event {
                Ok(_) => {
                    signal.send_replace(());
                }
                Err(error) => tracing::warn!(kind, %error, "watching failed; starting again"),
            }
        }
    });
    Observed { store, changed }
}

impl<K> Observed<K>
where
    K: Resource<DynamicType = ()> + Clone + 'static,
{
    /// Returns when all objects that existed at the start are known. `false`: the watch has ended.
    pub async fn ready(&self) -> bool {
        self.store.wait_until_ready().await.is_ok()
    }

    /// All objects.
    pub fn all(&self) -> Vec<Arc<K>> {
        self.store.state()
    }

    /// One object.
    pub fn get(&self, namespace: Option<&str>, name: &str) -> Option<Arc<K>> {
        let key = ObjectRef::new(name);
        self.store.get(&match namespace {
            Some(namespace) => key.within(namespace),
            None => key,
        })
    }

    /// Returns when an object has changed since the last call (or might have). `false`: the watch has ended.
    pub async fn changed(&mut self) -> bool {
        self.changed.changed().await.is_ok()
    }
}
