//! Takes the steps of one migration, in the order that [`step`](super::step) draws, until nothing is left to
//! do.

use std::sync::Arc;

use slackwater_api::{Reservation, VMMigration};
use tokio::sync::OwnedSemaphorePermit;

use super::context::Context;
use super::run::Run;
use super::step::{Step, holds_claim, next};

/// Brings a VMMigration as far as it goes: until nothing is left to do, or the object is gone. `turn`: until it
/// is planned, others wait for theirs.
pub(super) async fn drive(
    context: Context,
    object: Arc<VMMigration>,
    mut turn: Option<OwnedSemaphorePermit>,
) {
    let claims = Arc::clone(&context.claims);
    let mut run = Run::new(context, object);
    if !run.tracked.read_again().await {
        return claims.release(&run.tracked.uid);
    }
    loop {
        run.tracked.look();
        if run.tracked.is_forgotten() {
            tracing::warn!(
                migration = run.tracked.name(),
                "it was in doubt, and its finalizer was removed: it is forgotten"
            );
            return claims.release(&run.tracked.uid);
        }
        if run.tracked.refuse_copy() {
            run.tracked.write().await;
        }
        run.note_spec().await;
        let draft = run.tracked.draft();
        let step = next(&draft.status, draft.wish);
        if step != Step::Plan {
            drop(turn.take());
        }
        match step {
            Step::Plan => run.plan().await,
            Step::Reserve => run.reserve().await,
            Step::GiveUp => {
                run.tracked.draft_now().give_up_before_asking();
                run.tracked.write().await;
            }
            Step::Migrate => run.migrate().await,
            Step::Release(reason) => run.release(reason).await,
            Step::Retry => run.retry().await,
            Step::Done => break,
        }
    }
    let status = &run.tracked.draft().status;
    let kept = status.reservation == Some(Reservation::Kept);
    if !holds_claim(status) || run.tracked.is_deleting() {
        claims.release(&run.tracked.uid);
    }
    if !kept {
        run.acknowledge().await;
    }
    // Without anything left at the agents the object may go, whether or not an operator is there to see it.
    if !kept || run.tracked.is_deleting() {
        run.tracked.write_finalizer(false).await;
    }
}
