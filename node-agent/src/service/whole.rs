//! Calls that are carried out to their end although their caller goes away.
//!
//! A server drops the future of a call when the connection ends. What a call has taken by then, or has only
//! half recorded, must not stay behind: a call that changes something runs in a task of its own, and its
//! future only waits for that.

use slackwater_proto::refusal::Refusal;
use slackwater_proto::tonic::Code;

use super::reason::ServiceReason;

/// What comes of a call, which goes on if this is dropped.
///
/// # Errors
/// Those of the call, or INTERNAL if its task has ended early.
pub(super) async fn to_its_end<T, E>(
    call: impl Future<Output = Result<T, E>> + Send + 'static,
) -> Result<T, E>
where
    T: Send + 'static,
    E: From<Refusal> + Send + 'static,
{
    match tokio::spawn(call).await {
        Ok(answer) => answer,
        Err(error) => {
            let message = format!("the call was not carried out to its end: {error}");
            Err(Refusal::new(Code::Internal, ServiceReason::Internal, message).into())
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::sync::{Notify, oneshot};

    use super::*;

    #[tokio::test]
    async fn a_call_whose_caller_goes_away_at_any_stage_is_carried_out_to_its_end() {
        for stage in 0..3 {
            let (reached, goes_on) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
            let (done, carried_out) = oneshot::channel();
            let call = {
                let (reached, goes_on) = (Arc::clone(&reached), Arc::clone(&goes_on));
                async move {
                    for at in 0..3 {
                        if at == stage {
                            reached.notify_one();
                            goes_on.notified().await;
                        }
                        tokio::task::yield_now().await;
                    }
                    let _ = done.send(stage);
                    Ok::<_, Refusal>(())
                }
            };
            let caller = tokio::spawn(to_its_end(call));
            reached.notified().await;
            caller.abort();
            assert!(caller.await.unwrap_err().is_cancelled());
            goes_on.notify_one();
            assert_eq!(carried_out.await, Ok(stage));
        }
    }

    #[tokio::test]
    async fn the_caller_hears_what_came_of_it() {
        assert_eq!(to_its_end(async { Ok::<_, Refusal>(7) }).await.unwrap(), 7);
        let nothing = Vec::<Result<(), Refusal>>::new();
        let panics = async move { nothing.into_iter().next().unwrap() };
        let refused = to_its_end(panics).await.unwrap_err();
        assert!(refused.message.contains("not carried out"), "{refused:?}");
    }
}
