//! What keeps a migration from going on, and what would help.

use slackwater_api::MigrationPhase;
use slackwater_api::condition::{IN_DOUBT, SUCCEEDED};
use slackwater_handover::resolver::{DoubtReason, End};

use super::Draft;
use crate::conditions::Status;
use crate::migration::step::Wish;
use crate::reason::{self, camel_case_or};

/// Why a migration is in doubt, by one of two sources.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Doubtful {
    /// The operator has asked both ends, or tried to.
    AskedBoth {
        /// What came of it.
        reason: DoubtReason,
        /// Why an end cannot be asked, in the words of the failed call.
        why: String,
        /// The end for which an administrator may decide.
        remedy: Option<End>,
    },
    /// The source's agent says so.
    SourceSays {
        /// CamelCase, as the agent has it.
        reason: String,
        /// In the agent's words.
        message: String,
    },
}

impl Doubtful {
    /// The source's agent says that it cannot ask the target, or gets no good answer. When the operator has
    /// asked the target itself, it knows more about that.
    #[must_use]
    pub fn is_about_the_target(&self) -> bool {
        match self {
            Self::SourceSays { reason, .. } => {
                [reason::agent::PEER_LOST, reason::agent::TARGET_FORGOT].contains(&reason.as_str())
            }
            Self::AskedBoth { .. } => false,
        }
    }
}

impl Draft {
    /// The migration does not go on: a node has to come back, or a person to decide.
    pub fn set_in_doubt(&mut self, doubt: &Doubtful) {
        let (reason, situation) = match doubt {
            Doubtful::AskedBoth { reason, why, remedy } => {
                (reason.as_str().to_owned(), self.situation(*reason, why, *remedy))
            }
            Doubtful::SourceSays { reason, message } => {
                (camel_case_or(reason, "SourceInDoubt"), self.what_the_source_says(reason, message))
            }
        };
        let message = format!("{situation}{}", self.what_deletion_means());
        let known = self.is_in_doubt() && self.has_reason(IN_DOUBT, &reason);
        self.status.phase = Some(MigrationPhase::InDoubt);
        self.set(IN_DOUBT, Status::True, &reason, &message);
        self.set(SUCCEEDED, Status::Unknown, &reason, &message);
        if !known {
            self.warn("InDoubt", format!("{reason}: {message}"));
        }
    }

    /// The migration goes on.
    pub fn clear_doubt(&mut self) {
        if !self.is_in_doubt() {
            return;
        }
        let message = "Nothing is in doubt any more.";
        self.set(IN_DOUBT, Status::False, "Settled", message);
        self.report("DoubtSettled", message.to_owned());
        if self.status.completion_time.is_some() {
            return;
        }
        let (phase, message) = if self.is_committed() {
            (MigrationPhase::Starting, "The migration goes on: the two nodes are settling where the VM runs.")
        } else if self.wish == Wish::Migrate {
            (MigrationPhase::Stopped, "The migration goes on.")
        } else {
            (MigrationPhase::Aborting, "The migration is being given up.")
        };
        self.status.phase = Some(phase);
        self.set(SUCCEEDED, Status::Unknown, reason::IN_PROGRESS, message);
    }

    /// What the operator found when it asked both ends, and what would help.
    fn situation(&self, reason: DoubtReason, why: &str, remedy: Option<End>) -> String {
        let (vm, source, target) = (&self.vm, self.source(), self.target());
        let why = why.trim_end_matches('.');
        let paused = format!("VM {vm} is kept paused at {source}, which has passed its point of no return");
        let situation = match reason {
            DoubtReason::TargetUnreachable => format!(
                "{paused}; {target}, which is to start it, cannot be asked: {why}. Bring {target} back, or its link: \
                 then the migration goes on by itself."
            ),
            DoubtReason::TargetForgot if why.is_empty() => format!(
                "{paused}; {target} answers, and has no record of this migration: its state directory was lost. Look \
                 on {target} whether the VM runs there."
            ),
            DoubtReason::TargetForgot => format!(
                "{source} has passed its point of no return and cannot be asked: {why}. {target} answers, and has no \
                 record of this migration: its state directory was lost. Bring {source} back, and look on {target} \
                 whether VM {vm} runs there."
            ),
            DoubtReason::SourceUnreachable => format!(
                "{target} holds all of VM {vm}, verified, and waits for the decision of {source}, which cannot be \
                 asked: {why}. Bring {source} back, or its link: then the migration goes on by itself."
            ),
            DoubtReason::SourceForgot if remedy == Some(End::Destination) => format!(
                "{target} holds all of VM {vm}, verified, and waits for the decision of {source}, which answers, and \
                 has no record of this migration: its state directory was lost. Look on {source} whether the VM runs \
                 there."
            ),
            DoubtReason::SourceForgot => {
                let also = if why.is_empty() {
                    format!("{target} has nothing that could become the VM")
                } else {
                    format!("{target} cannot be asked: {why}")
                };
                format!(
                    "{source} had begun with this migration, and has no record of it any more: its state directory \
                     was lost. {also}. Look where VM {vm} runs (`kubectl get assignedvms`), and on {source} for a VMM \
                     that is paused; nothing touches it. There is nothing that the operator could do: when you have \
                     seen to the VM, delete this object and remove its finalizer."
                )
            }
            DoubtReason::AgentsUnreachable => format!(
                "{source} has passed its point of no return, and neither end can be asked: {why}. Bring {target} \
                 back, or {source}, or their links."
            ),
            DoubtReason::SourceJournalUnreadable => format!(
                "{source} answers, and cannot read what it has journalled about this migration: {why}. Until it can, \
                 it touches neither VM {vm} nor its devices. Put the file back, for example from a backup, and restart \
                 the agent: then the migration goes on by itself."
            ),
            DoubtReason::TargetJournalUnreadable => format!(
                "{source} has passed its point of no return, and waits; {target} answers, and cannot read what it has \
                 journalled about this migration: {why}. Put the file back, for example from a backup, and restart \
                 the agent of {target}: then the migration goes on by itself."
            ),
            DoubtReason::Forked => format!(
                "{source} has taken VM {vm} back, and {target} says that it has started it: both copies may have run. \
                 The operator touches neither. Find out which copy is the VM, and end the other before anything else."
            ),
        };
        format!("{situation}{}", remedy.map(|end| self.remedy_by_resolve(end)).unwrap_or_default())
    }

    fn remedy_by_resolve(&self, run_on: End) -> String {
        let (vm, source, target) = (&self.vm, self.source(), self.target());
        match run_on {
            End::Source => format!(
                " If {target} never started the VM, and cannot do so any more (power it off first), {source} takes VM \
                 {vm} back by `spec.resolve: {{runOn: Source, destinationNeverStarted: true, justification: \"how you \
                 know that\"}}`. If that is not true, the VM runs twice."
            ),
            End::Destination => {
                let stated = if self.is_committed() { "" } else { "sourceNeverResumes: true, " };
                format!(
                    " If the VM has not run on {source} since it was stopped, and will not be resumed there (power it \
                     off first), {target} starts VM {vm} by `spec.resolve: {{runOn: Destination, \
                     {stated}justification: \"how you know that\"}}`. If that is not true, the VM runs twice."
                )
            }
        }
    }

    fn what_the_source_says(&self, reason: &str, message: &str) -> String {
        let (vm, source, target) = (&self.vm, self.source(), self.target());
        let help = match reason {
            reason::agent::PEER_LOST => {
                format!("The operator relays between {source} and {target}, as far as it reaches them.")
            }
            reason::agent::TARGET_SLOW => {
                format!("{target} answers, and goes on by itself; look at its load and its log.")
            }
            reason::agent::JOURNAL_FAILED => {
                format!(
                    "See to the disk of the state directory of {source}: it tries again until it can write."
                )
            }
            _ => format!("It goes on as soon as {source} can."),
        };
        format!("{source} says: {}. VM {vm} is kept paused there. {help}", message.trim_end_matches('.'))
    }

    fn what_deletion_means(&self) -> String {
        match self.wish {
            Wish::Migrate => String::new(),
            Wish::Cancel => {
                " It was cancelled; it is given up if it still can be when this is settled.".to_owned()
            }
            Wish::Delete => format!(
                " The object was deleted, and stays until this is settled. Removing its finalizer by hand (`kubectl \
                 patch vmmig NAME --type=merge -p '{{\"metadata\":{{\"finalizers\":null}}}}'`) removes it at once: \
                 then the operator does not relay between {} and {} any more, and the VM stays as it is until they \
                 reach each other.",
                self.source(),
                self.target()
            ),
        }
    }
}
