//! Which of the streams of a VMM's own state one is. A device's blob has one stream only.

use slackwater_proto::tonic::Status;
use slackwater_proto::transfer::VmmState;

/// The most streams besides the main one.
pub const MAX_CHANNELS: u8 = 16;

/// One of several streams, or the only one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Channel {
    number: u8,
    more: u8,
}

impl Channel {
    /// All that there are with so many besides the main one; that comes first.
    pub fn all(more: u8) -> impl Iterator<Item = Self> {
        (0..=more).map(move |number| Self { number, more })
    }

    /// 0 for the main one.
    pub fn number(self) -> usize {
        self.number.into()
    }

    /// How many there are.
    pub fn count(self) -> usize {
        usize::from(self.more) + 1
    }

    /// Whether the end of this one is the end of all.
    pub fn is_main(self) -> bool {
        self.number == 0
    }

    pub(super) fn told(self) -> VmmState {
        VmmState { channel: self.number.into(), more_channels: self.more.into() }
    }

    /// Reads what a source says.
    ///
    /// # Errors
    /// INVALID_ARGUMENT, with the field and what would be right.
    pub fn understand(state: VmmState) -> Result<Self, Status> {
        let VmmState { channel, more_channels } = state;
        let more =
            u8::try_from(more_channels).ok().filter(|more| *more <= MAX_CHANNELS).ok_or_else(|| {
                Status::invalid_argument(format!(
                    "header.vmm.more_channels is {more_channels}; it must be 0 to {MAX_CHANNELS}"
                ))
            })?;
        let number = u8::try_from(channel).ok().filter(|number| *number <= more).ok_or_else(|| {
            Status::invalid_argument(format!(
                "header.vmm.channel is {channel}; with more_channels {more} it must be 0 to {more}"
            ))
        })?;
        Ok(Self { number, more })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_one_end_tells_the_other_understands() {
        for channel in Channel::all(3) {
            assert_eq!(Channel::understand(channel.told()).unwrap(), channel);
            assert_eq!(channel.count(), 4);
        }
        assert_eq!(Channel::understand(VmmState::default()).unwrap(), Channel::default());
        assert_eq!(Channel::all(2).filter(|channel| channel.is_main()).count(), 1);
    }

    #[test]
    fn a_channel_that_cannot_be_is_refused_with_what_would_be_right() {
        let said = |channel, more_channels| {
            Channel::understand(VmmState { channel, more_channels }).unwrap_err().message().to_owned()
        };
        assert_eq!(said(0, 17), "header.vmm.more_channels is 17; it must be 0 to 16");
        assert_eq!(said(3, 2), "header.vmm.channel is 3; with more_channels 2 it must be 0 to 2");
        assert_eq!(said(256, 0), "header.vmm.channel is 256; with more_channels 0 it must be 0 to 0");
    }
}
