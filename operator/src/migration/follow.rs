//! The part of a migration that the source's agent runs: asking it, following its events, joining again when
//! the stream breaks, asking both ends when it does not go on, and giving up when the user wants that.

use std::sync::Arc;
use std::time::Duration;

use futures::future::{BoxFuture, pending};
use futures::stream::ReadyChunks;
use futures::{FutureExt, StreamExt};
use slackwater_handover::resolver::Settlement;
use slackwater_proto::node::migration_event::What;
use slackwater_proto::node::{MigrationEvent, Outcome, Phase};
use tokio::time::Instant;

use super::abort::{AbortAnswer, abort, abort_once};
use super::inquiry::{Round, run_round};
use super::request::Accepted;
use super::run::Run;
use super::step::Wish;
use crate::fleet::{CallError, Events};
use crate::reason::SOURCE_REFUSED;

/// How long the last event may take after the source has said that it gave the migration up.
const LAST_EVENT_TIMEOUT: Duration = Duration::from_secs(10);
/// The pause before the source is asked again to give up, after it has refused.
const REFUSED_ABORT_PAUSE: Duration = Duration::from_secs(5);
/// At most this many events are taken in before the status is written.
const BATCH: usize = 256;
/// The pause after events that have changed the status: an agent must not have the API server written to
/// without a pause.
const BATCH_PAUSE: Duration = Duration::from_millis(200);
/// How long what is worth showing waits for more of it: a blackout is shorter. What happens within that time
/// costs one write, and often none, since the end is written at once.
const PROGRESS_PAUSE: Duration = Duration::from_secs(1);
/// How often the source is joined again after its journal says that the migration is settled. After that,
/// what its journal says is all there is.
const JOINS_AFTER_THE_END: u32 = 3;

/// How following a stream of events ended.
enum Followed {
    /// The migration has ended, and the draft says how.
    Finished,
    /// The stream is over, and has not said how the migration ended.
    NoOutcome(String),
    /// The source refuses, before the first event.
    Refused(CallError),
    /// The stream broke; the migration may go on.
    Broken(CallError),
}

/// The source cannot be followed, for now or for good.
struct NotFollowed {
    /// Why, for a person.
    error: String,
    /// Why, for a condition, if it turns out that the source never began.
    reason: String,
    /// The source answers, and does not report more.
    refused: bool,
}

impl NotFollowed {
    fn because_of(error: &CallError) -> Self {
        let reason = error.source_reason().to_owned();
        Self { error: error.to_string(), reason, refused: error.is_refusal() }
    }
}

/// A batch of events, as far as they have arrived.
type Batch = Vec<Result<MigrationEvent, CallError>>;

/// What runs beside a stream of events.
#[derive(Default)]
struct SideTasks {
    /// Asking the source to give up.
    abort: Option<BoxFuture<'static, AbortAnswer>>,
    /// Asking both ends what they have journalled.
    round: Option<BoxFuture<'static, Round>>,
    /// Waiting for the last event of a migration that was given up.
    last_event: Option<BoxFuture<'static, ()>>,
    /// No events are taken in before: what was taken in last has led to a write.
    next_batch: Option<Instant>,
    /// When the status is written with the progress that has been taken in.
    progress_due: Option<Instant>,
}

/// What happens next while a stream is followed.
enum Wakeup {
    /// Events have arrived. `None`: the stream has ended.
    Events(Option<Batch>),
    /// A VMMigration has changed.
    ObjectChanged,
    /// The source has answered an abort.
    AbortAnswered(AbortAnswer),
    /// Both ends have been asked.
    RoundEnded(Round),
    /// The source has given up, and its last event does not come.
    NoLastEvent,
    /// It is time to write what has been taken in.
    ProgressDue,
}

impl Run {
    pub(super) async fn migrate(&mut self) {
        let Some(accepted) = self.tracked.accepted() else { return self.tracked.give_up_unreadable().await };
        let mut never_asked = std::mem::take(&mut self.attempt.source_never_asked);
        let mut joins_left = JOINS_AFTER_THE_END;
        self.recall();
        while !self.tracked.is_forgotten() {
            if self.wants_abort() {
                if self.give_up(&accepted).await {
                    return;
                }
                continue;
            }
            let followed = self.join(&accepted).await;
            let Some(not_followed) = self.handle_end(followed, never_asked).await else { return };
            never_asked = false;
            let refused = not_followed.refused;
            self.show_unreachable(&accepted, &not_followed.error, refused).await;
            match self.inquire(&accepted).await {
                // The migration may begin, when the source can be asked again.
                Some(Settlement::NeverBegan) if !refused => {}
                Some(how) if refused || joins_left == 0 => {
                    return self.conclude(&how, Some(&not_followed)).await;
                }
                // The source has more to report than its journal says, and can be asked now.
                Some(_) => {
                    joins_left -= 1;
                    self.attempt.inquiry.hurry();
                }
                None => {}
            }
        }
    }

    /// Asks the source to migrate, or joins the migration there, and follows its events.
    async fn join(&mut self, accepted: &Accepted) -> Followed {
        match self.context.fleet.migrate(&accepted.source, accepted.migrate()).await {
            Ok(events) => self.follow(accepted, events).await,
            Err(error) if error.is_refusal() => Followed::Refused(error),
            Err(error) => Followed::Broken(error),
        }
    }

    /// Ends the migration if it is over. `None`: it is, and the status is written.
    async fn handle_end(&mut self, followed: Followed, never_asked: bool) -> Option<NotFollowed> {
        match followed {
            Followed::Finished => None,
            Followed::Refused(error) if never_asked => {
                self.tracked.draft_now().source_refused(error.source_reason(), &error.to_string());
                self.tracked.write().await;
                None
            }
            Followed::Broken(error) if never_asked && error.was_not_asked() => {
                self.tracked.draft_now().source_unreachable(&error.to_string());
                self.tracked.write().await;
                None
            }
            Followed::Refused(error) => Some(NotFollowed::because_of(&error)),
            Followed::NoOutcome(error) => {
                Some(NotFollowed { error, reason: SOURCE_REFUSED.to_owned(), refused: true })
            }
            // Whatever ended the stream after its first event is no answer of the source.
            Followed::Broken(error) => {
                Some(NotFollowed { refused: false, ..NotFollowed::because_of(&error) })
            }
        }
    }

    fn wants_abort(&self) -> bool {
        let wish = self.tracked.draft().wish;
        wish != Wish::Migrate && !self.attempt.abort_too_late && !self.attempt.given_up
    }

    async fn conclude(&mut self, how: &Settlement, why: Option<&NotFollowed>) {
        let why = why.map(|why| (why.reason.as_str(), why.error.as_str()));
        self.tracked.draft_now().settle(how, why);
        self.tracked.write().await;
    }

    async fn show_unreachable(&mut self, accepted: &Accepted, error: &str, refused: bool) {
        let source = &accepted.source;
        tracing::warn!(
            migration = self.tracked.name(),
            source,
            error,
            "the stream of events broke; joining again"
        );
        let error = error.trim_end_matches('.');
        let message = match refused {
            true => format!("{source} does not report on the migration: {error}. Both ends are asked."),
            false => format!(
                "{source} does not answer: {error}. Its agent goes on by itself; the operator joins again when it can."
            ),
        };
        self.tracked.draft_now().agent_unreachable(&message);
        self.tracked.write_progress().await;
    }

    /// Gives up a migration whose stream is not open. `true`: it is over.
    async fn give_up(&mut self, accepted: &Accepted) -> bool {
        self.tracked.draft_now().abort_requested();
        self.tracked.write_progress().await;
        let request = accepted.abort(self.tracked.draft().wish.why_given_up());
        match abort_once(&self.context.fleet, accepted, request).await {
            // An agent answers so for a migration that it does not know, too: what it has journalled decides.
            Ok(AbortAnswer::Ended) => match self.inquire(accepted).await {
                Some(how @ (Settlement::NeverBegan | Settlement::SourceLost { .. })) => {
                    self.conclude(&how, None).await;
                    return true;
                }
                // Its stream reports the rest.
                Some(_) => self.attempt.given_up = true,
                None => {}
            },
            Ok(AbortAnswer::TooLate(error)) => self.abort_too_late(&error).await,
            Ok(AbortAnswer::Refused(error)) => {
                self.abort_refused(&error).await;
                self.inquire(accepted).await;
            }
            Err(error) => {
                let source = &accepted.source;
                tracing::warn!(
                    migration = self.tracked.name(),
                    source,
                    %error,
                    "aborting failed; trying again"
                );
                if let Some(how @ Settlement::SourceLost { .. }) = self.inquire(accepted).await {
                    self.conclude(&how, None).await;
                    return true;
                }
            }
        }
        false
    }

    async fn abort_too_late(&mut self, error: &CallError) {
        self.attempt.abort_too_late = true;
        self.tracked.draft_now().abort_too_late(&error.to_string());
        self.tracked.write_progress().await;
    }

    async fn abort_refused(&mut self, error: &CallError) {
        tracing::warn!(
            migration = self.tracked.name(),
            %error,
            "the source cannot give the migration up; asking again"
        );
        self.tracked.draft_now().abort_refused(&error.to_string());
        self.tracked.write_progress().await;
    }

    async fn follow(&mut self, accepted: &Accepted, events: Events) -> Followed {
        self.attempt.trace.begin_again();
        let mut batches = events.ready_chunks(BATCH);
        let mut side_tasks = SideTasks::default();
        loop {
            self.start_side_tasks(accepted, &mut side_tasks).await;
            match self.wait(&mut batches, &mut side_tasks).await {
                Wakeup::Events(Some(batch)) => {
                    let before = self.tracked.draft().status.clone();
                    if let Some(end) = self.take_in(batch, &mut side_tasks.progress_due).await {
                        return end;
                    }
                    let changed = self.tracked.draft().status != before;
                    side_tasks.next_batch = changed.then(|| Instant::now() + BATCH_PAUSE);
                }
                Wakeup::Events(None) => {
                    let message = "the stream of events ended before the migration did".to_owned();
                    return Followed::Broken(CallError::Broken { reason: None, message });
                }
                Wakeup::ObjectChanged => {
                    self.tracked.look();
                    if self.tracked.is_forgotten() {
                        return Followed::Finished;
                    }
                    self.note_spec().await;
                }
                Wakeup::AbortAnswered(AbortAnswer::Ended) => {
                    self.attempt.given_up = true;
                    side_tasks.last_event = Some(tokio::time::sleep(LAST_EVENT_TIMEOUT).boxed());
                }
                Wakeup::AbortAnswered(AbortAnswer::TooLate(error)) => self.abort_too_late(&error).await,
                Wakeup::AbortAnswered(AbortAnswer::Refused(error)) => {
                    self.abort_refused(&error).await;
                    side_tasks.abort = Some(self.abort_after(accepted, REFUSED_ABORT_PAUSE));
                }
                Wakeup::RoundEnded(round) => {
                    // The stream reports how the migration ended.
                    self.take_in_round(round).await;
                }
                Wakeup::ProgressDue => {
                    side_tasks.progress_due = None;
                    self.tracked.write_progress().await;
                }
                Wakeup::NoLastEvent => {
                    return Followed::NoOutcome("it was given up, and has reported no more".to_owned());
                }
            }
        }
    }

    /// Begins what is wanted and not under way yet.
    async fn start_side_tasks(&mut self, accepted: &Accepted, side_tasks: &mut SideTasks) {
        if self.wants_abort() && side_tasks.abort.is_none() {
            self.tracked.draft_now().abort_requested();
            self.tracked.write_progress().await;
            side_tasks.abort = Some(self.abort_after(accepted, Duration::ZERO));
        }
        if self.is_stuck() && side_tasks.round.is_none() {
            let next = self.attempt.inquiry.next_round();
            let fleet = Arc::clone(&self.context.fleet);
            side_tasks.round = Some(run_round(fleet, accepted.clone(), next).boxed());
        }
    }

    /// Waits for what happens next. Nothing is lost of what is under way.
    async fn wait(&mut self, batches: &mut ReadyChunks<Events>, side_tasks: &mut SideTasks) -> Wakeup {
        tokio::select! {
            batch = next_batch(batches, side_tasks.next_batch) => Wakeup::Events(batch),
            () = self.tracked.changed() => Wakeup::ObjectChanged,
            answer = finished(&mut side_tasks.abort) => Wakeup::AbortAnswered(answer),
            round = finished(&mut side_tasks.round) => Wakeup::RoundEnded(round),
            () = finished(&mut side_tasks.last_event) => Wakeup::NoLastEvent,
            () = until(side_tasks.progress_due) => Wakeup::ProgressDue,
        }
    }

    /// Both ends have to be asked, although the source's stream is open.
    fn is_stuck(&self) -> bool {
        let inquiry = &self.attempt.inquiry;
        inquiry.has_source_doubt()
            || inquiry.resolver().doubt().is_some()
            || self.tracked.draft().is_in_doubt()
    }

    fn abort_after(&self, accepted: &Accepted, pause: Duration) -> BoxFuture<'static, AbortAnswer> {
        let (fleet, accepted) = (Arc::clone(&self.context.fleet), accepted.clone());
        let request = accepted.abort(self.tracked.draft().wish.why_given_up());
        async move {
            tokio::time::sleep(pause).await;
            abort(&fleet, &accepted, request).await
        }
        .boxed()
    }

    /// Takes in events. Returns how the stream ended, if it has.
    async fn take_in(&mut self, batch: Batch, progress_due: &mut Option<Instant>) -> Option<Followed> {
        let mut worth_writing = false;
        for item in batch {
            let status = &self.tracked.draft().status;
            let event = match item {
                Ok(event) => event,
                Err(error) if error.is_refusal() && self.attempt.trace.is_silent() => {
                    return Some(Followed::Refused(error));
                }
                Err(error) => return Some(Followed::Broken(error)),
            };
            // Nothing happens elsewhere: a migration has two ends.
            let (source, target) = (&status.source_node, &status.target_node);
            if ![source, target].into_iter().flatten().any(|end| *end == event.node) {
                continue;
            }
            let (node, unix_ns, what) = (event.node.clone(), event.unix_ns, event.what.clone());
            if !self.attempt.trace.push(event) {
                continue;
            }
            match what {
                Some(What::Phase(phase)) => {
                    let phase = Phase::try_from(phase).unwrap_or_default();
                    worth_writing |= self.reach(phase, &node);
                }
                Some(What::Doubt(doubt)) => {
                    self.attempt.inquiry.source_doubts(doubt.reason, doubt.message);
                    worth_writing = true;
                }
                Some(What::Estimate(estimate)) => {
                    worth_writing |= self.tracked.draft_now().update_estimate(&estimate, unix_ns);
                }
                Some(What::Finished(finished)) => {
                    self.tracked.draft_now().finish(&self.attempt.trace, &finished);
                    if finished.outcome() == Outcome::Unspecified {
                        let message = format!("it ended without an outcome ({})", finished.message);
                        return Some(Followed::NoOutcome(message));
                    }
                    self.tracked.write().await;
                    return Some(Followed::Finished);
                }
                Some(What::DeviceState(_) | What::Progress(_)) | None => {}
            }
        }
        if self.attempt.inquiry.has_source_doubt() {
            self.show_doubt();
        }
        if worth_writing {
            progress_due.get_or_insert_with(|| Instant::now() + PROGRESS_PAUSE);
        }
        None
    }

    /// The migration has come to a phase. `true`: the status is worth writing now.
    fn reach(&mut self, phase: Phase, node: &str) -> bool {
        let committed =
            matches!(phase, Phase::Committed | Phase::Starting | Phase::Started | Phase::Released);
        self.attempt.inquiry.source_goes_on(committed);
        if !self.tracked.draft().is_new(phase, node) {
            return false;
        }
        self.attempt.inquiry.hurry();
        let doubtful = self.tracked.draft().is_in_doubt();
        let draft = self.tracked.draft_now();
        draft.clear_doubt();
        draft.reach(phase, &self.attempt.trace) || doubtful
    }
}

async fn next_batch(batches: &mut ReadyChunks<Events>, not_before: Option<Instant>) -> Option<Batch> {
    if let Some(time) = not_before {
        tokio::time::sleep_until(time).await;
    }
    batches.next().await
}

/// Returns at that time; never, if there is none.
async fn until(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => pending().await,
    }
}

/// The result of what is under way; never, if nothing is. Afterwards nothing is.
async fn finished<T>(under_way: &mut Option<BoxFuture<'static, T>>) -> T {
    let result = match under_way {
        Some(future) => future.await,
        None => pending().await,
    };
    *under_way = None;
    result
}

#[cfg(test)]
mod tests {
    use futures::stream;

    use super::*;

    #[tokio::test]
    async fn events_that_changed_the_status_are_followed_by_a_pause_in_which_the_next_ones_gather() {
        let numbered = |sequence| Ok(MigrationEvent { sequence, ..MigrationEvent::default() });
        let events: Events = stream::iter((1..=3).map(numbered)).boxed();
        let mut batches = events.ready_chunks(2);
        let begun = Instant::now();
        assert_eq!(next_batch(&mut batches, None).await.map(|batch| batch.len()), Some(2));
        let batch = next_batch(&mut batches, Some(begun + BATCH_PAUSE)).await;
        assert_eq!(batch.map(|batch| batch.len()), Some(1));
        assert!(begun.elapsed() >= BATCH_PAUSE);
    }
}
