//! The part of a migration that the source's agent runs: asking it, following its events, joining again when the stream
//! breaks, asking both ends when it does not go on, and giving up when that is wanted.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures::future::{BoxFuture, Either, pending};
use futures::{FutureExt, StreamExt};
use slackwater_handover::{Record, Word};
use slackwater_proto::node::migration_event::What;
use slackwater_proto::node::{AbortRequest, MigrationEvent, Outcome, Phase};

use super::fact;
use super::inquiry::{self, Round};
use super::request::Accepted;
use super::resolver::{Event, Settlement};
use super::run::Run;
use super::step::Wish;
use crate::fleet::{CallError, Events, Fleet};

/// How long the last event may take after the source has said that it gave the migration up.
const LAST_WORD: Duration = Duration::from_secs(10);
/// The pause before an abort that did not come through is tried again.
const ABORT_AGAIN: Duration = Duration::from_secs(1);
/// The same, if the source has refused it.
const ABORT_REFUSED: Duration = Duration::from_secs(5);
/// At most this many events are taken in before the status is written.
const BATCH: usize = 256;
/// So often the source is asked for more than its journal says, before what that says is all there is.
const JOINS_AFTER_THE_END: u32 = 3;

/// How following a stream of events came to an end.
enum Followed {
    /// The migration has ended, and the draft says how.
    Finished,
    /// The stream is over, and has not told how it ended.
    Untold(String),
    /// The source refuses, before the first event.
    Refused(CallError),
    /// The stream broke; the migration may go on.
    Broken(CallError),
}

/// What the source says to an abort.
enum AbortAnswer {
    /// It has ended.
    Ended,
    /// The point of no return has passed.
    TooLate(CallError),
    /// No, for another reason.
    Refused(CallError),
}

impl Run {
    pub(super) async fn migrate(&mut self) {
        let Some(accepted) = self.accepted() else { return self.unreadable().await };
        let mut never_asked = std::mem::take(&mut self.source_never_asked);
        let mut joins_left = JOINS_AFTER_THE_END;
        self.recall();
        while !self.is_forgotten() {
            if self.wants_abort() {
                if self.give_up(&accepted).await {
                    return;
                }
                continue;
            }
            let followed = match self.around.fleet.migrate(&accepted.source, accepted.migrate()).await {
                Ok(events) => self.follow(&accepted, events).await,
                Err(error) if error.is_refusal() => Followed::Refused(error),
                Err(error) => Followed::Broken(error),
            };
            let (error, refused) = match followed {
                Followed::Finished => return,
                Followed::Refused(error) if never_asked => {
                    self.learn(|draft, stamp| fact::source_refused(draft, &error.to_string(), stamp));
                    return self.write().await;
                }
                Followed::Broken(error) if never_asked && error.was_not_asked() => {
                    self.learn(|draft, stamp| fact::source_unreachable(draft, &error.to_string(), stamp));
                    return self.write().await;
                }
                Followed::Refused(error) => (error.to_string(), true),
                Followed::Untold(error) => (error, true),
                Followed::Broken(error) => (error.to_string(), false),
            };
            never_asked = false;
            self.say_unreachable(&accepted, &error, refused).await;
            match self.inquire(&accepted).await {
                // It may begin, when it can be asked again.
                Some(Settlement::NeverBegan) if !refused => {}
                Some(how) if refused || joins_left == 0 => return self.conclude(&how, Some(&error)).await,
                // It has more to tell than its journal's last word, and can be asked now.
                Some(_) => {
                    joins_left -= 1;
                    self.inquiry.hurry();
                }
                None => {}
            }
        }
    }

    fn wants_abort(&self) -> bool {
        self.draft.wish != Wish::Migrate && !self.abort_too_late && !self.given_up
    }

    /// What the source is told when it is to give up.
    fn why_abort(&self) -> &'static str {
        match self.draft.wish {
            Wish::Delete => "the VMMigration was deleted",
            _ => "spec.cancel was set to true",
        }
    }

    async fn conclude(&mut self, how: &Settlement, error: Option<&str>) {
        self.learn(|draft, stamp| fact::settled(draft, how, error, stamp));
        self.write().await;
    }

    async fn say_unreachable(&mut self, accepted: &Accepted, error: &str, refused: bool) {
        tracing::warn!(
            migration = self.name(),
            source = accepted.source,
            error,
            "the stream of events broke; joining again"
        );
        let error = error.trim_end_matches('.');
        let message = match refused {
            true => {
                format!("{} does not tell of the migration: {error}. Both ends are asked.", accepted.source)
            }
            false => format!(
                "{} does not answer: {error}. Its agent goes on by itself; the operator joins again when it can.",
                accepted.source
            ),
        };
        self.learn(|draft, stamp| fact::unreachable(draft, &message, stamp));
        self.write_progress().await;
    }

    /// Gives up a migration whose stream is not open. `true`: it is over.
    async fn give_up(&mut self, accepted: &Accepted) -> bool {
        self.learn(fact::aborting);
        self.write_progress().await;
        let request = accepted.abort(self.why_abort());
        let answer = match self.around.fleet.abort(&accepted.source, request).await {
            Ok(()) => AbortAnswer::Ended,
            Err(error) if error.is_refusal() => {
                refused_or_too_late(&self.around.fleet, accepted, error).await
            }
            Err(error) => {
                tracing::warn!(migration = self.name(), source = accepted.source, %error, "aborting failed; trying again");
                self.inquire(accepted).await;
                return false;
            }
        };
        match answer {
            // An agent answers so for a migration that it does not know, too: what it has journalled decides.
            AbortAnswer::Ended => match self.inquire(accepted).await {
                Some(Settlement::NeverBegan) => {
                    self.conclude(&Settlement::NeverBegan, None).await;
                    return true;
                }
                // Its stream tells the rest.
                Some(_) => self.given_up = true,
                None => {}
            },
            AbortAnswer::TooLate(error) => self.too_late(&error).await,
            AbortAnswer::Refused(error) => {
                self.abort_refused(&error).await;
                self.inquire(accepted).await;
            }
        }
        false
    }

    async fn too_late(&mut self, error: &CallError) {
        self.abort_too_late = true;
        self.learn(|draft, stamp| fact::abort_too_late(draft, &error.to_string(), stamp));
        self.write_progress().await;
    }

    async fn abort_refused(&mut self, error: &CallError) {
        tracing::warn!(migration = self.name(), %error, "the source cannot give the migration up; asking again");
        self.learn(|draft, stamp| fact::abort_refused(draft, &error.to_string(), stamp));
        self.write_progress().await;
    }

    async fn follow(&mut self, accepted: &Accepted, events: Events) -> Followed {
        self.trace.begin_again();
        let mut batches = events.ready_chunks(BATCH);
        let mut abort: Option<BoxFuture<'static, AbortAnswer>> = None;
        let mut round: Option<BoxFuture<'static, Round>> = None;
        let mut last_word = pin!(Either::Left(pending::<()>()));
        loop {
            if self.wants_abort() && abort.is_none() {
                self.learn(fact::aborting);
                self.write_progress().await;
                abort = Some(self.abort_after(accepted, Duration::ZERO));
            }
            if round.is_none() && self.does_not_go_on() {
                let next = self.inquiry.next_round();
                round = Some(inquiry::round(Arc::clone(&self.around.fleet), accepted.clone(), next).boxed());
            }
            tokio::select! {
                batch = batches.next() => {
                    let Some(batch) = batch else {
                        let message = "the stream of events ended before the migration did".to_owned();
                        return Followed::Broken(CallError::Broken { message });
                    };
                    if let Some(end) = self.take_in(batch).await {
                        return end;
                    }
                }
                _ = self.around.migrations.changed() => {
                    self.look();
                    if self.is_forgotten() {
                        return Followed::Finished;
                    }
                    self.note_spec_change().await;
                }
                answer = outcome(&mut abort) => match answer {
                    AbortAnswer::Ended => {
                        self.given_up = true;
                        last_word.set(Either::Right(tokio::time::sleep(LAST_WORD)));
                    }
                    AbortAnswer::TooLate(error) => self.too_late(&error).await,
                    AbortAnswer::Refused(error) => {
                        self.abort_refused(&error).await;
                        abort = Some(self.abort_after(accepted, ABORT_REFUSED));
                    }
                },
                heard = outcome(&mut round) => {
                    // How it has ended, the stream tells.
                    self.take_in_round(heard).await;
                }
                () = &mut last_word => {
                    return Followed::Untold("it was given up, and has not told more".to_owned());
                }
            }
        }
    }

    /// Both ends have to be asked, although the source's stream is open.
    fn does_not_go_on(&self) -> bool {
        self.inquiry.told.is_some() || self.inquiry.resolver.doubt().is_some() || self.draft.is_in_doubt()
    }

    fn abort_after(&self, accepted: &Accepted, pause: Duration) -> BoxFuture<'static, AbortAnswer> {
        let (fleet, accepted) = (Arc::clone(&self.around.fleet), accepted.clone());
        let request = accepted.abort(self.why_abort());
        async move {
            tokio::time::sleep(pause).await;
            abort_at(&fleet, &accepted, request).await
        }
        .boxed()
    }

    async fn take_in(&mut self, batch: Vec<Result<MigrationEvent, CallError>>) -> Option<Followed> {
        let mut worth_writing = false;
        for item in batch {
            let event = match item {
                Ok(event) => event,
                Err(error) if error.is_refusal() && self.trace.is_silent() => {
                    return Some(Followed::Refused(error));
                }
                Err(error) => return Some(Followed::Broken(error)),
            };
            let (node, unix_ns, what) = (event.node.clone(), event.unix_ns, event.what.clone());
            if !self.trace.push(event) {
                continue;
            }
            match what {
                Some(What::Phase(phase)) => {
                    let phase = Phase::try_from(phase).unwrap_or_default();
                    worth_writing |= self.reach(phase, &node);
                }
                Some(What::Doubt(doubt)) => {
                    self.inquiry.hear_doubt(doubt.reason, doubt.message);
                    worth_writing = true;
                }
                Some(What::Estimate(estimate)) => {
                    worth_writing |=
                        self.learn(|draft, stamp| fact::estimated(draft, &estimate, unix_ns, stamp));
                }
                Some(What::Finished(finished)) => {
                    let trace = std::mem::take(&mut self.trace);
                    self.learn(|draft, stamp| fact::finished(draft, &trace, &finished, stamp));
                    self.trace = trace;
                    if finished.outcome() == Outcome::Unspecified {
                        let message = format!("it ended without telling how ({})", finished.message);
                        return Some(Followed::Untold(message));
                    }
                    self.write().await;
                    return Some(Followed::Finished);
                }
                Some(What::DeviceState(_) | What::Progress(_)) | None => {}
            }
        }
        if self.inquiry.told.is_some() {
            self.show_doubt();
        }
        if worth_writing {
            self.write_progress().await;
        }
        None
    }

    /// The migration has come to a phase. `true`: that is worth writing.
    fn reach(&mut self, phase: Phase, node: &str) -> bool {
        // A phase ends what the source was in doubt about, whether it has been shown or not.
        self.inquiry.told = None;
        let committed =
            matches!(phase, Phase::Committed | Phase::Starting | Phase::Started | Phase::Released);
        self.inquiry.hear(Event::SourceTold { committed });
        if !fact::is_news(&self.draft, phase, node) {
            return false;
        }
        self.inquiry.hurry();
        let doubtful = self.draft.is_in_doubt();
        self.learn(fact::doubt_cleared);
        let trace = std::mem::take(&mut self.trace);
        let worth_writing = self.learn(|draft, stamp| fact::phase(draft, &trace, phase, stamp));
        self.trace = trace;
        worth_writing || doubtful
    }
}

/// The result of what is under way; never, if nothing is. Afterwards nothing is.
async fn outcome<T>(under_way: &mut Option<BoxFuture<'static, T>>) -> T {
    let result = match under_way {
        Some(future) => future.await,
        None => pending().await,
    };
    *under_way = None;
    result
}

/// Asks the source to give the migration up until it has answered.
async fn abort_at(fleet: &Fleet, accepted: &Accepted, request: AbortRequest) -> AbortAnswer {
    loop {
        match fleet.abort(&accepted.source, request.clone()).await {
            Ok(()) => return AbortAnswer::Ended,
            Err(error) if error.is_refusal() => return refused_or_too_late(fleet, accepted, error).await,
            Err(error) => {
                tracing::warn!(source = accepted.source, %error, "aborting failed; trying again");
                tokio::time::sleep(ABORT_AGAIN).await;
            }
        }
    }
}

/// Whether the point of no return has passed, or the source cannot give up for another reason: its journal says which.
async fn refused_or_too_late(fleet: &Fleet, accepted: &Accepted, error: CallError) -> AbortAnswer {
    let word = fleet.resolve(&accepted.source, accepted.resolve(None)).await;
    let record = word.ok().and_then(|state| Word::try_from(&state).ok()).and_then(|word| word.record);
    match record {
        Some(Record::Committed | Record::Released) => AbortAnswer::TooLate(error),
        _ => AbortAnswer::Refused(error),
    }
}
