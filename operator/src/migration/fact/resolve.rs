//! Facts about `spec.resolve`, an administrator's word in the place of an agent's.

use slackwater_api::condition::RESOLVE_ACCEPTED;
use slackwater_api::{JUSTIFICATION_CHARACTERS, Resolve, RunOn, VMMigrationSpec};

use super::Draft;
use crate::conditions::{Stamp, Status};
use crate::migration::resolver::{Decision, End, Unfit};

/// A resolve that is not acted upon: CamelCase reason, and why, for a person.
pub type Refused = (&'static str, String);

/// The resolve that has not been judged yet, if there is one. One that was accepted is final.
pub fn unjudged<'a>(draft: &Draft, spec: &'a VMMigrationSpec) -> Option<&'a Resolve> {
    let observed = draft.status.observed_spec.as_ref()?;
    let resolve = spec.resolve.as_ref()?;
    let judged = observed.resolve.as_ref() == Some(resolve);
    (!judged && !draft.is(RESOLVE_ACCEPTED, Status::True)).then_some(resolve)
}

/// Judges a resolve. `fits`: whether it could be acted upon as things stand.
///
/// # Errors
/// Why it is not acted upon.
pub fn judge(draft: &Draft, resolve: &Resolve, fits: Result<(), Unfit>) -> Result<Decision, Refused> {
    fits.map_err(|unfit| refusal(draft, resolve.run_on, unfit))?;
    let justification = resolve.justification.trim();
    if !JUSTIFICATION_CHARACTERS.contains(&justification.chars().count()) {
        let message = format!(
            "spec.resolve.justification has {} characters; it must say, in {} to {}, how it is known that the VM cannot run \
             twice.",
            justification.chars().count(),
            JUSTIFICATION_CHARACTERS.start(),
            JUSTIFICATION_CHARACTERS.end()
        );
        return Err(("JustificationMissing", message));
    }
    match resolve.run_on {
        RunOn::Source if !resolve.destination_never_started => {
            let message = format!(
                "spec.resolve with runOn: Source must state destinationNeverStarted: true, that is, that {} has not started \
                 VM {} and cannot do so any more.",
                draft.target(),
                draft.vm
            );
            Err(("StatementMissing", message))
        }
        RunOn::Destination if !resolve.source_never_resumes && !draft.is_committed() => {
            let message = format!(
                "spec.resolve with runOn: Destination must state sourceNeverResumes: true, that is, that {} has not run VM {} \
                 since it was stopped, and will not: it is not known to have passed its point of no return.",
                draft.source(),
                draft.vm
            );
            Err(("StatementMissing", message))
        }
        run_on => Ok(Decision { run_on: end(run_on), justification: justification.to_owned() }),
    }
}

/// The end that a resolve names.
pub fn end(run_on: RunOn) -> End {
    match run_on {
        RunOn::Source => End::Source,
        RunOn::Destination => End::Destination,
    }
}

fn refusal(draft: &Draft, run_on: RunOn, unfit: Unfit) -> Refused {
    let (source, target) = (draft.source(), draft.target());
    let node = |end| match end {
        End::Source => &source,
        End::Destination => &target,
    };
    match unfit {
        Unfit::NotInDoubt => {
            let message = "The migration is not in doubt: there is nothing to resolve. A resolve for later is not kept; set it \
                           when the condition InDoubt is True and names it as a remedy.";
            ("NotInDoubt", message.to_owned())
        }
        Unfit::CannotBeTold(end) => {
            let message = format!(
                "{0} would have to act upon runOn: {run_on:?}, and cannot be told. Bring {0} back first.",
                node(end)
            );
            ("CannotBeTold", message)
        }
        Unfit::DoesNotWait(end) => {
            let message = format!(
                "{} does not wait for anybody's word: runOn: {run_on:?} would change nothing.",
                node(end)
            );
            ("DoesNotFit", message)
        }
        Unfit::OtherAnswers(end) => {
            let message = format!(
                "{} answers, and has journalled how far it has come: its own word decides, not runOn: {run_on:?}.",
                node(end)
            );
            ("DoesNotFit", message)
        }
        Unfit::Started => {
            let message = format!(
                "{target} says that it has started VM {}: it goes forward only, and runOn: {run_on:?} is not possible any \
                 more.",
                draft.vm
            );
            ("AlreadyStarted", message)
        }
    }
}

/// It is acted upon.
pub fn resolve_accepted(draft: &mut Draft, resolve: &Resolve, stamp: Stamp) {
    note(draft, resolve);
    let stated = match resolve.run_on {
        RunOn::Source => {
            format!("{} is told that {} never started the VM", draft.source(), draft.target())
        }
        RunOn::Destination => {
            format!("{} is told to start the VM; {} will not resume it", draft.target(), draft.source())
        }
    };
    let message = format!(
        "runOn: {:?}, since an administrator states: {:?}. {stated}.",
        resolve.run_on, resolve.justification
    );
    if draft.set(RESOLVE_ACCEPTED, Status::True, "Stated", &message, stamp) {
        draft.tell(false, "ResolveAccepted", message);
    }
}

/// It is not acted upon, and changes nothing.
pub fn resolve_refused(draft: &mut Draft, resolve: &Resolve, (reason, why): &Refused, stamp: Stamp) {
    note(draft, resolve);
    let message = format!("{why} Nothing was changed; spec.resolve may be replaced.");
    draft.set(RESOLVE_ACCEPTED, Status::False, reason, &message, stamp);
    draft.tell(true, "ResolveRefused", format!("{reason}: {message}"));
}

fn note(draft: &mut Draft, resolve: &Resolve) {
    if let Some(observed) = &mut draft.status.observed_spec {
        observed.resolve = Some(resolve.clone());
    }
}
