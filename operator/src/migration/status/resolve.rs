//! `spec.resolve`: an administrator's statement in the place of an agent's.

use slackwater_api::condition::RESOLVE_ACCEPTED;
use slackwater_api::{JUSTIFICATION_CHARACTERS, Resolve, RunOn, VMMigrationSpec};
use slackwater_handover::resolver::{Decision, End, Unfit};

use super::Draft;
use crate::conditions::Status;

/// Why a resolve is not acted upon.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ResolveRefusal {
    /// CamelCase.
    pub reason: &'static str,
    /// For a person.
    pub message: String,
}

/// The end that a resolve names.
pub fn end_of(run_on: RunOn) -> End {
    match run_on {
        RunOn::Source => End::Source,
        RunOn::Destination => End::Destination,
    }
}

impl Draft {
    /// The resolve that has not been judged yet, if there is one. An accepted one is final.
    pub fn unjudged_resolve<'a>(&self, spec: &'a VMMigrationSpec) -> Option<&'a Resolve> {
        let observed = self.status.observed_spec.as_ref()?;
        let resolve = spec.resolve.as_ref()?;
        let judged = observed.resolve.as_ref() == Some(resolve);
        (!judged && !self.is_resolved()).then_some(resolve)
    }

    /// Judges a resolve. `fits`: whether it could be acted upon as things are.
    ///
    /// # Errors
    /// Why it is not acted upon.
    pub fn judge_resolve(
        &self,
        resolve: &Resolve,
        fits: Result<(), Unfit>,
    ) -> Result<Decision, ResolveRefusal> {
        fits.map_err(|unfit| self.resolve_refusal(resolve.run_on, unfit))?;
        let (source, target, vm) = (self.source(), self.target(), &self.vm);
        let justification = resolve.justification.trim();
        let characters = justification.chars().count();
        if !JUSTIFICATION_CHARACTERS.contains(&characters) {
            let message = format!(
                "spec.resolve.justification has {characters} characters; it must say, in {} to {}, how it is known \
                 that the VM cannot run twice.",
                JUSTIFICATION_CHARACTERS.start(),
                JUSTIFICATION_CHARACTERS.end()
            );
            return Err(ResolveRefusal { reason: "JustificationMissing", message });
        }
        let missing = |message| Err(ResolveRefusal { reason: "StatementMissing", message });
        match resolve.run_on {
            RunOn::Source if !resolve.destination_never_started => missing(format!(
                "spec.resolve with runOn: Source must state destinationNeverStarted: true, that is, that {target} has \
                 not started VM {vm} and cannot do so any more."
            )),
            RunOn::Destination if !resolve.source_never_resumes && !self.is_committed() => missing(format!(
                "spec.resolve with runOn: Destination must state sourceNeverResumes: true, that is, that {source} has \
                 not run VM {vm} since it was stopped, and will not: it is not known to have passed its point of no \
                 return."
            )),
            run_on => Ok(Decision { run_on: end_of(run_on), justification: justification.to_owned() }),
        }
    }

    fn resolve_refusal(&self, run_on: RunOn, unfit: Unfit) -> ResolveRefusal {
        let (source, target) = (self.source(), self.target());
        let node = |end| match end {
            End::Source => &source,
            End::Destination => &target,
        };
        let (reason, message) = match unfit {
            Unfit::NotInDoubt => {
                let message = "The migration is not in doubt: there is nothing to resolve. A resolve for later is not \
                               kept; set it when the condition InDoubt is True and names it as a remedy.";
                ("NotInDoubt", message.to_owned())
            }
            Unfit::CannotBeReached(end) => {
                let message = format!(
                    "{0} would have to act upon runOn: {run_on:?}, and cannot be reached. Bring {0} back first.",
                    node(end)
                );
                ("CannotBeTold", message)
            }
            Unfit::DoesNotWait(end) => {
                let message = format!(
                    "{} does not wait for a decision: runOn: {run_on:?} would change nothing.",
                    node(end)
                );
                ("DoesNotFit", message)
            }
            Unfit::OtherAnswers(end) => {
                let message = format!(
                    "{} answers, and has journalled how far it has come: its own record decides, not runOn: \
                     {run_on:?}.",
                    node(end)
                );
                ("DoesNotFit", message)
            }
            Unfit::Started => {
                let message = format!(
                    "{target} says that it has started VM {}: it goes forward only, and runOn: {run_on:?} is not \
                     possible any more.",
                    self.vm
                );
                ("AlreadyStarted", message)
            }
        };
        ResolveRefusal { reason, message }
    }

    /// The resolve is acted upon.
    pub fn accept_resolve(&mut self, resolve: &Resolve) {
        self.note_resolve(resolve);
        let (source, target) = (self.source(), self.target());
        let consequence = match resolve.run_on {
            RunOn::Source => format!("{source} hears that {target} never started the VM"),
            RunOn::Destination => {
                format!("{target} is to start the VM; {source} will not resume it")
            }
        };
        let message = format!(
            "runOn: {:?}, since an administrator states: {:?}. {consequence}.",
            resolve.run_on, resolve.justification
        );
        if self.set(RESOLVE_ACCEPTED, Status::True, "Stated", &message) {
            self.report("ResolveAccepted", message);
        }
    }

    /// The resolve is not acted upon, and changes nothing.
    pub fn refuse_resolve(&mut self, resolve: &Resolve, refusal: &ResolveRefusal) {
        self.note_resolve(resolve);
        let message = format!("{refusal} Nothing was changed; spec.resolve may be replaced.");
        self.set(RESOLVE_ACCEPTED, Status::False, refusal.reason, &message);
        self.warn("ResolveRefused", format!("{}: {message}", refusal.reason));
    }

    fn note_resolve(&mut self, resolve: &Resolve) {
        if let Some(observed) = &mut self.status.observed_spec {
            observed.resolve = Some(resolve.clone());
        }
    }
}
