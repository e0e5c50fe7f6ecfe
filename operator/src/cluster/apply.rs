//! Writing, by server-side apply.
//!
//! Two field managers, since API servers before 1.21 do not keep managed fields per subresource: with one,
//! applying a finalizer would take the status away.

use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use kube::api::{DeleteParams, Patch, PatchParams, Preconditions};
use kube::core::NamespaceResourceScope;
use kube::{Api, Client, Resource, ResourceExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use slackwater_api::{
    ACCEPTED_AS_ANNOTATION, AssignedVM, AssignedVMStatus, MIGRATION_FINALIZER, MigrationNode,
    MigrationNodeStatus,
};
use slackwater_api::{VMMigration, VMMigrationStatus};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::guard::Guarded;
use crate::epoch::Epoch;

/// How many calls to the API server are under way at a time, and so how many connections: kube's client speaks
/// HTTP/1.1. Calls beyond it wait for their turn, in the order in which they came.
const REQUESTS_AT_A_TIME: usize = 32;
/// How long the API server may take to answer: the caller has agents to listen to meanwhile.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(15);
/// The field manager of metadata that the operator writes.
pub(super) const MANAGER: &str = "slackwater-operator";
/// The field manager of statuses.
const STATUS_MANAGER: &str = "slackwater-operator-status";

/// The API server, for writing.
#[derive(Clone)]
pub struct Cluster {
    pub(super) client: Client,
    epoch: Epoch,
    turns: Arc<Semaphore>,
}

/// A call to the API server that failed.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The object does not exist any more, or is another one of the same name.
    #[error("the object is gone")]
    Gone,
    /// There is an object, and this version cannot read it.
    #[error("the object cannot be read: {error}")]
    Unreadable {
        /// Which field, and why.
        error: String,
    },
    /// The namespace does not exist.
    #[error("there is no namespace {namespace:?}")]
    NoNamespace {
        /// Its name.
        namespace: String,
    },
    /// The Lease was not renewed in time.
    #[error("this operator could not renew its Lease in time, and writes nothing any more")]
    NotLeading,
    /// The API server did not answer.
    #[error("the API server has not answered within {} s", REQUEST_TIMEOUT.as_secs())]
    TooLate,
    /// Anything else. Trying again may help.
    #[error("the call to the API server failed: {0}")]
    Write(#[source] Box<kube::Error>),
}

impl Cluster {
    /// For an API server. `epoch`: of the leadership by which is written.
    pub fn new(client: Client, epoch: Epoch) -> Self {
        Self { client, epoch, turns: Arc::new(Semaphore::new(REQUESTS_AT_A_TIME)) }
    }

    /// Makes a call to the API server, and classifies how it failed.
    pub(super) async fn request<T>(
        &self,
        call: impl Future<Output = kube::Result<T>>,
    ) -> Result<T, WriteError> {
        // It is never closed.
        let _turn = self.turns.acquire().await.ok();
        if !self.epoch.is_in_force() {
            return Err(WriteError::NotLeading);
        }
        match timeout(REQUEST_TIMEOUT, call).await {
            Ok(answer) => answer.map_err(classify),
            Err(_) => Err(WriteError::TooLate),
        }
    }

    /// All objects of a kind.
    pub fn all<K: Resource<DynamicType = ()>>(&self) -> Api<K> {
        Api::all(self.client.clone())
    }

    /// The VMMigration as it is now, if it is still the same object.
    ///
    /// # Errors
    /// [`WriteError`]
    pub async fn migration(&self, migration: &VMMigration) -> Result<VMMigration, WriteError> {
        let api: Api<Guarded<VMMigration>> = self.namespaced(migration);
        let now = self.request(api.get(&migration.name_any())).await?;
        if now.uid() == migration.uid() { readable(now) } else { Err(WriteError::Gone) }
    }

    /// Writes the whole status of a VMMigration.
    ///
    /// # Errors
    /// [`WriteError`]
    pub async fn write_migration_status(
        &self,
        migration: &VMMigration,
        status: &VMMigrationStatus,
    ) -> Result<(), WriteError> {
        self.apply_status(self.namespaced(migration), migration, status).await
    }

    /// Puts the finalizer on a VMMigration, and its UID into an annotation, by which a copy of it is known for
    /// one.
    ///
    /// # Errors
    /// [`WriteError`]
    pub async fn add_finalizer(&self, migration: &VMMigration) -> Result<(), WriteError> {
        let mut body = identity(migration);
        let annotations = json!({ACCEPTED_AS_ANNOTATION: migration.uid()});
        merge(
            &mut body,
            json!({"metadata": {"finalizers": [MIGRATION_FINALIZER], "annotations": annotations}}),
        );
        let api: Api<Guarded<VMMigration>> = self.namespaced(migration);
        let params = PatchParams::apply(MANAGER).force();
        self.request(api.patch(&migration.name_any(), &params, &Patch::Apply(&body))).await.map(drop)
    }

    /// Takes the finalizer off a VMMigration, whoever put it there: server-side apply would leave one that was
    /// there when the object was created.
    ///
    /// # Errors
    /// [`WriteError`]
    pub async fn remove_finalizer(&self, migration: &VMMigration) -> Result<(), WriteError> {
        let api: Api<Guarded<VMMigration>> = self.namespaced(migration);
        let name = migration.name_any();
        let uid = migration.uid().unwrap_or_default();
        let (mut finalizers, mut fresh) = (migration.finalizers().to_vec(), false);
        loop {
            match finalizers.iter().position(|finalizer| finalizer == MIGRATION_FINALIZER) {
                Some(position) => {
                    let patch = serde_json::from_value(removal(&uid, position));
                    let failed = |error| WriteError::Write(Box::new(kube::Error::SerdeError(error)));
                    let patch = Patch::<()>::Json(patch.map_err(failed)?);
                    let params =
                        PatchParams { field_manager: Some(MANAGER.to_owned()), ..Default::default() };
                    let patched = api.patch(&name, &params, &patch);
                    match self.request(patched).await {
                        // It is another object, or its finalizers are others by now.
                        Err(WriteError::Write(error)) if !fresh && is_unprocessable(&error) => {}
                        result => return result.map(drop),
                    }
                }
                None if fresh => return Ok(()),
                // The watch may be late.
                None => {}
            }
            let now = self.request(api.get_metadata(&name)).await?;
            if now.metadata.uid.as_ref() != Some(&uid) {
                return Err(WriteError::Gone);
            }
            (finalizers, fresh) = (now.metadata.finalizers.unwrap_or_default(), true);
        }
    }

    /// Deletes a VMMigration; another one of the same name, or one that has changed since, stays.
    ///
    /// # Errors
    /// [`WriteError`]
    pub async fn delete_migration(&self, migration: &VMMigration) -> Result<(), WriteError> {
        let (uid, resource_version) = (migration.uid(), migration.resource_version());
        self.delete(migration, Preconditions { uid, resource_version }).await
    }

    /// Writes the whole status of a MigrationNode.
    ///
    /// # Errors
    /// [`WriteError`]
    pub async fn write_node_status(
        &self,
        node: &MigrationNode,
        status: &MigrationNodeStatus,
    ) -> Result<(), WriteError> {
        self.apply_status(self.all(), node, status).await
    }

    /// Makes sure that there is an AssignedVM of that name, and returns it.
    ///
    /// # Errors
    /// [`WriteError`]
    pub async fn ensure_vm(&self, namespace: &str, name: &str) -> Result<AssignedVM, WriteError> {
        let api: Api<Guarded<AssignedVM>> = Api::namespaced(self.client.clone(), namespace);
        let body = json!({
            "apiVersion": AssignedVM::api_version(&()),
            "kind": AssignedVM::kind(&()),
            "metadata": {"name": name, "namespace": namespace},
        });
        let params = PatchParams::apply(MANAGER).force();
        let ensured = self.request(api.patch(name, &params, &Patch::Apply(&body))).await;
        ensured.and_then(readable).map_err(|error| match error {
            WriteError::Gone => WriteError::NoNamespace { namespace: namespace.to_owned() },
            other => other,
        })
    }

    /// Writes the whole status of an AssignedVM.
    ///
    /// # Errors
    /// [`WriteError`]
    pub async fn write_vm_status(
        &self,
        vm: &AssignedVM,
        status: &AssignedVMStatus,
    ) -> Result<(), WriteError> {
        self.apply_status(self.namespaced(vm), vm, status).await
    }

    /// Removes an AssignedVM; one of the same name that was created since stays.
    ///
    /// # Errors
    /// [`WriteError`]
    pub async fn remove_vm(&self, vm: &AssignedVM) -> Result<(), WriteError> {
        self.delete(vm, Preconditions { uid: vm.uid(), resource_version: None }).await
    }

    async fn delete<K>(&self, object: &K, preconditions: Preconditions) -> Result<(), WriteError>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + DeserializeOwned + Debug,
    {
        let params = DeleteParams { preconditions: Some(preconditions), ..Default::default() };
        let api: Api<Guarded<K>> = self.namespaced(object);
        match self.request(api.delete(&object.name_any(), &params)).await {
            Ok(_) | Err(WriteError::Gone) => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn namespaced<K>(&self, object: &K) -> Api<Guarded<K>>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
    {
        Api::namespaced(self.client.clone(), &object.namespace().unwrap_or_default())
    }

    async fn apply_status<K, S>(&self, api: Api<Guarded<K>>, object: &K, status: &S) -> Result<(), WriteError>
    where
        K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug,
        S: Serialize,
    {
        let mut body = identity(object);
        merge(&mut body, json!({"status": status}));
        let params = PatchParams::apply(STATUS_MANAGER).force();
        self.request(api.patch_status(&object.name_any(), &params, &Patch::Apply(&body))).await.map(drop)
    }
}

fn readable<K>(object: Guarded<K>) -> Result<K, WriteError> {
    object.content.map_err(|unreadable| WriteError::Unreadable { error: unreadable.error })
}

/// A JSON patch that takes away the finalizer at a position, if it is there, of the object with that UID.
fn removal(uid: &str, position: usize) -> Value {
    let path = format!("/metadata/finalizers/{position}");
    json!([
        {"op": "test", "path": "/metadata/uid", "value": uid},
        {"op": "test", "path": path, "value": MIGRATION_FINALIZER},
        {"op": "remove", "path": path},
    ])
}

/// The API server says that a patch does not fit the object.
fn is_unprocessable(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 422)
}

/// What names an object for server-side apply; the UID, so that another object of the same name is left
/// alone.
pub(super) fn identity<K: Resource<DynamicType = ()>>(object: &K) -> Value {
    json!({
        "apiVersion": K::api_version(&()),
        "kind": K::kind(&()),
        "metadata": {"name": object.name_any(), "namespace": object.namespace(), "uid": object.uid()},
    })
}

pub(super) fn merge(into: &mut Value, from: Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (key, value) in from {
                merge(into.entry(key).or_insert(Value::Null), value);
            }
        }
        (into, from) => *into = from,
    }
}

fn classify(error: kube::Error) -> WriteError {
    match &error {
        kube::Error::Api(status) if status.code == 404 => WriteError::Gone,
        // "Precondition failed: UID ..." for another object of the name, "uid mismatch: ..." for none.
        kube::Error::Api(status) if status.code == 409 && status.message.to_lowercase().contains("uid") => {
            WriteError::Gone
        }
        _ => WriteError::Write(Box::new(error)),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::Instant;

    use super::*;

    #[tokio::test]
    async fn calls_beyond_the_limit_wait_for_their_turn() {
        let nowhere = kube::Config::new("http://127.0.0.1:1".parse().unwrap());
        let (epoch, _lease) = Epoch::new(1, Instant::now() + Duration::from_secs(3600));
        let cluster = Cluster::new(Client::try_from(nowhere).unwrap(), epoch);
        let (answer, answered) = tokio::sync::watch::channel(false);
        let most = Arc::new(std::sync::Mutex::new((0, 0)));
        let mut calls = tokio::task::JoinSet::new();
        for _ in 0..3 * REQUESTS_AT_A_TIME {
            let (cluster, mut answered, most) = (cluster.clone(), answered.clone(), Arc::clone(&most));
            calls.spawn(async move {
                let call = async {
                    {
                        let mut counts = most.lock().unwrap();
                        counts.0 += 1;
                        counts.1 = counts.1.max(counts.0);
                    }
                    answered.wait_for(|answered| *answered).await.ok();
                    most.lock().unwrap().0 -= 1;
                    Ok(())
                };
                cluster.request(call).await.unwrap();
            });
        }
        while most.lock().unwrap().0 < REQUESTS_AT_A_TIME {
            tokio::task::yield_now().await;
        }
        answer.send_replace(true);
        calls.join_all().await;
        assert_eq!(*most.lock().unwrap(), (0, REQUESTS_AT_A_TIME));
    }

    #[tokio::test]
    async fn an_operator_whose_lease_has_run_out_makes_no_call_to_the_api_server() {
        let nowhere = kube::Config::new("http://127.0.0.1:1".parse().unwrap());
        let client = Client::try_from(nowhere).unwrap();
        let (epoch, lease) = Epoch::new(1, Instant::now() + Duration::from_secs(3600));
        let cluster = Cluster::new(client, epoch);
        let made = cluster.request(std::future::ready(Ok(7))).await.unwrap();
        assert_eq!(made, 7);
        lease.valid_until.send_replace(Instant::now());
        let call = async { panic!("the call was made") };
        let refused = cluster.request::<u8>(call).await;
        assert!(matches!(refused, Err(WriteError::NotLeading)), "{refused:?}");
    }
}
