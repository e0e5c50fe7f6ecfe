//! Waiting until something happens to a file or in a directory: inotify, for async code.

use std::path::Path;
use std::sync::Arc;

use notify::event::{AccessKind, AccessMode};
use notify::{Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::Notify;

/// Changes of one file, or of the entries of one directory. What is only opened or read is no change.
#[derive(Debug)]
pub(crate) struct FileEvents {
    changed: Arc<Notify>,
    _watcher: RecommendedWatcher,
}

impl FileEvents {
    /// Begins to watch: whatever happens from now on is seen by [`FileEvents::next`].
    pub(crate) fn watch(path: &Path) -> notify::Result<Self> {
        let changed = Arc::new(Notify::new());
        let tell = Arc::clone(&changed);
        let mut watcher = notify::recommended_watcher(move |event: notify::Result<Event>| {
            let only_looked_at = event.as_ref().is_ok_and(|event| match event.kind {
                EventKind::Access(AccessKind::Close(AccessMode::Write)) => false,
                EventKind::Access(_) => true,
                _ => false,
            });
            if !only_looked_at {
                tell.notify_one();
            }
        })?;
        watcher.watch(path, RecursiveMode::NonRecursive)?;
        Ok(Self { changed, _watcher: watcher })
    }

    /// Returns when something has changed since the last return, or since the watch began.
    pub(crate) async fn next(&self) {
        self.changed.notified().await;
    }
}
