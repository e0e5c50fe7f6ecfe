//! Who has to look at what again: each subscriber gets the names of what has changed since its last look, each
//! name once, however often it has changed.
//!
//! A loop that works from these does what the changes cost, and not what the whole fleet does.

use std::collections::BTreeSet;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use tokio::sync::Notify;

/// Tells subscribers what has changed.
#[derive(Debug)]
pub struct Publisher<T> {
    subscribers: Mutex<Vec<Weak<Pending<T>>>>,
}

/// Learns what has changed.
#[derive(Debug)]
pub struct Subscription<T> {
    pending: Arc<Pending<T>>,
}

#[derive(Debug)]
struct Pending<T> {
    names: Mutex<Names<T>>,
    arrived: Notify,
}

#[derive(Debug)]
struct Names<T> {
    changed: BTreeSet<T>,
    /// Nothing more will come.
    ended: bool,
}

impl<T> Default for Publisher<T> {
    fn default() -> Self {
        Self { subscribers: Mutex::default() }
    }
}

impl<T: Ord + Clone> Publisher<T> {
    /// A subscription to all that changes from now on; `changed` counts as changed already.
    pub fn subscribe(&self, changed: impl IntoIterator<Item = T>) -> Subscription<T> {
        let names = Names { changed: changed.into_iter().collect(), ended: false };
        let pending = Arc::new(Pending { names: Mutex::new(names), arrived: Notify::new() });
        // For those that have changed already.
        pending.arrived.notify_one();
        self.subscribers.lock().push(Arc::downgrade(&pending));
        Subscription { pending }
    }

    /// These have changed.
    pub fn publish(&self, changed: impl IntoIterator<Item = T>) {
        let changed: Vec<T> = changed.into_iter().collect();
        if !changed.is_empty() {
            self.tell(|names| names.changed.extend(changed.iter().cloned()));
        }
    }

    /// Nothing will change any more.
    pub fn end(&self) {
        self.tell(|names| names.ended = true);
    }

    fn tell(&self, mut change: impl FnMut(&mut Names<T>)) {
        self.subscribers.lock().retain(|subscriber| {
            let Some(pending) = subscriber.upgrade() else { return false };
            change(&mut pending.names.lock());
            pending.arrived.notify_one();
            true
        });
    }
}

impl<T: Ord> Subscription<T> {
    /// Returns what has changed since the last call, as soon as something has. `None`: nothing more will.
    ///
    /// Nothing is lost when the future is dropped.
    pub async fn next(&mut self) -> Option<BTreeSet<T>> {
        loop {
            {
                let mut names = self.pending.names.lock();
                if !names.changed.is_empty() {
                    return Some(std::mem::take(&mut names.changed));
                }
                if names.ended {
                    return None;
                }
            }
            self.pending.arrived.notified().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[test]
    fn a_subscriber_gets_each_changed_name_once_and_those_of_the_past_only_if_they_are_given() {
        let publisher = Publisher::default();
        publisher.publish(["before"]);
        let (mut all, mut new) = (publisher.subscribe(["known"]), publisher.subscribe([]));
        publisher.publish(["a", "b"]);
        publisher.publish(["a"]);
        assert_eq!(all.next().now_or_never(), Some(Some(BTreeSet::from(["a", "b", "known"]))));
        assert_eq!(new.next().now_or_never(), Some(Some(BTreeSet::from(["a", "b"]))));
        assert_eq!(new.next().now_or_never(), None);
    }

    #[test]
    fn what_changed_before_the_end_is_still_told_and_a_subscriber_that_is_gone_costs_nothing() {
        let publisher = Publisher::default();
        let mut subscription = publisher.subscribe([]);
        drop(publisher.subscribe([]));
        publisher.publish([1]);
        publisher.end();
        assert_eq!(publisher.subscribers.lock().len(), 1);
        assert_eq!(subscription.next().now_or_never(), Some(Some(BTreeSet::from([1]))));
        assert_eq!(subscription.next().now_or_never(), Some(None));
    }
}
