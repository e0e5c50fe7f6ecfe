//! What the source has given up, and the destination may not have heard: a destination at LOADED gives nothing
//! back before it knows, however long that takes.

use std::time::Duration;

use slackwater_handover::{Record, Word};
use slackwater_proto::node::JournalState;

use super::link::Peer;

/// The first pause before the destination hears it again, and the longest.
const TELL_AGAIN: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// An attempt that the source has given up.
#[derive(Debug)]
pub struct Unheard {
    peer: Peer,
    own: JournalState,
}

impl Unheard {
    /// `own`: what the source has journalled.
    pub fn new(peer: Peer, own: JournalState) -> Self {
        Self { peer, own }
    }

    /// Says it again and again, without an end, until the destination has given back what it reserved.
    pub async fn tell_until_heard(self) {
        tell_all(vec![self]).await;
    }

    async fn is_heard(&self) -> bool {
        let answer = self.peer.settle(self.own.clone()).await;
        matches!(answer, Ok(Word { record: None | Some(Record::Discarded), .. }))
    }
}

/// The same for several attempts, one after the other: those of an agent before this one may be many.
pub async fn tell_all(mut unheard: Vec<Unheard>) {
    let (mut pause, longest) = TELL_AGAIN;
    while !unheard.is_empty() {
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(longest);
        let mut left = Vec::new();
        for attempt in unheard {
            if !attempt.is_heard().await {
                left.push(attempt);
            }
        }
        unheard = left;
    }
}
