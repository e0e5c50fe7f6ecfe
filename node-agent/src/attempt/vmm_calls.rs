//! What both ends ask of a VMM, and how a call that failed is described.

use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures::future::BoxFuture;
use slackwater_handover::policy::Driver;
use slackwater_handover::{Failure, Reason};
use tokio::time::{Instant, timeout};
use tracing::{info, warn};

use crate::vmm::{RunState, Vmm, VmmError};

/// A call to a VMM that yields nothing but success or failure.
pub(super) type VmmCall = for<'a> fn(&'a dyn Vmm) -> BoxFuture<'a, Result<(), VmmError>>;

/// How a VMM is asked again that has not done what it was asked for.
#[derive(Clone, Copy)]
struct Patience {
    /// The pause before each try.
    pause: Duration,
    /// Not done for so long, it is reported.
    late_after: Duration,
}

const PATIENCE: Patience =
    Patience { pause: Duration::from_millis(500), late_after: Duration::from_secs(10) };

/// Lets the vCPUs of a twin run. Past STARTING only a process that has ended is an end. `late` is told once,
/// if the VMM does not carry it out for long.
pub(super) async fn resume(vmm: &dyn Vmm, late: impl FnOnce(Failure) + Send) -> Result<(), VmmError> {
    until_done(vmm, "resume", PATIENCE, late, move || run(vmm)).await
}

/// Lets a VM run on where it was, unless it has been stopped there since. A save whose end the VMM has not
/// confirmed (`save_open`) comes first: while it saves, it resumes nothing. `late` is told once, if the VMM does
/// not carry it out for long.
pub(super) async fn take_back(
    vmm: &dyn Vmm,
    save_open: &AtomicBool,
    late: impl FnOnce(Failure) + Send,
) -> Result<RunState, VmmError> {
    let once = move || async move {
        if save_open.load(Ordering::Relaxed) {
            abort_save(vmm, save_open)
                .await
                .or_else(|error| if is_answer(&error) { Ok(()) } else { Err(error) })?;
        }
        match vmm.driver() {
            Driver::Agent => run(vmm).await.map(|()| RunState::Running),
            Driver::Vmm => vmm.take_back().await,
        }
    };
    until_done(vmm, "resume", PATIENCE, late, once).await
}

/// Ends a save. `save_open` is cleared when the VMM has confirmed that, or has refused: then there is none.
pub(super) async fn abort_save(vmm: &dyn Vmm, save_open: &AtomicBool) -> Result<(), VmmError> {
    let ended = vmm.abort_save().await;
    if ended.as_ref().err().is_none_or(is_answer) {
        save_open.store(false, Ordering::Relaxed);
    }
    ended
}

/// Lets the vCPUs run, unless they do already. After a pause that failed, in an agent that has started again,
/// or after a connection that broke, it is not known whether they run, and a VMM refuses to resume a VM that
/// runs. One that drives its devices looks itself.
async fn run(vmm: &dyn Vmm) -> Result<(), VmmError> {
    match vmm.driver() {
        Driver::Agent if vmm.run_state().await? == RunState::Running => Ok(()),
        Driver::Agent | Driver::Vmm => vmm.resume().await,
    }
}

/// Repeats what may be repeated until the VMM has done it, or its process has ended. A connection that breaks,
/// or an answer that does not come, says nothing about the VM; and what a VMM refuses now (a disk's lock is
/// still held, say) it may do later. Each try has its own deadline; there is none for all of them.
async fn until_done<T, F>(
    vmm: &dyn Vmm,
    call: &'static str,
    patience: Patience,
    late: impl FnOnce(Failure) + Send,
    once: impl Fn() -> F + Send,
) -> Result<T, VmmError>
where
    F: Future<Output = Result<T, VmmError>> + Send,
{
    let (began, mut late, mut last) = (Instant::now(), Some(late), None);
    loop {
        let error = match once().await {
            Ok(done) => {
                if last.is_some() {
                    info!(pid = vmm.pid(), call, "the VMM has done it");
                }
                return Ok(done);
            }
            Err(error) => error,
        };
        let (said, error) = (is_answer(&error), error.to_string());
        if last.as_ref() != Some(&error) {
            warn!(
                pid = vmm.pid(),
                call, error, "not done; the VMM is asked again as long as its process lives"
            );
        }
        if timeout(patience.pause, vmm.exited()).await.is_ok() {
            return Err(VmmError::Lost { call, message: format!("its process has ended, after: {error}") });
        }
        if began.elapsed() >= patience.late_after
            && let Some(late) = late.take()
        {
            late(Failure::new(Reason::VmmFailed, not_done(vmm.pid(), call, said, &error)));
        }
        last = Some(error);
    }
}

fn not_done(pid: u32, call: &str, said: bool, error: &str) -> String {
    let does = if said { "refuses" } else { "does not answer" };
    format!(
        "the VMM's process {pid} lives and {does} {call}: {error}. It is asked again until the VM runs or that \
         process ends; see to what it says, or end the process if the VM cannot run any more"
    )
}

/// Whether the VMM has said something. Otherwise it is not known whether it has carried the call out.
fn is_answer(error: &VmmError) -> bool {
    match error {
        VmmError::Refused { .. }
        | VmmError::Answer { .. }
        | VmmError::BudgetExceeded(_)
        | VmmError::VmStopped { .. } => true,
        VmmError::Connect(_) | VmmError::Trust { .. } | VmmError::Lost { .. } | VmmError::Deadline { .. } => {
            false
        }
    }
}

/// Asks the twin for a sign of life. A process that is being killed gives none, even if its end has not been
/// seen yet.
pub(super) fn confirm(vmm: &dyn Vmm) -> BoxFuture<'_, Result<(), VmmError>> {
    Box::pin(async move { vmm.run_state().await.map(drop) })
}

/// A call to the VM's VMM at the source that failed.
pub(super) fn source_failure(error: &VmmError) -> Failure {
    let reason = match error {
        VmmError::BudgetExceeded(_) => Reason::BudgetExceeded,
        VmmError::VmStopped { .. } => Reason::VmStopped,
        _ => Reason::VmmFailed,
    };
    Failure::new(reason, error.to_string())
}

/// A call to the twin that failed: it refused, or it has ended. The broken call may be the first sign of its
/// end.
pub(super) fn twin_failure(error: &VmmError) -> Failure {
    let reason = match error {
        VmmError::Lost { .. } => Reason::TwinFailed,
        _ => Reason::VmmFailed,
    };
    Failure::new(reason, format!("at the destination, {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::fake::{Cut, FakeVmm, SharedLog};

    #[tokio::test]
    async fn a_vmm_that_is_silent_for_long_is_reported_once_and_still_asked() {
        let vm = FakeVmm::running("vm", SharedLog::default(), Vec::new());
        vm.pause().await.unwrap();
        vm.cut("resume", &[Cut::Silent; 20]);
        let patience = Patience { pause: Duration::from_millis(2), late_after: Duration::from_millis(10) };
        let mut told = Vec::new();
        let late = |failure: Failure| told.push(failure);
        let vmm: &dyn Vmm = &vm;
        until_done(vmm, "resume", patience, late, move || run(vmm)).await.unwrap();
        assert_eq!(vm.run_state(), RunState::Running);
        let [told] = told.as_slice() else { panic!("{told:?}") };
        assert_eq!(told.reason, Reason::VmmFailed);
        assert!(told.message.contains("lives and does not answer resume"), "{told}");
    }

    #[tokio::test]
    async fn a_vmm_that_refuses_is_reported_in_its_own_words_and_asked_again() {
        let vm = FakeVmm::running("vm", SharedLog::default(), Vec::new());
        vm.pause().await.unwrap();
        vm.fail("resume");
        let patience = Patience { pause: Duration::from_millis(2), late_after: Duration::from_millis(10) };
        let (told, mut tells) = tokio::sync::mpsc::unbounded_channel();
        let late = move |failure: Failure| told.send(failure).unwrap();
        let vmm: &dyn Vmm = &vm;
        let runs = until_done(vmm, "resume", patience, late, move || run(vmm));
        let mended = async {
            let told = tells.recv().await.unwrap();
            assert_eq!(told.reason, Reason::VmmFailed);
            assert!(told.message.contains("refuses resume"), "{told}");
            assert!(told.message.contains("the test says so"), "{told}");
            vm.mend("resume");
        };
        let (done, ()) = tokio::join!(runs, mended);
        done.unwrap();
        assert_eq!(vm.run_state(), RunState::Running);
    }
}
