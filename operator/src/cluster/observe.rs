//! A local, always current copy of all objects of a kind, and who has to look at which of them again.
//!
//! An object that cannot be read is reported and left alone; it hides no other one.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fmt::Debug;
use std::pin::pin;
use std::sync::Arc;

use futures::StreamExt;
use kube::runtime::watcher::Event;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Resource, ResourceExt};
use parking_lot::{Mutex, RwLock};
use serde::de::DeserializeOwned;
use tokio::sync::watch;
use tokio_util::task::TaskTracker;

use super::Cluster;
use super::guard::{Guarded, Unreadable};
use crate::changes::{Publisher, Subscription};

/// Names an object of a kind.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectKey {
    /// Empty for a kind without namespaces.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

impl ObjectKey {
    /// The key of an object.
    pub fn of(object: &impl Resource) -> Self {
        Self { namespace: object.namespace().unwrap_or_default(), name: object.name_any() }
    }
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.namespace.as_str() {
            "" => write!(f, "{}", self.name),
            namespace => write!(f, "{namespace}/{}", self.name),
        }
    }
}

/// What is kept of an object, and what it is found by beside its name.
pub struct Keep<K> {
    /// Takes away what nobody will ask for.
    pub slim: fn(&mut K),
    /// What it belongs to.
    pub group: fn(&K) -> Option<String>,
}

/// An object as it was seen last.
#[derive(Debug)]
pub enum Seen<K> {
    /// It is there.
    There(Arc<K>),
    /// It is there, with that UID, and cannot be read.
    Unreadable {
        /// Its UID.
        uid: Option<String>,
    },
    /// There is none of that name.
    Gone,
}

/// All objects of a kind.
pub struct Observed<K> {
    shared: Arc<Shared<K>>,
}

impl<K> Clone for Observed<K> {
    fn clone(&self) -> Self {
        Self { shared: Arc::clone(&self.shared) }
    }
}

struct Shared<K> {
    keep: Keep<K>,
    objects: RwLock<Objects<K>>,
    /// All that existed at the start are known.
    primed: watch::Sender<bool>,
    keys: Publisher<ObjectKey>,
    groups: Publisher<String>,
    /// Those who wait for a change of one object.
    followers: Mutex<BTreeMap<ObjectKey, watch::Sender<()>>>,
}

struct Objects<K> {
    entries: BTreeMap<ObjectKey, Entry<K>>,
    groups: BTreeMap<String, BTreeSet<ObjectKey>>,
}

enum Entry<K> {
    Readable { object: Arc<K>, group: Option<String> },
    Unreadable(Box<Unreadable<K>>),
}

/// Watches all objects of a kind until the tracker's tasks are dropped. A broken watch starts again, with
/// back-off.
pub fn observe<K>(cluster: &Cluster, keep: Keep<K>, tasks: &TaskTracker) -> Observed<K>
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + Sync + 'static,
{
    let observed = Observed::new(keep);
    let shared = Arc::clone(&observed.shared);
    let (cluster, reports) = (cluster.clone(), tasks.clone());
    let kind = K::kind(&());
    let events = watcher(cluster.all::<Guarded<K>>(), watcher::Config::default()).default_backoff();
    tasks.spawn(async move {
        let mut events = pin!(events);
        let mut listed = BTreeSet::new();
        while let Some(event) = events.next().await {
            let seen = match event {
                Ok(event) => shared.take_in(event, &mut listed),
                Err(error) => {
                    tracing::warn!(%kind, %error, "watching failed; starting again");
                    None
                }
            };
            if let Some(news) = seen {
                let cluster = cluster.clone();
                reports.spawn(async move { news.report(&cluster).await });
            }
        }
        shared.end();
    });
    observed
}

/// What a user has to hear of an object that cannot be read, or can be again.
struct News<K> {
    about: Guarded<K>,
    /// `None`: it can be read again.
    error: Option<String>,
}

impl<K> News<K>
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug,
{
    async fn report(self, cluster: &Cluster) {
        let (kind, name) = (K::kind(&()), ObjectKey::of(&self.about));
        match self.error {
            Some(error) => {
                tracing::error!(%kind, %name, error, "an object cannot be read; it is left alone");
                cluster.mark_unreadable(&self.about, &error).await;
            }
            None => {
                tracing::info!(%kind, %name, "an object can be read again");
                cluster.take_mark(&self.about).await;
            }
        }
    }
}

impl<K: Resource<DynamicType = ()> + Clone> Shared<K> {
    /// Takes in what the watch says. `listed`: the objects of a list that is under way.
    fn take_in(&self, event: Event<Guarded<K>>, listed: &mut BTreeSet<ObjectKey>) -> Option<News<K>> {
        match event {
            Event::Init => {
                listed.clear();
                None
            }
            Event::InitApply(object) => {
                listed.insert(ObjectKey::of(&object));
                self.put(object)
            }
            Event::InitDone => {
                let listed = std::mem::take(listed);
                let gone: Vec<ObjectKey> = {
                    let objects = self.objects.read();
                    objects.entries.keys().filter(|key| !listed.contains(key)).cloned().collect()
                };
                gone.iter().for_each(|key| self.remove(key));
                self.primed.send_replace(true);
                None
            }
            Event::Apply(object) => self.put(object),
            Event::Delete(object) => {
                self.remove(&ObjectKey::of(&object));
                None
            }
        }
    }

    fn put(&self, guarded: Guarded<K>) -> Option<News<K>> {
        let key = ObjectKey::of(&guarded);
        let known = self.objects.read().entries.get(&key).map(|entry| (entry.version(), entry.error()));
        if known.as_ref().is_some_and(|(version, _)| *version == version_of(&guarded)) {
            return None;
        }
        let error = guarded.content.as_ref().err().map(|unreadable| unreadable.error.clone());
        let known_error = known.and_then(|(_, error)| error);
        let is_news = match &error {
            Some(_) => error != known_error,
            // A try to take the mark away may have come too late for what it saw.
            None => guarded.mark.is_some(),
        };
        let news = is_news.then(|| News { about: guarded.clone(), error });
        let entry = match guarded.content {
            Ok(mut object) => {
                (self.keep.slim)(&mut object);
                let group = (self.keep.group)(&object);
                Entry::Readable { object: Arc::new(object), group }
            }
            Err(unreadable) => Entry::Unreadable(Box::new(unreadable)),
        };
        self.replace(&key, Some(entry));
        news
    }

    fn remove(&self, key: &ObjectKey) {
        self.replace(key, None);
    }

    fn replace(&self, key: &ObjectKey, entry: Option<Entry<K>>) {
        let mut objects = self.objects.write();
        let new_group = entry.as_ref().and_then(Entry::group).map(str::to_owned);
        let old = match entry {
            Some(entry) => objects.entries.insert(key.clone(), entry),
            None => objects.entries.remove(key),
        };
        let old_group = old.as_ref().and_then(Entry::group).map(str::to_owned);
        if old_group != new_group {
            if let Some(group) = &old_group
                && let Some(members) = objects.groups.get_mut(group)
            {
                members.remove(key);
                if members.is_empty() {
                    objects.groups.remove(group);
                }
            }
            if let Some(group) = &new_group {
                objects.groups.entry(group.clone()).or_default().insert(key.clone());
            }
        }
        drop(objects);
        self.keys.publish([key.clone()]);
        self.groups.publish(old_group.into_iter().chain(new_group));
        if let Some(follower) = self.followers.lock().get(key) {
            follower.send_replace(());
        }
    }

    fn end(&self) {
        self.keys.end();
        self.groups.end();
    }
}

fn version_of(object: &impl Resource) -> (Option<String>, Option<String>) {
    (object.uid(), object.resource_version())
}

impl<K: Resource<DynamicType = ()>> Entry<K> {
    /// UID and version.
    fn version(&self) -> (Option<String>, Option<String>) {
        match self {
            Self::Readable { object, .. } => version_of(object.as_ref()),
            Self::Unreadable(unreadable) => {
                (unreadable.metadata.uid.clone(), unreadable.metadata.resource_version.clone())
            }
        }
    }

    fn error(&self) -> Option<String> {
        match self {
            Self::Readable { .. } => None,
            Self::Unreadable(unreadable) => Some(unreadable.error.clone()),
        }
    }

    fn group(&self) -> Option<&str> {
        match self {
            Self::Readable { group, .. } => group.as_deref(),
            Self::Unreadable(_) => None,
        }
    }

    fn readable(&self) -> Option<Arc<K>> {
        match self {
            Self::Readable { object, .. } => Some(Arc::clone(object)),
            Self::Unreadable(_) => None,
        }
    }
}

impl<K: Resource<DynamicType = ()> + Clone> Observed<K> {
    fn new(keep: Keep<K>) -> Self {
        Self {
            shared: Arc::new(Shared {
                keep,
                objects: RwLock::new(Objects { entries: BTreeMap::new(), groups: BTreeMap::new() }),
                primed: watch::Sender::new(false),
                keys: Publisher::default(),
                groups: Publisher::default(),
                followers: Mutex::default(),
            }),
        }
    }

    /// Returns when all objects that existed at the start are known.
    pub async fn ready(&self) {
        // The sender lives as long as this.
        self.shared.primed.subscribe().wait_for(|primed| *primed).await.ok();
    }

    /// The names of all objects.
    pub fn keys(&self) -> Vec<ObjectKey> {
        self.shared.objects.read().entries.keys().cloned().collect()
    }

    /// All objects that can be read.
    pub fn all(&self) -> Vec<Arc<K>> {
        self.shared.objects.read().entries.values().filter_map(Entry::readable).collect()
    }

    /// All objects of a group.
    pub fn in_group(&self, group: &str) -> Vec<Arc<K>> {
        let objects = self.shared.objects.read();
        let members = objects.groups.get(group).into_iter().flatten();
        members.filter_map(|key| objects.entries.get(key)?.readable()).collect()
    }

    /// One object, if it can be read.
    pub fn get(&self, key: &ObjectKey) -> Option<Arc<K>> {
        self.shared.objects.read().entries.get(key)?.readable()
    }

    /// One object.
    pub fn see(&self, key: &ObjectKey) -> Seen<K> {
        match self.shared.objects.read().entries.get(key) {
            None => Seen::Gone,
            Some(Entry::Readable { object, .. }) => Seen::There(Arc::clone(object)),
            Some(Entry::Unreadable(unreadable)) => Seen::Unreadable { uid: unreadable.metadata.uid.clone() },
        }
    }

    /// What is known of one object even if its status cannot be read.
    pub fn without_status(&self, key: &ObjectKey) -> Option<K> {
        match self.shared.objects.read().entries.get(key)? {
            Entry::Readable { object, .. } => Some(object.as_ref().clone()),
            Entry::Unreadable(unreadable) => unreadable.without_status.clone(),
        }
    }

    /// The names of objects that have changed, or are new, or gone. Begins with all that are known.
    pub fn changes(&self) -> Subscription<ObjectKey> {
        // With the lock held, so that nothing changes in between untold.
        let objects = self.shared.objects.read();
        self.shared.keys.subscribe(objects.entries.keys().cloned())
    }

    /// The groups of which an object has changed, has come, or has gone.
    pub fn group_changes(&self) -> Subscription<String> {
        self.shared.groups.subscribe([])
    }

    /// The changes of one object from now on.
    pub fn follow(&self, key: &ObjectKey) -> Follower<K> {
        let mut followers = self.shared.followers.lock();
        let receiver = followers.entry(key.clone()).or_insert_with(|| watch::Sender::new(())).subscribe();
        drop(followers);
        Follower { observed: self.clone(), key: key.clone(), receiver }
    }
}

/// Waits for the changes of one object.
pub struct Follower<K> {
    observed: Observed<K>,
    key: ObjectKey,
    receiver: watch::Receiver<()>,
}

impl<K> Follower<K> {
    /// Returns when the object has changed since the last call.
    pub async fn changed(&mut self) {
        if self.receiver.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

impl<K> Drop for Follower<K> {
    fn drop(&mut self) {
        let mut followers = self.observed.shared.followers.lock();
        // This one is the last.
        if followers.get(&self.key).is_some_and(|sender| sender.receiver_count() <= 1) {
            followers.remove(&self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;
    use serde_json::{Value, json};
    use slackwater_api::VMMigration;

    use super::*;
    use crate::cluster::guard::Mark;

    fn guarded(name: &str, version: u32, phase: &str) -> Guarded<VMMigration> {
        let object: Value = json!({
            "apiVersion": "slackwater.dev/v1alpha1",
            "kind": "VMMigration",
            "metadata": {
                "name": name, "namespace": "demo", "uid": format!("uid-{name}"),
                "resourceVersion": version.to_string(),
            },
            "spec": {"vmRef": {"name": "counter"}},
            "status": {"phase": phase},
        });
        serde_json::from_value(object).unwrap()
    }

    fn key(name: &str) -> ObjectKey {
        ObjectKey { namespace: "demo".into(), name: name.into() }
    }

    fn observed() -> Observed<VMMigration> {
        Observed::new(Keep { slim: |_| {}, group: |object| Some(object.spec.vm_ref.name.clone()) })
    }

    fn take_in(observed: &Observed<VMMigration>, events: Vec<Event<Guarded<VMMigration>>>) -> Vec<bool> {
        let mut listed = BTreeSet::new();
        let news = events.into_iter().filter_map(|event| observed.shared.take_in(event, &mut listed));
        news.map(|news| news.error.is_some()).collect()
    }

    #[test]
    fn a_list_that_comes_again_tells_only_of_what_has_changed_is_new_or_is_gone() {
        let observed = observed();
        let list = |objects: Vec<Guarded<VMMigration>>| {
            let listed = objects.into_iter().map(Event::InitApply);
            [Event::Init].into_iter().chain(listed).chain([Event::InitDone]).collect()
        };
        let same = || guarded("same", 1, "Copying");
        take_in(
            &observed,
            list(vec![same(), guarded("changed", 1, "Copying"), guarded("gone", 1, "Copying")]),
        );
        assert!(observed.ready().now_or_never().is_some());
        let mut changes = observed.changes();
        assert_eq!(changes.next().now_or_never().unwrap().unwrap().len(), 3);
        let mut follower = observed.follow(&key("same"));
        take_in(
            &observed,
            list(vec![same(), guarded("changed", 2, "Copying"), guarded("new", 3, "Copying")]),
        );
        let changed = changes.next().now_or_never().unwrap().unwrap();
        assert_eq!(changed, BTreeSet::from([key("changed"), key("gone"), key("new")]));
        assert!(follower.changed().now_or_never().is_none());
        take_in(&observed, vec![Event::Delete(same())]);
        assert!(follower.changed().now_or_never().is_some());
        assert!(matches!(observed.see(&key("same")), Seen::Gone));
        drop(follower);
        assert!(observed.shared.followers.lock().is_empty());
        let group: BTreeSet<String> =
            observed.in_group("counter").iter().map(|object| object.name_any()).collect();
        assert_eq!(group, BTreeSet::from(["changed".to_owned(), "new".to_owned()]));
    }

    #[test]
    fn an_object_that_cannot_be_read_is_reported_once_and_is_not_gone() {
        let observed = observed();
        let events = vec![
            Event::Apply(guarded("good", 1, "Copying")),
            Event::Apply(guarded("bad", 2, "Teleporting")),
            Event::Apply(guarded("bad", 3, "Teleporting")),
            Event::Apply(guarded("good", 4, "Teleporting")),
        ];
        assert_eq!(take_in(&observed, events), [true, true]);
        assert!(observed.all().is_empty());
        let Seen::Unreadable { uid } = observed.see(&key("good")) else { panic!("it is there") };
        assert_eq!(uid.as_deref(), Some("uid-good"));
        assert_eq!(observed.without_status(&key("bad")).unwrap().spec.vm_ref.name, "counter");
        // A watch that begins again says nothing new.
        let again = vec![Event::Init, Event::InitApply(guarded("bad", 3, "Teleporting")), Event::InitDone];
        assert_eq!(take_in(&observed, again), Vec::<bool>::new());
        let mut mended = guarded("bad", 5, "Copying");
        mended.mark = Some(Mark { position: 0, message: "x".into() });
        assert_eq!(take_in(&observed, vec![Event::Apply(mended)]), [false]);
        assert_eq!(observed.all().len(), 1);
    }
}
