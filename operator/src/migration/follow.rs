//! The part of a migration that the source's agent runs: asking it, following its events, joining again when the stream
//! breaks, and giving up when the object is deleted.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::future::{Either, pending};
use slackwater_proto::node::migration_event::What;
use slackwater_proto::node::{AbortRequest, MigrationEvent, Phase};

use super::fact;
use super::request::Accepted;
use super::run::{Pause, Run};
use super::trace::Trace;
use crate::fleet::{CallError, Events, Fleet};

/// What the source is told when the object is deleted.
const WHY: &str = "the VMMigration was deleted";
/// How long the last event may take after the source has said that it gave the migration up.
const LAST_WORD: Duration = Duration::from_secs(10);
/// The pause before an abort that did not come through is tried again.
const ABORT_AGAIN: Duration = Duration::from_secs(1);
/// At most this many events are taken in before the status is written.
const BATCH: usize = 256;

/// How following a stream of events came to an end.
enum Followed {
    /// The migration has ended, and the draft says how.
    Finished,
    /// The source gave the migration up and its stream has not told more.
    GaveUp,
    /// The source refuses, before the first event.
    Refused(CallError),
    /// The stream broke; the migration may go on.
    Broken(CallError),
}

impl Run {
    pub(super) async fn migrate(&mut self) {
        let Some(accepted) = self.accepted() else { return self.unreadable().await };
        let mut never_asked = std::mem::take(&mut self.source_never_asked);
        let mut pause = Pause::new();
        loop {
            if self.wants_abort() {
                if self.give_up(&accepted, &mut pause).await {
                    return;
                }
                continue;
            }
            let followed = match self.around.fleet.migrate(&accepted.source, accepted.migrate()).await {
                Ok(events) => self.follow(&accepted, events).await,
                Err(error) if error.is_refusal() => Followed::Refused(error),
                Err(error) => Followed::Broken(error),
            };
            match followed {
                Followed::Finished => return,
                Followed::GaveUp => self.learn(fact::aborted),
                Followed::Refused(error) if never_asked => {
                    self.learn(|draft, stamp| fact::source_refused(draft, &error.to_string(), stamp));
                }
                Followed::Refused(error) => {
                    self.learn(|draft, stamp| fact::source_forgot(draft, &error.to_string(), stamp))
                }
                Followed::Broken(error) if never_asked && error.was_not_asked() => {
                    self.learn(|draft, stamp| fact::source_unreachable(draft, &error.to_string(), stamp));
                }
                Followed::Broken(error) => {
                    never_asked = false;
                    self.say_unreachable(&accepted, &error).await;
                    self.rest(&mut pause).await;
                    self.look();
                    continue;
                }
            }
            return self.write().await;
        }
    }

    fn wants_abort(&self) -> bool {
        self.is_deleting() && !self.abort_too_late
    }

    async fn say_unreachable(&mut self, accepted: &Accepted, error: &CallError) {
        tracing::warn!(migration = self.name(), source = accepted.source, %error, "the stream of events broke; joining again");
        let message = format!(
            "{} does not answer: {error}. Its agent goes on by itself; the operator joins again when it can.",
            accepted.source
        );
        self.learn(|draft, stamp| fact::unreachable(draft, &message, stamp));
        self.write_progress().await;
    }

    /// Gives up a migration whose stream is not open. `true`: it is over.
    async fn give_up(&mut self, accepted: &Accepted, pause: &mut Pause) -> bool {
        self.learn(fact::aborting);
        self.write_progress().await;
        match self.around.fleet.abort(&accepted.source, accepted.abort(WHY)).await {
            Ok(()) => {
                self.learn(fact::aborted);
                self.write().await;
                return true;
            }
            Err(error) if error.is_refusal() => self.too_late(&error).await,
            Err(error) => {
                tracing::warn!(migration = self.name(), source = accepted.source, %error, "aborting failed; trying again");
                self.rest(pause).await;
            }
        }
        false
    }

    async fn too_late(&mut self, error: &CallError) {
        self.abort_too_late = true;
        self.learn(|draft, stamp| fact::abort_too_late(draft, &error.to_string(), stamp));
        self.write_progress().await;
    }

    async fn follow(&mut self, accepted: &Accepted, events: Events) -> Followed {
        let mut trace = Trace::default();
        let mut batches = events.ready_chunks(BATCH);
        let mut abort = pin!(Either::Left(pending::<Result<(), CallError>>()));
        let mut asked_to_abort = false;
        let mut last_word = pin!(Either::Left(pending::<()>()));
        loop {
            if self.wants_abort() && !asked_to_abort {
                asked_to_abort = true;
                self.learn(fact::aborting);
                self.write_progress().await;
                abort.set(Either::Right(abort_at(
                    Arc::clone(&self.around.fleet),
                    accepted.source.clone(),
                    accepted.abort(WHY),
                )));
            }
            tokio::select! {
                batch = batches.next() => {
                    let Some(batch) = batch else {
                        let message = "the stream of events ended before the migration did".to_owned();
                        return Followed::Broken(CallError::Broken { message });
                    };
                    if let Some(end) = self.take_in(&mut trace, batch).await {
                        return end;
                    }
                }
                _ = self.around.migrations.changed() => {
                    self.look();
                    self.note_spec_change().await;
                }
                answer = &mut abort => {
                    abort.set(Either::Left(pending()));
                    match answer {
                        Ok(()) => last_word.set(Either::Right(tokio::time::sleep(LAST_WORD))),
                        Err(error) => self.too_late(&error).await,
                    }
                }
                () = &mut last_word => return Followed::GaveUp,
            }
        }
    }

    async fn take_in(
        &mut self,
        trace: &mut Trace,
        batch: Vec<Result<MigrationEvent, CallError>>,
    ) -> Option<Followed> {
        let mut worth_writing = false;
        for item in batch {
            let event = match item {
                Ok(event) => event,
                Err(error) if error.is_refusal() && trace.is_empty() => {
                    return Some(Followed::Refused(error));
                }
                Err(error) => return Some(Followed::Broken(error)),
            };
            let what = event.what.clone();
            if !trace.push(event) {
                continue;
            }
            match what {
                Some(What::Phase(phase)) => {
                    let phase = Phase::try_from(phase).unwrap_or_default();
                    worth_writing |= self.learn(|draft, stamp| fact::phase(draft, trace, phase, stamp));
                }
                Some(What::Finished(finished)) => {
                    self.learn(|draft, stamp| fact::finished(draft, trace, &finished, stamp));
                    self.write().await;
                    return Some(Followed::Finished);
                }
                Some(What::DeviceState(_) | What::Progress(_) | What::Doubt(_)) | None => {}
            }
        }
        if worth_writing {
            self.write_progress().await;
        }
        None
    }
}

/// Asks the source to give the migration up until it has answered.
async fn abort_at(fleet: Arc<Fleet>, source: String, request: AbortRequest) -> Result<(), CallError> {
    loop {
        match fleet.abort(&source, request.clone()).await {
            Err(error) if !error.is_refusal() => {
                tracing::warn!(source, %error, "aborting failed; trying again");
                tokio::time::sleep(ABORT_AGAIN).await;
            }
            answer => return answer,
        }
    }
}
