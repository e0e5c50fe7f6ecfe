//! Waiting for a change of a file or a directory: inotify, for async code.

use std::path::Path;
use std::sync::Arc;

use notify::event::{AccessKind, AccessMode};
use notify::{Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::Notify;

/// Whether something was changed, and not only opened or read.
pub(crate) fn is_change(event: &Event) -> bool {
    match event.kind {
        EventKind::Access(AccessKind::Close(AccessMode::Write)) => true,
        EventKind::Access(_) => false,
        _ => true,
    }
}

/// Changes of one file, or of the entries of one directory: see [`is_change`].
#[derive(Debug)]
pub(crate) struct FileEvents {
    changed: Arc<Notify>,
    _watcher: RecommendedWatcher,
}

impl FileEvents {
    /// Begins to watch: [`FileEvents::next`] reports every change from now on.
    pub(crate) fn watch(path: &Path) -> notify::Result<Self> {
        let changed = Arc::new(Notify::new());
        let notify = Arc::clone(&changed);
        let mut watcher = notify::recommended_watcher(move |event: notify::Result<Event>| {
            if event.as_ref().map_or(true, is_change) {
                notify.notify_one();
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
