//! Effects by how they can fail.

use slackwater_handover::devices::Move;
use slackwater_handover::{destination, source};

use crate::effects::How;

/// Which faults may still happen.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Faults {
    pub device: bool,
    pub write: bool,
    pub call: bool,
}

/// An effect that takes time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A write to the journal.
    Record,
    /// The end of the attempt, which the journal keeps, too.
    Finish,
    /// A state change or a reset of a device.
    DeviceStep,
    /// A blob is read and sent. A device fault damages it.
    Sending,
    /// The twin is started.
    StartTwin,
    /// A call to a VMM, a read, a look at a device, or the connection.
    Call,
    /// It cannot fail.
    Safe,
}

impl Kind {
    /// `None`: it is answered by a message.
    pub(crate) fn of_source(effect: &source::Effect) -> Option<Self> {
        use source::Effect;
        Some(match effect {
            Effect::AskPeer => return None,
            Effect::Record(_) | Effect::RecordAgain(_) => Self::Record,
            Effect::Finish(_) => Self::Finish,
            Effect::SetState(..) | Effect::Reset(_) => Self::DeviceStep,
            Effect::FinishSave | Effect::Capture(_) => Self::Sending,
            Effect::Connect
            | Effect::StartSave
            | Effect::Converge
            | Effect::ReadState(_)
            | Effect::PreCopy(_)
            | Effect::Pause
            | Effect::Resume => Self::Call,
            _ => Self::Safe,
        })
    }

    pub(crate) fn of_destination(effect: &destination::Effect) -> Option<Self> {
        use destination::Effect;
        Some(match effect {
            Effect::Record(_) | Effect::RecordAgain(_) => Self::Record,
            Effect::Finish(_) => Self::Finish,
            Effect::StartTwin => Self::StartTwin,
            Effect::SetState(..) => Self::DeviceStep,
            Effect::Check(_)
            | Effect::FinishLoad
            | Effect::ConfirmTwin
            | Effect::ActivateIdentity
            | Effect::Resume => Self::Call,
            _ => Self::Safe,
        })
    }

    /// The device that an effect is a call to.
    pub(crate) fn device_of_source(effect: &source::Effect) -> Option<usize> {
        use source::Effect;
        match effect {
            Effect::SetState(Move { index, .. }) | Effect::ReadState(index) | Effect::Reset(index) => {
                Some(*index)
            }
            _ => None,
        }
    }

    /// The same at the destination.
    pub(crate) fn device_of_destination(effect: &destination::Effect) -> Option<usize> {
        use destination::Effect;
        match effect {
            Effect::SetState(Move { index, .. }) | Effect::Check(index) => Some(*index),
            _ => None,
        }
    }

    /// How it can go.
    pub(crate) fn ways(self, may: Faults) -> Vec<How> {
        let mut ways = match self {
            Self::Record if may.write => [false, true].map(|stands| How::WriteFails { stands }).to_vec(),
            // A restart makes no difference between an end that stands although the write failed, and one
            // that was written.
            Self::Finish if may.write => vec![How::WriteFails { stands: false }],
            Self::DeviceStep if may.device => [None, Some(false), Some(true)].map(How::DeviceFails).to_vec(),
            Self::Sending | Self::StartTwin if may.device => vec![How::DeviceFails(None)],
            _ => Vec::new(),
        };
        if matches!(self, Self::Call | Self::Sending) && may.call {
            ways.push(How::CallFails);
        }
        ways.push(How::Well);
        ways
    }
}
