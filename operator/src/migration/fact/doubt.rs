//! Facts about doubt: what keeps a migration from going on, and what would help.

use slackwater_api::MigrationPhase;
use slackwater_api::condition::{IN_DOUBT, SUCCEEDED};

use super::Draft;
use crate::conditions::{Stamp, Status, find};
use crate::inventory::camel_case_or;
use crate::migration::resolver::{DoubtReason, End};
use crate::migration::step::Wish;

/// What is known of a doubt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Doubtful {
    /// The operator has asked both ends, or tried to.
    Asked {
        /// What came of it.
        reason: DoubtReason,
        /// Why an end cannot be asked, in the words that were heard.
        why: String,
        /// The end for which an administrator may decide.
        remedy: Option<End>,
    },
    /// The source says so.
    Told {
        /// CamelCase, as the agent has it.
        reason: String,
        /// In the agent's words.
        message: String,
    },
}

impl Doubtful {
    /// The source says that it cannot ask the target, or gets no good answer. Of that the operator knows more when it has
    /// asked the target itself.
    #[must_use]
    pub fn is_about_the_target(&self) -> bool {
        matches!(self, Self::Told { reason, .. } if reason == "PeerLost" || reason == "TargetForgot")
    }
}

/// The migration does not go on: a node has to come back, or a person to decide.
pub fn in_doubt(draft: &mut Draft, doubt: &Doubtful, stamp: Stamp) {
    let (reason, message) = match doubt {
        Doubtful::Asked { reason, why, remedy } => {
            (reason.as_str().to_owned(), asked(draft, *reason, why, *remedy))
        }
        Doubtful::Told { reason, message } => {
            (camel_case_or(reason, "SourceInDoubt"), told(draft, reason, message))
        }
    };
    let message = format!("{message}{}", of_deletion(draft));
    let before = find(&draft.status.conditions, IN_DOUBT);
    let known = before.is_some_and(|known| known.status == Status::True.as_str() && known.reason == reason);
    draft.status.phase = Some(MigrationPhase::InDoubt);
    draft.set(IN_DOUBT, Status::True, &reason, &message, stamp);
    draft.set(SUCCEEDED, Status::Unknown, &reason, &message, stamp);
    if !known {
        draft.tell(true, "InDoubt", format!("{reason}: {message}"));
    }
}

/// It goes on.
pub fn doubt_cleared(draft: &mut Draft, stamp: Stamp) {
    if !draft.is_in_doubt() {
        return;
    }
    let message = "Nothing is in doubt any more.";
    draft.set(IN_DOUBT, Status::False, "Settled", message, stamp);
    draft.tell(false, "DoubtSettled", message.to_owned());
    if draft.status.completion_time.is_some() {
        return;
    }
    let (phase, message) = if draft.is_committed() {
        (MigrationPhase::Starting, "The migration goes on: the two nodes are settling where the VM runs.")
    } else if draft.wish == Wish::Migrate {
        (MigrationPhase::Stopped, "The migration goes on.")
    } else {
        (MigrationPhase::Aborting, "The migration is being given up.")
    };
    draft.status.phase = Some(phase);
    draft.set(SUCCEEDED, Status::Unknown, "InProgress", message, stamp);
}

fn asked(draft: &Draft, reason: DoubtReason, why: &str, remedy: Option<End>) -> String {
    let (vm, source, target) = (&draft.vm, draft.source(), draft.target());
    let why = why.trim_end_matches('.');
    let paused = format!("VM {vm} is kept paused at {source}, which has passed its point of no return");
    let situation = match reason {
        DoubtReason::TargetUnreachable => format!(
            "{paused}; {target}, which is to start it, cannot be asked: {why}. Bring {target} back, or its link: then the \
             migration goes on by itself."
        ),
        DoubtReason::TargetForgot if why.is_empty() => format!(
            "{paused}; {target} answers, and has no record of this migration: its state directory was lost. Look on {target} \
             whether the VM runs there."
        ),
        DoubtReason::TargetForgot => format!(
            "{source} has passed its point of no return and cannot be asked: {why}. {target} answers, and has no record of \
             this migration: its state directory was lost. Bring {source} back, and look on {target} whether VM {vm} runs \
             there."
        ),
        DoubtReason::SourceUnreachable => format!(
            "{target} holds all of VM {vm}, verified, and waits for the word of {source}, which cannot be asked: {why}. Bring \
             {source} back, or its link: then the migration goes on by itself."
        ),
        DoubtReason::SourceForgot if remedy == Some(End::Destination) => format!(
            "{target} holds all of VM {vm}, verified, and waits for the word of {source}, which answers, and has no record of \
             this migration: its state directory was lost. Look on {source} whether the VM runs there."
        ),
        DoubtReason::SourceForgot => {
            let also = if why.is_empty() {
                format!("{target} has nothing that could become the VM")
            } else {
                format!("{target} cannot be asked: {why}")
            };
            format!(
                "{source} had begun with this migration, and has no record of it any more: its state directory was lost. \
                 {also}. Look where VM {vm} runs (`kubectl get assignedvms`), and on {source} for a VMM that stands paused; \
                 nothing touches it. There is nothing that the operator could do: when you have seen to the VM, delete this \
                 object and remove its finalizer."
            )
        }
        DoubtReason::AgentsUnreachable => format!(
            "{source} has passed its point of no return, and neither end can be asked: {why}. Bring {target} back, or \
             {source}, or their links."
        ),
        DoubtReason::SourceJournalUnreadable => format!(
            "{source} answers, and cannot read what it has journalled of this migration: {why}. Until it can, it touches \
             neither VM {vm} nor its devices. Put the file back, as from a backup, and restart the agent: then the migration \
             goes on by itself."
        ),
        DoubtReason::TargetJournalUnreadable => format!(
            "{source} has passed its point of no return, and waits; {target} answers, and cannot read what it has journalled \
             of this migration: {why}. Put the file back, as from a backup, and restart the agent of {target}: then the \
             migration goes on by itself."
        ),
        DoubtReason::Forked => format!(
            "{source} has taken VM {vm} back, and {target} says that it has started it: both copies may have run. The operator \
             touches neither. Find out which copy is the VM, and end the other before anything else."
        ),
    };
    format!("{situation}{}", remedy.map(|end| by_resolve(draft, end)).unwrap_or_default())
}

fn by_resolve(draft: &Draft, run_on: End) -> String {
    let (vm, source, target) = (&draft.vm, draft.source(), draft.target());
    match run_on {
        End::Source => format!(
            " If {target} never started the VM, and cannot do so any more (power it off first), {source} takes VM {vm} back \
             by `spec.resolve: {{runOn: Source, destinationNeverStarted: true, justification: \"how you know that\"}}`. If \
             that is not true, the VM runs twice."
        ),
        End::Destination => {
            let stated = if draft.is_committed() { "" } else { "sourceNeverResumes: true, " };
            format!(
                " If the VM has not run on {source} since it was stopped, and will not be resumed there (power it off first), \
                 {target} starts VM {vm} by `spec.resolve: {{runOn: Destination, {stated}justification: \"how you know that\"}}`. If that is not \
                 true, the VM runs twice."
            )
        }
    }
}

fn told(draft: &Draft, reason: &str, message: &str) -> String {
    let (vm, source, target) = (&draft.vm, draft.source(), draft.target());
    let help = match reason {
        "PeerLost" => {
            format!("The operator relays between {source} and {target}, as far as it reaches them.")
        }
        "TargetSlow" => format!("{target} answers, and goes on by itself; look at its load and its log."),
        "JournalFailed" => {
            format!("See to the disk of the state directory of {source}: it tries again until it can write.")
        }
        _ => format!("It goes on as soon as {source} can."),
    };
    format!("{source} says: {}. VM {vm} is kept paused there. {help}", message.trim_end_matches('.'))
}

fn of_deletion(draft: &Draft) -> String {
    match draft.wish {
        Wish::Migrate => String::new(),
        Wish::Cancel => {
            " It was cancelled; it is given up if it still can be when this is settled.".to_owned()
        }
        Wish::Delete => format!(
            " The object was deleted, and stays until this is settled. Removing its finalizer by hand (`kubectl patch vmmig \
             NAME --type=merge -p '{{\"metadata\":{{\"finalizers\":null}}}}'`) makes it go at once: then nobody relays between \
             {} and {} any more, and the VM stays as it is until they reach each other.",
            draft.source(),
            draft.target()
        ),
    }
}
