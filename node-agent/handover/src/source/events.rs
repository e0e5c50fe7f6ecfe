//! What the source goes through, hears, asks for and ends in.

use crate::devices::Move;
use crate::state::MigrationState;
use crate::{Blob, Failure, Record, Word};

/// How far the source has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Nothing has been asked of anybody.
    New,
    /// SAVING is being recorded.
    Saving,
    /// Hello is on its way to the destination.
    Connecting,
    /// The guest runs; devices that can are giving initial data.
    PreCopying,
    /// The vCPUs are being paused. The blackout begins.
    Pausing,
    /// Devices are on their way to the barrier of the [`StopPlan`](crate::policy::StopPlan).
    Quiescing,
    /// Devices are on their way to STOP_COPY.
    Stopping,
    /// Slack water: the final state is being read and sent.
    Capturing,
    /// COMMITTED is being recorded.
    Committing,
    /// COMMIT has been sent. Nothing here may ever resume on the source's own judgement: only on the
    /// destination's DISCARDED.
    AwaitingStarted,
    /// The VM runs elsewhere; what is left here is being given back.
    Releasing,
    /// Failed; waiting until nothing is in flight, streams are closed and ABORTED is recorded.
    Settling,
    /// Rollback: devices are leaving STOP_COPY for STOP.
    LeavingCapture,
    /// Rollback: devices are on their way to RUNNING_P2P.
    WakingP2p,
    /// Rollback: devices that did not get there are being reset.
    Mending,
    /// Rollback: devices are on their way to RUNNING.
    Waking,
    /// Rollback: the vCPUs are being resumed.
    Resuming,
    /// The end.
    Finished,
}

/// What has happened.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// Go.
    Start,
    /// The destination answered Ready.
    PeerReady,
    /// The VMM has begun a save.
    SaveStarted,
    /// What is left to send is little enough for the blackout.
    Converged,
    /// A device has been read back where it was to go, or has been reset to RUNNING.
    DeviceReached(usize, MigrationState),
    /// A device did not get where it was to go; where it was found, if it could be read.
    DeviceFailed(usize, Option<MigrationState>, Failure),
    /// A call to a device has not returned in its time; the failure names the device and the call. What was
    /// asked of it is still answered if it returns.
    DeviceHangs(usize, Failure),
    /// That call has returned.
    DeviceAnswers(usize),
    /// The destination reports what it waits for.
    PeerDoubts(Failure),
    /// A device has given all of its initial data.
    PreCopied(usize),
    /// No vCPU runs.
    Paused,
    /// A blob has been sent whole, and the destination has verified it.
    BlobSent(Blob),
    /// The VMM says that its save has ended: it will not take its VM back by itself any more.
    SaveFinished,
    /// The destination has loaded everything, and its devices are in STOP.
    Loaded,
    /// A record is on stable storage.
    Recorded(Record),
    /// A record could not be written; what was recorded before still is.
    RecordFailed(Record, Failure),
    /// The destination's answer to [`Effect::AskPeer`]: what it has journalled.
    PeerSays(Word),
    /// The same, as the operator relays it. It answers no question.
    Relayed(Word),
    /// The destination was asked what it has journalled, and did not answer.
    PeerSilent(Failure),
    /// STARTED has not come in the time in which it mostly does.
    StartOverdue(Failure),
    /// The VM runs at the destination.
    Started,
    /// What was left here is given back.
    Released,
    /// Every stream has ended and every data descriptor is closed; the VMM's save is aborted.
    StreamsClosed,
    /// The vCPUs run again.
    Resumed,
    /// Something failed that belongs to no device: a call to the VMM, a blob, the peer, a deadline, or a
    /// user's request.
    Failed(Failure),
    /// A call to the VMM that was in flight failed, so it cannot be known whether the vCPUs run.
    PauseFailed(Failure),
    /// The vCPUs could not be resumed.
    ResumeFailed(Failure),
    /// The VMM's process is gone, and the VM with it.
    VmmExited,
}

/// What is to be done. Each is answered by one event, or by a failure, unless it says otherwise.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Effect {
    /// Report the phase to the watchers. No answer.
    Report(Phase),
    /// Open the hand-over with the destination and a stream for every blob. [`Event::PeerReady`]
    Connect,
    /// [`Event::Recorded`], [`Event::RecordFailed`]
    Record(Record),
    /// The same, after a pause: it has just failed, and must succeed. [`Event::Recorded`],
    /// [`Event::RecordFailed`]
    RecordAgain(Record),
    /// Ask the destination what it has journalled, and say that this end is committed; after a pause, if it
    /// was asked before. [`Event::PeerSays`], [`Event::PeerSilent`]
    AskPeer,
    /// Report to the watchers what keeps the migration from its end. No answer.
    Doubt(Failure),
    /// [`Event::SaveStarted`]
    StartSave,
    /// Wait until a VMM that drives its devices is ready for the blackout. [`Event::Converged`]
    Converge,
    /// Read the state of a device that its VMM drives. [`Event::DeviceReached`], [`Event::DeviceFailed`]
    ReadState(usize),
    /// A device that is not where it was left is not asked, and has failed. [`Event::DeviceReached`],
    /// [`Event::DeviceFailed`]
    SetState(Move),
    /// Read and send initial data until none is left. [`Event::PreCopied`]
    PreCopy(usize),
    /// [`Event::Paused`], [`Event::PauseFailed`]
    Pause,
    /// Let the VMM give its final state, and send it. [`Event::BlobSent`] and [`Event::SaveFinished`]: a
    /// stream ends, too, when a VMM gives its save up.
    FinishSave,
    /// Read and send a device's final data. [`Event::BlobSent`]
    Capture(usize),
    /// No answer.
    SendCommit,
    /// No answer; the message may not arrive.
    SendAbort(String),
    /// Stop sending, close the data descriptors, abort the VMM's save. [`Event::StreamsClosed`]
    CloseStreams,
    /// Reset a device that only a reset can mend. [`Event::DeviceReached`], [`Event::DeviceFailed`]
    Reset(usize),
    /// [`Event::Resumed`], [`Event::ResumeFailed`]
    Resume,
    /// Give the devices back and end the VMM. [`Event::Released`]
    Release,
    /// The migration is over. No answer.
    Finish(End),
}

/// How it ended.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum End {
    /// The VM runs at the destination.
    Succeeded,
    /// The VM runs here, its devices RUNNING.
    RolledBack(Failure),
    /// Nothing here had been touched.
    Refused(Failure),
    /// The VM runs nowhere.
    Lost(Failure),
}
