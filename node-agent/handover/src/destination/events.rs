//! What the destination goes through, hears, asks for and ends in.

use crate::devices::Move;
use crate::state::MigrationState;
use crate::{Blob, Failure, Record, Word};

/// How far the destination has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Nothing has been done.
    New,
    /// RESERVED is being recorded.
    Recording,
    /// The twin is being started, paused.
    StartingTwin,
    /// Devices are on their way to RESUMING.
    Preparing,
    /// Waiting for the source.
    Reserved,
    /// The source is connected; blobs may arrive.
    Loading,
    /// All blobs are verified; the VMM puts RAM and machine state in place.
    Finishing,
    /// Devices are on their way from RESUMING to STOP: each driver says whether it takes its blob.
    Verifying,
    /// LOADED is being recorded.
    RecordingLoaded,
    /// LOADED has been sent. Only the source decides now.
    Loaded,
    /// The source has committed itself; whether there is a twin to start is being asked of the twin itself.
    Confirming,
    /// STARTING is being recorded.
    RecordingStarting,
    /// The devices' network identity is being taken over.
    Starting,
    /// Devices are on their way to RUNNING_P2P.
    WakingP2p,
    /// Devices are on their way to RUNNING.
    Waking,
    /// The vCPUs are being resumed.
    Resuming,
    /// RUNNING is being recorded.
    RecordingRunning,
    /// All that was reserved is being given back.
    Discarding,
    /// The end.
    Finished,
}

/// What has happened.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// Go.
    Start,
    /// The twin answers, and its devices have been borrowed.
    TwinReady,
    /// A device has been read back where it was to go.
    DeviceReached(usize, MigrationState),
    /// A device did not get where it was to go; where it was found, if it could be read.
    DeviceFailed(usize, Option<MigrationState>, Failure),
    /// A call to a device has not returned in its time; the failure names the device and the call. What was
    /// asked of it is still answered if it returns.
    DeviceHangs(usize, Failure),
    /// That call has returned.
    DeviceAnswers(usize),
    /// The source said Hello.
    PeerConnected,
    /// A blob has arrived whole, its length and digest are what the source announced, and all of it has been
    /// handed on.
    BlobVerified(Blob),
    /// The VMM has RAM and machine state in place.
    LoadFinished,
    /// A record is on stable storage.
    Recorded(Record),
    /// A record could not be written; what was recorded before still is.
    RecordFailed(Record, Failure),
    /// What the source has journalled: by its own question, or relayed.
    PeerSays(Word),
    /// The source has passed its point of no return.
    CommitReceived,
    /// The source keeps the VM: its own word, or the operator's who has it from the source.
    AbortReceived(Failure),
    /// The connection to the source is lost.
    PeerLost(Failure),
    /// The twin has answered: it is there to be started.
    TwinConfirmed,
    /// The devices carry the VM's network identity.
    IdentityActivated,
    /// The vCPUs run.
    Resumed,
    /// Something failed that belongs to no device: the twin, a call to it, a blob.
    Failed(Failure),
    /// All that was reserved is given back.
    Discarded,
}

/// What is to be done. Each is answered by one event, or by a failure, unless it says otherwise.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Effect {
    /// Report the phase to the watchers. No answer.
    Report(Phase),
    /// Prepare the network identity, start the twin paused, borrow its devices. [`Event::TwinReady`]
    StartTwin,
    /// A device that is not where it was left is not asked, and has failed. [`Event::DeviceReached`],
    /// [`Event::DeviceFailed`]
    SetState(Move),
    /// Lead a device that its VMM has loaded from RESUMING to STOP: its driver says whether it takes its
    /// state. [`Event::DeviceReached`], [`Event::DeviceFailed`]
    Check(usize),
    /// Answer the reservation: the devices are in RESUMING. No answer.
    ConfirmReserved,
    /// No answer.
    SendReady,
    /// [`Event::LoadFinished`]
    FinishLoad,
    /// [`Event::Recorded`], [`Event::RecordFailed`]
    Record(Record),
    /// The same, after a pause: it has just failed, and must succeed. [`Event::Recorded`],
    /// [`Event::RecordFailed`]
    RecordAgain(Record),
    /// No answer; the message may not arrive.
    SendLoaded,
    /// Ask the twin anything at all. [`Event::TwinConfirmed`]
    ConfirmTwin,
    /// No answer; the message may not arrive.
    SendStarting,
    /// [`Event::IdentityActivated`]
    ActivateIdentity,
    /// [`Event::Resumed`]
    Resume,
    /// No answer; the message may not arrive.
    SendStarted,
    /// No answer; the message may not arrive.
    SendFailed(Failure),
    /// Report to the source, and to whoever asks, what this end waits for. No answer.
    Doubt(Failure),
    /// Stop receiving, reset the devices that hold foreign data, end the twin, give everything back.
    /// [`Event::Discarded`]
    Discard,
    /// It is over here. No answer.
    Finish(End),
}

/// How it ended.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum End {
    /// The VM runs here.
    Running,
    /// Given back, before anything had started.
    Discarded(Failure),
    /// The VM is here, and could not be started. The source's copy is dead.
    Stuck(Failure),
}
